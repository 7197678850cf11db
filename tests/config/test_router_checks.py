"""Routing types and dispatchers that can't work with other keys are refused, and do as the fix says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qerl_rl.config.checks import check_config
from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import ClusterConfig, Config, DataConfig, LoraConfig, ModelConfig, RouterReplayConfig
from qerl_rl.config.schema import TrainConfig as Train

FULL, ADAPTERS = LoraConfig(rank=0), LoraConfig(rank=8)
LOSS = Train(router_load_balancing="aux_loss", router_aux_loss_coefficient=0.01)
SEQUENCE_WISE = Train(token_dispatcher="alltoall_seq", tensor_parallel=2)
GROUPS = Train(router_num_groups=4)
R3 = RouterReplayConfig(mode="R3")


def _check(train: Train, lora: LoraConfig = FULL, replay: RouterReplayConfig | None = None) -> None:
    config = Config(
        cluster=ClusterConfig(workers=2),
        model=ModelConfig(path="some/model"),
        data=DataConfig(train_path="arithmetic"),
        train=train,
        lora=lora,
        router_replay=replay or RouterReplayConfig(),
    )
    check_config(config, lambda key: key)


@pytest.mark.parametrize(
    ("train", "others", "where", "fix", "fixed"),
    [
        (
            replace(LOSS, router_load_balancing="auto"),
            (FULL,),
            "train.router_aux_loss_coefficient",
            "train.router_load_balancing to aux_loss",
            (LOSS, FULL),
        ),
        (
            replace(LOSS, router_aux_loss_coefficient=0.0),
            (FULL,),
            "train.router_aux_loss_coefficient",
            "above 0",
            (LOSS, FULL),
        ),
        (LOSS, (ADAPTERS,), "train.router_load_balancing", "lora.rank to 0", (LOSS, FULL)),
        (
            Train(router_load_balancing="sinkhorn"),
            (FULL, R3),
            "train.router_load_balancing",
            "router_replay.mode to disabled",
            (Train(router_load_balancing="sinkhorn"), FULL),
        ),
        (
            GROUPS,
            (FULL,),
            "train.router_num_groups",
            "train.router_load_balancing to group_limited_greedy",
            (replace(GROUPS, router_load_balancing="group_limited_greedy"), FULL),
        ),
        (
            SEQUENCE_WISE,
            (FULL,),
            "train.token_dispatcher",
            "train.expert_tensor_parallel to 2",
            (replace(SEQUENCE_WISE, expert_tensor_parallel=2), FULL),
        ),
        (
            Train(router_load_balancing="softmax"),
            (FULL,),
            "train.router_load_balancing",
            "softmax_topk",
            (Train(router_load_balancing="softmax_topk"), FULL),
        ),
    ],
)
def test_what_can_not_work_is_refused_and_its_fix_works(
    train: Train, others: tuple, where: str, fix: str, fixed: tuple
) -> None:
    with pytest.raises(ConfigError) as caught:
        _check(train, *others)
    assert caught.value.where == where
    assert fix in caught.value.fix
    _check(*fixed)


def test_the_balancing_loss_may_balance_replayed_experts() -> None:
    _check(LOSS, FULL, R3)
