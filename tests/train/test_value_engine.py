"""The critic and the reward model compute what transformers computes, whatever the layout, beside the policy."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qerl_rl.algorithms.losses import clipped_value_loss
from qerl_rl.algorithms.sequences import AGGREGATIONS
from qerl_rl.config.schema import Config, CriticConfig, RewardModelConfig
from qerl_rl.platform import detect, prepare_megatron
from qerl_rl.platform.state_store import SpillFile
from qerl_rl.train.value_engine import RewardModelEngine, ValueEngine
from tests.ranks import fresh_world
from tests.train.models import make_config, make_samples, policy_gradient, share, start_engine

LAYOUTS: dict[str, dict[str, Any]] = {
    "data 2": {},
    "tensor 2": {"tensor_parallel": 2},
    "expert 2": {"expert_parallel": 2},
    "pipeline 2": {"pipeline_parallel": 2},
    "tensor 2, expert 2, recompute": {"tensor_parallel": 2, "expert_parallel": 2, "recompute": "full"},
}
KINDS: dict[str, dict[str, Any]] = {"adapters": {"quant": "w8a8"}, "everything": {"quant": "none", "rank": 0}}
FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral")


def with_critic(config: Config, path: str = "", **critic: Any) -> Config:
    critic = {"learning_rate": 3e-3, **critic}
    return dataclasses.replace(config, critic=CriticConfig(path=path, **critic))


def start_critic(config: Config) -> ValueEngine:
    """A critic beside the policy of this process, which it starts anew."""
    policy = start_engine(config)
    policy.offload()
    return ValueEngine(config)


def returning(samples: Any) -> Any:
    """All samples with the columns of a critic's update."""
    generator = np.random.default_rng(8)
    columns = {
        name: [generator.normal(size=length).astype(np.float32) for length in samples.response_lengths]
        for name in ("values", "returns")
    }
    return dataclasses.replace(samples, columns=columns)


def value_loss(
    values: torch.Tensor, columns: dict[str, torch.Tensor], weights: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return clipped_value_loss(values, columns["values"], columns["returns"], weights, clip=0.5)


# ---- against transformers


def classifier(folder: Path, target: Path, seed: int = 4) -> Path:
    """Give the model in `folder` a head for one label in place of its vocabulary, as transformers saves it."""
    from transformers import AutoModelForSequenceClassification

    # The last token counts in full sequences: there is no padding to look for.
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32, pad_token_id=None
    )
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(seed)))
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, target / name)
    return target


@torch.no_grad()
def hf_values_and_scores(folder: Path, samples: Any) -> tuple[list[np.ndarray], np.ndarray]:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    by_token = AutoModelForTokenClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32).eval()
    by_token.score.bias.zero_()
    whole = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32).eval()
    values, scores = [], []
    for tokens, length in zip(samples.tokens, samples.response_lengths, strict=True):
        ids = torch.from_numpy(tokens)[None]
        values.append(by_token(ids).logits[0, -length - 1 : -1, 0].numpy())
        scores.append(whole(ids).logits[0, 0].item())
    return values, np.float32(scores)


def engine_values_and_scores(folder: Path, samples: Any, quant: str, tokens: int) -> tuple[list[np.ndarray], Any]:
    prepare_megatron(detect("cpu"))
    fresh_world()
    config = make_config({quant: str(folder)}, quant=quant, micro_batch_tokens=tokens)
    config = dataclasses.replace(config, reward_model=RewardModelConfig(path=str(folder)))
    return ValueEngine(config).values(samples), RewardModelEngine(config).scores(samples)  # type: ignore[return-value]


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_scores_equal_those_of_transformers(one_rank, tiny_checkpoint, tmp_path, family):
    folder = classifier(tiny_checkpoint(family, layers=2), tmp_path)
    samples = make_samples()
    expected, expected_scores = hf_values_and_scores(folder, samples)
    for tokens in (1, 100_000):
        values, scores = one_rank(engine_values_and_scores, folder, samples, "none", tokens)[0]
        assert [len(row) for row in values] == samples.response_lengths
        np.testing.assert_allclose(np.concatenate(values), np.concatenate(expected), atol=1e-4)
        np.testing.assert_allclose(scores, expected_scores, atol=1e-4)
    assert np.concatenate(expected).std() > 0.3


# ---- against one rank


def learn(paths: dict[str, str], cases: dict[str, dict], kind: dict) -> dict[str, dict]:
    """Three updates of the critic in each case, one of each aggregation; what came out, by case."""
    found = {}
    for name, settings in cases.items():
        critic = start_critic(with_critic(make_config(paths, workers=2, **kind, **settings)))
        own = share(returning(make_samples()), critic.data_parallel_rank, critic.data_parallel_size)
        first = critic.values(own)
        updates = [critic.update(own, value_loss, aggregation=aggregation) for aggregation in AGGREGATIONS]
        values = critic.values(own)
        head = critic.snapshot().tensors.get("critic/parameter/output_layer.weight")
        found[name] = {
            "updates": updates,
            "data_parallel_rank": critic.data_parallel_rank,
            "first": first and np.concatenate(first),
            "values": values and np.concatenate(values),
            "head": None if head is None else head.numpy(),
        }
    return found


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def alone(one_rank, checkpoints, kind) -> dict:
    return one_rank(learn, checkpoints, {"alone": {}}, KINDS[kind])[0]["alone"]


@pytest.fixture(scope="module")
def together(two_ranks, checkpoints, kind) -> list[dict]:
    return two_ranks(learn, checkpoints, LAYOUTS, KINDS[kind])


@pytest.mark.parametrize("case", LAYOUTS)
def test_losses_gradients_head_and_values_equal_those_of_one_rank(alone, together, case):
    for rank in together:
        assert rank[case]["updates"] == together[0][case]["updates"]
        for update, expected in zip(rank[case]["updates"], alone["updates"], strict=True):
            assert update == pytest.approx(expected, rel=1e-5)
        if rank[case]["head"] is not None:
            np.testing.assert_allclose(rank[case]["head"], alone["head"], rtol=1e-3, atol=1e-5)
    assert any(rank[case]["head"] is not None for rank in together)
    outputs = {rank[case]["data_parallel_rank"]: rank[case] for rank in together if rank[case]["values"] is not None}
    found = np.concatenate([outputs[rank]["values"] for rank in sorted(outputs)])
    np.testing.assert_allclose(found, alone["values"], rtol=1e-4, atol=1e-4)


def test_a_critic_without_a_head_in_its_checkpoint_expects_nothing_at_first(alone):
    assert not alone["first"].any()
    assert np.abs(alone["values"]).max() > 1e-2
    # The head's gradient is there from the start; the adapters' follows once the head is not zero.
    assert alone["updates"][0]["grad_norm"] > 1e-2


def by_micro_batch(paths: dict[str, str]) -> list[list[dict[str, float]]]:
    samples, found = returning(make_samples(8)), []
    for tokens in (1, 60, 100_000):
        critic = start_critic(with_critic(make_config(paths, micro_batch_tokens=tokens)))
        found.append([critic.update(samples, value_loss, aggregation=name) for name in AGGREGATIONS])
    return found


def test_eight_micro_batches_of_one_equal_one_of_eight(one_rank, checkpoints):
    eight, some, one = one_rank(by_micro_batch, checkpoints)[0]
    for found in (eight, some):
        for update, expected in zip(found, one, strict=True):
            assert update == pytest.approx(expected, rel=1e-5)
    assert 0 < one[0]["value_clip_fraction"] < 1


# ---- beside the policy


def beside(paths: dict[str, str], layout: dict, folder: str) -> dict:
    """A policy that learns alone, and one that shares its process with a critic that learns and leaves memory."""
    config = with_critic(make_config(paths, workers=2, **layout), warmup_steps=2)
    engine = start_engine(config)
    place = engine.data_parallel_rank, engine.data_parallel_size
    own, returns = share(make_samples(), *place), share(returning(make_samples()), *place)
    alone = [engine.update(own, policy_gradient) for _ in range(2)]
    policy = start_engine(config, store=SpillFile(folder))
    policy.offload()
    critic = ValueEngine(config, SpillFile(folder))
    shared, rates = [], []
    for _ in range(2):
        rates.append(critic.update(returns, value_loss)["learning_rate"])
        critic.offload()
        away = critic.held_bytes()
        policy.onload()
        shared.append(policy.update(own, policy_gradient))
        policy.offload()
        critic.onload()
    return {"alone": alone, "shared": shared, "rates": rates, "away": away}


@pytest.mark.parametrize("layout", ["data 2", "tensor 2", "pipeline 2"])
def test_the_policy_learns_as_if_there_were_no_critic(two_ranks, checkpoints, tmp_path, layout):
    for rank in two_ranks(beside, checkpoints, LAYOUTS[layout], str(tmp_path)):
        assert rank["shared"] == rank["alone"]
        assert rank["rates"] == [1.5e-3, 3e-3]
        assert rank["away"] == {"parameters": 0, "gradients": 0, "optimizer": 0}


def in_another_layout(paths: dict[str, str]) -> str:
    start_engine(make_config(paths, workers=2))
    try:
        ValueEngine(make_config(paths, workers=2, **LAYOUTS["tensor 2"]))
    except RuntimeError as error:
        return str(error)
    return ""


def test_models_of_one_process_share_one_layout(two_ranks, checkpoints):
    for message in two_ranks(in_another_layout, checkpoints):
        assert "groups for ParallelSizes(tensor=1" in message
        assert "wants ParallelSizes(tensor=2" in message


def step_of_both(policy: Any, critic: ValueEngine) -> list[dict[str, float]]:
    place = policy.data_parallel_rank, policy.data_parallel_size
    return [
        policy.update(share(make_samples(), *place), policy_gradient),
        critic.update(share(returning(make_samples()), *place), value_loss),
    ]


def resumed(paths: dict[str, str], layouts: tuple[dict, dict], folder: str) -> dict:
    """Two steps, a checkpoint, a third; and a third in the second layout, from the checkpoint, which is saved again."""
    first, second = (with_critic(make_config(paths, workers=2, **layout)) for layout in layouts)
    policy = start_engine(first)
    critic = ValueEngine(first)
    for _ in range(2):
        step_of_both(policy, critic)
    policy.save_checkpoint(folder, 1, beside=[critic.snapshot()])
    straight = step_of_both(policy, critic)
    policy = start_engine(second)
    critic = ValueEngine(second)
    for engine in (critic, policy):
        engine.load_checkpoint(folder, 1)
    policy.save_checkpoint(folder, 2, beside=[critic.snapshot()])
    return {"straight": straight, "resumed": step_of_both(policy, critic), "updates": critic.updates}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_holds_the_critic_too_bit_for_bit(two_ranks, checkpoints, tmp_path, dtype):
    layout = {"tensor_parallel": 2, "expert_parallel": 2, "dtype": dtype}
    for rank in two_ranks(resumed, checkpoints, (layout, layout), str(tmp_path)):
        assert rank["resumed"] == rank["straight"]
        assert rank["updates"] == 3


ROUND_TRIPS = [("data 2", "tensor 2"), ("pipeline 2", "expert 2"), ("expert 2", "pipeline 2")]


@pytest.mark.parametrize("pair", ROUND_TRIPS, ids=" to ".join)
def test_another_layout_takes_adapters_and_head_of_the_critic_along(two_ranks, checkpoints, tmp_path, pair):
    layouts = LAYOUTS[pair[0]], LAYOUTS[pair[1]]
    for rank in two_ranks(resumed, checkpoints, layouts, str(tmp_path)):
        for found, expected in zip(rank["resumed"], rank["straight"], strict=True):
            assert found == pytest.approx(expected, rel=1e-4)
    # The optimizer's shards of the head, whichever ranks hold them, are the same numbers.
    heads = [head_state(tmp_path / f"step_0000000{step}") for step in (1, 2)]
    assert set(heads[0]) == {"master", "exp_avg", "exp_avg_sq"}
    for kind, expected in heads[0].items():
        np.testing.assert_array_equal(heads[1][kind], expected)


def head_state(folder: Path) -> dict[str, np.ndarray]:
    """The head and its moments, [hidden] each, out of the shards of all ranks."""
    prefix, found = "critic/optimizer/output_layer.weight/", {}
    for path in sorted(folder.glob("rank_*")):
        tensors = load_file(path)
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            if prefix + kind in tensors:
                part, begin = tensors[prefix + kind].numpy(), int(tensors[f"{prefix}offset"])
                whole = found.setdefault(kind, np.full(64, np.nan, np.float32))
                whole[begin : begin + part.size] = part.reshape(-1)
    assert all(np.isfinite(whole).all() for whole in found.values())
    return found
