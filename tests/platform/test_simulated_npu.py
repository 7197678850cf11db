"""Where the simulated NPU can't be had, the launch says why and what to do, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.loader import LoadedConfig, load_config
from qerl_rl.platform.simulated_npu import package
from trainer.simulation import prepare_simulation


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LoadedConfig:
    """A launch file with train.device=npu-sim, on a machine that has never run it."""
    monkeypatch.setattr(package, "CACHE", tmp_path / "cache" / "torch_npu")
    file = tmp_path / "launch.yaml"
    file.write_text("train:\n  device: npu-sim\n")
    return load_config(str(file), [])


def test_without_a_compiler_nothing_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loaded: LoadedConfig
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no gcc, nm, readelf here\. Fix: install gcc and binutils.*launch\.yaml:2"):
        prepare_simulation(loaded, dry_run=False)
    assert not package.CACHE.parent.exists()


def test_without_an_index_the_fix_names_the_cache(monkeypatch: pytest.MonkeyPatch, loaded: LoadedConfig) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        ConfigError, match=r"torch-npu==2\.13\.0, which can't be downloaded: ERROR: No matching"
    ) as found:
        prepare_simulation(loaded, dry_run=False)
    assert str(package.CACHE) in found.value.fix
    assert list(package.CACHE.parent.iterdir()) == []


def test_another_torch_is_refused(monkeypatch: pytest.MonkeyPatch, loaded: LoadedConfig) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    with pytest.raises(
        ConfigError, match=r"beside torch 2\.13\.0 only; this is 2\.10\.0\. Fix: pip install torch==2\.13\.0"
    ):
        prepare_simulation(loaded, dry_run=False)


def test_a_dry_run_fetches_nothing_and_says_what_is_not_proven(
    capsys: pytest.CaptureFixture[str], loaded: LoadedConfig
) -> None:
    prepare_simulation(loaded, dry_run=True)
    assert "Not proven by this run: numerics" in capsys.readouterr().out
    assert not package.CACHE.parent.exists()
