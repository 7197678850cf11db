"""run.deterministic: what a worker's process is told, and that it then refuses what it can't repeat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qerl_rl.config.schema import ClusterConfig, Config, RunConfig, TrainConfig
from qerl_rl.platform.determinism import compute_deterministically, contradiction, deterministic_variables
from tests.ranks import RankPool
from workers.group import worker_environment

HCCL, NCCL = "HCCL_DETERMINISTIC", "NCCL_ALGO"


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    compute_deterministically()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark = before


def test_an_operator_that_can_not_repeat_its_bits_is_refused(deterministic: None) -> None:
    # Of two values for one place, whichever is written last stays.
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))


def _modes(path: Path) -> list[bool]:
    from qerl_rl.platform import detect, prepare_megatron

    prepare_megatron(detect("cpu"))
    from qerl_rl.layout.architecture import MoeArchitecture
    from qerl_rl.model.build import transformer_config

    architecture = MoeArchitecture.from_folder(path)
    modes = [transformer_config(architecture, TrainConfig()).deterministic_mode]
    compute_deterministically()
    modes.append(transformer_config(architecture, TrainConfig()).deterministic_mode)
    torch.use_deterministic_algorithms(False)
    return modes


def test_megatron_takes_its_deterministic_ways_with_it(tiny_w8a8, one_rank: RankPool) -> None:
    assert one_rank(_modes, tiny_w8a8("qwen3_moe")) == [[False, True]]


@pytest.mark.parametrize(
    ("device", "there", "absent"),
    [
        ("npu", {HCCL}, {NCCL}),
        ("cuda", {NCCL}, {HCCL}),
        ("cpu", set(), {HCCL, NCCL}),
        ("npu-sim", {HCCL}, {NCCL}),
        ("auto", {HCCL, NCCL}, set()),
    ],
)
def test_workers_get_the_variables_of_their_device(device: str, there: set[str], absent: set[str]) -> None:
    def environment(deterministic: bool, **own: str) -> dict[str, str]:
        return worker_environment(
            Config(
                run=RunConfig(deterministic=deterministic),
                train=TrainConfig(device=device),
                cluster=ClusterConfig(environment=own),
            )
        )

    found = environment(True)
    assert there | {"PYTHONHASHSEED"} <= found.keys()
    assert not absent & found.keys()
    assert environment(False) == {name: found[name] for name in found.keys() - deterministic_variables(device).keys()}
    assert environment(True, HCCL_DETERMINISTIC="strict")[HCCL] == "strict"


def test_an_environment_that_undoes_it_is_found() -> None:
    assert contradiction("npu", {HCCL: "false"}) == (HCCL, "true")
    assert contradiction("auto", {NCCL: "CollnetDirect"}) == (NCCL, "Ring")
    for harmless in ({}, {HCCL: "True"}, {HCCL: "strict"}, {NCCL: "CollnetDirect"}, {"PYTHONHASHSEED": "7"}):
        assert contradiction("npu", harmless) is None
