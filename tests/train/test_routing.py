"""Training by every routing type and token dispatcher, in every layout that they allow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.train.models import make_config, make_samples, policy_gradient, share, start_engine

BALANCED = {"rank": 0, "quant": "none", "router_load_balancing": "aux_loss", "router_aux_loss_coefficient": 2.0}
SEQUENCE_WISE = {"tensor_parallel": 2, "expert_tensor_parallel": 2, "token_dispatcher": "alltoall_seq"}
DISPATCHERS = {
    "expert 2, allgather": {"expert_parallel": 2, "token_dispatcher": "allgather"},
    "expert 2, alltoall_seq": {"expert_parallel": 2, "token_dispatcher": "alltoall_seq"},
    "tensor 2, alltoall_seq": SEQUENCE_WISE,
    "tensor 2, alltoall_seq, recompute full": {**SEQUENCE_WISE, "recompute": "full"},
}
FOUR_RANKS = {
    "tensor 2 extended by expert 2": {"tensor_parallel": 2, "expert_parallel": 4},
    "tensor 2, expert 2, alltoall_seq": {**SEQUENCE_WISE, "expert_parallel": 2},
    "tensor 2, pipeline 2, alltoall_seq": {**SEQUENCE_WISE, "pipeline_parallel": 2},
    "pipeline 2, expert 2, allgather": {"pipeline_parallel": 2, "expert_parallel": 2, "token_dispatcher": "allgather"},
}
BALANCED_LAYOUTS = {
    "tensor 2": {"tensor_parallel": 2},
    "tensor 2, alltoall_seq": SEQUENCE_WISE,
    "tensor 2, expert 2, recompute full": {"tensor_parallel": 2, "expert_parallel": 2, "recompute": "full"},
    "pipeline 2": {"pipeline_parallel": 2},
}


def train(paths: dict[str, str], cases: dict[str, dict], settings: dict, workers: int = 2) -> dict[str, dict]:
    """Two updates and the log-probs after them, by case."""
    found = {}
    for name, layout in cases.items():
        engine = start_engine(make_config(paths, workers=workers, **{**settings, **layout}))
        own = share(make_samples(), engine.data_parallel_rank, engine.data_parallel_size)
        updates = [engine.update(own, policy_gradient, aggregation=kind) for kind in ("token_mean", "sequence_mean")]
        scores = engine.log_probs(own)
        found[name] = {
            "updates": updates,
            "data_parallel_rank": engine.data_parallel_rank,
            "log_probs": None if scores is None else np.concatenate(scores.log_probs),
        }
    return found


def _assert_equal(ranks: list[dict], alone: dict) -> None:
    for case in ranks[0]:
        outputs = {
            rank[case]["data_parallel_rank"]: rank[case] for rank in ranks if rank[case]["log_probs"] is not None
        }
        found = np.concatenate([outputs[rank]["log_probs"] for rank in sorted(outputs)])
        np.testing.assert_allclose(found, alone["log_probs"], rtol=1e-4, atol=1e-4, err_msg=case)
        for rank in ranks:
            for update, expected in zip(rank[case]["updates"], alone["updates"], strict=True):
                assert update == pytest.approx(expected, rel=2e-5), case


def test_dispatchers_give_the_losses_of_one_rank(one_rank, two_ranks, checkpoints):
    adapters = {"quant": "w8a8"}
    alone = one_rank(train, checkpoints, {"alone": {}}, adapters, 1)[0]["alone"]
    _assert_equal(two_ranks(train, checkpoints, DISPATCHERS, adapters), alone)
    _assert_equal(run_ranks(train, 4, checkpoints, FOUR_RANKS, adapters, 4), alone)


def test_balancing_loss_and_what_it_teaches_do_not_depend_on_the_layout(one_rank, two_ranks, checkpoints):
    alone = one_rank(train, checkpoints, {"alone": {}}, BALANCED, 1)[0]["alone"]
    assert all(update["router_aux_loss"] > 1.01 for update in alone["updates"])
    _assert_equal(two_ranks(train, checkpoints, BALANCED_LAYOUTS, BALANCED), alone)


def _nothing_else(log_probs, entropy, columns, weights):
    return (0.0 * log_probs).sum(), {}


def balance(paths: dict[str, str], dead: bool) -> list[float]:
    """The balancing loss over some updates that have no other. dead: also none of it."""
    settings = {**BALANCED, **({"router_load_balancing": "auto", "router_aux_loss_coefficient": 0.0} if dead else {})}
    engine = start_engine(make_config(paths, **settings))
    samples = make_samples()
    routers = [layer.mlp.router.weight for layer in engine.model.decoder.layers]
    before = [weight.detach().clone() for weight in routers]
    updates = [engine.update(samples, _nothing_else) for _ in range(8)]
    moved = max(float((weight - first).abs().max()) for weight, first in zip(routers, before, strict=True))
    return [moved, *(update.get("router_aux_loss", float("nan")) for update in updates)]


def test_balancing_loss_reaches_the_routers_and_falls(one_rank, checkpoints):
    [[moved, first, *later]] = one_rank(balance, checkpoints, False)
    assert moved > 0
    assert later[-1] - 1 < (first - 1) / 2
    [[moved, *reported]] = one_rank(balance, checkpoints, True)
    assert moved == 0
    assert np.isnan(reported).all()


def by_type(paths: dict[str, str], kinds: dict[str, dict]) -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    """Log-probs before any update, twice over other micro-batches, by routing type."""
    found = {}
    for name, settings in kinds.items():
        scores = []
        for tokens in (80, 1000):
            engine = start_engine(make_config(paths, micro_batch_tokens=tokens, **settings))
            scores.append(np.concatenate(engine.log_probs(make_samples()).log_probs))
            losses = []

            def own_loss(log_probs, entropy, columns, weights, losses=losses):
                losses.append(log_probs.detach().clone())
                return log_probs.sum(), {}

            engine.update(make_samples(), own_loss)
        found[name] = scores, torch.cat(losses).numpy()
    return found


def test_log_probs_of_every_routing_type_do_not_depend_on_the_micro_batches(one_rank, checkpoints):
    groups = {"router_load_balancing": "group_limited_greedy", "router_num_groups": 4, "router_group_topk": 1}
    kinds = {kind: {"router_load_balancing": kind} for kind in ("auto", "none", "softmax_topk", "sinkhorn")}
    kinds |= {"sparsemixer_topk": {"router_load_balancing": "sparsemixer_topk"}, "group_limited_greedy": groups}
    [found] = one_rank(by_type, checkpoints, kinds)
    own = found["auto"][0][0]
    for kind, ((small, large), updated) in found.items():
        np.testing.assert_allclose(small, large, atol=1e-5, err_msg=kind)
        same = kind in ("auto", "none", "softmax_topk", "sinkhorn")
        assert (np.abs(small - own).max() < 1e-5) == same, kind
        # Sinkhorn balances the tokens of a micro-batch, in updates only.
        ordered = np.sort(small), np.sort(updated)
        assert (np.abs(ordered[0] - ordered[1]).max() < 1e-5) == (kind != "sinkhorn"), kind
