"""What one engine computes: scores, losses, gradients and learning rates, against HF and against each other."""

import numpy as np
import pytest
import torch

from qerl_rl.algorithms.choices import LOSSES
from qerl_rl.algorithms.grpo import grpo_loss
from qerl_rl.algorithms.sequences import AGGREGATIONS
from qerl_rl.config.schema import AlgorithmConfig, RolloutCorrectionConfig
from qerl_rl.train.samples import Samples
from tests.train.models import dequantize_folder, make_config, make_samples, policy_gradient, share, start_engine


def scores_by_packing(paths: dict[str, str]) -> list[dict[str, np.ndarray]]:
    found = []
    for tokens in (1, 64, 100_000):
        engine = start_engine(make_config(paths, micro_batch_tokens=tokens))
        scores = engine.log_probs(make_samples())
        found.append({name: np.concatenate(getattr(scores, name)) for name in ("log_probs", "entropy")})
    return found


def hf_scores(folder: str, samples: Samples, temperature: float) -> dict[str, np.ndarray]:
    """Log-probs and entropies of the response tokens by transformers, one sample after the other."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    log_probs, entropy = [], []
    with torch.no_grad():
        for tokens, length in zip(samples.tokens, samples.response_lengths, strict=True):
            ids = torch.from_numpy(tokens)
            every = torch.log_softmax(model(ids[None]).logits[0, -length - 1 : -1].double() / temperature, dim=-1)
            log_probs.append(every.gather(1, ids[-length:, None])[:, 0])
            entropy.append(-(every.exp() * every).sum(-1))
    return {"log_probs": torch.cat(log_probs).numpy(), "entropy": torch.cat(entropy).numpy()}


def test_scores_equal_those_of_transformers_however_packed(one_rank, checkpoints, tmp_path):
    one_by_one, some, all_together = one_rank(scores_by_packing, checkpoints)[0]
    dequantize_folder(checkpoints, tmp_path)
    expected = hf_scores(str(tmp_path), make_samples(), make_config(checkpoints).rollout.temperature)
    for name, values in expected.items():
        for found in (one_by_one, some, all_together):
            np.testing.assert_allclose(found[name], values, atol=1e-4)
        np.testing.assert_allclose(some[name], one_by_one[name], atol=1e-5)
        np.testing.assert_allclose(all_together[name], one_by_one[name], atol=1e-5)


CORRECTIONS = {
    **{f"by {level}": RolloutCorrectionConfig(rollout_is=level) for level in ("token", "sequence")},
    "rejecting": RolloutCorrectionConfig(
        rollout_is="token",
        rollout_is_threshold="0.7_1.6",
        rollout_rs="seq_mean_k1,token_k3",
        rollout_rs_threshold="0.8_1.3,0.3",
    ),
}
"""Of the ppo loss."""


def updates_by_micro_batch(paths: dict[str, str]) -> list[dict[tuple[str, str], dict[str, float]]]:
    """Two updates of every loss and aggregation, one after the other, in micro-batches of three sizes."""
    samples = make_samples(8)
    noise = np.random.default_rng(5)
    scores = start_engine(make_config(paths)).log_probs(samples).log_probs
    samples.columns["old_log_probs"] = [row + noise.normal(0, 0.2, len(row)).astype(np.float32) for row in scores]
    samples.columns["rollout_log_probs"] = [row + noise.normal(0, 0.3, len(row)).astype(np.float32) for row in scores]
    samples.columns["reference_log_probs"] = scores
    found = []
    for tokens in (1, 60, 100_000):
        engine = start_engine(make_config(paths, micro_batch_tokens=tokens))
        updates = {}
        for aggregation in AGGREGATIONS:
            for name, correction in {**dict.fromkeys(LOSSES), **CORRECTIONS}.items():
                loss = name if name in LOSSES else "ppo"
                config = AlgorithmConfig(loss=loss, kl_coefficient=0.1, entropy_coefficient=0.01, dual_clip=1.3)
                function = grpo_loss(config, correction)
                first, second = (engine.update(samples, function, aggregation=aggregation) for _ in range(2))
                updates[name, aggregation] = {**first, "loss after": second["loss"], "norm after": second["grad_norm"]}
        found.append(updates)
    return found


@pytest.fixture(scope="module")
def by_micro_batch(one_rank, checkpoints) -> list[dict[tuple[str, str], dict[str, float]]]:
    return one_rank(updates_by_micro_batch, checkpoints)[0]


@pytest.mark.parametrize("loss", [*LOSSES, *CORRECTIONS])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_eight_micro_batches_of_one_equal_one_of_eight(by_micro_batch, loss, aggregation):
    eight, some, one = (updates[loss, aggregation] for updates in by_micro_batch)
    assert one["grad_norm"] > 1e-3
    assert 0 < one["clip_fraction"] < 1
    assert ("rollout_correction/rs_masked" in one) == (loss == "rejecting")
    assert 0 < one.get("rollout_correction/rs_masked", 0.5) < 1
    # Every update adds rounding of its own to the weights that the next ones see.
    assert eight == pytest.approx(one, rel=1e-4)
    assert some == pytest.approx(one, rel=1e-4)


def train_alone(paths: dict[str, str]) -> dict:
    samples = make_samples(9)
    config = make_config(paths, warmup_steps=4, learning_rate=1e-2)
    engine = start_engine(config)
    found = {"base": engine.log_probs(samples)}
    found["token_mean"] = engine.update(samples, policy_gradient, aggregation="token_mean")
    found["second"] = engine.log_probs(samples)
    found["sequence_mean"] = engine.update(samples, policy_gradient, aggregation="sequence_mean")
    found["third"] = engine.log_probs(samples)
    found["sequence_sum_constant"] = engine.update(samples, policy_gradient, aggregation="sequence_sum_constant")
    found["rates"] = [engine.update(samples, policy_gradient)["learning_rate"] for _ in range(3)]
    found["trained"] = engine.log_probs(samples)
    found["reference"] = engine.log_probs(samples, reference=True)
    found["errors"] = [
        _error(engine, samples.select([]), policy_gradient),
        _error(engine, Samples([np.arange(4)], [0]), policy_gradient),
        _error(engine, samples, lambda log_probs, *rest: (log_probs.sum() * float("nan"), {})),
        _error(engine, samples, policy_gradient, aggregation="median"),
    ]
    return found


def _error(engine, *arguments, **named) -> str:
    try:
        engine.update(*arguments, **named)
    except (ValueError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


@pytest.fixture(scope="module")
def alone(one_rank, checkpoints) -> dict:
    return one_rank(train_alone, checkpoints)[0]


@pytest.mark.parametrize(
    ("aggregation", "before"),
    [("token_mean", "base"), ("sequence_mean", "second"), ("sequence_sum_constant", "third")],
)
def test_the_loss_is_the_mean_of_its_aggregation(alone, aggregation, before):
    scores = alone[before]
    advantages = make_samples(9).columns["advantages"]
    losses = [-p * a - 0.1 * e for p, e, a in zip(scores.log_probs, scores.entropy, advantages, strict=True)]
    means = {
        "token_mean": np.concatenate(losses).mean(),
        "sequence_mean": np.mean([loss.mean() for loss in losses]),
        # A response has 128 tokens at most by default, and the key that would say otherwise is not set.
        "sequence_sum_constant": np.mean([loss.sum() / 128 for loss in losses]),
    }
    assert alone[aggregation]["loss"] == pytest.approx(means[aggregation], rel=1e-5)
    assert alone[aggregation]["log_prob"] == pytest.approx(np.concatenate(scores.log_probs).mean(), rel=1e-5)
    assert alone[aggregation]["entropy"] == pytest.approx(np.concatenate(scores.entropy).mean(), rel=1e-5)


def test_the_reference_is_the_base_bit_for_bit_after_training(alone):
    for base, reference in zip(alone["base"].log_probs, alone["reference"].log_probs, strict=True):
        np.testing.assert_array_equal(base, reference)
    difference = np.abs(np.concatenate(alone["trained"].log_probs) - np.concatenate(alone["base"].log_probs))
    assert difference.max() > 0.1


def test_the_learning_rate_rises_over_the_warmup_updates(alone):
    rates = [*(alone[kind]["learning_rate"] for kind in AGGREGATIONS), *alone["rates"]]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_updates_that_cannot_be_done_say_why(alone):
    nothing, no_response, broken, unknown = alone["errors"]
    assert "no response token" in nothing
    assert "no response token" in no_response
    assert broken.startswith("FloatingPointError: the gradient norm of update 7 is nan")
    assert "'median' is neither" in unknown


def test_updates_raise_the_log_probs_of_good_tokens(alone):
    advantages = np.concatenate(make_samples(9).columns["advantages"])
    change = np.concatenate(alone["trained"].log_probs) - np.concatenate(alone["base"].log_probs)
    assert (change * advantages).mean() > 0.05


def unequal(paths: dict[str, str], counts: list[int], layout: dict) -> dict:
    """Data-parallel ranks with `counts` samples each."""
    engine = start_engine(make_config(paths, workers=len(counts), **layout))
    rank = engine.data_parallel_rank
    own = make_samples(sum(counts)).select(range(sum(counts[:rank]), sum(counts[: rank + 1])))
    updates = [engine.update(own, policy_gradient, aggregation=kind) for kind in ("token_mean", "sequence_mean")]
    scores = engine.log_probs(own)
    return {"updates": updates, "log_probs": scores.log_probs}


@pytest.mark.parametrize("counts", [[11, 1], [0, 12]], ids=["11 and 1", "0 and 12"])
@pytest.mark.parametrize("layout", [{}, {"expert_parallel": 2}], ids=["data 2", "expert 2"])
def test_ranks_with_unequal_sample_counts_train_as_one(one_rank, two_ranks, checkpoints, counts, layout):
    expected = one_rank(unequal, checkpoints, [12], {})[0]
    found = two_ranks(unequal, checkpoints, counts, layout)
    for rank in found:
        for update, other in zip(rank["updates"], expected["updates"], strict=True):
            assert update == pytest.approx(other, rel=1e-5)
    both = [*found[0]["log_probs"], *found[1]["log_probs"]]
    for values, others in zip(both, expected["log_probs"], strict=True):
        np.testing.assert_allclose(values, others, atol=1e-4)


def in_dtype(paths: dict[str, str], layout: dict) -> dict:
    engine = start_engine(make_config(paths, workers=2, dtype="bfloat16", **layout))
    own = share(make_samples(), engine.data_parallel_rank, engine.data_parallel_size)
    return {"updates": [engine.update(own, policy_gradient) for _ in range(4)]}


def float32_updates(paths: dict[str, str]) -> list[dict[str, float]]:
    engine = start_engine(make_config(paths))
    return [engine.update(make_samples(), policy_gradient) for _ in range(4)]


def test_bfloat16_training_follows_float32(one_rank, two_ranks, checkpoints):
    exact = one_rank(float32_updates, checkpoints)[0]
    for rank in two_ranks(in_dtype, checkpoints, {"expert_parallel": 2}):
        for update, expected in zip(rank["updates"], exact, strict=True):
            # bfloat16 keeps 8 bits: 2^-8 per rounding, and some routing near-ties fall the other way.
            assert update["loss"] == pytest.approx(expected["loss"], abs=0.05)
            assert update["log_prob"] == pytest.approx(expected["log_prob"], rel=0.02)
