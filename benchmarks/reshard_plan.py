"""How long the largest models take to plan, and how good the plans are: `python -m benchmarks.reshard_plan`.

Each case runs in a process of its own, so that its peak memory is its own: layouts, full tensors, plan and summary from
nothing, RUNS times (the median counts). (`python -m benchmarks.reshard` shows these figures among its own.)
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.figures import Figure
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.blocks import ParallelSizes
from qerl_rl.layout.engine import EngineLayout
from qerl_rl.layout.families.deepseek import NAMES
from qerl_rl.layout.parts import LatentAttention
from qerl_rl.layout.routing import SIGMOID, RoutingRule
from qerl_rl.layout.tensors import Weights, full_tensors
from qerl_rl.layout.train import TrainLayout
from qerl_rl.quant.formats import get_format
from qerl_rl.reshard.plan import Plan, make_plan

RUNS = 1
BUCKET_BYTES = 64 << 20
RANKS_PER_NODE = 8

QWEN3_235B = MoeArchitecture(
    family="qwen3_moe",
    layers=94,
    hidden_size=4096,
    attention_heads=64,
    key_value_heads=4,
    head_dim=128,
    experts=128,
    experts_per_token=8,
    expert_width=1536,
    shared_expert_width=0,
    vocabulary_size=151936,
    max_positions=40960,
    norm_eps=1e-6,
    rope_theta=1e6,
    normalized_top_k=True,
    qk_norm=True,
    qkv_bias=False,
    tied_embeddings=False,
)
DEEPSEEK_V3 = MoeArchitecture(
    family="deepseek_v3",
    layers=61,
    hidden_size=7168,
    attention_heads=128,
    key_value_heads=128,
    head_dim=192,
    experts=256,
    experts_per_token=8,
    expert_width=2048,
    shared_expert_width=2048,
    vocabulary_size=129280,
    max_positions=163840,
    norm_eps=1e-6,
    rope_theta=1e4,
    normalized_top_k=True,
    qk_norm=False,
    qkv_bias=False,
    tied_embeddings=False,
    shared_expert_gate=False,
    latent=LatentAttention(1536, 512, nope_head_dim=128, rope_head_dim=64, value_head_dim=128),
    rule=RoutingRule(top_k=8, scores=SIGMOID, has_bias=True),
    dense_layers=3,
    dense_width=18432,
    names=NAMES,
)
"""The sizes that the models' config.json say."""


@dataclass(frozen=True)
class Case:
    """A model that goes from a layout of the trainer to one of the engines; format: "none" is bfloat16."""

    name: str
    architecture: MoeArchitecture
    format: str
    train: ParallelSizes
    tensor: int
    data: int
    engines: int
    bar_s: float

    def plan(self) -> Plan:
        """From nothing."""
        format = None if self.format == "none" else get_format(self.format)
        weights = Weights.chosen_by(self.architecture, lambda name: format)
        engine = EngineLayout(self.architecture, self.tensor, self.data, True, weights, self.engines)
        source = TrainLayout(self.architecture, self.train, engine.world_size, weights)
        tensors = full_tensors(self.architecture, weights)
        return make_plan(tensors, source, engine, bucket_bytes=BUCKET_BYTES, ranks_per_node=RANKS_PER_NODE)


UNEVEN = (8, 8, 8, 8, 8, 7, 7, 7)
CASES = (
    *(
        Case(
            f"Qwen3-235B-A22B {format}, 128 ranks, TP4 EP16 PP2 to TP{tensor} EP128",
            QWEN3_235B,
            format,
            ParallelSizes(tensor=4, pipeline=2, expert=16),
            tensor,
            128 // tensor,
            1,
            5.0,
        )
        for format, tensor in (("none", 4), ("w8a8", 8))
    ),
    *(
        Case(
            f"DeepSeek-V3 {format}, 512 ranks, TP{tensor} EP32 PP8 to 2 x TP8 EP256",
            DEEPSEEK_V3,
            format,
            ParallelSizes(tensor=tensor, pipeline=8, expert=32, layers_per_stage=UNEVEN),
            8,
            32,
            2,
            20.0,
        )
        for format, tensor in (("none", 1), ("w8a8", 1), ("w8a8", 4))
    ),
)


def measure(runs: int = RUNS) -> list[Figure]:
    """Seconds to plan with their bars, and what the plans are like; prints the summaries."""
    figures = []
    for case in CASES:
        found = _in_a_process(case, runs)
        print(f"{case.name}\n{found['summary']}")
        figures += [
            Figure(f"plan {case.name}", found["seconds"], case.bar_s, at_least=False, unit="s"),
            Figure("  bytes moved / lower bound", found["moved"], 1.0, at_least=False),
            Figure("  buckets / what the busiest rank fills", found["buckets"], None, at_least=False),
            Figure("  peak memory, libraries included", found["mebibytes"], None, at_least=False, unit="MiB"),
        ]
    return figures


def _in_a_process(case: Case, runs: int) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run, (CASES.index(case), runs))


def _run(number: int, runs: int) -> dict[str, Any]:
    case, seconds = CASES[number], []
    for _ in range(runs):
        start = time.perf_counter()
        summary = case.plan().summary()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "summary": str(summary),
        "moved": summary.moved_over_lower_bound,
        "buckets": summary.buckets / summary.fewest_buckets,
        "mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> int:
    """Print every figure; 1 when one misses its bar."""
    figures = measure()
    print(*figures, sep="\n")
    return 0 if all(figure.met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
