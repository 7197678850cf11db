"""Training does not depend on how the model and the samples are laid out over ranks, nor on what is recomputed."""

import numpy as np
import pytest

from tests.train.models import make_config, make_samples, policy_gradient, share, start_engine

LAYOUTS = {
    "data 2": {},
    "tensor 2": {"tensor_parallel": 2, "expert_tensor_parallel": 2},
    "tensor 2, whole experts": {"tensor_parallel": 2},
    "expert 2": {"expert_parallel": 2},
    "pipeline 2": {"pipeline_parallel": 2},
    "tensor 2, expert 2": {"tensor_parallel": 2, "expert_parallel": 2},
    "tensor 2, expert 2, allgather": {"tensor_parallel": 2, "expert_parallel": 2, "token_dispatcher": "allgather"},
}
RECOMPUTED = {
    f"{layout}, recompute {mode}": {**LAYOUTS[layout], "recompute": mode}
    for layout, mode in (
        ("data 2", "full"),
        ("pipeline 2", "full"),
        ("tensor 2, expert 2", "full"),
        ("tensor 2, expert 2", "selective"),
    )
}
# What trains: adapters over an int8 base, or every weight of the unquantized model.
KINDS = {"adapters": {"quant": "w8a8"}, "everything": {"quant": "none", "rank": 0, "kl_coefficient": 0.1}}


def train(paths: dict[str, str], cases: dict[str, dict], kind: dict) -> dict[str, dict]:
    """Three updates in each case, one of each aggregation; what came out, by case."""
    found = {}
    for name, settings in cases.items():
        engine = start_engine(make_config(paths, workers=2, **kind, **settings))
        own = share(make_samples(), engine.data_parallel_rank, engine.data_parallel_size)
        updates = [
            engine.update(own, policy_gradient, aggregation=aggregation)
            for aggregation in ("token_mean", "sequence_mean", "sequence_sum_constant")
        ]
        scores = engine.log_probs(own)
        reference = engine.log_probs(own, reference=True)
        found[name] = {
            "updates": updates,
            "data_parallel_rank": engine.data_parallel_rank,
            "log_probs": scores and np.concatenate(scores.log_probs),
            "entropy": scores and np.concatenate(scores.entropy),
            "reference": reference and np.concatenate(reference.log_probs),
            "adapters": {name: tensor.numpy().copy() for name, tensor in engine.gather_adapters().items()},
        }
    return found


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def alone(one_rank, checkpoints, kind) -> dict:
    """One rank with everything."""
    return one_rank(train, checkpoints, {"alone": {}}, KINDS[kind])[0]["alone"]


@pytest.fixture(scope="module")
def together(two_ranks, checkpoints, kind) -> list[dict]:
    return two_ranks(train, checkpoints, {**LAYOUTS, **RECOMPUTED}, KINDS[kind])


@pytest.mark.parametrize("case", [*LAYOUTS, *RECOMPUTED])
def test_loss_and_gradient_norm_equal_those_of_one_rank(alone, together, case):
    for rank in together:
        assert rank[case]["updates"] == together[0][case]["updates"]
        for update, expected in zip(rank[case]["updates"], alone["updates"], strict=True):
            assert update == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", LAYOUTS)
def test_log_probs_equal_those_of_one_rank(alone, together, case):
    outputs = {rank[case]["data_parallel_rank"]: rank[case] for rank in together if rank[case]["log_probs"] is not None}
    for name in ("log_probs", "entropy", "reference"):
        found = np.concatenate([outputs[rank][name] for rank in sorted(outputs)])
        np.testing.assert_allclose(found, alone[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", LAYOUTS)
def test_adapters_equal_those_of_one_rank(alone, together, case):
    for rank in together:
        assert rank[case]["adapters"].keys() == alone["adapters"].keys()
        for name, expected in alone["adapters"].items():
            np.testing.assert_allclose(rank[case]["adapters"][name], expected, rtol=1e-3, atol=1e-5)


def test_training_took_the_log_probs_away_from_the_reference(alone):
    assert np.abs(alone["log_probs"] - alone["reference"]).max() > 1e-2
