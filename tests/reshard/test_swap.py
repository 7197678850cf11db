"""After a swap the rollout engine serves the trainer's policy: real engines, two ranks, ten updates between."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import run_engines, run_ranks

_random = np.random.default_rng(5)
PROMPTS = [_random.integers(8, 60, length).tolist() for length in _random.integers(3, 12, 64)]
"""So many that the mean over their 2,048 tokens does not hang on the few whose experts change."""
RESPONSE_TOKENS = 32
UPDATES = 10


def base_config(model, folder, train, rollout):
    from qerl_rl.config.loader import from_dict

    sections = {
        "run": {"output_dir": str(folder), "seed": 3},
        "model": {"path": str(model), "max_length": 64},
        "train": {"learning_rate": 5e-3, "micro_batch_tokens": 512, **train},
        "noise": {"enabled": True, "sigma_start": 0.05, "stages": 2, "exempt_router": True},
        "rollout": {"max_response_tokens": RESPONSE_TOKENS, "max_sequences": 16, "kv_cache_bytes": 8 << 20, **rollout},
    }
    import dataclasses

    from qerl_rl.config.schema import Config

    values = dataclasses.asdict(Config())
    for name, keys in sections.items():
        values[name].update(keys)
    return from_dict(values)


def start_worker(config):
    """A worker as Ray would make it, in this process."""
    import dataclasses

    from workers import ActorHybridWorker

    worker = ActorHybridWorker(dataclasses.asdict(config), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    worker.start(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    return worker


def greedy(engine):
    """All ranks answer all prompts, so that results can be compared whatever the layout."""
    from qerl_rl.rollout.engine import GroupRequest

    requests = [GroupRequest(i, np.array(prompt, dtype=np.int32), 1, 7) for i, prompt in enumerate(PROMPTS)]
    outputs = {output.group: output for output in engine.generate(requests, greedy=True)}
    tokens = [outputs[i].responses[0] for i in range(len(PROMPTS))]
    return tokens, [outputs[i].log_probs[0] for i in range(len(PROMPTS))]


def samples_of(responses, advantages=None):
    from qerl_rl.train.samples import Samples

    tokens = [np.concatenate([p, r]).astype(np.int64) for p, r in zip(PROMPTS, responses, strict=True)]
    columns = {}
    if advantages is not None:
        columns["advantages"] = [
            np.full(len(r), a, dtype=np.float32) for r, a in zip(responses, advantages, strict=True)
        ]
    return Samples(tokens, [len(r) for r in responses], columns)


def policy_gradient(log_probs, entropy, columns, token_weights):
    loss = -(token_weights * columns["advantages"] * log_probs).sum()
    return loss, {"entropy": entropy.detach().sum()}


def share(samples, worker):
    size = worker.train.data_parallel_size
    return samples.select(list(range(worker.train.data_parallel_rank, len(PROMPTS), size)))


def difference(worker, responses, log_probs, noise=None):
    """|engine - trainer| for each of this rank's tokens; none on ranks without output."""
    samples = share(samples_of(responses), worker)
    scores = worker.train.log_probs(samples, noise=noise)
    if scores is None:
        return np.zeros(0)
    own = log_probs[worker.train.data_parallel_rank :: worker.train.data_parallel_size]
    return np.abs(np.concatenate(own) - np.concatenate(scores.log_probs))


class Twins:
    """The worker's trainer and, where that reads the engine's memory, one that stores all its weights itself."""

    def __init__(self, worker):
        from qerl_rl.train.engine import TrainEngine

        shares = worker.rollout.held_bytes()["shared"] > 0
        self.engines = [worker.train, *([TrainEngine(worker.config)] if shares else [])]
        *_, whole = self.engines
        self.experts = sum(buffer.nbytes for name, buffer in whole.model.named_buffers() if ".experts.w" in name)
        held = [engine.held_bytes()["parameters"] for engine in self.engines]
        self.spared, self.alike = held[-1] - held[0], True

    def update(self, samples):
        first, *others = [engine.update(samples, policy_gradient) for engine in self.engines]
        self.alike &= all(first == other for other in others)

    def score(self, samples, **options):
        first, *others = [engine.log_probs(samples, **options) for engine in self.engines]
        for other in others if first else ():
            pairs = zip(first.log_probs + first.entropy, other.log_probs + other.entropy, strict=True)
            self.alike &= all(np.array_equal(a, b) for a, b in pairs)


def train_and_swap(model, folder, train, rollout):
    worker = start_worker(base_config(model, folder, train, rollout))
    twins = Twins(worker)
    worker.swap_to_rollout(0)
    before_tokens, before_log_probs = greedy(worker.rollout)
    held_in_rollout = worker.swap.held_bytes()
    report = worker.swap_to_train()
    before = difference(worker, before_tokens, before_log_probs)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], len(PROMPTS))
    for _ in range(UPDATES):
        twins.update(share(samples_of(before_tokens, signs), worker))
    worker.swap_to_rollout(0)
    after_tokens, after_log_probs = greedy(worker.rollout)
    worker.swap_to_train()
    after = difference(worker, after_tokens, after_log_probs)
    # Beside the train state, which stays in memory, the engine serves the same policy.
    published = worker.publish(0)
    again = greedy(worker.rollout)
    worker.export(str(Path(folder) / "export"))
    last = worker.config.run.steps
    worker.swap_to_rollout(last)
    noisy = greedy(worker.rollout)
    worker.swap_to_train()
    samples = share(samples_of(after_tokens), worker)
    twins.score(samples, noise=worker.swap.noise_of(last))
    # What the trainer reads in the engine's memory stays there.
    worker.rollout.release_weights(None)
    twins.score(samples, reference=True)
    return {
        "base": (worker._base, twins.experts, twins.spared, twins.alike),
        "noisy": difference(worker, *noisy, noise=worker.swap.noise_of(last)),
        "noise unknown": difference(worker, *noisy),
        "before": before,
        "after": after,
        "tokens": (before_tokens, after_tokens),
        "log_probs": after_log_probs,
        "held_in_rollout": held_in_rollout,
        "held_in_train": report.held_bytes,
        "published": (again, published.held_bytes, published.released_bytes),
    }


def fresh_engine(model, folder, config_sections):
    """An engine that never saw the trainer, loaded from the checkpoint and the exported adapter."""
    import torch
    from safetensors.torch import load_file

    from qerl_rl.rollout.vllm_engine import VllmEngine

    torch.distributed.init_process_group("gloo")
    config = base_config(model, folder, {}, config_sections)
    engine = VllmEngine(str(model), config.rollout, config.lora, max_length=64, seed=3)
    engine.set_adapters(load_file(Path(folder) / "export" / "adapters.safetensors"))
    return greedy(engine)


LAYOUTS = [
    ({"expert_parallel": 2}, {"data_parallel": 2}),
    ({"tensor_parallel": 2}, {"tensor_parallel": 2, "data_parallel": 1}),
    ({"pipeline_parallel": 2}, {"tensor_parallel": 2, "data_parallel": 1, "expert_parallel": False}),
]


@pytest.mark.parametrize(("train", "rollout"), LAYOUTS, ids=["ep2-to-dp2ep2", "tp2-to-tp2ep2", "pp2-to-tp2"])
def test_the_engine_follows_the_trainer_through_ten_updates(tmp_path, tiny_w8a8, train, rollout):
    model = tiny_w8a8("qwen3_moe")
    ranks = run_ranks(train_and_swap, 2, model, tmp_path, train, rollout)

    gaps = {
        when: np.concatenate([rank[when] for rank in ranks]) for when in ("before", "after", "noisy", "noise unknown")
    }

    old, new = ranks[0]["tokens"]
    assert any(not np.array_equal(a, b) for a, b in zip(old, new, strict=True)), "ten updates changed no answer"
    assert gaps["after"].mean() <= gaps["before"].mean()
    # A trainer that knows the noise is about as close to what sampled as without any.
    assert gaps["noisy"].mean() < gaps["noise unknown"].mean() / 2

    held = ranks[0]["held_in_rollout"], ranks[0]["held_in_train"]
    assert held[0]["train/optimizer"] == held[0]["train/gradients"] == held[0]["train/parameters"] == 0
    assert held[0]["rollout/kv_cache"] > 0
    assert held[1]["rollout/kv_cache"] == 0
    assert held[1]["train/parameters"] > 0
    (tokens, log_probs), both, released = ranks[0]["published"]
    assert all(np.array_equal(a, b) for a, b in zip(tokens, new, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(log_probs, ranks[0]["log_probs"], strict=True))
    assert min(both["train/parameters"], both["rollout/kv_cache"]) > 0
    assert released == {}

    # Where both hold the same experts, whole, the trainer has none of its own; where not, all.
    for rank in ranks:
        said, experts, spared, alike = rank["base"]
        shared = [rank[when]["rollout/shared"] for when in ("held_in_rollout", "held_in_train")]
        assert [spared, *shared] == [experts if train == {"expert_parallel": 2} else 0] * 3
        assert said.startswith("base stored once" if spared else "base stored for each engine: no experts")
        assert alike

    fresh_tokens, fresh_log_probs = run_engines(fresh_engine, 2, model, tmp_path, rollout)[0]
    # An early end of sequence would quietly shrink what is compared.
    assert [len(response) for response in new] == [RESPONSE_TOKENS] * len(PROMPTS)
    for after, fresh in zip(new, fresh_tokens, strict=True):
        np.testing.assert_array_equal(after, fresh)
    for after, fresh in zip(ranks[0]["log_probs"], fresh_log_probs, strict=True):
        np.testing.assert_allclose(after, fresh, atol=1e-3)
