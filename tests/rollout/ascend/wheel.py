"""The real modules of vllm-ascend on a machine without a card, foreign imports stubbed.

What they import of vLLM and torch_npu is stood in for by names without meaning, but for the few that the code under
test calls; those are given here, torch_npu's after their documentation.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from tests.rollout.ascend.sources import VERSION, vllm_ascend

FOREIGN = ("vllm", "vllm_ascend", "torch_npu", "acl")
FRACTAL_NZ = 29


class _Anything(type):
    """A class of classes that can stand for whatever a module does with a name while it is imported."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _named(name)

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        if "_is_stub" not in vars(cls):
            return super().__call__(*arguments, **options)
        # As a decorator, a name leaves what it decorates.
        return arguments[0] if len(arguments) == 1 and callable(arguments[0]) else _named(cls.__name__)


def _named(name: str) -> Any:
    return _Anything(name, (), {"_is_stub": True})


class _Stub(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _named(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules named in `real` in the wheel, and a stub for every other of the foreign packages."""

    def __init__(self, real: frozenset[str], given: Mapping[str, Mapping[str, Any]]) -> None:
        self._real, self._given = real, given

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in FOREIGN:
            return None
        if name in self._real:
            file = vllm_ascend() / (name.replace(".", "/") + ".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        module = _Stub(spec.name)
        module.__dict__.update(self._given.get(spec.name, {}))
        return module

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


@contextmanager
def wheel(*modules: str, given: Mapping[str, Mapping[str, Any]]) -> Iterator[Callable[[str], ModuleType]]:
    """Inside, an importer of these modules of vllm-ascend; afterwards nothing of it can be imported any more.

    Args: modules: by their full names; all others are stubs. given: by module, the names that stubs define.
    """
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in FOREIGN}
    finder = _Finder(frozenset(modules), given)
    for name in before:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    had_npu = getattr(torch, "npu", None)
    torch.npu = _named("npu")  # type: ignore[attr-defined]
    torch.Tensor.npu = lambda self: self  # type: ignore[attr-defined]
    try:
        yield importlib.import_module
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in FOREIGN]:
            del sys.modules[name]
        sys.modules.update(before)
        del torch.npu, torch.Tensor.npu  # type: ignore[attr-defined]
        if had_npu is not None:
            torch.npu = had_npu  # type: ignore[attr-defined]


def fractal_nz(weight: torch.Tensor, acl_format: int = FRACTAL_NZ) -> torch.Tensor:
    """The numbers of each matrix [K, N] as FRACTAL_NZ has them in memory: blocks of 16 rows and 32 bytes, by columns of
    blocks. A card would show the matrix all the same; here what lies in memory can be seen.
    """
    assert acl_format == FRACTAL_NZ
    columns = 32 // weight.itemsize
    blocks = weight.unflatten(-1, (-1, columns)).unflatten(-3, (-1, 16))
    return blocks.movedim(-2, -4).contiguous().view(weight.shape)


def int4pack(weight: torch.Tensor) -> torch.Tensor:
    """npu_convert_weight_to_int4pack: int32 [M, N] -> [M, N / 8]."""
    assert weight.dtype == torch.int32
    assert weight.dim() == 2
    packed = torch.zeros(weight.shape[0], weight.shape[1] // 8, dtype=torch.int32)
    for place in range(8):
        packed |= (weight[:, place::8] & 0xF) << (4 * place)
    return packed


class VllmConfig(SimpleNamespace):
    """What quantization schemes ask of vLLM's configuration."""

    def __init__(self, quant_description: dict[str, Any]) -> None:
        super().__init__(
            quant_config=SimpleNamespace(quant_description=quant_description),
            compilation_config=SimpleNamespace(mode=0),
            parallel_config=SimpleNamespace(enable_expert_parallel=True),
            model_config=SimpleNamespace(enforce_eager=True, dtype=torch.bfloat16),
        )


class AscendConfig(SimpleNamespace):
    """What they ask of vllm-ascend's."""

    def __init__(self, enable_fused_mc2: int = 0, weight_nz_mode: int = 0) -> None:
        super().__init__(
            enable_fused_mc2=enable_fused_mc2,
            weight_nz_mode=weight_nz_mode,
            eplb_config=SimpleNamespace(dynamic_eplb=False),
            multistream_overlap_gate=False,
        )


class UnquantizedMethod:
    """vLLM's method of unquantized layers, which does nothing with weights off a CPU."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Nothing is kept."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing is done."""


class UnquantizedFusedMoEMethod(UnquantizedMethod):
    def _maybe_pad_weight(self, weight: torch.Tensor) -> torch.Tensor:
        # vLLM pads on AMD's cards alone.
        return weight


def set_weight_attrs(weight: torch.Tensor, attributes: dict[str, Any] | None) -> None:
    for name, value in (attributes or {}).items():
        setattr(weight, name, value)


METHODS = "vllm_ascend.quantization.methods"
MODULES = (
    f"{METHODS}.base",
    f"{METHODS}.registry",
    f"{METHODS}.w8a8_dynamic",
    f"{METHODS}.w4a16",
    f"{METHODS}.w4a8",
    f"{METHODS}.w8a8_mxfp8",
    "vllm_ascend.quantization.quant_type",
    "vllm_ascend.quantization.method_adapters",
    "vllm_ascend.ops.linear",
    "vllm_ascend.ops.fused_moe.fused_moe",
    "vllm_ascend.utils",
)


def given(description: dict[str, Any], ascend: AscendConfig) -> dict[str, dict[str, Any]]:
    """What the stubs define for the schemes of MODULES."""
    return {
        "vllm.config": {"get_current_vllm_config": lambda: VllmConfig(description)},
        "vllm.distributed": {"get_tensor_model_parallel_world_size": lambda: 1},
        "vllm.model_executor.utils": {"set_weight_attrs": set_weight_attrs},
        "vllm.model_executor.layers.linear": {
            "UnquantizedLinearMethod": UnquantizedMethod,
            "LinearMethodBase": object,
            "RowParallelLinear": type("RowParallelLinear", (), {}),
        },
        "vllm.model_executor.layers.fused_moe.layer": {"UnquantizedFusedMoEMethod": UnquantizedFusedMoEMethod},
        "vllm.model_executor.layers.fused_moe": {"FusedMoEMethodBase": UnquantizedMethod},
        "vllm.utils.math_utils": {"cdiv": lambda a, b: -(-a // b)},
        "vllm_ascend.envs": {"VLLM_VERSION": VERSION},
        "vllm_ascend.distributed.parallel_state": {"get_mc2_group": lambda: None},
        "vllm_ascend.ascend_config": {"get_ascend_config": lambda: ascend},
        "torch_npu": {"npu_format_cast": fractal_nz, "npu_convert_weight_to_int4pack": int4pack},
    }
