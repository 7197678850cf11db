"""What `benchmarks.reshard` measures on each of two ranks: a swap, a plain copy, a swap as others do it, memory."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.blocks import ParallelSizes
from qerl_rl.layout.engine import EngineLayout
from qerl_rl.layout.holdings import Box, FullTensor, Holding, Layout
from qerl_rl.layout.tensors import Weights, full_tensors
from qerl_rl.layout.train import TrainLayout
from qerl_rl.platform.device import CPU
from qerl_rl.quant.quantize import Recipe
from qerl_rl.reshard.exchange import Exchange
from qerl_rl.reshard.node_exchange import make_exchange
from qerl_rl.reshard.plan import Plan, RankPlan, make_plan
from qerl_rl.reshard.transfer import Source, Target, TransferReport, transfer

RANKS = 2
BUCKET_BYTES = 16 << 20
WARM_UP, TURNS = 2, 5
DEADLINE_S = 120.0

MODEL = MoeArchitecture(
    family="qwen3_moe",
    layers=16,
    hidden_size=768,
    attention_heads=12,
    key_value_heads=4,
    head_dim=64,
    experts=12,
    experts_per_token=4,
    expert_width=512,
    shared_expert_width=0,
    vocabulary_size=2048,
    max_positions=4096,
    norm_eps=1e-6,
    rope_theta=1e6,
    normalized_top_k=True,
    qk_norm=True,
    qkv_bias=False,
    tied_embeddings=False,
)
"""510 MB in bfloat16, 453 of them experts; groups of 128 stay whole when two ranks split a row of 512."""

TRAIN = {
    "TP2": ParallelSizes(tensor=2, expert_tensor=2),
    "EP2": ParallelSizes(expert=2),
    "PP2": ParallelSizes(pipeline=2),
    "DP2": ParallelSizes(),
}
ROLLOUT = {
    "TP2": {"tensor": 2, "data": 1, "expert_parallel": False},
    "DP2+EP2": {"tensor": 1, "data": 2, "expert_parallel": True},
    "2 engines": {"tensor": 1, "data": 1, "expert_parallel": False, "engines": 2},
}
FORMATS = {"bf16": None, "int8": Recipe("w8a8"), "int4": Recipe("w4a16", group_size=128)}


@dataclass(frozen=True)
class Case:
    """Names in TRAIN, ROLLOUT and FORMATS; gathering: whether the swap of others is measured too."""

    train: str
    rollout: str
    format: str

    @property
    def gathering(self) -> bool:
        return self.train == "EP2"

    def __str__(self) -> str:
        return f"train {self.train} to rollout {self.rollout}, {self.format}"


@dataclass(frozen=True)
class Found:
    """What one rank measured of a case: bytes, and median seconds; `lower_bound`: bytes that it needs and has not."""

    moved: int
    lower_bound: int
    experts_moved: int
    experts_lower_bound: int
    gathered: int
    swap_s: float
    copy_s: float
    gather_s: float
    peak: int
    shard: int
    report: TransferReport


def tensors_of(format: str) -> Weights:
    recipe = FORMATS[format]
    return Weights() if recipe is None else Weights.chosen_by(MODEL, recipe.format_of)


def layouts(case: Case) -> tuple[list[FullTensor], Layout, Layout]:
    weights = tensors_of(case.format)
    train = TrainLayout(MODEL, TRAIN[case.train], RANKS, weights)
    return full_tensors(MODEL, weights), train, EngineLayout(MODEL, tensors=weights, **ROLLOUT[case.rollout])


def planned(tensors: list[FullTensor], source: Layout, target: Layout) -> Plan:
    return make_plan(tensors, source, target, bucket_bytes=BUCKET_BYTES, ranks_per_node=RANKS)


def join() -> None:
    """Start the world of the ranks."""
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=RANKS)


def measure(case: Case) -> Found:
    """One case on this rank; collective."""
    rank = dist.get_rank()
    tensors, train, rollout = layouts(case)
    plan = planned(tensors, train, rollout).for_rank(rank)
    peak, shard = peak_memory(plan, tensors, train, rollout)

    source = Warm(allocated(tensors, train, rank))
    target = Warm(allocated(tensors, rollout, rank))
    copies = {name: tensor.clone() for name, tensor in target.tensors.items()}
    exchange = make_exchange(CPU, DEADLINE_S)
    report = TransferReport()

    def swap() -> None:
        nonlocal report
        report = transfer(plan, source, target, exchange)

    def copy() -> None:
        for name, tensor in target.tensors.items():
            tensor.copy_(copies[name])

    contenders: dict[str, Callable[[], object]] = {"swap": swap, "copy": copy}
    if case.gathering:
        gathering = Gathering(Case(case.train, case.rollout, "bf16"), rank, exchange)
        contenders["gather"] = gathering.run
    seconds = interleaved(contenders)
    bound, experts_bound = missing(tensors, train, rollout, rank)
    return Found(
        moved=report.received_bytes,
        lower_bound=bound,
        experts_moved=experts_received(plan, tensors),
        experts_lower_bound=experts_bound,
        gathered=gathering.received if case.gathering else 0,
        swap_s=seconds["swap"],
        copy_s=seconds["copy"],
        gather_s=seconds.get("gather", 0.0),
        peak=peak,
        shard=shard,
        report=report,
    )


def interleaved(contenders: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds until both ranks are through; they take turns, and the first turns are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(WARM_UP + TURNS):
        for name, run in contenders.items():
            dist.barrier()
            begin = time.perf_counter()
            run()
            dist.barrier()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values[WARM_UP:]) for name, values in seconds.items()}


# ---- bytes -----------------------------------------------------------------------------------------------------------
def missing(tensors: Iterable[FullTensor], source: Layout, target: Layout, rank: int) -> tuple[int, int]:
    """Bytes that a rank needs and does not hold: of all tensors, and of the experts. Reckoned without the planner."""
    found = [0, 0]
    for tensor in tensors:
        held = [holding.box for holding in source.holdings_of(tensor.name, rank)]
        elements = 0
        for holding in target.holdings_of(tensor.name, rank):
            shared = [both.elements for box in held if (both := holding.box.meet(box)) is not None]
            elements += holding.box.elements - sum(shared)
        found[0] += elements * tensor.dtype.itemsize
        found[1] += elements * tensor.dtype.itemsize * tensor.is_expert
    return found[0], found[1]


def experts_received(plan: RankPlan, tensors: Iterable[FullTensor]) -> int:
    experts = {tensor.name: tensor.dtype.itemsize for tensor in tensors if tensor.is_expert}
    return sum(
        holding.box.elements * experts.get(holding.tensor, 0)
        for bucket in plan.buckets
        for holdings in bucket.receives.values()
        for holding in holdings
    )


# ---- sides of a transfer ---------------------------------------------------------------------------------------------
def local_dtypes(tensors: Iterable[FullTensor], layout: Layout, rank: int) -> dict[str, torch.dtype]:
    return {holding.local: tensor.dtype for tensor in tensors for holding in layout.holdings_of(tensor.name, rank)}


def allocated(tensors: Iterable[FullTensor], layout: Layout, rank: int) -> dict[str, torch.Tensor]:
    """The rank's tensors, each page of them touched."""
    dtypes = local_dtypes(tensors, layout, rank)
    made = {name: torch.empty(shape, dtype=dtypes[name]) for name, shape in layout.local_shapes(rank).items()}
    for tensor in made.values():
        tensor.view(torch.uint8).fill_(1)
    return made


class Warm:
    """A source or target whose tensors stay."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def read(self, local: str) -> torch.Tensor:
        return self.tensors[local]

    write = read

    def finished(self, local: str) -> None:
        pass

    complete = finished


class Leaving(Warm):
    """A source whose tensors leave memory when they are finished."""

    def finished(self, local: str) -> None:
        del self.tensors[local]


class Coming(Warm):
    """A target whose tensors take memory when they are first written."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> None:
        super().__init__({})
        self._shapes, self._dtypes = shapes, dtypes

    def write(self, local: str) -> torch.Tensor:
        if local not in self.tensors:
            self.tensors[local] = torch.empty(self._shapes[local], dtype=self._dtypes[local])
        return self.tensors[local]


# ---- memory ----------------------------------------------------------------------------------------------------------
def peak_memory(plan: RankPlan, tensors: list[FullTensor], train: Layout, rollout: Layout) -> tuple[int, int]:
    """(peak resident bytes while train shards leave and rollout shards come, bytes of the larger shard).

    What the process had before the shards existed is subtracted; the exchange is a new one, whose buckets count.
    """
    return_free_memory()
    before = resident("VmRSS")
    source: Source = (leaving := Leaving(allocated(tensors, train, plan.rank)))
    coming = Coming(rollout.local_shapes(plan.rank), local_dtypes(tensors, rollout, plan.rank))
    target: Target = coming
    train_bytes = sum(tensor.nbytes for tensor in leaving.tensors.values())
    exchange = make_exchange(CPU, DEADLINE_S)
    return_free_memory()
    # Linux takes this for: forget the peak.
    Path("/proc/self/clear_refs").write_text("5")
    transfer(plan, source, target, exchange)
    peak = resident("VmHWM") - before
    return peak, max(train_bytes, sum(tensor.nbytes for tensor in coming.tensors.values()))


def resident(kind: str) -> int:
    """VmRSS: bytes in memory now; VmHWM: at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def return_free_memory() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


# ---- the swap of others ----------------------------------------------------------------------------------------------
class Whole:
    """A layout in which every rank has every full tensor."""

    world_size = RANKS

    def __init__(self, tensors: Iterable[FullTensor]) -> None:
        self._shapes = {tensor.name: tensor.shape for tensor in tensors}

    def pattern(self, tensor: str) -> str:
        return "whole"

    def holdings_of(self, tensor: str, rank: int) -> list[Holding]:
        shape = self._shapes[tensor]
        return [Holding(tensor, Box.of(shape), tensor, shape, Box.of(shape).slices)]

    def holdings(self, rank: int) -> list[Holding]:
        return [holding for tensor in self._shapes for holding in self.holdings_of(tensor, rank)]

    def local_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)


@dataclass
class Slicing:
    """A target of full tensors: one is sliced into the engine's tensors when it is there, its memory is used again."""

    tensors: Mapping[str, FullTensor]
    slices: Mapping[str, list[Holding]]
    engine: Mapping[str, torch.Tensor]
    memory: dict[tuple, list[torch.Tensor]] = field(default_factory=dict)
    open: dict[str, torch.Tensor] = field(default_factory=dict)

    def write(self, local: str) -> torch.Tensor:
        if local not in self.open:
            tensor = self.tensors[local]
            free = self.memory.get((tensor.shape, tensor.dtype))
            self.open[local] = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype)
        return self.open[local]

    def complete(self, local: str) -> None:
        full = self.open.pop(local)
        for holding in self.slices[local]:
            holding.take(self.engine[holding.local]).copy_(full[holding.box.slices])
        self.memory.setdefault((full.shape, full.dtype), []).append(full)


class Gathering:
    """Every rank gathers the full bfloat16 tensors, over the exchange that our swap uses, and slices them."""

    def __init__(self, case: Case, rank: int, exchange: Exchange) -> None:
        tensors, train, rollout = layouts(case)
        self._plan = planned(tensors, train, Whole(tensors)).for_rank(rank)
        self._source, self._exchange = Warm(allocated(tensors, train, rank)), exchange
        slices = {tensor.name: rollout.holdings_of(tensor.name, rank) for tensor in tensors}
        full = {tensor.name: tensor for tensor in tensors}
        self._target = Slicing(full, slices, allocated(tensors, rollout, rank))
        self.received = 0

    def run(self) -> None:
        self.received = transfer(self._plan, self._source, self._target, self._exchange).received_bytes
