"""Checkpoints that hold all experts of a layer in two tensors, and where in them each expert's matrix lies.

In memory transformers 5 has the experts of a layer as gate_up_proj and down_proj, of three dimensions. So they are
saved by `save_pretrained(..., save_original_format=False)` and by who saves a state_dict, and some vendors publish them
so. Everything else here goes by the names of one tensor an expert. With hidden size H and E experts of width I:

    by rows       gate_up_proj [E, 2 I, H], down_proj [E, H, I]    each matrix as a Linear has it
    by columns    gate_up_proj [E, H, 2 I], down_proj [E, I, H]    each matrix transposed

Gate comes first, then up. The two shapes together fit one of the orders only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.layout.families.mixtral import NAMES as MIXTRAL_NAMES
from qerl_rl.layout.parts import USUAL_NAMES, ModuleNames

Header = Callable[[str], tuple[str, tuple[int, ...]]]
"""Name of a stored tensor -> its dtype, as safetensors calls it, and its shape."""

_FUSED = re.compile(
    r"(?P<layer>.*\.layers\.\d+\.)(?P<block>\w+)\.experts\.(?P<leaf>gate_up_proj|down_proj)(?P<rest>.*)"
)
_FLOATS = ("BF16", "F16", "F32")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_ONE_BY_ONE = "save the model with one tensor an expert (transformers 5: save_original_format=True)"
_SAME = "use config.json and weights of the same model"


@dataclass(frozen=True)
class Convention:
    """How files of a model_type with fused experts are written.

    names: those of its files with one tensor an expert. block, router: what the MoE block and its router are called
    beside fused experts. by_columns: whether files of it lie by columns, by rows, or there are both.
    """

    names: ModuleNames = USUAL_NAMES
    block: str = "mlp"
    router: str = "gate"
    by_columns: tuple[bool, ...] = (False,)


CONVENTIONS: Mapping[str, Convention] = {
    **dict.fromkeys(("qwen3_moe", "qwen2_moe", "deepseek_v2", "deepseek_v3"), Convention()),
    "mixtral": Convention(MIXTRAL_NAMES),
    "phimoe": Convention(MIXTRAL_NAMES, router="router"),
    # From here on: not trained, but quantized. The published Qwen3-VL-MoE lies by columns, as transformers 4 kept it.
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "glm4_moe", "olmoe"), Convention()),
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_vl_moe_text"), Convention(by_columns=(True, False))),
    **dict.fromkeys(
        ("llama4", "llama4_text"), Convention(ModuleNames("feed_forward"), "feed_forward", by_columns=(True,))
    ),
}
"""By model_type. Sources: the classes of experts in transformers 5.19 (`models/*/modeling_*.py`) and what it does to
published files (`conversion_mapping.py`). Types with gate and up in turns, row by row (gpt_oss), are left out."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies that a file has under another name, or as part of another.

    tensor: the stored one. expert: of its first dimension; None: it is all of the tensor. first_row, shape: the matrix
    is the `shape` = (N, K) from this row on. by_columns: rows of the matrix are columns of what is stored.
    """

    tensor: str
    expert: int | None = None
    first_row: int = 0
    shape: tuple[int, ...] = ()
    by_columns: bool = False

    def read(self, stored: Any, *index: slice) -> torch.Tensor:
        """The tensor, or what `index` leaves of its dimensions: nothing else is read.

        Args: stored: the file's tensor, as `safe_open(...).get_slice(tensor)` gives it.
        """
        if self.expert is None:
            return stored[index or slice(None)]
        rows, columns = (*index, slice(None), slice(None))[:2]
        start, stop, _ = rows.indices(self.shape[0])
        rows = slice(self.first_row + start, self.first_row + stop)
        if self.by_columns:
            return stored[self.expert, columns, rows].T.contiguous()
        return stored[self.expert, rows, columns]


def find_places(
    stored: Collection[str], header: Header, read_config: Callable[[], Mapping[str, Any]], where: str
) -> dict[str, Place]:
    """What a checkpoint with the tensors `stored` would have in their place with one tensor an expert, by name.

    Empty where no experts are fused; then neither `header` nor `read_config` (the folder's config.json) is called.
    Args: where: the folder, for messages.
    Raises: ConfigError for fused experts of an unknown model_type, with biases or quantized, beside the same experts
    one by one, of shapes that don't belong together, or whose order the shapes do not tell.
    """
    blocks = _fused_blocks(stored, where)
    if not blocks:
        return {}
    config = read_config()
    name = str(config.get("model_type", ""))
    if name not in CONVENTIONS:
        raise ConfigError(
            f"the experts of a layer are one tensor ({blocks[0].gate_up}), in which model_type={name or 'missing'} has"
            " an order that is not known here.",
            fix=f"{_ONE_BY_ONE}; known are {', '.join(CONVENTIONS)}",
            where=where,
        )
    found: dict[str, Place] = {}
    for block in blocks:
        # Models of several media have that of the language model inside.
        of_text = config.get("text_config") or config
        layer = _Layer(block, CONVENTIONS[name], {**of_text, "model_type": name}, where)
        layer.check_names(stored)
        found |= layer.experts(*(header(tensor) for tensor in (block.gate_up, block.down)))
        found |= layer.renamed(stored)
    return found


@dataclass(frozen=True)
class _Block:
    """The fused experts of a layer. layer: its prefix. name: of the block in it. gate_up, down: stored tensors."""

    layer: str
    name: str
    gate_up: str
    down: str


def _fused_blocks(stored: Collection[str], where: str) -> list[_Block]:
    leaves: dict[tuple[str, str], dict[str, str]] = {}
    for name in sorted(stored):
        found = _FUSED.match(name)
        if found is None:
            continue
        if found["rest"] not in ("", ".weight"):
            raise ConfigError(
                f"{name} belongs to fused experts that are quantized or have biases.",
                fix=f"use a checkpoint in bfloat16 without biases, or {_ONE_BY_ONE}",
                where=where,
            )
        of_block = leaves.setdefault((found["layer"], found["block"]), {})
        if found["leaf"] in of_block:
            raise _twice(of_block[found["leaf"]], name, where)
        of_block[found["leaf"]] = name
    for names in leaves.values():
        if len(names) == 1:
            [(leaf, name)] = names.items()
            other = "down_proj" if leaf == "gate_up_proj" else "gate_up_proj"
            raise ConfigError(f"{name} has no {other} beside it.", fix="copy the checkpoint again", where=where)
    return [_Block(*key, names["gate_up_proj"], names["down_proj"]) for key, names in leaves.items()]


def _twice(name: str, other: str, where: str) -> ConfigError:
    return ConfigError(
        f"the same weights are stored twice, as {name} and as {other}.",
        fix="take one of the two out of the folder (files of an earlier save may have stayed)",
        where=where,
    )


@dataclass(frozen=True)
class _Layer:
    """One block with what the model says of it. config: that of the language model."""

    block: _Block
    convention: Convention
    config: Mapping[str, Any]
    where: str

    @property
    def _published(self) -> str:
        """Prefix of the block in files with one tensor an expert."""
        return f"{self.block.layer}{self.convention.names.mlp}."

    def check_names(self, stored: Collection[str]) -> None:
        """Raise ConfigError where the block has another name, or its experts are there one by one too."""
        block, blocks = self.block, {self.convention.block, self.convention.names.mlp}
        if block.name not in blocks:
            raise ConfigError(
                f"{block.gate_up} is in a block {block.name}, not {self.convention.block}.", fix=_SAME, where=self.where
            )
        alone = re.compile(rf"{re.escape(block.layer)}({'|'.join(blocks)})\.experts\.\d+\.")
        also = min(filter(alone.match, stored), default=None)
        if also:
            raise _twice(block.gate_up, also, self.where)

    def experts(
        self, gate_up: tuple[str, tuple[int, ...]], down: tuple[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, Place]]:
        """(name, place) of each expert's matrices. Args: (dtype, shape) of the stored tensors."""
        names, block, by_columns = self.convention.names, self.block, self._by_columns(gate_up, down)
        experts, hidden = gate_up[1][0], self.config["hidden_size"]
        width = down[1][1] if by_columns else down[1][2]
        matrices = [
            (names.gate, block.gate_up, 0, (width, hidden)),
            (names.up, block.gate_up, width, (width, hidden)),
            (names.down, block.down, 0, (hidden, width)),
        ]
        for expert in range(experts):
            for leaf, tensor, first_row, shape in matrices:
                place = Place(tensor, expert, first_row, shape, by_columns)
                yield f"{self._published}experts.{expert}.{leaf}.weight", place

    def _by_columns(self, gate_up: tuple[str, tuple[int, ...]], down: tuple[str, tuple[int, ...]]) -> bool:
        """The order of both tensors, from their shapes."""
        block, hidden = self.block, self.config.get("hidden_size")
        count = next((self.config[key] for key in _EXPERT_COUNTS if key in self.config), gate_up[1][0])
        by_rows = by_columns = False
        if len(gate_up[1]) == len(down[1]) == 3 and gate_up[1][0] == down[1][0] == count:
            (_, rows, columns), (_, down_rows, down_columns) = gate_up[1], down[1]
            # Never both: rows would be twice down_columns, and equal to it.
            by_rows = columns == down_rows == hidden and rows == 2 * down_columns
            by_columns = rows == down_columns == hidden and columns == 2 * down_rows
        said = f"{block.gate_up} {list(gate_up[1])} and {block.down} {list(down[1])}"
        if not (by_rows or by_columns):
            problem = f"{said} are not {count} experts of a model with hidden_size={hidden}."
            raise ConfigError(problem, fix=_SAME, where=self.where)
        if gate_up[0] not in _FLOATS or down[0] not in _FLOATS:
            problem = f"{block.gate_up} is {gate_up[0]}, {block.down} {down[0]}: fused experts are read as floats."
            raise ConfigError(problem, fix="use a checkpoint in bfloat16", where=self.where)
        if rows == columns and by_columns not in self.convention.by_columns:
            # Down's shape alone is no proof of gate_up's order, where files of this type are known to have another.
            raise ConfigError(
                f"{said}: the first is square, and the second lies by {'columns' if by_columns else 'rows'}, unlike"
                f" other files of model_type={self.config['model_type']}, so that gate and up can't be told.",
                fix=_ONE_BY_ONE,
                where=self.where,
            )
        return by_columns

    def renamed(self, stored: Collection[str]) -> Iterator[tuple[str, Place]]:
        """(published name, place) of what else the block has, where files with fused experts call it otherwise."""
        own, router = f"{self.block.layer}{self.block.name}.", f"{self.convention.router}."
        for name in stored:
            if name.startswith(own) and name not in (self.block.gate_up, self.block.down):
                rest = name.removeprefix(own)
                rest = f"gate.{rest.removeprefix(router)}" if rest.startswith(router) else rest
                if self._published + rest != name:
                    if self._published + rest in stored:
                        raise _twice(self._published + rest, name, self.where)
                    yield self._published + rest, Place(name)
