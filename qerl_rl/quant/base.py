"""What a weight format is: the parts that a weight is stored in, and how it becomes them and comes back.

A format splits a weight [..., N, K] into parts, each a tensor of its own in a checkpoint: the packed integers, the
scales of groups of a row, sometimes one scale for the whole matrix. Names, layouts and rounding are those of the
compressed-tensors library, which vLLM, vLLM-Ascend and transformers read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qerl_rl.platform.integer_loops import has_loops, largest_magnitudes
from qerl_rl.quant.blocks import in_blocks

Parts = Mapping[str, torch.Tensor]
"""Tensor by the suffix of its part."""
Index = tuple[slice, ...]
"""What is wanted of the dimensions of a tensor; of those that it does not name, all."""


@dataclass(frozen=True)
class Part:
    """One tensor of a quantized weight [..., N, K]; X.weight's part is stored under the name X.weight + suffix.

    columns: how many weights of a row one element stands for; it divides K. 0: one element stands for a whole row.
    per_matrix: a checkpoint holds one element [1] for each matrix [N, K]; in memory, as in `Format.quantize`, it is
        repeated for each row, so that matrices can be fused and split.
    """

    suffix: str
    dtype: torch.dtype
    columns: int
    per_matrix: bool = False

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in memory of this part of a weight of shape [..., N, K]. Raises: ValueError when K does not divide."""
        *rows, width = weight
        if self.columns and width % self.columns:
            raise ValueError(f"rows of {width} weights can't be cut into parts of {self.columns}")
        return (*rows, width // self.columns if self.columns else 1)


class Format(ABC):
    """One format with its group size; `parts` come in the order in which they are stored, what is rounded first.

    A weight is about a point of the `grid` times its step: rounding is `scales`, then `encode`.
    """

    name: str
    """The value of quant.format."""
    group_size: int
    """Weights of a row that share a scale; 0: the whole row does."""
    parts: tuple[Part, ...]
    grid: torch.Tensor
    """The values that a stored number can stand for, before its scale; ascending, float32."""
    preset: str
    """compressed-tensors' name of the scheme."""

    def quantize(self, weight: torch.Tensor, largest: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Round to nearest; tensor by suffix, with the shapes of `Part.shape`.

        Args: weight [..., N, K] of any float dtype; computed in float32, each matrix [N, K] for itself. largest [...]:
            for formats with a part per matrix, the largest |weight| of all matrices that an engine fuses with this one
            (q, k and v; gate and up), which must share that part; by default this matrix's own.
        Raises: ValueError when K is no multiple of the group size.
        """
        return self.encode(weight, self.scales(weight, largest))

    def scales(self, weight: torch.Tensor, largest: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The parts that `quantize` scales by: all but the first, by suffix."""
        return self.scales_of_groups(largest_of_groups(weight, self.group_size), largest)

    @abstractmethod
    def scales_of_groups(self, of_groups: torch.Tensor, largest: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """`scales` of weights whose groups have these largest magnitudes (`largest_of_groups`).

        Who holds a part of each row, or of each matrix, gives the maxima over all parts, and gets the scales of the
        whole. Args: of_groups float32 [..., N, K / group_size] (or [..., N, 1]). largest: as in `quantize`.
        """

    def encode(self, weight: torch.Tensor, scales: Parts) -> dict[str, torch.Tensor]:
        """Round to the nearest multiples that these scales allow (beyond the grid's ends: to its ends); all parts."""
        first, width = self.parts[0], weight.shape[-1]
        rows, steps = weight.detach().reshape(-1, width), self.steps(scales).flatten(0, -2)[..., None]
        out = torch.empty(first.shape(tuple(weight.shape)), dtype=first.dtype, device=weight.device)
        flat = out.flatten(0, -2)

        def encode_some(some: slice) -> None:
            weights = rows[some].unflatten(-1, (steps.shape[-2], -1))
            flat[some] = self._rounded_quotients(weights, steps[some]).view(flat[some].shape)

        in_blocks(encode_some, len(rows), width)
        return {first.suffix: out, **scales}

    def _rounded_quotients(self, weights: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """`_rounded` of weights [rows, groups, K] divided by their steps [rows, groups, 1] float32."""
        if weights.dtype == torch.float32:
            return self._rounded(weights / steps)
        # This copy is ours to overwrite.
        return self._rounded(weights.float().div_(steps))

    @abstractmethod
    def _rounded(self, scaled: torch.Tensor) -> torch.Tensor:
        """Elements of the first part (integers may come as floats) of weights divided by their steps, float32.

        What it gets may be overwritten; what it gives is contiguous.
        """

    @abstractmethod
    def steps(self, parts: Parts) -> torch.Tensor:
        """What a point of the grid is multiplied with: float32 [..., N, K / group_size] (or [..., N, 1])."""

    @abstractmethod
    def dequantize(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [..., N, K] that the parts stand for, as compressed-tensors computes it, then cast to `dtype`."""

    def weight_shape(self, first: tuple[int, ...]) -> tuple[int, ...]:
        """The shape [..., N, K] of a weight whose first part is stored in a tensor of this shape."""
        *rows, elements = first
        return (*rows, elements * self.parts[0].columns)

    def matrix_shape(self, first: torch.Tensor) -> tuple[int, int]:
        """(N, K) of the weights [E, N, K] whose first part this is."""
        return first.shape[1], first.shape[2] * self.parts[0].columns

    def unpacked(self, parts: Parts, scratch: torch.Tensor | None = None) -> Parts:
        """The parts of one matrix as `quantize` gives them: a rollout engine's kernel may keep them in another order.

        scratch: of the first part's shape and dtype; where something has to be written, it is there.
        """
        return parts

    def described(self, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """By suffix, what a checkpoint stores beside the parts of a matrix and what follows from its shape [N, K]."""
        return {}

    def stored(self, parts: Parts) -> dict[str, torch.Tensor]:
        """By suffix, what a checkpoint holds for one matrix [N, K] with these parts in memory."""
        tensors = {part.suffix: parts[part.suffix] for part in self.parts}
        for part in self.parts:
            if part.per_matrix:
                tensors[part.suffix] = parts[part.suffix][0].clone()
        first = self.parts[0]
        rows, width = tensors[first.suffix].shape
        return tensors | self.described((rows, width * first.columns))

    def loaded(self, tensors: Parts) -> dict[str, torch.Tensor]:
        """The parts in memory of one matrix [N, K] that a checkpoint holds as `tensors`: what `stored` undoes."""
        rows = tensors[self.parts[0].suffix].shape[0]
        return {
            part.suffix: tensors[part.suffix].reshape(1, 1).repeat(rows, 1)
            if part.per_matrix
            else tensors[part.suffix].to(part.dtype)
            for part in self.parts
        }

    def stored_in(self, part: Part) -> tuple[str, ...]:
        """Suffixes of the tensors of a checkpoint that a part follows from."""
        return (part.suffix,)

    @property
    def sources(self) -> tuple[str, ...]:
        """Suffixes of all tensors that `loaded` takes."""
        return tuple(suffix for part in self.parts for suffix in self.stored_in(part))

    def window(self, part: Part, rows: int, index: Index) -> tuple[Index, Index]:
        """For a part that is stored otherwise than it is in memory: what to read of its tensors so that `loaded` gives
        `index` of it, and what is wanted of what it gives. Args: rows: N of the weight."""
        return (), index

    def with_scales(self, dtype: torch.dtype) -> Format:
        """This format as a checkpoint has it whose scales are of another float type; itself where that is converted."""
        return self

    def scheme(self) -> Any:
        """compressed-tensors' description of this format for Linear modules, a QuantizationScheme."""
        # Imported where it is needed: it takes two seconds, and who only reads a checkpoint has no use for it.
        from compressed_tensors.quantization import preset_name_to_scheme

        scheme = preset_name_to_scheme(self.preset, ["Linear"])
        if scheme.weights.strategy == "group":
            if self.group_size:
                scheme.weights.group_size = self.group_size
            else:
                scheme.weights.group_size, scheme.weights.strategy = None, "channel"
        return scheme

    def layout(self) -> str:
        """The library's name of the checkpoint layout (int-quantized, pack-quantized ...)."""
        from compressed_tensors.compressors.format import infer_module_format

        return infer_module_format(torch.nn.Linear, self.scheme()).value

    def config_group(self, targets: list[str]) -> dict[str, Any]:
        """The entry of `config_groups` that stores the Linear modules `targets` (names or re:patterns) this way."""
        return self.scheme().model_dump(mode="json") | {"format": self.layout(), "targets": targets}

    def quantization_config(self, ignore: list[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json; ignore: names or re:patterns of Linear modules left as they are."""
        return quantization_config({"group_0": self.config_group(["Linear"])}, ignore)


def quantization_config(groups: dict[str, dict[str, Any]], ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json of a model with these `Format.config_group`s."""
    layouts = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": groups,
        "kv_cache_scheme": None,
    }


def largest_of_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Largest |weight| of each group of a row: [..., N, K] -> float32 [..., N, K / group_size].

    A group size of 0 means the row: [..., N, 1].

    Raises: ValueError when K is no multiple of the group size.
    """
    width = weight.shape[-1]
    if group_size and width % group_size:
        raise ValueError(f"rows of {width} weights can't be cut into groups of {group_size}")
    groups = weight.detach().reshape(-1, group_size or width)
    largest = torch.empty(len(groups), device=weight.device)

    def reduce_some(some: slice) -> None:
        weights = groups[some]
        largest[some] = largest_magnitudes(weights) if has_loops(weights) else weights.float().abs().amax(-1)

    in_blocks(reduce_some, *groups.shape)
    return largest.view(*weight.shape[:-1], -1)


def library_scales(largest: torch.Tensor, arguments: Any, global_scale: torch.Tensor | None = None) -> torch.Tensor:
    """compressed-tensors' scales of groups with these largest magnitudes, symmetric, float32."""
    from compressed_tensors.quantization.utils import calculate_qparams

    return calculate_qparams(-largest, largest, arguments, global_scale=global_scale)[0]
