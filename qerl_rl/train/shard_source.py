"""What this rank trains, in the form in which it moves to the rollout engine. Import after `prepare_megatron`.

Weights are rounded to the engine's format before they move, one at a time: the model has no second copy meanwhile.
Where a scale belongs to more of a weight than this rank holds, the ranks agree on the largest magnitude first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.slots import Slot, find_tensor
from qerl_rl.model.formats import SlotFormats, check_format_layout
from qerl_rl.model.parallel import current_coordinates, current_sizes
from qerl_rl.quant.base import largest_of_groups
from qerl_rl.quant.formats import Format

OnFinished = Callable[[str, torch.Tensor], None]
"""Called with a parameter's name in the model, and the parameter, when it has been read for the last time."""


class ShardSource:
    """The tensors of this rank by their local names, for one transfer (`Source` of qerl_rl.reshard.transfer).

    Making one is collective where weights are rounded. What it gives follows from the parameters as they are then:
    nothing may train before the last read.

    Args: slots: of what moves; those of other pipeline stages are passed over. formats: of the weights that are
        rounded, to nearest, as the whole weight would be; others become `dtype`, or stay what they are (None).
    Raises: ConfigError where a rank holds part of a group of weights that share a scale.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        architecture: MoeArchitecture,
        slots: Iterable[Slot],
        *,
        formats: SlotFormats | None = None,
        dtype: torch.dtype | None = None,
        on_finished: OnFinished | None = None,
    ) -> None:
        formats, sizes, here = formats or {}, current_sizes(), current_coordinates()
        check_format_layout(architecture, formats, sizes)
        self._on_finished = on_finished
        self._weights: dict[str, _Weight] = {}
        self._names: dict[str, tuple[_Weight, str]] = {}
        for slot in slots:
            if slot.stage(architecture.layers, sizes) != here.pipeline:
                continue
            path = slot.module_path(architecture.layers, sizes)
            format = formats.get((slot.layer, slot.name))
            weight = _Weight(path, slot, find_tensor(model, path).detach(), format, slot.dtype or dtype)
            self._names |= {path + suffix: (weight, suffix) for suffix in weight.unfinished}
            self._weights[path] = weight
        _agree_on_largest(self._weights.values())

    @property
    def names(self) -> list[str]:
        """The local names that are not finished, in the order of the model."""
        return list(self._names)

    def read(self, local: str) -> torch.Tensor:
        """The tensor of this name; the parts of a weight are made together when the first of them is asked for.

        Raises: KeyError when there is none, or none any more.
        """
        weight, suffix = self._names[local]
        if suffix not in weight.parts:
            made = weight.converted()
            weight.parts = {key: tensor for key, tensor in made.items() if key in weight.unfinished}
        return weight.parts[suffix]

    def finished(self, local: str) -> None:
        """Let go of what `read` gave under this name; when that was the last part of a weight the hook is called."""
        weight, suffix = self._names.pop(local)
        weight.parts.pop(suffix, None)
        weight.unfinished.remove(suffix)
        if not weight.unfinished:
            del self._weights[weight.path]
            if self._on_finished is not None:
                self._on_finished(weight.path, weight.tensor)


class _Weight:
    """A parameter of this rank and, for a while, what has been made of it.

    of_rows [..., N, 1], of_matrices [...]: the largest magnitudes of all ranks' parts of a weight [..., N, K], float32,
    where its scales follow from those; None: this rank's own are all there are.
    """

    def __init__(
        self, path: str, slot: Slot, tensor: torch.Tensor, format: Format | None, dtype: torch.dtype | None
    ) -> None:
        self.path, self.tensor, self.format, self._dtype = path, tensor, format, dtype
        self.unfinished = {part.suffix for part in format.parts} if format else {""}
        self.parts: dict[str, torch.Tensor] = {}
        self.is_expert = slot.block.is_expert
        self.of_rows: torch.Tensor | None = None
        self.of_matrices: torch.Tensor | None = None
        self._is_split = slot.block.split_dim is not None
        self._splits_rows = slot.block.split_dim == len(slot.block.shape) - 1

    def measure(self) -> list[torch.Tensor]:
        """What the ranks have to agree on, to be overwritten with the largest of all."""
        if self.format is None or not self._is_split:
            return []
        if self._splits_rows and self.format.group_size == 0:
            self.of_rows = largest_of_groups(self.tensor, 0)
        if any(part.per_matrix for part in self.format.parts):
            # q, k and v, or gate and up, lie in one matrix here; engines fuse them too, so that they share their scale.
            self.of_matrices = largest_of_groups(self.tensor, 0).amax((-2, -1))
        return [found for found in (self.of_rows, self.of_matrices) if found is not None]

    def converted(self) -> dict[str, torch.Tensor]:
        """By suffix, what moves."""
        if self.format is None:
            return {"": self.tensor if self._dtype is None else self.tensor.to(self._dtype)}
        of_groups = largest_of_groups(self.tensor, self.format.group_size) if self.of_rows is None else self.of_rows
        return self.format.encode(self.tensor, self.format.scales_of_groups(of_groups, self.of_matrices))


def _agree_on_largest(weights: Iterable[_Weight]) -> None:
    """One all-reduce of all maxima over the ranks that split dense weights, one over those that split experts'."""
    weights = list(weights)
    for is_expert, ways, group in (
        (False, parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_group),
        (True, parallel_state.get_expert_tensor_parallel_world_size(), parallel_state.get_expert_tensor_parallel_group),
    ):
        if ways == 1:
            continue
        shares = [share for weight in weights if weight.is_expert == is_expert for share in weight.measure()]
        if not shares:
            continue
        flat = torch.cat([share.flatten() for share in shares])
        dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=group())
        for share, agreed in zip(shares, flat.split([share.numel() for share in shares]), strict=True):
            share.copy_(agreed.view_as(share))
