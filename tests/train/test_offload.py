"""State leaves memory and comes back bit for bit; the engine's own cycle is in test_engine_state.py."""

import itertools
import os
import threading

import psutil
import pytest
import torch

from qerl_rl.platform import detect
from qerl_rl.platform.state_store import PinnedStore, SpillFile, StateStore
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
