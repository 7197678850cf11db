import pytest
import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.platform import detect


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
