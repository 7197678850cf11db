"""The profiler is asked for what the run has, or says what to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from qerl_rl.config.checks import check_config
from qerl_rl.config.errors import ConfigError
from qerl_rl.config.loader import load_config
from qerl_rl.config.profiler_schema import STAGES
from qerl_rl.config.schema import Config

LAUNCH = "model: {path: some/model}\ndata: {train_path: arithmetic}\n"
DPO = ["algorithm.name=dpo", "algorithm.samples_per_prompt=2"]
PPO = ["algorithm.name=ppo", "algorithm.advantage=gae"]


def load(folder: Path, *overrides: str) -> Config:
    path = folder / "launch.yaml"
    path.write_text(LAUNCH)
    loaded = load_config(path, overrides)
    check_config(loaded.config, loaded.locate)
    return loaded.config


@pytest.mark.parametrize(
    ("overrides", "problem", "fix"),
    [
        (["steps=2"], "profiler.steps=2 is no list of whole numbers", "write profiler.steps as [1, 2, 4]"),
        (["steps=[1.5]"], "is no list of whole numbers", "[1, 2, 4]"),
        (["stages=[1]"], "is no list of names", "write profiler.stages as [one, another]"),
        (["steps=[0]"], "profiler.steps holds 0", "numbers from 1 to 10"),
        (["steps=[11]"], "profiler.steps holds 11", "numbers from 1 to 10"),
        (["ranks=[2]"], "profiler.ranks holds 2", "numbers from 0 to 1"),
        (["kind=nsight"], "profiler.kind=nsight is unknown", "torch or msprof"),
        (["level=level3"], "profiler.level=level3 is unknown", "level2"),
        (["steps=[1]", "stages=[train]"], "holds train, which is unknown", "choose from rollout,"),
        (["steps=[1]", "stages=[values]"], "this run has none (only ppo has a critic)", "take values out of"),
        (["steps=[1]", "stages=[reward]"], "reward_model.backend=megatron", "take reward out of profiler.stages"),
        (["steps=[1]", "stages=[rollout,update]", "rollout.ahead=true"], "at the same time", "to [rollout]"),
        (["steps=[1]", "stages=[all]", "rollout.ahead=true"], "at the same time", "to [rollout]"),
        (["steps=[1]", "stages=[swap_to_train]", "rollout.ahead=true"], "both engines stay", "take swap_to_train"),
        (["steps=[1]", "stages=[rollout]", *DPO], "dpo samples nothing", "take rollout out"),
        (["steps=[1]", "stages=[old_log_probs]", "rollout_correction.bypass_mode=true"], "takes the engine's", "take"),
        (["steps=[1]", "train.device=npu-sim"], "npu-sim has no driver", "set profiler.steps to []"),
        (["steps=[1]", "kind=msprof", "train.device=cpu"], "and train.device=cpu", "set profiler.kind to torch"),
        (["steps=[1]", "kind=msprof", "train.device=cuda"], "and train.device=cuda", "set profiler.kind to torch"),
    ],
)
def test_what_can_not_be_recorded_is_refused(tmp_path: Path, overrides: list[str], problem: str, fix: str) -> None:
    own = [key if "." in key.partition("=")[0] else f"profiler.{key}" for key in overrides]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *own)
    assert problem in caught.value.problem
    assert fix in caught.value.fix
    assert caught.value.where == "command line"


@pytest.mark.parametrize(
    ("overrides", "absent"),
    [
        ([], {"values", "reward", "critic_update"}),
        (PPO, {"reward"}),
        ([*PPO, "reward_model.path=m", "reward_model.backend=megatron"], set()),
    ],
)
def test_every_stage_that_a_run_has_can_be_recorded(tmp_path: Path, overrides: list[str], absent: set[str]) -> None:
    wanted = ",".join(stage for stage in STAGES if stage not in absent)
    config = load(tmp_path, *overrides, "profiler.steps=[1,10]", f"profiler.stages=[{wanted}]", "profiler.ranks=[0,1]")
    for stage in STAGES:
        found = [(step, rank) for step in range(12) for rank in range(3) if config.profiler.records(step, stage, rank)]
        assert found == ([] if stage in absent else [(1, 0), (1, 1), (10, 0), (10, 1)])


def test_by_default_nothing_is_recorded(tmp_path: Path) -> None:
    profiler = load(tmp_path).profiler
    assert not any(profiler.records(step, stage, 0) for step in range(12) for stage in STAGES)
