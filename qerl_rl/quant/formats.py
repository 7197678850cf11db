"""Every weight format by name: how weights of Linear layers, or of stacks of experts, are stored in fewer bits."""

from __future__ import annotations

from collections.abc import Callable

from qerl_rl.config.errors import ConfigError
from qerl_rl.quant.base import Format, Part, Parts
from qerl_rl.quant.fp4 import Mxfp4, Nvfp4
from qerl_rl.quant.int4 import W4A8, W4A16
from qerl_rl.quant.microscaling import Mxfp8
from qerl_rl.quant.w8a8 import W8A8

__all__ = ["FORMATS", "GROUP_SIZES", "Format", "Part", "Parts", "get_format"]

WHOLE_ROW = -1
FORMATS: dict[str, Callable[[int], Format]] = {
    "w8a8": lambda group_size: W8A8(),
    "w4a16": W4A16,
    "w4a8": W4A8,
    "nvfp4": lambda group_size: Nvfp4(),
    "mxfp4": lambda group_size: Mxfp4(),
    "mxfp8": lambda group_size: Mxfp8(),
}
"""quant.format -> its Format, from a group size (of those that have a choice; 0: a scale for each row)."""

GROUP_SIZES: dict[str, tuple[int, ...]] = {
    "w8a8": (WHOLE_ROW,),
    "w4a16": (128, 64, 32, WHOLE_ROW),
    "w4a8": (128, 64, 32, WHOLE_ROW),
    "nvfp4": (16,),
    "mxfp4": (32,),
    "mxfp8": (32,),
}
"""Group sizes of each format, its own first; -1: the whole row."""


def get_format(name: str, group_size: int = 0) -> Format:
    """The format of this name. Args: group_size: weights that share a scale; 0: the format's own; -1: the whole row.

    Raises: ConfigError when there is none, or none with this group size.
    """
    if name not in FORMATS:
        raise ConfigError(f"format {name!r} is unknown.", fix=f"set quant.format to one of {', '.join(FORMATS)}")
    sizes = GROUP_SIZES[name]
    if group_size and group_size not in sizes:
        raise ConfigError(
            f"{name} has no groups of {group_size}.", fix=f"set the group size to {' or '.join(map(str, sizes))}"
        )
    return FORMATS[name](max(group_size or sizes[0], 0))
