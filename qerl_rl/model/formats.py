"""Which weights of the model are stored in which format, and whether a layout can cut them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import TrainConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.blocks import ParallelSizes
from qerl_rl.layout.slots import Slot, weight_slots
from qerl_rl.layout.train import parallel_sizes
from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.quant.formats import Format, Part
from qerl_rl.quant.quantize import Recipe

SlotFormats = Mapping[tuple[int, str], Format]
"""(layer, name of the slot) -> the format of the weight; floats have no entry."""

SMALLER_GROUPS = "set quant.group_size smaller, or quant.format to one of smaller groups, or to w8a8"
"""What helps where weights that train can't be rounded in groups."""


def stored_formats(reader: CheckpointReader, architecture: MoeArchitecture) -> SlotFormats:
    """The formats of a checkpoint's weights. One may differ from layer to layer, and attention's from the experts'.

    Raises: ConfigError when weights that the model keeps in one tensor are stored in different formats.
    """
    found = {}
    for slot in weight_slots(architecture, ParallelSizes()):
        if slot.quantizable and (format := _format_of(slot, reader)):
            found[slot.layer, slot.name] = format
    return found


def rounded_formats(architecture: MoeArchitecture, recipe: Recipe | None) -> SlotFormats:
    """The formats that a checkpoint of floats gets by `recipe` (None: it stays floats).

    Raises: ConfigError when the rows of a weight can't be cut into groups of its format.
    """
    found = {}
    for slot in weight_slots(architecture, ParallelSizes()) if recipe else ():
        format = recipe.format_of(slot.pieces[0].name) if recipe and slot.quantizable else None
        if format is None:
            continue
        for part in format.parts:
            _check_part(slot, format, part)
        found[slot.layer, slot.name] = format
    return found


def _check_part(slot: Slot, format: Format, part: Part) -> None:
    try:
        part.shape(slot.block.shape)
    except ValueError as error:
        raise ConfigError(
            f"{slot.pieces[0].name} can't be rounded to {described(format)}: {error}.",
            fix=SMALLER_GROUPS,
        ) from None


def _format_of(slot: Slot, reader: CheckpointReader) -> Format | None:
    first: tuple[str, Format | None] | None = None
    for piece in slot.pieces:
        format = reader.format_of(piece.name)
        if format is None and piece.name not in reader:
            continue  # Loading says that it is missing.
        if first is None:
            first = piece.name, format
        elif not same_format(first[1], format):
            raise ConfigError(
                f"{first[0]} is stored as {described(first[1])}, {piece.name} as {described(format)}.",
                fix="quantize all experts of a layer alike, and q, k and v, and gate and up",
                where=str(reader.path),
            )
    return None if first is None else first[1]


def same_format(left: Format | None, right: Format | None) -> bool:
    """Whether both store a weight in the same parts of the same meaning."""
    if left is None or right is None:
        return left is right
    return (type(left), left.group_size, left.parts) == (type(right), right.group_size, right.parts)


def described(format: Format | None) -> str:
    """The format for a message."""
    if format is None:
        return "floats"
    return f"{format.name} in groups of {format.group_size}" if format.group_size else format.name


def check_format_layout(
    architecture: MoeArchitecture,
    formats: SlotFormats,
    sizes: ParallelSizes,
    fix: str = "quantize the model in smaller groups",
) -> None:
    """Raise ConfigError when a rank would get part of a group of weights that share a scale, or part of a byte.

    Args: fix: what helps beside another layout.
    """
    for slot in weight_slots(architecture, sizes):
        block, format = slot.block, formats.get((slot.layer, slot.name))
        if format is None or block.split_dim != len(block.shape) - 1:
            continue
        key, ways = ("tensor_parallel", sizes.tensor)
        if block.is_expert:
            key, ways = "expert_tensor_parallel", sizes.expert_tensor
        together, width = max(part.columns for part in format.parts), block.shape[-1]
        if width // ways % together:
            fitting = [number for number in range(1, ways) if width % number == 0 and width // number % together == 0]
            ways_out = f"set train.{key} to {' or '.join(map(str, fitting))}, or " if fitting else ""
            raise ConfigError(
                f"train.{key}={ways} cuts the {width} columns of {slot.pieces[0].name} into {width // ways}, "
                f"but {described(format)} stores {together} together.",
                fix=f"{ways_out}{fix}",
            )


def check_rounding(architecture: MoeArchitecture, recipe: Recipe | None, train: TrainConfig) -> None:
    """Raise ConfigError when weights that train in the layout of `train` can't be rounded by `recipe` in shards."""
    check_format_layout(architecture, rounded_formats(architecture, recipe), parallel_sizes(train), SMALLER_GROUPS)


def check_checkpoint(path: str | Path, architecture: MoeArchitecture, train: TrainConfig) -> None:
    """Raise ConfigError when a checkpoint's formats can't be read, or can't be cut as the layout of `train` would."""
    with CheckpointReader(path) as reader:
        check_format_layout(architecture, stored_formats(reader, architecture), parallel_sizes(train))
