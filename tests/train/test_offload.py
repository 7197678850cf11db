"""State leaves memory and comes back bit for bit; the engine's own cycle is in test_engine_state.py."""

import ctypes
import itertools
import mmap
import os
import random
import threading

import psutil
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qerl_rl.platform import detect
from qerl_rl.platform.state_store import PinnedStore, SpillFile, StateStore
from qerl_rl.train import offload
from qerl_rl.train.offload import Offloader

MIB = 1 << 20


def resident() -> int:
    return psutil.Process().memory_info().rss


@pytest.fixture
def offloader(tmp_path) -> Offloader:
    return Offloader(SpillFile(str(tmp_path)))


@pytest.fixture(params=["file", "pinned"])
def any_offloader(request, tmp_path) -> Offloader:
    """Over each store; the chunks of the pinned one are smaller than what it is given."""
    if request.param == "pinned":
        return Offloader(PinnedStore(detect("cpu"), chunk_bytes=512))
    return Offloader(SpillFile(str(tmp_path)))


def test_memory_really_falls_and_every_bit_returns(offloader):
    generator = torch.Generator().manual_seed(1)
    # One block far above glibc's mmap threshold, and many small ones that live on its heap.
    large = torch.randint(-128, 128, (96 * MIB,), dtype=torch.int8, generator=generator)
    small = [torch.randn(2000, generator=generator) for _ in range(4000)]
    state = torch.randn(16 * MIB, generator=generator)
    copies = [large.clone(), state.clone(), torch.stack(small)]
    offloader.track("parameters", [large, *small], frozen=True)
    offloader.track("optimizer", [state])
    offloader.offload([])  # What earlier tests left free on the heap goes first, so that the rest is ours.
    before = resident()
    freed = offloader.offload(["parameters", "optimizer"])
    assert freed == {"parameters": 96 * MIB + 4000 * 8000, "gradients": 0, "optimizer": 64 * MIB}
    assert before - resident() >= 0.9 * sum(freed.values())
    assert offloader.held_bytes() == {"parameters": 0, "gradients": 0, "optimizer": 0}
    assert offloader.onload() == freed
    offloader.finish()
    assert before - resident() <= 8 * MIB
    assert all(torch.equal(a, b) for a, b in zip(copies, [large, state, torch.stack(small)], strict=True))


def test_views_of_one_buffer_leave_once_and_stay_views(any_offloader):
    buffer = torch.arange(1000, dtype=torch.float32)
    parameters = [torch.nn.Parameter(buffer[:400].view(20, 20)), torch.nn.Parameter(buffer[400:])]
    any_offloader.track("parameters", [*parameters, buffer])
    for _ in range(2):
        assert any_offloader.offload(["parameters"])["parameters"] == 4000
        assert any_offloader.onload()["parameters"] == 4000
        with torch.no_grad():
            parameters[1].add_(1)
    assert buffer[399] == 399
    assert buffer[400] == 402
    assert parameters[0].data_ptr() == buffer.data_ptr()


def test_gradients_are_not_written_and_return_as_zeros(tmp_path, offloader):
    gradients = torch.ones(5 * MIB)
    offloader.track("gradients", [gradients])
    written = psutil.Process().io_counters().write_chars
    assert offloader.offload(["gradients"])["gradients"] == 20 * MIB
    assert psutil.Process().io_counters().write_chars - written < MIB
    offloader.onload()
    assert not gradients.any()
    assert gradients.shape == (5 * MIB,)


def test_frozen_state_is_written_once_and_changing_state_every_time(offloader):
    frozen, changing = torch.randn(2 * MIB), torch.randn(MIB)
    offloader.track("parameters", [frozen], frozen=True)
    offloader.track("parameters", [changing])
    written = []
    for _ in range(3):
        start = psutil.Process().io_counters().write_chars
        offloader.offload(["parameters"])
        offloader.onload()
        written.append(psutil.Process().io_counters().write_chars - start)
        changing += 1
    assert written[0] == pytest.approx(12 * MIB, abs=MIB)
    assert written[1:] == pytest.approx([4 * MIB, 4 * MIB], abs=MIB)


def test_only_the_named_kinds_leave_and_a_second_offload_frees_nothing_more(any_offloader):
    tensors = {kind: torch.ones(10) for kind in ("parameters", "gradients", "optimizer")}
    for kind, tensor in tensors.items():
        any_offloader.track(kind, [tensor])
    assert any_offloader.offload(["optimizer"]) == {"parameters": 0, "gradients": 0, "optimizer": 40}
    assert any_offloader.offload(["optimizer"])["optimizer"] == 0
    assert any_offloader.held_bytes() == {"parameters": 40, "gradients": 40, "optimizer": 0}
    assert any_offloader.is_away
    any_offloader.onload()
    assert not any_offloader.is_away


def test_state_that_appears_later_is_tracked_then(any_offloader):
    first, later = torch.full((10,), 1.0), torch.full((20,), 2.0)
    any_offloader.track("optimizer", [first])
    any_offloader.offload(["optimizer"])
    any_offloader.onload()
    any_offloader.track("optimizer", [first, later, torch.tensor(3.0)])
    assert any_offloader.offload(["optimizer"])["optimizer"] == 120
    any_offloader.onload()
    any_offloader.finish()
    assert first.eq(1).all()
    assert later.eq(2).all()


def test_a_mapped_tensor_is_refused(tmp_path, offloader):
    (tmp_path / "weights").write_bytes(bytes(64))
    mapped = torch.from_file(str(tmp_path / "weights"), shared=True, size=16)
    with pytest.raises(ValueError, match="can't leave memory"):
        offloader.track("parameters", [mapped])


def test_the_spill_file_has_no_name(tmp_path):
    store = SpillFile(str(tmp_path))
    store.write(0, torch.zeros(10, dtype=torch.uint8))
    assert os.listdir(tmp_path) == []


def test_pinned_buffers_are_taken_once_and_keep_their_addresses():
    store = PinnedStore(detect("cpu"), chunk_bytes=1 << 12)
    offloader, generator = Offloader(store), torch.Generator().manual_seed(2)
    parameters = [torch.randn(size, generator=generator) for size in (900, 1, 1500, 300)]
    offloader.track("parameters", parameters)
    seen = set()
    for _ in range(10):
        expected = [parameter.clone() for parameter in parameters]
        offloader.offload(["parameters"])
        offloader.onload()
        assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))
        seen.add(tuple(part.data_ptr() for parts in store._places.values() for part in parts))
        for parameter in parameters:
            parameter.add_(1)
    assert len(seen) == 1
    # 2701 numbers of 4 bytes lie without gaps in three chunks of 4096 bytes.
    assert store.nbytes == 3 * 4096
    places = sorted((part.data_ptr(), part.numel()) for parts in store._places.values() for part in parts)
    assert all(a + length <= b for (a, length), (b, _) in itertools.pairwise(places))


class GatedStore(StateStore):
    """Its copies wait at a gate."""

    def __init__(self, store: SpillFile) -> None:
        self.store, self.gate, self.begun = store, threading.Event(), []
        store._thread.submit(self.gate.wait, 60)

    def begin_write(self, slots):
        self.begun.append(("write", *slots))
        return self.store.begin_write(slots)

    def begin_read(self, slots):
        self.begun.append(("read", *slots))
        return self.store.begin_read(slots)

    def close(self) -> None:
        self.gate.clear()
        self.store._thread.submit(self.gate.wait, 60)


def test_copies_go_on_beside_the_caller_and_are_all_begun_before_the_first_is_done(tmp_path):
    store = GatedStore(SpillFile(str(tmp_path)))
    offloader = Offloader(store)
    frozen, trained, moments = (torch.full((size,), 2.0) for size in (10, 20, 30))
    offloader.track("parameters", [frozen], frozen=True)
    offloader.track("parameters", [trained])
    offloader.track("optimizer", [moments])
    left = offloader.begin_offload(["optimizer", "parameters"], only_frozen=["parameters"])
    assert left == {"parameters": 40, "gradients": 0, "optimizer": 120}
    assert store.begun == [("write", 2, 0)]
    offloader.reclaim()
    # Not written yet, so it is all still there.
    assert offloader.held_bytes() == {"parameters": 120, "gradients": 0, "optimizer": 120}
    assert moments.eq(2).all()
    store.gate.set()
    assert offloader.offload(["optimizer", "parameters"]) == {"parameters": 80, "gradients": 0, "optimizer": 0}
    assert offloader.held_bytes() == {"parameters": 0, "gradients": 0, "optimizer": 0}
    offloader.onload()
    store.close()
    offloader.offload([])
    offloader.begin_offload(["optimizer"])
    assert offloader.is_away
    store.gate.set()
    offloader.finish()
    store.begun.clear()
    assert offloader.onload() == {"parameters": 0, "gradients": 0, "optimizer": 120}
    offloader.finish()
    assert [frozen.sum(), trained.sum(), moments.sum()] == [20, 40, 60]


def test_parameters_are_back_before_the_optimizer_s_state(tmp_path):
    store = GatedStore(SpillFile(str(tmp_path)))
    store.gate.set()
    offloader = Offloader(store)
    moments, parameters = torch.full((30,), 3.0), torch.full((20,), 2.0)
    offloader.track("optimizer", [moments])
    offloader.track("parameters", [parameters])
    offloader.offload(["parameters", "optimizer"])
    store.begun.clear()
    offloader.onload()
    assert store.begun == [("read", 1), ("read", 0)]
    assert parameters.eq(2).all()
    offloader.finish()
    assert moments.eq(3).all()


def test_a_copy_that_fails_is_not_taken_for_one_that_worked(tmp_path):
    store = SpillFile(str(tmp_path))
    offloader, state = Offloader(store), torch.full((1000,), 5.0)
    offloader.track("optimizer", [state])
    store._file.close()
    with pytest.raises(ValueError, match="closed file"):
        offloader.offload(["optimizer"])
    assert state.eq(5).all()


def pages_in_memory(tensor: torch.Tensor) -> dict[int, bool]:
    """Of each page that lies wholly in the storage of `tensor`, by the offset of its first byte: is it in memory?"""
    base, count = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
    begin = -(-base // mmap.PAGESIZE) * mmap.PAGESIZE
    # Small ones lie within a page.
    pages = max(base + count - begin, 0) // mmap.PAGESIZE
    found, libc = (ctypes.c_ubyte * pages)(), ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(begin), ctypes.c_size_t(pages * mmap.PAGESIZE), found) == 0
    return {begin - base + i * mmap.PAGESIZE: bool(found[i] & 1) for i in range(pages)}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    # Several on a page and some over many; pages that gaps lie on stay.
    sizes=st.lists(st.sampled_from((1, 130, 700, 1500, 3000, 20_000)), min_size=1, max_size=24),
    gaps=st.lists(st.sampled_from((0, 0, 0, 0, 0, 2500)), min_size=25, max_size=25),
    seed=st.integers(0, 1000),
)
@example(sizes=[700] * 60, gaps=[0] * 61, seed=0)
@example(sizes=[700] * 60, gaps=[0] * 61, seed=1)
def test_tensors_of_one_buffer_leave_page_by_page_and_return_whatever_ended_the_swap(
    tmp_path_factory, sizes, gaps, seed
):
    offloader = Offloader(SpillFile(str(tmp_path_factory.mktemp("spill"))))
    count = sum(sizes) + sum(gaps[: len(sizes) + 1])
    buffer = torch.randint(-128, 128, (count,), dtype=torch.int8, generator=torch.Generator().manual_seed(count))
    tensors, begin = [], gaps[0]
    for size, gap in zip(sizes, gaps[1:], strict=False):
        tensors.append(buffer[begin : begin + size])
        begin += size + gap
    offloader.track("parameters", [buffer])
    offloader.divide(tensors)
    draw = random.Random(seed)
    for _ in range(2):
        expected, left, total = buffer.clone(), torch.zeros(count, dtype=torch.bool), 0
        order = draw.sample(tensors, draw.randint(0, len(tensors)))
        for tensor in order:
            assert offloader.leave_early(tensor) == tensor.nbytes
            assert offloader.leave_early(tensor) == 0
            offloader.finish()
            total += tensor.nbytes
            assert offloader.held_bytes()["parameters"] == count - total
            if total == count:
                break
            left[tensor.storage_offset() :][: len(tensor)] = True
            assert torch.equal(buffer[~left], expected[~left])
            for page, is_there in pages_in_memory(buffer).items():
                assert is_there != left[page : page + mmap.PAGESIZE].all()
        assert offloader.is_away == bool(order) != offloader.holds(tensors)
        if draw.random() < 0.5:
            assert offloader.offload(["parameters"])["parameters"] == count
            assert buffer.untyped_storage().nbytes() == 0
            total = count
        assert offloader.onload()["parameters"] == total
        assert torch.equal(buffer, expected)
        assert not offloader.is_away
        buffer += 1


def test_memory_falls_while_one_tensor_after_the_other_leaves(offloader):
    buffer = torch.ones(96 * MIB, dtype=torch.int8)
    expected, quarters = buffer.clone(), buffer.chunk(4)
    offloader.track("parameters", [buffer])
    offloader.divide(quarters)
    before = resident()
    for number, tensor in enumerate(quarters, 1):
        leave_and_wait(offloader, tensor)
        assert before - resident() >= 0.95 * number * 24 * MIB
    offloader.onload()
    assert torch.equal(buffer, expected)


class Ticket:
    """A copy that is done once somebody has waited for it."""

    def __init__(self, waiting: set, size: int) -> None:
        self.waiting, self.size = waiting, size
        waiting.add(self)

    def done(self) -> bool:
        return self not in self.waiting

    def result(self) -> None:
        self.waiting.discard(self)


class LazyStore(StateStore):
    """Writes nothing before somebody waits."""

    def __init__(self) -> None:
        self.waiting: set[Ticket] = set()

    def begin_write(self, slots):
        return Ticket(self.waiting, sum(map(len, slots.values())))


def test_a_slow_store_holds_up_what_leaves_early(monkeypatch):
    monkeypatch.setattr(offload, "EARLY_BYTES", 3000)
    store, buffer, moments = LazyStore(), torch.zeros(20_000, dtype=torch.int8), torch.zeros(7000, dtype=torch.int8)
    offloader, most = Offloader(store), 0
    offloader.track("parameters", [buffer])
    offloader.track("optimizer", [moments])
    offloader.divide(buffer.split(1000))
    offloader.begin_offload(["optimizer"])
    for number, tensor in enumerate(buffer.split(1000)):
        offloader.leave_early(tensor)
        waiting = sum(ticket.size for ticket in store.waiting)
        # What was begun before, and may take as long as it likes, is waited for with the first that is too much.
        assert waiting == 7000 + (number + 1) * 1000 if number < 4 else waiting == 4000
        most = max(most, waiting)
    assert most == 11_000


@pytest.mark.parametrize("is_host", [True, False], ids=["host", "card"])
def test_on_a_card_only_what_has_a_storage_of_its_own_leaves_early(monkeypatch, any_offloader, is_host):
    monkeypatch.setattr(offload, "is_host_memory", lambda storage: is_host)
    buffer, own = torch.arange(3000.0), torch.arange(50.0)
    any_offloader.track("parameters", [buffer, own])
    any_offloader.divide(buffer.split(1000))
    assert any_offloader.leave_early(own) == 200
    assert any_offloader.leave_early(buffer[1000:2000]) == (4000 if is_host else 0)
    assert any_offloader.leave_early(buffer[1000:1999]) == any_offloader.leave_early(torch.ones(3)) == 0
    any_offloader.finish()
    assert own.untyped_storage().nbytes() == 0
    assert any_offloader.held_bytes()["parameters"] == (8000 if is_host else 12_000)
    assert not any_offloader.holds([own])
    assert any_offloader.holds([buffer]) != is_host
    assert any_offloader.offload(["parameters"])["parameters"] == 12_200
    assert any_offloader.onload()["parameters"] == 12_200
    assert torch.equal(buffer, torch.arange(3000.0))
    assert torch.equal(own, torch.arange(50.0))


def leave_and_wait(offloader: Offloader, tensor: torch.Tensor) -> None:
    offloader.leave_early(tensor)
    offloader.finish()


def test_what_could_not_be_written_does_not_leave_early(tmp_path):
    store = SpillFile(str(tmp_path))
    offloader, buffer = Offloader(store), torch.full((100_000,), 5.0)
    offloader.track("parameters", [buffer])
    offloader.divide(buffer.chunk(2))
    store._file.close()
    with pytest.raises(ValueError, match="closed file"):
        leave_and_wait(offloader, buffer[:50_000])
    assert buffer.eq(5).all()
    assert offloader.held_bytes()["parameters"] == buffer.nbytes
