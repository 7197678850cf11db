"""vLLM's names for the full tensors: which of them share a parameter, and how each is split.

Parameters have the orientation of a checkpoint (rows are outputs), as vLLM's have while it loads; what its kernels make
of them afterwards is the engine's affair. Experts are named `...experts.w13_weight`, whichever module holds them in a
version of vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass

from qerl_rl.config.errors import ConfigError
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.blocks import ParallelSizes
from qerl_rl.layout.holdings import FullTensor
from qerl_rl.layout.tensors import Adapters, Entry, Tensors, entries

WHOLE, SHARES, HEADS, VOCABULARY = "whole", "shares", "heads", "vocabulary"
"""How a tensor is split over tensor-parallel ranks: not at all, into equal shares, into heads (where there are fewer
than ranks, neighbouring ranks hold the same one), or as a vocabulary, which is padded first."""

_SPLITS = {
    **dict.fromkeys(("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj"), SHARES),
    **dict.fromkeys(("k_proj", "v_proj"), HEADS),
    **dict.fromkeys(("embed_tokens", "lm_head"), VOCABULARY),
}
"""Modules by the last name in HF whose rows are split."""

_ROW_PARALLEL = ("o_proj", "down_proj", "w2")
"""Whose columns are."""

_ON_EVERY_RANK = ("q_a_proj", "kv_a_proj_with_mqa")
"""Whose adapters are column parallel in the trainer and whole in the engine."""

_FUSED = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
)
"""Modules whose rows vLLM keeps in one tensor, in this order, where a model has all of them."""

_LEAF = re.compile(r"^(?P<stem>.*\.)?(?P<module>[^.]+)\.(?P<parameter>(weight|bias)[^.]*)$")


@dataclass(frozen=True)
class Segment:
    """A full tensor's place in a local one: how it is split, and along which dimension."""

    tensor: FullTensor
    split: str
    dim: int

    @property
    def kind(self) -> Hashable:
        """Equal for segments that are split alike."""
        return self.tensor.shape, self.tensor.is_expert, self.split, self.dim


@dataclass(frozen=True)
class Local:
    """A tensor of a rank: its segments follow each other along dimension 0."""

    name: str
    segments: tuple[Segment, ...]


def engine_locals(architecture: MoeArchitecture, tensors: Tensors) -> list[Local]:
    """The engine's tensors, in the order of the model.

    Raises: ConfigError for weights of different formats in one tensor.
    """
    found: dict[str, dict[str, Segment]] = {}
    all_entries = entries(architecture, tensors, ParallelSizes())
    present = {entry.tensor.name for entry in all_entries}
    present |= {name.rpartition(".")[0] for name in present}
    for entry in all_entries:
        if isinstance(tensors, Adapters):
            name, segment = entry.tensor.name.partition(":")[0], _adapter(entry)
        elif entry.tensor.is_expert:
            name, segment = _expert_name(entry.tensor.name, architecture.mlp_name), _expert(entry)
        else:
            name, segment = _weight(entry, present)
        found.setdefault(name, {})[entry.tensor.name] = segment
    return [Local(name, tuple(segments.values())) for name, segments in found.items()]


def _weight(entry: Entry, present: set[str]) -> tuple[str, Segment]:
    """present: all tensors and the modules that have any."""
    tensor = entry.tensor
    leaf = _LEAF.match(tensor.name)
    if leaf is None:
        return tensor.name, Segment(tensor, WHOLE, 0)
    stem, module, parameter = leaf["stem"], leaf["module"], leaf["parameter"]
    name = tensor.name
    for fused, members in _FUSED:
        if module not in members or not all(f"{stem}{member}" in present for member in members):
            continue
        if not all(f"{stem}{member}.{parameter}" in present for member in members):
            raise ConfigError(
                f"{tensor.name} is in another format than what vLLM keeps with it in {fused}.",
                fix=f"quantize {', '.join(members)} alike",
            )
        name = f"{stem}{fused}.{parameter}"
    return name, _columns(entry) if module in _ROW_PARALLEL else Segment(tensor, _SPLITS.get(module, WHOLE), 0)


def _columns(entry: Entry) -> Segment:
    """Of a row-parallel layer. A scale that stands for a whole row, or an adapter's B, is on every rank."""
    is_split = entry.slot.block.split_dim is not None
    return Segment(entry.tensor, SHARES if is_split else WHOLE, len(entry.tensor.shape) - 1)


def _expert_name(name: str, mlp_name: str) -> str:
    name = name.replace(".mlp.experts.", f".{mlp_name}.experts.")
    return re.sub(r"\.(w13|w2)([^.]*)$", r".\1_weight\2", name)


def _expert(entry: Entry) -> Segment:
    """w13 [E, 2, I, H] is split along I, w2 [E, H, I] along its columns, where experts are split at all."""
    return Segment(entry.tensor, SHARES, 2) if len(entry.tensor.shape) == 4 else _columns(entry)


def _adapter(entry: Entry) -> Segment:
    tensor, last = entry.tensor, len(entry.tensor.shape) - 1
    name, _, kind = tensor.name.partition(":")
    module, matrix = name.split(".")[-2:]
    if module in _ROW_PARALLEL:
        return _columns(entry)
    if matrix == "lora_A" or module in _ON_EVERY_RANK:
        return Segment(tensor, WHOLE, last)
    if kind:
        return Segment(tensor, SHARES if kind == "q" else HEADS, 0)
    return Segment(tensor, SHARES, last - 1)
