"""Every train layout to every rollout layout, with real engines: what is served after a swap is what a fresh engine is.

One pair of processes a rollout layout. Its engine is built on the checkpoint, which is the fresh one; then its weights
are wiped out before each swap, so that whatever it says afterwards has come from the trainer.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from qerl_rl.config.schema import (
    ClusterConfig,
    Config,
    LoraConfig,
    ModelConfig,
    QuantConfig,
    RolloutConfig,
    SwapConfig,
    TrainConfig,
)
from tests.ranks import run_engines

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
        cluster=ClusterConfig(workers=2),
        model=ModelConfig(path=str(model), max_length=400),
        quant=QuantConfig(format="w8a8"),
        lora=LoraConfig(rank=rank, alpha=16.0),
        train=TrainConfig(device="cpu", **train),
        rollout=RolloutConfig(max_response_tokens=12, kv_cache_bytes=16 << 20, **rollout),
        swap=SwapConfig(bucket_bytes=1 << 16, **swap),
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


def full_pairs(model: Path, rollout: dict[str, Any]) -> dict[str, Any]:
    from qerl_rl.reshard.swap import Swap

    engine = make_engine(make_config(model, 0, rollout, {}))
    found: dict[str, Any] = {"fresh": greedy(engine)}
    for name, train in TRAIN.items():
        wipe(engine.weight_target())
        found["wiped"] = greedy(engine)
        config = make_config(model, 0, rollout, train)
        report = Swap(make_trainer(config), engine, config).to_rollout(0)
        found[name] = greedy(engine), dataclasses.asdict(report), report.line()
    return found


@pytest.mark.parametrize("rollout", ROLLOUT)
def test_every_train_layout_gives_what_a_fresh_engine_serves(tiny_checkpoint, rollout):
    model = tiny_checkpoint("qwen3_moe", "bfloat16")
    for found in run_engines(full_pairs, 2, model, ROLLOUT[rollout]):
        for name in TRAIN:
            served, _report, line = found[name]
            assert served == found["fresh"], name
            print(line)
        assert found["wiped"] != found["fresh"]
