"""Checkpoints as the full tensors that a resharding moves, and what a rank of an engine was given of them."""

from __future__ import annotations

import re
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.engine import EngineLayout
from qerl_rl.layout.tensors import Weights, full_tensors
from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.rollout import merge
from qerl_rl.rollout.full_tensors import put
from qerl_rl.rollout.repack import packed_modules
from qerl_rl.rollout.vllm_engine import VllmEngine

_STACKED = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(w13|w2)(.*)")
_PLAIN = re.compile(r"(.*\.(?:weight|bias|e_score_correction_bias))(_.*)?")


def full_weights(folder: Path) -> tuple[Weights, dict[str, torch.Tensor]]:
    """The formats of a checkpoint, and all its full tensors by name."""
    architecture, reader = MoeArchitecture.from_folder(folder), CheckpointReader(folder)
    kinds = Weights.chosen_by(architecture, reader.format_of)
    gate, up, down = architecture.expert_weight_names

    def part(name: str, suffix: str) -> torch.Tensor:
        return reader.parts(name)[suffix] if reader.is_quantized(name) else reader.get(name)

    def stacked(layer: str, names: tuple[str, ...], suffix: str) -> torch.Tensor:
        parent = f"{layer}.{architecture.mlp_name}.experts"
        parts = [part(f"{parent}.{e}.{name}.weight", suffix) for e in range(architecture.experts) for name in names]
        return torch.stack(parts)

    found = {}
    for tensor in full_tensors(architecture, kinds):
        if experts := _STACKED.fullmatch(tensor.name):
            whole = stacked(experts[1], (gate, up) if experts[2] == "w13" else (down,), experts[3])
        else:
            plain = _PLAIN.fullmatch(tensor.name)
            assert plain is not None
            whole = part(plain[1], plain[2] or "")
        found[tensor.name] = whole.reshape(tensor.shape)
    return kinds, found


def fill(engine: VllmEngine, folder: Path) -> int:
    """Put the weights of a checkpoint into a live engine, as a resharding would; returns the bytes written."""
    kinds, tensors = full_weights(folder)
    target, layout = engine.weight_target(), engine._layout(kinds)
    assert target.locals == layout.local_shapes(engine._rank)
    put(target, layout, engine._rank, tensors)
    return target.finish()


Merged = dict[str, tuple[tuple[slice, ...], np.ndarray]]
"""By full tensor, which elements of it a rank has, and their bytes (the last dimension is that many times as long)."""


def merged_weights(engine: VllmEngine, adapters: dict[str, torch.Tensor], step: int) -> Merged:
    """What the engine packs when it merges these adapters."""
    names = {id(module): path for path, module in packed_modules(engine.model).items()}
    packed: dict[str, torch.Tensor] = {}
    original = merge.repack

    def repack(module: torch.nn.Module, config: object, tensors: dict[str, torch.Tensor]) -> None:
        packed.update({f"{names[id(module)]}.{name}": tensor.clone() for name, tensor in tensors.items()})
        original(module, config, tensors)

    with mock.patch.object(merge, "repack", repack):
        engine.set_adapters(adapters, step)
    layout: EngineLayout = engine._layout(Weights.chosen_by(engine._architecture, engine._plan.engine_format))
    held = [holding for holding in layout.holdings(engine._rank) if holding.local in packed]
    return {
        each.tensor: (each.box.slices, each.take(packed[each.local]).contiguous().view(torch.uint8).numpy())
        for each in held
    }


def check_shards(shards: Merged, whole: Merged) -> None:
    """The bytes of a rank are those that one rank alone has there."""
    assert shards.keys() == whole.keys()
    for name, (slices, part) in shards.items():
        last = slices[-1]
        item = part.shape[-1] // (last.stop - last.start)
        expected = whole[name][1][(*slices[:-1], slice(last.start * item, last.stop * item))]
        np.testing.assert_array_equal(part, expected, err_msg=name)
