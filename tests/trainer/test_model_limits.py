"""What a model's own kind rules out is refused before anything starts, and what it allows is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.loader import load_config
from qerl_rl.layout.architecture import MoeArchitecture
from trainer.model_limits import check_model_limits

DPO = ("algorithm.name=dpo", "algorithm.samples_per_prompt=2")


def _check(folder: Path, scratch: Path, *overrides: str) -> None:
    path = scratch / "launch.yaml"
    path.write_text(f"model: {{path: {folder}, max_length: 64}}\n")
    check_model_limits(load_config(path, overrides), MoeArchitecture.from_folder(folder))


@pytest.mark.parametrize(
    ("family", "overrides", "problem", "fix"),
    [
        ("phimoe", ["model.max_length=513"], "beyond the 512 positions", "model.max_length to 512"),
        ("phimoe", ["noise.enabled=true"], "phimoe has layer norms", "noise.enabled to false"),
        ("minicpm", [], "can't sample from MiniCPM-MoE", "algorithm.name=dpo with eval.every=0"),
        ("minicpm", [*DPO, "eval.every=1"], "can't sample from MiniCPM-MoE", "eval.every=0"),
    ],
)
def test_what_a_family_can_not_do_is_refused(
    family: str, overrides: list[str], problem: str, fix: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint(family, layers=2)
    with pytest.raises(ConfigError) as caught:
        _check(folder, tmp_path, *overrides)
    assert problem in caught.value.problem
    assert fix in caught.value.fix


def test_what_it_can_do_passes(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    _check(tiny_checkpoint("phimoe", layers=2), tmp_path, "model.max_length=512")
    _check(tiny_checkpoint("mixtral", layers=2), tmp_path, "noise.enabled=true")
    _check(tiny_checkpoint("minicpm", layers=2), tmp_path, *DPO)
