"""Every train layout to every rollout layout, with real engines: what is served after a swap is what a fresh engine is.

One pair of processes a rollout layout. Its engine is built on the checkpoint, which is the fresh one; then its weights
are wiped out before each swap, so that whatever it says afterwards has come from the trainer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from qerl_rl.config.schema import (
    ClusterConfig,
    Config,
    LoraConfig,
    ModelConfig,
    QuantConfig,
    RolloutConfig,
    RunConfig,
    SwapConfig,
    TrainConfig,
)
from qerl_rl.layout.holdings import Box
from qerl_rl.layout.tensors import Adapters
from qerl_rl.reshard.canary import CanaryError
from qerl_rl.reshard.checksum import ChecksumError
from qerl_rl.reshard.plan import Copy, RankPlan
from qerl_rl.rollout.adapters import AdapterSet
from tests.ranks import run_engines
from tests.rollout.scenes import LORA, random_adapters

TRAIN = {
    "tp2": {"tensor_parallel": 2},
    "ep2": {"expert_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "dp2": {},
}
ROLLOUT = {
    "tp2": {"tensor_parallel": 2, "data_parallel": 1},
    "dp2ep2": {"tensor_parallel": 1, "data_parallel": 2},
    "tp1": {"tensor_parallel": 1, "data_parallel": 2, "expert_parallel": False},
}
LENGTHS = (5, 40, 270)
"""Tokens of the prompts; a block of the prefix cache has 128."""


def make_config(model: Path, rank: int, rollout: dict[str, Any], train: dict[str, Any], **swap: Any) -> Config:
    return Config(
        run=RunConfig(output_dir=str(model)),
        cluster=ClusterConfig(workers=2),
        model=ModelConfig(path=str(model), max_length=400),
        quant=QuantConfig(format="w8a8"),
        lora=LoraConfig(rank=rank, alpha=LORA.alpha),
        train=TrainConfig(device="cpu", **train),
        rollout=RolloutConfig(max_response_tokens=12, kv_cache_bytes=16 << 20, **rollout),
        swap=SwapConfig(bucket_bytes=1 << 16, release_weights=True, **swap),
    )


def make_engine(config: Config) -> Any:
    from qerl_rl.platform import detect, prepare_megatron
    from qerl_rl.rollout.vllm_engine import VllmEngine

    prepare_megatron(detect("cpu"))
    dist.init_process_group("gloo")
    return VllmEngine(
        config.model.path, config.rollout, config.lora, max_length=400, seed=0, quantize_to=config.quant.format
    )


def make_trainer(config: Config) -> Any:
    """In place of the one before, in the process group that the engine keeps."""
    from megatron.core import parallel_state

    from qerl_rl.train.engine import TrainEngine

    parallel_state.destroy_model_parallel()
    # Megatron forgets to forget these.
    parallel_state._POSITION_EMBEDDING_GLOBAL_RANKS = None
    parallel_state._EMBEDDING_GLOBAL_RANKS = None
    return TrainEngine(config)


def greedy(engine: Any) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probs; every rank asks everything, so that layouts can be compared."""
    from qerl_rl.rollout.engine import GroupRequest

    draw = np.random.default_rng(0)
    prompts = [draw.integers(4, 60, length).astype(np.int32) for length in LENGTHS]
    requests = [GroupRequest(group, prompt, 1, seed=group) for group, prompt in enumerate(prompts)]
    found = {output.group: output for output in engine.generate(requests, greedy=True)}
    return [(found[i].responses[0].tolist(), found[i].log_probs[0].tolist()) for i in range(len(prompts))]


def wipe(target: Any) -> None:
    for local in target.locals:
        target.write(local).zero_()
        target.complete(local)
    target.finish()


def all_pairs(model: Path, quantized: Path, rollout: dict[str, Any]) -> dict[str, Any]:
    """What a fresh engine serves, with and without adapters, and what one does after a swap from each train layout."""
    from qerl_rl.reshard.swap import Swap

    engine = make_engine(make_config(model, 0, rollout, {}))
    found: dict[str, Any] = {"fresh": greedy(engine), "errors": {}}
    for name, train in TRAIN.items():
        wipe(engine.weight_target())
        found["wiped"] = greedy(engine)
        config = make_config(model, 0, rollout, train)
        trainer = make_trainer(config)
        swap = Swap(trainer, engine, config)
        with what_leaves(trainer) as found[f"left, {name}"]:
            report = swap.to_rollout(0)
        found[name] = greedy(engine), dataclasses.asdict(report)
        if name == "pp2":
            found["back"] = there_and_back(swap, engine)
        if name == "ep2" and rollout == ROLLOUT["dp2ep2"]:
            found["errors"] = errors_of_broken_swaps(swap, engine, config)
    adapters = random_adapters(quantized, seed=5)
    config = make_config(quantized, LORA.rank, rollout, {})
    engine._adapters, engine._adapter_kinds = AdapterSet(engine.model, config.lora), Adapters(config.lora)
    engine.set_adapters(adapters)
    found["fresh, adapted"] = greedy(engine)
    for name, train in TRAIN.items():
        wipe(engine.adapter_target())
        config = make_config(quantized, LORA.rank, rollout, train)
        trainer = make_trainer(config)
        trainer.load_adapters(adapters)
        swap = Swap(trainer, engine, config)
        report = swap.to_rollout(0)
        found[f"{name}, adapted"] = greedy(engine), dataclasses.asdict(report)
        if name == "pp2":
            found["back, adapted"] = there_and_back(swap, engine)
    return found


@contextmanager
def what_leaves(trainer: Any) -> Iterator[list[tuple[int, int]]]:
    """(bytes of a parameter, bytes of parameters in memory once it has been sent) of each, in the order of a swap.

    The first are (0, what there is before).
    """
    let_go, seen = trainer.let_go, [(0, trainer.held_bytes()["parameters"])]

    def watched(name: str, parameter: torch.Tensor) -> None:
        let_go(name, parameter)
        trainer.finish_moves()
        seen.append((parameter.nbytes, trainer.held_bytes()["parameters"]))

    trainer.let_go = watched
    try:
        yield seen
    finally:
        del trainer.let_go


def there_and_back(swap: Any, engine: Any) -> tuple[Any, dict[str, int], dict[str, int]]:
    """What is served after a phase of training, and the bytes held in that and after it."""
    held = swap.to_train().held_bytes
    report = swap.to_rollout(1)
    assert (report.checksum_bytes, report.canary) == (0, None), "checks were for the first swap"
    return greedy(engine), held, report.held_bytes


@pytest.mark.parametrize("rollout", ROLLOUT)
def test_every_train_layout_gives_what_a_fresh_engine_serves(tiny_checkpoint, tiny_quantized, tiny_fused, rollout):
    model = tiny_checkpoint("qwen3_moe", "bfloat16")
    quantized = tiny_quantized(model, "w8a8")
    # Once from a checkpoint whose experts of a layer are one tensor.
    ranks = run_engines(all_pairs, 2, tiny_fused(model) if rollout == "tp1" else model, quantized, ROLLOUT[rollout])
    for found in ranks:
        for mode in ("", ", adapted"):
            for name in TRAIN:
                served, report = found[name + mode]
                assert served == found["fresh" + mode], name + mode
                assert report["moved_bytes"] > 0
                assert report["traffic"]["over_lower_bound"] == 1.0
            served, in_train, in_rollout = found["back" + mode]
            assert served == found["fresh" + mode]
            # Some lie in handlers of kernels, which can't leave.
            assert in_train["rollout/weights"] < 0.6 * in_rollout["rollout/weights"]
            assert in_train["rollout/kv_cache"] == in_rollout["train/parameters"] == 0
        assert found["wiped"] != found["fresh"] != found["fresh, adapted"]
        for name in TRAIN:
            (_, all_of_them), *left = found[f"left, {name}"]
            sizes, held = zip(*left, strict=True)
            assert list(held) == [all_of_them - size for size in itertools.accumulate(sizes)]
            # What is left pads the buffers.
            assert held[-1] < 0.01 * all_of_them
    # Each byte of the engines is summed up once, on whichever rank; of the trainer's copies one is.
    for name in TRAIN:
        summed = sum(found[name][1]["checksum_bytes"] for found in ranks)
        assert summed > sum(found[name][1]["moved_bytes"] for found in ranks)
    if rollout == "dp2ep2":
        assert_noticed([found["errors"] for found in ranks])


def errors_of_broken_swaps(swap: Any, engine: Any, config: Config) -> dict[str, str]:
    """What is said of a plan that puts experts in each other's places, by either check, and of a byte that flips."""
    from qerl_rl.reshard.swap import Swap

    found = {}
    trainer, plan = swap._train, swap._policy._rank_plan
    trainer.onload()
    weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    for name, checks in (("checksum", ("always", "never")), ("canary", ("never", "always"))):
        own = dataclasses.replace(config, swap=SwapConfig(checksum=checks[0], canary=checks[1], canary_tolerance=0.2))
        trainer.onload()
        broken = Swap(trainer, engine, own)
        broken._policy.__dict__["_rank_plan"] = with_experts_exchanged(plan)
        found[name] = error_of(lambda swap=broken: swap.to_rollout(3))
    trainer.onload()
    flipped = Swap(trainer, engine, dataclasses.replace(config, swap=SwapConfig(checksum="always", canary="never")))
    with one_byte_flipped():
        found["byte"] = error_of(lambda: flipped.to_rollout(4))
    trainer.onload()
    assert all(map(torch.equal, trainer.model.parameters(), weights)), "the trainer lost what it had sent"
    return found


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except (ChecksumError, CanaryError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def with_experts_exchanged(plan: RankPlan) -> RankPlan:
    """A plan in which each of a rank's experts goes where the next one belongs."""
    buckets = []
    for bucket in plan.buckets:
        copies: list[Copy] = []
        for copy in bucket.copies:
            places = rows(copy.source.box) if ".experts." in copy.target.local else [copy.source.box]
            for place, other in zip(places, [*places[1:], places[0]], strict=True):
                copies.append(Copy(copy.source.narrowed(place), copy.target.narrowed(other)))
        buckets.append(dataclasses.replace(bucket, copies=tuple(copies)))
    return dataclasses.replace(plan, buckets=tuple(buckets))


def rows(box: Box) -> list[Box]:
    """One for each index of the first dimension."""
    return [Box((first, *box.start[1:]), (first + 1, *box.stop[1:])) for first in range(box.start[0], box.stop[0])]


@contextmanager
def one_byte_flipped() -> Iterator[None]:
    """Of what rank 1's engine is given of an attention layer's output projection."""
    from qerl_rl.reshard.checksum import _CountedTarget

    complete = _CountedTarget.complete

    def spoiled(self: Any, local: str) -> None:
        if dist.get_rank() == 1 and local == "model.layers.1.self_attn.o_proj.weight":
            self.write(local).view(torch.uint8).view(-1)[17] ^= 1
        complete(self, local)

    _CountedTarget.complete = spoiled  # type: ignore[method-assign]
    try:
        yield
    finally:
        _CountedTarget.complete = complete  # type: ignore[method-assign]


def assert_noticed(ranks: list[dict[str, str]]) -> None:
    for found in ranks:
        assert "ChecksumError: swap of step 3" in found["checksum"]
        assert ".mlp.experts.w" in found["checksum"]
        assert "CanaryError: swap of step 3" in found["canary"]
        assert "from 0.2 on it counts as broken" in found["canary"]
        assert "swap of step 4" in found["byte"]
        assert (
            "in model.layers.1.self_attn.o_proj.weight (held by train ranks 0, 1 and rollout ranks 0, 1). "
            in (found["byte"])
        )
