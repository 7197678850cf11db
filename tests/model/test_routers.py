"""Routers choose and weigh experts as transformers' and Megatron's own do, and differentiate like them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import TrainConfig
from qerl_rl.layout.routing import GROUP_LIMITED, SIGMOID, SINKHORN, SPARSE_MIXER, RoutingRule, chosen_rule
from qerl_rl.platform import detect, prepare_megatron
from tests.model import harness
from tests.ranks import RankPool

EXPERTS, TOKENS = 12, 40


def _logits(seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed)) * scale


def _near_ties(seed: int = 0) -> torch.Tensor:
    """Logits of which several lie within sparsemixer's 2 % of the largest."""
    close = 4 + 0.1 * torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed))
    return torch.where(_logits(seed) > 0, close, _logits(seed + 1))


def _transformers_router(kind: str, **settings: Any) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """A router of transformers whose logits are its inputs: logits [T, E] -> (weights, experts), both [T, k]."""
    import transformers
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    classes = {
        "Mixtral": MixtralTopKRouter,
        "Qwen3Moe": Qwen3MoeTopKRouter,
        "DeepseekV2": DeepseekV2TopkRouter,
        "DeepseekV3": DeepseekV3TopkRouter,
        "Phimoe": PhimoeTopKRouter,
    }
    config = getattr(transformers, f"{kind}Config")(hidden_size=EXPERTS, num_attention_heads=1, **settings)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        setattr(config, name, EXPERTS)
    router = classes[kind](config).eval()
    with torch.no_grad():
        router.weight.copy_(torch.eye(EXPERTS))
        if kind == "DeepseekV3":
            router.e_score_correction_bias.copy_(BIAS)
    return lambda logits: router(logits)[1:]


BIAS = torch.linspace(0, 0.3, EXPERTS)
ROUTERS: dict[str, tuple[RoutingRule, str, dict[str, Any]]] = {
    "Mixtral": (RoutingRule(3), "Mixtral", {"num_experts_per_tok": 3}),
    "Qwen3-MoE, not normalized": (
        RoutingRule(3, normalized=False),
        "Qwen3Moe",
        {"num_experts_per_tok": 3, "norm_topk_prob": False},
    ),
    "DeepSeek-V2, greedy": (
        RoutingRule(3, normalized=False, scaling=1.5),
        "DeepseekV2",
        {"num_experts_per_tok": 3, "routed_scaling_factor": 1.5, "topk_method": "greedy"},
    ),
    "DeepSeek-V2, group-limited": (
        RoutingRule(3, choice=GROUP_LIMITED, normalized=False, scaling=1.5, groups=4, chosen_groups=2),
        "DeepseekV2",
        {
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.5,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    "DeepSeek-V3": (
        RoutingRule(3, choice=GROUP_LIMITED, scores=SIGMOID, scaling=2.5, groups=4, chosen_groups=2, best_of_group=2),
        "DeepseekV3",
        {
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    "Phi-3.5-MoE": (
        RoutingRule(2, choice=SPARSE_MIXER, jitter=0.01),
        "Phimoe",
        {"num_experts_per_tok": 2, "router_jitter_noise": 0.01},
    ),
}


def _dense(weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(weights), EXPERTS).scatter(1, experts, weights)


def _compare_with_transformers() -> dict[str, list[np.ndarray]]:
    """By case: weights [T, E] and the gradients of a sum over them, of ours and of transformers."""
    prepare_megatron(detect("cpu"))
    from qerl_rl.model.routers import choose, weigh

    found = {}
    for case, (rule, kind, options) in ROUTERS.items():
        router = _transformers_router(kind, **options)
        results = []
        for seed in range(5):
            drawn = _near_ties(seed) if rule.choice == SPARSE_MIXER else _logits(seed)
            ours, theirs = drawn.clone().requires_grad_(), drawn.clone().requires_grad_()
            bias = BIAS if rule.scores == SIGMOID else None
            experts = choose(rule, ours, training=True, bias=bias)
            own, expected = _dense(weigh(rule, ours, experts), experts), _dense(*router(theirs))
            direction = _logits(seed + 50)
            (own * direction).sum().backward()
            (expected * direction).sum().backward()
            results.append([tensor.detach().numpy() for tensor in (own, expected, ours.grad, theirs.grad)])  # type: ignore[union-attr]
        found[case] = [np.concatenate(parts) for parts in zip(*results, strict=True)]
    return found


@pytest.fixture(scope="module")
def compared(one_rank: RankPool) -> dict[str, list[np.ndarray]]:
    return one_rank(_compare_with_transformers)[0]


@pytest.mark.parametrize("case", ROUTERS)
def test_weights_and_their_gradients_equal_those_of_transformers(
    case: str, compared: dict[str, list[np.ndarray]]
) -> None:
    own, expected, gradient, expected_gradient = compared[case]
    assert ((own > 0).sum(1) == ROUTERS[case][0].top_k).all()
    np.testing.assert_allclose(own, expected, atol=1e-6)
    assert abs(expected_gradient).max() > 1e-2
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


def _sampled_gradient() -> tuple[np.ndarray, np.ndarray]:
    """Ours, and that of transformers' sparsemixer in training where the largest logit is what it samples."""
    prepare_megatron(detect("cpu"))
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    from qerl_rl.model.routers import choose, weigh

    rule, direction = ROUTERS["Phi-3.5-MoE"][0], _logits(9)[:, :2]
    ours, theirs = (_near_ties(3).requires_grad_() for _ in range(2))
    (weigh(rule, ours, choose(rule, ours, training=True)) * direction).sum().backward()
    drawn = torch.Tensor.exponential_
    try:
        # Equal draws add the same noise to all logits.
        torch.Tensor.exponential_ = lambda self, *args, **kwargs: self.fill_(1.0)  # type: ignore[method-assign]
        weights, _ = sparsemixer(theirs, jitter_eps=rule.jitter, training=True)
    finally:
        torch.Tensor.exponential_ = drawn  # type: ignore[method-assign]
    (weights * direction).sum().backward()
    return ours.grad.numpy(), theirs.grad.numpy()  # type: ignore[union-attr]


def test_sparsemixer_gradient_is_the_authors_estimate_where_the_largest_is_sampled(one_rank: RankPool) -> None:
    [(found, expected)] = one_rank(_sampled_gradient)
    assert abs(expected).max() > 1e-2
    np.testing.assert_allclose(found, expected, atol=1e-6)


def _compare_with_megatron(cases: list[tuple[int, int, int, int, bool, str]]) -> list[float]:
    """Largest difference of weights in each case: seed, top_k, groups, chosen groups, normalized, scores."""
    prepare_megatron(detect("cpu"))
    from megatron.core.transformer.moe.moe_utils import topk_softmax_with_capacity

    from qerl_rl.model.routers import choose, weigh

    differences = []
    for seed, top_k, groups, chosen, normalized, kind in cases:
        logits, bias = _logits(seed), BIAS if kind == SIGMOID else None
        rule = RoutingRule(top_k, scores=kind, normalized=normalized)
        if groups > 1:
            best = top_k // chosen
            rule = replace(rule, choice=GROUP_LIMITED, groups=groups, chosen_groups=chosen, best_of_group=best)
        experts = choose(rule, logits, training=True, bias=bias)
        expected, _, counts = topk_softmax_with_capacity(
            logits,
            top_k,
            use_pre_softmax=not normalized,
            num_groups=groups,
            group_topk=chosen if groups > 1 else None,
            score_function=kind,
            expert_bias=bias,
        )
        own = _dense(weigh(rule, logits, experts), experts)
        same_counts = torch.equal(counts, torch.bincount(experts.flatten(), minlength=EXPERTS))
        differences.append(float((own - expected).abs().max()) if same_counts else torch.inf)
    return differences


def test_top_k_and_groups_equal_megatrons_function(one_rank: RankPool) -> None:
    plain = [
        (seed, top_k, 1, 1, normalized, "softmax")
        for seed in range(3)
        for top_k in (2, 5)
        for normalized in (True, False)
    ]
    # Megatron normalizes sigmoid scores always, and limits groups of normalized softmax by logits and not by scores.
    limited = [(seed, 4, 4, 2, False, "softmax") for seed in range(3)] + [
        (seed, 4, groups, chosen, True, SIGMOID) for seed in range(3) for groups, chosen in ((1, 1), (4, 2), (3, 2))
    ]
    [differences] = one_rank(_compare_with_megatron, plain + limited)
    assert len(differences) == 12 + 3 + 9
    assert max(differences) <= 1e-6


def _sinkhorn() -> dict[str, np.ndarray]:
    """Experts of skewed logits, by ours and by Megatron's own router, in training and out of it."""
    train = TrainConfig()
    harness.start(train)
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    from qerl_rl.model.routers import choose, weigh

    rule = RoutingRule(2, choice=SINKHORN, normalized=False)
    logits = _logits(4) + torch.linspace(3, 0, EXPERTS)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=EXPERTS,
        num_attention_heads=1,
        num_moe_experts=EXPERTS,
        moe_router_topk=2,
        moe_router_load_balancing_type="sinkhorn",
        perform_initialization=False,
        add_bias_linear=False,
    )
    router, found = TopKRouter(config), {}
    for mode in (True, False):
        router.train(mode)
        experts = choose(rule, logits, training=mode)
        found[f"found {mode}"] = _dense(weigh(rule, logits, experts), experts).numpy()
        found[f"expected {mode}"] = router.sinkhorn_load_balancing(logits)[0].detach().numpy()
    return found


def test_sinkhorn_is_megatrons_and_levels_the_load_in_training_only(one_rank: RankPool) -> None:
    [found] = one_rank(_sinkhorn)
    for mode in (True, False):
        np.testing.assert_allclose(found[f"found {mode}"], found[f"expected {mode}"], atol=1e-6)
    balanced, greedy = ((found[f"found {mode}"] > 0).sum(0) for mode in (True, False))
    assert balanced.sum() == greedy.sum() == 2 * TOKENS
    assert np.ptp(balanced) < np.ptp(greedy) / 2


def _forced_near_rivals(seeds: list[int]) -> list[tuple[float, float]]:
    """Of the largest logit moved just below the next: how the weight of the same expert, forced, changes."""
    prepare_megatron(detect("cpu"))
    from qerl_rl.model.routers import choose, weigh

    rule, found = ROUTERS["Phi-3.5-MoE"][0], []
    for seed in seeds:
        logits = _near_ties(seed)
        experts = choose(rule, logits, training=True)
        top = logits.topk(2, 1)
        moved = logits.scatter(1, top.indices[:, :1], top.values[:, 1:] - 1e-6)
        level = logits.scatter(1, top.indices[:, :1], top.values[:, 1:] + 1e-6)
        weights = weigh(rule, moved, experts), weigh(rule, level, experts)
        rows = weights[0].sum(1)
        found.append((float((weights[0] - weights[1]).abs().max()), float(rows.max())))
    return found


def test_replayed_sparsemixer_choice_weighs_alike_on_both_sides_of_a_tie(one_rank: RankPool) -> None:
    [found] = one_rank(_forced_near_rivals, list(range(5)))
    assert max(difference for difference, _ in found) <= 1e-4
    assert max(total for _, total in found) <= 2 + 1e-6


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 6), st.integers(0, 9), st.integers(0, 9))
def test_groups_are_refused_or_hold_all_experts_of_a_token(top_k: int, groups: int, chosen: int) -> None:
    train = TrainConfig(
        router_load_balancing="group_limited_greedy", router_num_groups=groups, router_group_topk=chosen
    )
    try:
        rule = chosen_rule(RoutingRule(top_k), EXPERTS, train)
    except ConfigError:
        return
    assert EXPERTS % rule.groups == 0
    assert top_k <= rule.chosen_groups * EXPERTS // rule.groups <= EXPERTS


def test_sparsemixer_needs_two_experts_a_token() -> None:
    train = TrainConfig(router_load_balancing="sparsemixer_topk")
    assert chosen_rule(RoutingRule(2), EXPERTS, train).choice == SPARSE_MIXER
    with pytest.raises(ConfigError, match="chooses 2 experts a token, and the model has 4"):
        chosen_rule(RoutingRule(4), EXPERTS, train)
