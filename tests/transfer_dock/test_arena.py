"""Shared memory between real processes: what somebody looks at is never overwritten, and no death keeps it busy."""

from __future__ import annotations

import ctypes
import errno
import gc
import multiprocessing
import os
import pickle
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from transfer_dock import arena as arena_module
from transfer_dock.arena import Arena, arena_folder, sweep
from transfer_dock.errors import DockError, DockTimeout, PayloadLost

SIZE = 1 << 20
FOREVER = float("inf")
fork = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "transfer-dock-test.arena"


@pytest.fixture
def arena(path: Path) -> Iterator[Arena]:
    made = Arena.create(path, SIZE)
    yield made
    made.close()


@contextmanager
def process_that(function: Callable[..., None], *args: Any) -> Iterator[Any]:
    """A forked process in which `function(pipe, *args)` has said that it is where it should be; killed at the end."""
    here, there = fork.Pipe()
    process = fork.Process(target=function, args=(there, *args), daemon=True)
    process.start()
    there.close()
    try:
        assert here.poll(60), "it never came to that"
        assert here.recv() == "there"
        yield process
    finally:
        process.kill()
        process.join()


def stay(pipe: Connection) -> None:
    pipe.send("there")
    pipe.recv()


def fill(arena: Arena, value: int, extent: int = 0, size: int = 4096) -> bool:
    return arena.write(extent, size, [(extent, np.full(size, value, np.uint8))], FOREVER)


def test_arrays_of_any_shape_come_back_at_their_places_in_another_process(arena: Arena, path: Path) -> None:
    grid = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    pieces = [(4096, grid), (4352, grid.T), (4608, np.array(7, np.int64)), (4672, np.zeros((0, 2))), (4736, grid > 3)]
    assert arena.write(4096, 4096, pieces, FOREVER)
    assert arena.bytes_written == 96 + 96 + 8 + 24

    def read(pipe: Connection) -> None:
        pin = Arena(path).pin(4096, 4096)
        for offset, array in pieces:
            view = pin.view(offset, array.nbytes).view(array.dtype).reshape(array.shape)
            np.testing.assert_array_equal(view, array)
        pipe.send("there")

    with process_that(read):
        pass
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_a_view_in_another_process_makes_the_extent_busy_until_that_process_is_killed(arena: Arena, path: Path) -> None:
    assert fill(arena, 1)

    def hold(pipe: Connection) -> None:
        view = Arena(path).pin(0, 4096).view(64, 8)
        stay(pipe)
        assert view is not None

    with process_that(hold) as process:
        assert not fill(arena, 2)
        assert fill(arena, 2, 4096), "the next extent is nobody's"
        assert arena.pin(0, 4096).view(0, 1)[0] == 1
        process.kill()
        process.join()
        assert fill(arena, 3)
    assert arena.bytes_written == 3 * 4096


def test_a_writer_in_another_process_keeps_all_others_out_until_it_is_killed(arena: Arena, path: Path) -> None:
    def write_forever(pipe: Connection) -> None:
        mine = Arena(path)
        mine._copy = lambda *_: stay(pipe)  # type: ignore[assignment, method-assign, func-returns-value]
        fill(mine, 1)

    with process_that(write_forever) as process:
        assert not fill(arena, 2)
        with pytest.raises(PayloadLost, match=rf"bytes 64 to 128 of {path} are being overwritten"):
            arena.pin(64, 64)
        process.kill()
        process.join()
        assert arena.pin(64, 64).view(64, 1).tolist() == [0]
        assert fill(arena, 2)


def test_threads_do_not_write_one_extent_at_once(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[bool] = []
    copy = arena._copy

    def copy_slowly(*args: Any) -> int:
        if not inside:
            inside.append(False)
            thread = threading.Thread(target=lambda: inside.extend([fill(arena, 2, 2048), fill(arena, 3, 4096)]))
            thread.start()
            thread.join()
        return copy(*args)

    monkeypatch.setattr(arena, "_copy", copy_slowly)
    assert fill(arena, 1)
    assert inside == [False, False, True]


DERIVED: dict[str, Callable[[np.ndarray], Any]] = {
    "the view": lambda view: view,
    "a slice of a slice": lambda view: view[8:][8:][::2],
    "another dtype and shape": lambda view: view.view(np.float32).reshape(4, -1).T[1:],
    "a tensor of a slice": lambda view: torch.from_numpy(view[64:].view(np.int32))[4:].view(2, -1),
    "a memoryview": lambda view: memoryview(view)[4:],
}


@pytest.mark.parametrize("kind", DERIVED)
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_whatever_is_derived_from_a_view_holds_the_extent(arena: Arena, kind: str) -> None:
    assert fill(arena, 1)
    pin = arena.pin(0, 4096)
    derived = DERIVED[kind](pin.view(0, 176))
    del pin
    assert not fill(arena, 2)
    del derived
    assert fill(arena, 2)


def test_a_pin_without_views_and_several_pins_of_one_extent_hold_it_until_the_last_is_gone(arena: Arena) -> None:
    first, second = arena.pin(0, 4096), arena.pin(0, 4096)
    view = second.view(0, 8)
    del first
    assert not fill(arena, 1)
    del second
    assert not fill(arena, 1)
    del view
    assert fill(arena, 1)


def test_a_pin_of_an_extent_that_was_since_cut_otherwise_unlocks_nobody_else(arena: Arena) -> None:
    old, new = arena.pin(0, 4096), arena.pin(2048, 4096)
    files = len(os.listdir("/proc/self/fd"))
    del old
    assert fill(arena, 1, 0, 2048)
    assert not fill(arena, 1, 2048, 64), "the new extent lost what the old one shared with it"
    old = arena.pin(0, 4096)
    del new
    assert not fill(arena, 1, 2048, 64)
    assert fill(arena, 1, 4096, 64)
    del old
    assert fill(arena, 1, 0, 8192)
    assert len(os.listdir("/proc/self/fd")) == files - 1


def test_views_cannot_be_written_nor_made_writable(arena: Arena) -> None:
    view = arena.pin(0, 64).view(0, 64)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    for array in (view, view[4:]):
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            array.flags.writeable = True


def test_a_write_past_its_reservation_changes_nothing_and_lets_go(arena: Arena) -> None:
    assert fill(arena, 1)
    with pytest.raises(DockTimeout, match="was not written within its reservation"):
        arena.write(0, 64, [(0, np.full(64, 2, np.uint8))], time.monotonic() - 1e-3)
    assert arena.pin(0, 64).view(0, 64).tolist() == [1] * 64
    assert arena.write(0, 64, [(0, np.full(64, 2, np.uint8))], time.monotonic() + 60)


def test_ranges_outside_and_arrays_of_objects_are_refused(arena: Arena) -> None:
    array = np.zeros(64, np.uint8)
    for extent, size, offset in ((0, 64, 1), (64, 64, 0), (SIZE - 32, 64, SIZE - 32), (-64, 64, -64), (0, 0, 0)):
        with pytest.raises(ValueError, match=r"a piece from|no bytes"):
            arena.write(extent, size, [(offset, array)], FOREVER)
    with pytest.raises(TypeError, match="object has no bytes"):
        arena.write(0, 64, [(0, np.array([None]))], FOREVER)
    for offset, nbytes in ((0, 64), (64, 65), (120, -1)):
        with pytest.raises(ValueError, match="not all in Pin"):
            arena.pin(64, 64).view(offset, nbytes)
    assert arena.pin(64, 64).view(128, 0).shape == (0,)


def test_readers_see_whole_writes_while_threads_and_the_garbage_collector_let_go(arena: Arena) -> None:
    """Two readers keep views in cycles, so that they are let go of in the middle of anything; two writers go on."""
    extents, size, torn, written = 4, 8192, [], [0, 0]
    readers_done = threading.Event()

    def reader(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(400):
            extent = choose.randrange(extents) * size
            try:
                view = arena.pin(extent, size).view(extent, size)
            except PayloadLost:
                continue
            before = int(view[0])
            cycle: list[Any] = [view[1:]]
            cycle.append(cycle)
            torn.extend([extent] * bool((view != before).any()))

    def writer(number: int) -> None:
        choose, value = random.Random(number + 10), 0
        while not readers_done.is_set():
            value = (value + 1) % 256
            extent = choose.randrange(extents) * size
            written[number] += fill(arena, value, extent, size)
            gc.collect(0)

    writers = [threading.Thread(target=writer, args=(number,)) for number in range(2)]
    readers = [threading.Thread(target=reader, args=(seed,)) for seed in range(2)]
    for thread in writers + readers:
        thread.start()
    for thread in readers:
        thread.join()
    readers_done.set()
    for thread in writers:
        thread.join()
    gc.collect()
    assert not torn
    assert min(written) > 0
    assert fill(arena, 0, 0, SIZE), "every pin was let go of"


def test_views_outlive_the_closed_arena_with_their_lock(arena: Arena, path: Path) -> None:
    assert fill(arena, 1)
    other, files = Arena(path), len(os.listdir("/proc/self/fd"))
    pin = other.pin(0, 4096)
    view = pin.view(0, 4096)
    other.close()
    other.close()
    for use in (lambda: other.pin(0, 64), lambda: fill(other, 2), partial(pin.view, 0, 1)):
        with pytest.raises(DockError, match="was closed in this process"):
            use()
    del pin, use
    assert not fill(arena, 2)
    assert view.sum() == 4096
    del view
    assert fill(arena, 2)
    assert len(os.listdir("/proc/self/fd")) == files - 3, "the readers', the writer's and the mapping's"


def test_what_a_forked_child_lets_go_of_stays_locked_for_its_parent(arena: Arena, path: Path) -> None:
    views = [arena.pin(0, 4096).view(0, 8)]

    def let_go(pipe: Connection) -> None:
        views.clear()
        assert not fill(Arena(path), 1)
        with pytest.raises(DockError, match="before a fork"):
            fill(arena, 1)
        arena.close()
        pipe.send("there")
        pipe.recv()

    with process_that(let_go):
        assert not fill(arena, 1)
    views.clear()
    assert fill(arena, 1)


def test_create_and_open_say_what_is_there(arena: Arena, path: Path) -> None:
    with pytest.raises(FileExistsError):
        Arena.create(path, SIZE)
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(PayloadLost, match=r"no arena .*nothing"):
        Arena(path.with_name("nothing"))
    with pytest.raises(ValueError, match="0 bytes"):
        Arena.create(path.with_name("empty"), 0)
    with pytest.raises(TypeError, match="send the path"):
        pickle.dumps(arena)


@pytest.fixture
def small_folder(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of one MiB, which only root can mount."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]).returncode:
        pytest.skip("nobody may mount a file system here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("kernel", ["populates", "is older than Linux 5.14"])
def test_a_full_file_system_is_an_error_with_advice_and_no_death(
    small_folder: Path, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel != "populates":

        class OldKernel:
            def madvise(self, *_: int) -> int:
                ctypes.set_errno(errno.EINVAL)
                return -1

        monkeypatch.setattr(arena_module, "_libc", OldKernel())
    arena = Arena.create(small_folder / "full.arena", 4 * SIZE)
    with pytest.raises(DockError, match=r"\[ENOSPC\] No space left on device: bytes 0 to 2097152 .*remount,size="):
        fill(arena, 1, 0, 2 * SIZE)
    with pytest.raises(DockError, match="ENOSPC"):
        arena.prefault(SIZE, 2 * SIZE)
    assert arena.bytes_written == 0
    assert fill(arena, 1, 0, SIZE // 2), "the lock was given back, and what there is can be written"
    assert arena.pin(0, SIZE // 2).view(0, SIZE // 2).sum() == SIZE // 2
    arena.close()


def test_prefault_changes_nothing_and_takes_the_memory(arena: Arena, path: Path) -> None:
    assert fill(arena, 5)
    arena.prefault(0, SIZE // 2)
    assert path.stat().st_blocks * 512 >= SIZE // 2
    assert arena.pin(0, 8192).view(0, 8192).sum() == 5 * 4096


def test_the_folder_is_shared_memory_or_there_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(arena_module, "SHARED_MEMORY", str(tmp_path))
    assert arena_folder(1) == str(tmp_path)
    for missing in (str(tmp_path), str(tmp_path / "missing")):
        monkeypatch.setattr(arena_module, "SHARED_MEMORY", missing)
        with pytest.warns(RuntimeWarning, match=r"bytes free, the dock wants \d+: its payload goes to"):
            assert arena_folder(1 << 62) != missing


def test_sweep_removes_what_a_killed_process_left_and_nothing_that_lives(arena: Arena, path: Path) -> None:
    dead, living_journal = path.with_name("transfer-dock-dead.arena"), path.with_suffix(".journal")
    rest = [dead.with_suffix(".journal"), dead.with_suffix(".journal.new"), dead.with_name(f"{dead.name}.x1.new")]
    foreign = [path.with_name("other.arena"), path.with_name("transfer-dock-link.arena")]
    for file in (living_journal, *rest, foreign[0]):
        file.touch()
    foreign[1].symlink_to(foreign[0])

    def die_open(pipe: Connection) -> None:
        made = Arena.create(dead, SIZE)
        stay(pipe)
        assert made is not None

    with process_that(die_open) as process:
        assert sweep(path.parent) == [rest[2]], "the leftover of a create that was killed"
        assert dead.exists()
        process.kill()
        process.join()
        assert set(sweep(path.parent)) == {dead, *rest[:2]}
    assert set(path.parent.iterdir()) == {path, living_journal, *foreign}
    view = arena.pin(0, 64).view(0, 64)
    arena.close()
    assert sweep(path.parent) == [], "a view keeps it"
    del view
    assert set(sweep(path.parent)) == {path, living_journal}


def test_an_arena_that_is_being_created_is_never_swept(tmp_path: Path) -> None:
    done, swept = threading.Event(), []

    def sweep_on() -> None:
        while not done.is_set():
            swept.extend(found for found in sweep(tmp_path) if found.suffix == ".arena")

    thread = threading.Thread(target=sweep_on)
    thread.start()
    made = [Arena.create(tmp_path / f"transfer-dock-{number}.arena", 4096) for number in range(60)]
    done.set()
    thread.join()
    assert not swept
    assert all(arena.path.exists() for arena in made)
    for arena in made:
        arena.close()
    assert len(sweep(tmp_path)) == 60
