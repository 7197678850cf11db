from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.platform import detect
from qerl_rl.platform.device import CPU, CUDA, DEVICES, NPU, MemoryStatistics


def test_auto_finds_a_device_that_computes() -> None:
    device = detect()
    assert device.is_available()
    assert torch.ones(2, device=device.current()).sum() == 2


def test_cpu_memory_follows_an_allocation_and_its_peak_stays() -> None:
    device = detect("cpu")
    before = device.memory().used_bytes
    block = torch.ones(64 << 20, dtype=torch.uint8)
    during = device.memory()
    assert during.used_bytes - before > 60 << 20
    assert during.peak_bytes >= during.used_bytes - (1 << 20)
    del block
    device.synchronize()
    assert device.memory().peak_bytes >= during.peak_bytes


def test_cpu_needs_no_visible_devices_and_speaks_gloo() -> None:
    device = detect("cpu")
    device.select(3)
    assert (device.collective_backend, device.visible_devices_variable) == ("gloo", "")


@pytest.mark.parametrize("name", ["tpu", "npu"])
def test_device_that_is_not_there_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.device={name}"):
        detect(name)


class _Card:
    """Stands in for torch.cuda and torch.npu, and writes down what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.card = 0

    def set_device(self, card: int) -> None:
        self.card = card

    def current_device(self) -> int:
        return self.card

    def synchronize(self) -> None:
        self.asked.append("synchronize")

    def memory_allocated(self) -> int:
        return 5

    def max_memory_allocated(self) -> int:
        return 7

    def current_stream(self) -> str:
        return "computing"

    def stream(self, stream: Any) -> Any:
        return torch.no_grad()

    def Stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.asked.append(("waits for", other)))

    def Event(self) -> Any:
        return SimpleNamespace(
            record=lambda stream: self.asked.append("recorded"),
            query=lambda: "recorded" in self.asked,
            synchronize=lambda: self.asked.append("waited"),
        )


def test_each_kind_of_device_has_its_collectives_and_its_variable() -> None:
    assert [(each.name, each.collective_backend, each.visible_devices_variable) for each in DEVICES.values()] == [
        ("npu", "hccl", "ASCEND_RT_VISIBLE_DEVICES"),
        ("cuda", "nccl", "CUDA_VISIBLE_DEVICES"),
        ("cpu", "gloo", ""),
    ]


@pytest.mark.parametrize("device", [NPU, CUDA], ids=lambda device: device.name)
def test_a_card_is_chosen_measured_and_waited_for_through_its_own_module(
    monkeypatch: pytest.MonkeyPatch, device: Any
) -> None:
    card = _Card()
    monkeypatch.setattr(torch, device.name, card, raising=False)
    device.select(3)
    # torch knows the type npu only once torch_npu is imported.
    monkeypatch.setattr(torch, "device", lambda *place: place)
    assert device.current() == (device.name, 3)
    assert device.memory() == MemoryStatistics(used_bytes=5, peak_bytes=7)
    assert not device.shares_host_memory
    device.synchronize()
    assert card.asked == ["synchronize"]


def test_copies_beside_computing_wait_for_it_and_end_with_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    card = _Card()
    monkeypatch.setattr(torch, "npu", card, raising=False)
    source, target = torch.arange(3.0), torch.zeros(3)
    pending = NPU.copy_stream().copy([(target, source)])
    assert card.asked == [("waits for", "computing"), "recorded"]
    assert pending.done()
    pending.result()
    assert card.asked[-1] == "waited"
    assert torch.equal(target, source)


def test_copies_of_a_cpu_are_done_at_once() -> None:
    source, target = torch.arange(3.0), torch.zeros(3)
    assert CPU.copy_stream().copy([(target, source)]).done()
    assert torch.equal(target, source)


def test_auto_takes_an_npu_before_a_cuda_card_before_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    available = {"npu", "cuda", "cpu"}
    monkeypatch.setattr(type(CPU), "is_available", lambda device: device.name in available)
    for name in ("npu", "cuda", "cpu"):
        assert detect().name == name
        available.discard(name)
