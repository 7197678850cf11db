"""State leaves memory and comes back bit for bit; the engine's own cycle is in test_engine_state.py."""

import os

import psutil
import pytest
import torch

from qerl_rl.train.offload import Offloader, SpillFile

MIB = 1 << 20


def resident() -> int:
    return psutil.Process().memory_info().rss


@pytest.fixture
def offloader(tmp_path) -> Offloader:
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
    assert before - resident() <= 8 * MIB
    assert all(torch.equal(a, b) for a, b in zip(copies, [large, state, torch.stack(small)], strict=True))


def test_views_of_one_buffer_leave_once_and_stay_views(offloader):
    buffer = torch.arange(1000, dtype=torch.float32)
    parameters = [torch.nn.Parameter(buffer[:400].view(20, 20)), torch.nn.Parameter(buffer[400:])]
    offloader.track("parameters", [*parameters, buffer])
    for _ in range(2):
        assert offloader.offload(["parameters"])["parameters"] == 4000
        assert offloader.onload()["parameters"] == 4000
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


def test_only_the_named_kinds_leave_and_a_second_offload_frees_nothing_more(offloader):
    tensors = {kind: torch.ones(10) for kind in ("parameters", "gradients", "optimizer")}
    for kind, tensor in tensors.items():
        offloader.track(kind, [tensor])
    assert offloader.offload(["optimizer"]) == {"parameters": 0, "gradients": 0, "optimizer": 40}
    assert offloader.offload(["optimizer"])["optimizer"] == 0
    assert offloader.held_bytes() == {"parameters": 40, "gradients": 40, "optimizer": 0}
    assert offloader.is_away
    offloader.onload()
    assert not offloader.is_away


def test_state_that_appears_later_is_tracked_then(offloader):
    first, later = torch.full((10,), 1.0), torch.full((20,), 2.0)
    offloader.track("optimizer", [first])
    offloader.offload(["optimizer"])
    offloader.onload()
    offloader.track("optimizer", [first, later, torch.tensor(3.0)])
    assert offloader.offload(["optimizer"])["optimizer"] == 120
    offloader.onload()
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
