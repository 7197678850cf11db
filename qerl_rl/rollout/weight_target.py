"""Weights that arrive in shards in a live vLLM engine: where each is written, and what is done once a module has all.

A tensor is named and shaped as vLLM's parameter of it before its kernels packed it; a quantized one comes in the parts
of its format, also where the engine computes with bfloat16 in its stead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.slots import ROUTER_BIAS
from qerl_rl.quant.formats import Format
from qerl_rl.rollout.adapters import check_complete
from qerl_rl.rollout.load_plan import LoadPlan
from qerl_rl.rollout.repack import absorbing_layers, packed_modules, repack, unpacked_parameters

_WEIGHT = re.compile(r"(w13_|w2_)?weight")
_DERIVED = "scale_bias"
"""Ends the names of parameters that follow from weights and scales."""
_GATE, _, _BIAS = ROUTER_BIAS.partition(".")
FIRST_OF_FUSED = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj", "fused_qkv_a_proj": "q_a_proj"}


class WeightTarget:
    """All weights of one rank's model, to be written anew. A module is packed as soon as all its tensors are complete.

    Until then they lie in tensors of their own; norms, embeddings and the output layer, which nothing packs away, are
    written where they are.
    """

    def __init__(self, model: Any, vllm_config: Any, plan: LoadPlan) -> None:
        self._modules: dict[str, _InPlace | _Packed | _Vector] = {}
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        architecture = MoeArchitecture.from_folder(plan.reader.path)
        absorbing = absorbing_layers(model)
        for path, module in packed_modules(model).items():
            bias = getattr(module, _BIAS, None)
            if isinstance(bias, torch.Tensor) and path.endswith(f".{_GATE}"):
                self._modules[f"{path}.{_BIAS}"] = _Vector(path, bias)
            parameters = unpacked_parameters(module)
            if not any(_WEIGHT.match(name) for name in parameters):
                continue
            place: _InPlace | _Packed
            if path == "lm_head" and module.weight is getattr(model.model.embed_tokens, "weight", None):
                continue  # Tied: the embedding's tensor is its own.
            if isinstance(module, VocabParallelEmbedding) or getattr(module, "quant_method", None) is None:
                place = _InPlace(path, model, module)
            else:
                formats = _Formats(plan, architecture, path)
                place = _Packed(path, module, parameters, vllm_config, formats, absorbing.get(module))
            self._modules |= dict.fromkeys(place.locals, place)
        self._missing: set[str] = set()

    def begin(self) -> None:
        """An update begins; what one that failed has left is forgotten."""
        self._missing = set(self._modules)
        for place in dict.fromkeys(self._modules.values()):
            place.begin()

    @property
    def locals(self) -> dict[str, tuple[int, ...]]:
        """By name, the shape of each tensor."""
        return {local: place.locals[local][0] for local, place in self._modules.items()}

    def write(self, local: str) -> torch.Tensor:
        """The tensor to fill. Raises: KeyError when the engine holds none of this name."""
        return self._modules[local].write(local)

    def complete(self, local: str) -> None:
        """All of it has been written."""
        self._modules[local].complete(local)
        self._missing.discard(local)

    def finish(self) -> int:
        """The end of an update: returns the bytes written. Raises: RuntimeError when tensors are missing."""
        check_complete(self._missing)
        return self.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(place.nbytes for place in dict.fromkeys(self._modules.values()))


class _Formats:
    """The formats of the weights of one module: what they arrive in, and what the engine computes in."""

    def __init__(self, plan: LoadPlan, architecture: MoeArchitecture, path: str) -> None:
        self._plan, self._architecture, self._path = plan, architecture, path

    def of(self, kind: str) -> tuple[Format | None, Format | None]:
        """Args: kind: w13_weight, w2_weight or weight."""
        weight = f"{self._module(kind)}.weight"
        return self._plan.stored_format(weight), self._plan.engine_format(weight)

    def _module(self, kind: str) -> str:
        """One of the checkpoint's modules that are fused in this one; all of them have one format."""
        parent, _, name = self._path.rpartition(".")
        if kind != "weight":
            gate, _, down = self._architecture.expert_weight_names
            return f"{self._path}.0.{down if kind == 'w2_weight' else gate}"
        return f"{parent}.{FIRST_OF_FUSED.get(name, name)}"


class _Vector:
    """A router's bias, which travels in float32 whatever the engine keeps it in."""

    def __init__(self, path: str, bias: torch.Tensor) -> None:
        self._bias, self._staged = bias, torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
        self.locals = {f"{path}.{_BIAS}": (tuple(bias.shape), torch.float32)}

    def begin(self) -> None:
        """Nothing is kept."""

    def write(self, local: str) -> torch.Tensor:
        return self._staged

    def complete(self, local: str) -> None:
        self._bias.data.copy_(self._staged)

    @property
    def nbytes(self) -> int:
        return self._staged.nbytes


class _InPlace:
    """A module whose parameters are used as they lie there (norms, embeddings), or the weight also as a packed copy
    (output layer)."""

    def __init__(self, path: str, model: Any, module: Any) -> None:
        self._module = module
        self._kinds = {f"{path}.{kind}": kind for kind in ("weight", "bias") if getattr(module, kind, None) is not None}
        parameters = {name: getattr(module, kind) for name, kind in self._kinds.items()}
        self.locals = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in parameters.items()}
        self.nbytes = sum(tensor.nbytes for tensor in parameters.values())
        # Only the output layer of a model computes products with what else is an embedding.
        head = getattr(model, "lm_head", None)
        self._packs = head if head is not None and getattr(head, "weight", None) is module.weight else None

    def begin(self) -> None:
        """Nothing is kept."""

    def write(self, local: str) -> torch.Tensor:
        return getattr(self._module, self._kinds[local]).data

    def complete(self, local: str) -> None:
        if self._packs is not None:
            self._packs.quant_method.process_weights_after_loading(self._packs)


class _Packed:
    """A module whose tensors its kernels pack: they are kept until all are there."""

    def __init__(
        self,
        path: str,
        module: Any,
        parameters: Mapping[str, torch.Tensor],
        vllm_config: Any,
        formats: _Formats,
        absorbing: Any,
    ) -> None:
        self._module, self._config, self._path, self._absorbing = module, vllm_config, path, absorbing
        self._parameters = parameters
        self._formats: dict[str, tuple[Format | None, Format | None]] = {}
        self.locals: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, parameter in parameters.items():
            found = _WEIGHT.match(name)
            kind = found[0] if found else name
            if found and kind not in self._formats:
                self._formats[kind] = formats.of(kind)
                self.locals |= self._parts(kind)
            elif not found and not name.endswith(_DERIVED):
                self.locals[f"{self._path}.{name}"] = tuple(parameter.shape), parameter.dtype
        self.begin()

    def begin(self) -> None:
        """Nothing has arrived yet."""
        self._staged: dict[str, torch.Tensor] = {}
        self._waiting = set(self.locals)

    def _parts(self, kind: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        stored, run = self._formats[kind]
        first = run.parts[0] if run else None
        parameter = self._parameters[kind + (first.suffix if first else "")]
        weight = run.weight_shape(tuple(parameter.shape)) if run else tuple(parameter.shape)
        if stored is None:
            return {f"{self._path}.{kind}": (weight, parameter.dtype)}
        return {f"{self._path}.{kind}{part.suffix}": (part.shape(weight), part.dtype) for part in stored.parts}

    def write(self, local: str) -> torch.Tensor:
        if local not in self._staged:
            shape, dtype = self.locals[local]
            self._staged[local] = torch.empty(shape, dtype=dtype, device=self._config.device_config.device)
        return self._staged[local]

    def complete(self, local: str) -> None:
        self._waiting.discard(local)
        if not self._waiting:
            repack(self._module, self._config, dict(self._tensors()), self._absorbing)
            self.begin()

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The module's parameters out of what has arrived."""
        for local in self.locals:
            name = local.removeprefix(f"{self._path}.")
            if not _WEIGHT.match(name):
                yield name, self._staged[local]
        for kind, (stored, run) in self._formats.items():
            if stored is None:
                yield kind, self._staged[f"{self._path}.{kind}"]
                continue
            parts = {part.suffix: self._staged[f"{self._path}.{kind}{part.suffix}"] for part in stored.parts}
            if run is None:
                yield kind, dequantized(stored, parts)
            else:
                for suffix, tensor in LoadPlan.converted(stored, run, parts).items():
                    yield kind + suffix, tensor

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.locals.values())


def dequantized(format: Format, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """bfloat16 [..., N, K]: a matrix of a stack at a time, since formats compute in float32."""
    if parts[format.parts[0].suffix].dim() == 2:
        return format.dequantize(parts, torch.bfloat16)
    count = len(parts[format.parts[0].suffix])
    return torch.stack([dequantized(format, {key: part[i] for key, part in parts.items()}) for i in range(count)])
