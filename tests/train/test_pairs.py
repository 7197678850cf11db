"""Updates from pairs: against transformers and the formulas, and however pairs are packed and laid out over ranks."""

import numpy as np
import pytest
import torch

from qerl_rl.algorithms.dpo import PREFERENCE_LOSSES, pair_loss
from qerl_rl.algorithms.sequences import PAIR_MEAN
from qerl_rl.config.schema import DpoConfig
from qerl_rl.train.packing import partition_alike
from tests.train.models import make_config, make_samples, share, start_engine

BETA, FLIPPED = 0.3, 0.1
CONFIGS = {loss: DpoConfig(loss=loss, beta=BETA, flip_probability=FLIPPED) for loss in PREFERENCE_LOSSES}
SIZES = (1, 60, 100_000)
LAYOUTS = {
    "data 2": {},
    "tensor 2, sequence parallel": {"tensor_parallel": 2},
    "expert 2": {"expert_parallel": 2},
    "pipeline 2": {"pipeline_parallel": 2},
    "tensor 2, expert 2": {"tensor_parallel": 2, "expert_parallel": 2},
}


def make_pairs(engine=None, count: int = 8):
    """Samples 0 and 1, 2 and 3, ... are pairs; their reference is near what `engine` gives (near -3 without one)."""
    samples = make_samples(2 * count)
    noise = np.random.default_rng(5)
    found = engine.log_probs(samples) if engine else None
    rows = found.log_probs if found else [np.full(length, -3.0) for length in samples.response_lengths]
    samples.columns["reference_log_probs"] = [(row + noise.normal(0, 0.2, len(row))).astype(np.float32) for row in rows]
    return samples


def update_everything(paths: dict[str, str]) -> dict[str, dict]:
    """One update of all weights of the float32 model with each loss, and the pairs it was made on."""
    found = {}
    for loss, config in CONFIGS.items():
        engine = start_engine(make_config(paths, quant="none", rank=0))
        samples = make_pairs(engine)
        found[loss] = {
            "reference": samples.columns["reference_log_probs"],
            "update": engine.update(samples, pair_loss(config), aggregation=PAIR_MEAN),
        }
    return found


@pytest.fixture(scope="module")
def everything(one_rank, checkpoints):
    return one_rank(update_everything, checkpoints)[0]


def by_formula(loss: str, margin: torch.Tensor) -> torch.Tensor:
    """Of h: DPO (2305.18290) eq. 7, its conservative variant, IPO (2310.12036) eq. 17."""
    right, wrong = -torch.log(torch.sigmoid(BETA * margin)), -torch.log(torch.sigmoid(-BETA * margin))
    return {"dpo": right, "cdpo": (1 - FLIPPED) * right + FLIPPED * wrong, "ipo": (margin - 1 / (2 * BETA)) ** 2}[loss]


@pytest.mark.parametrize("loss", CONFIGS)
def test_loss_metrics_and_gradient_norm_equal_those_of_transformers(everything, checkpoints, loss):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints["none"], dtype=torch.float32)
    temperature, samples = make_config(checkpoints).rollout.temperature, make_samples(16)
    gains = []
    for tokens, length, reference in zip(
        samples.tokens, samples.response_lengths, everything[loss]["reference"], strict=True
    ):
        logits = model(torch.from_numpy(tokens)[None]).logits[0, -length - 1 : -1] / temperature
        log_probs = torch.log_softmax(logits, dim=-1).gather(1, torch.from_numpy(tokens[-length:])[:, None])
        gains.append(log_probs.sum() - reference.sum())
    chosen, rejected = torch.stack(gains[::2]), torch.stack(gains[1::2])
    expected = by_formula(loss, chosen - rejected).mean()
    expected.backward()
    squares = [parameter.grad.square().sum() for parameter in model.parameters() if parameter.grad is not None]
    assert everything[loss]["update"] == pytest.approx(
        {
            "loss": expected.item(),
            "grad_norm": torch.stack(squares).sum().sqrt().item(),
            "learning_rate": 3e-3,
            "preference/loss": expected.item(),
            "preference/accuracy": (chosen > rejected).float().mean().item(),
            "preference/margin": BETA * (chosen - rejected).mean().item(),
            "preference/reward_chosen": BETA * chosen.mean().item(),
            "preference/reward_rejected": BETA * rejected.mean().item(),
        },
        rel=1e-3,
        abs=1e-5,
    )


def updates_by_micro_batch(paths: dict[str, str]) -> list[dict[str, list[dict[str, float]]]]:
    samples = make_pairs(start_engine(make_config(paths)))
    found = []
    for tokens in SIZES:
        engine = start_engine(make_config(paths, micro_batch_tokens=tokens))
        found.append(
            {
                loss: [engine.update(samples, pair_loss(config), aggregation=PAIR_MEAN) for _ in range(2)]
                for loss, config in CONFIGS.items()
            }
        )
    return found


@pytest.fixture(scope="module")
def by_micro_batch(one_rank, checkpoints):
    return one_rank(updates_by_micro_batch, checkpoints)[0]


@pytest.mark.parametrize("loss", CONFIGS)
def test_eight_micro_batches_of_a_pair_equal_one_of_eight(by_micro_batch, loss):
    eight, some, one = (updates[loss] for updates in by_micro_batch)
    for own in (eight, some):
        for update, expected in zip(own, one, strict=True):
            assert update == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert one[0]["grad_norm"] > 1e-3


def train(paths: dict[str, str], cases: dict[str, dict], workers: int) -> dict[str, list[dict[str, float]]]:
    """Three updates in each case; a rank of `data 2, uneven` has one pair, its peer seven."""
    found = {}
    for name, settings in cases.items():
        engine = start_engine(make_config(paths, workers=workers, **settings))
        samples = make_pairs()
        own = share(samples, engine.data_parallel_rank, engine.data_parallel_size)
        if name == "data 2, uneven":
            own = samples.select(range(2) if engine.data_parallel_rank else range(2, 16))
        found[name] = [engine.update(own, pair_loss(CONFIGS["dpo"]), aggregation=PAIR_MEAN) for _ in range(3)]
    return found


@pytest.fixture(scope="module")
def alone(one_rank, checkpoints):
    return one_rank(train, checkpoints, {"alone": {}}, 1)[0]["alone"]


@pytest.fixture(scope="module")
def together(two_ranks, checkpoints):
    return two_ranks(train, checkpoints, LAYOUTS | {"data 2, uneven": {}}, 2)


@pytest.mark.parametrize("case", [*LAYOUTS, "data 2, uneven"])
def test_updates_equal_those_of_one_rank(alone, together, case):
    for rank in together:
        assert rank[case] == together[0][case]
        for update, expected in zip(rank[case], alone, strict=True):
            assert update == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_pairs_are_never_parted_and_half_a_pair_is_refused():
    lengths = [5, 9, 30, 2, 4, 4, 7, 50]
    batches = partition_alike(lengths, 20, lambda count: max(count, 6), together=2)
    assert sorted(index for batch in batches for index in batch) == list(range(8))
    assert len(batches) == 6
    for batch in batches:
        assert all(first % 2 == 0 for first in batch[::2])
        assert batch[1::2] == [first + 1 for first in batch[::2]]
    with pytest.raises(ValueError, match="7 samples are no multiple of the 2"):
        partition_alike(lengths[:7], 20, lambda count: count, together=2)


def test_a_loss_without_its_columns_or_with_an_odd_response_says_so():
    function = pair_loss(CONFIGS["dpo"])
    three = {"sequence_ids": torch.tensor([0, 1, 2]), "reference_log_probs": torch.zeros(3)}
    with pytest.raises(ValueError, match="3 sequences are no pairs"):
        function(torch.zeros(3), torch.zeros(3), three, torch.ones(3))
    with pytest.raises(ValueError, match="reference_log_probs"):
        function(torch.zeros(2), torch.zeros(2), {"sequence_ids": torch.tensor([0, 1])}, torch.ones(2))
