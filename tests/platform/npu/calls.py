"""Every torch_npu call that the code can make, made under the real torch_npu on tensors without memory.

Run as a program, by `program.run_program`: prints one line of JSON. A case is computed twice, on the
CPU by the reference and on a fake NPU, where the dispatcher binds the arguments to the operator's schema, torch_npu's
own autograd records, and its meta kernels say shapes and types. What they do not say is whether a kernel accepts these
shapes, and what it computes.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qerl_rl.platform.device import NPU
from qerl_rl.platform.simulated_npu import package
from tests.platform.npu.cases import CASES, Case, Tensors, computed

ROOT = Path(__file__).parents[3]


class CallRecorder:
    """Stands in for torch.ops.npu: notes from where each operator is called."""

    def __init__(self, operators: Any) -> None:
        self._operators = operators
        self.calls: set[tuple[str, int, str]] = set()

    def __getattr__(self, name: str) -> Any:
        # Kept, as torch.ops keeps operators: the dispatcher looks them up here and owns no reference.
        self.__dict__[name] = _Noted(getattr(self._operators, name), self.calls)
        return self.__dict__[name]


class _Noted:
    """An operator of torch_npu, which has attributes that torch_npu itself uses."""

    def __init__(self, operator: Any, calls: set[tuple[str, int, str]]) -> None:
        self._operator, self._calls = operator, calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT):
            self._calls.add((str(path.relative_to(ROOT)), frame.f_lineno, self._operator.__name__))
        return self._operator(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operator, name)


def _missing_meta_kernels() -> torch.library.Library:
    """Shapes of the two operators that have no meta kernel, from their documentation."""
    library = torch.library.Library("npu", "IMPL")
    library.impl("npu_format_cast", lambda weight, *args, **kwargs: torch.empty_like(weight), "Meta")

    def packed(weight: torch.Tensor, inner_k_tiles: int = 0) -> torch.Tensor:
        return weight.new_empty(*weight.shape[:-1], weight.shape[-1] // 8)

    library.impl("npu_convert_weight_to_int4pack", packed, "Meta")
    return library


def _described(tensor: torch.Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"


def _on_cpu(case: Case) -> list[str]:
    return [_described(tensor) for tensor in computed(case, Tensors("cpu"))]


def _on_fake_npu(case: Case) -> list[str]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return [_described(tensor) for tensor in computed(case, Tensors("npu"))]


def _device() -> dict[str, Any]:
    """What the methods of `Device` find on two NPUs whose memory is the host's."""
    before = NPU.memory()
    available, first = NPU.is_available(), str(NPU.current())
    NPU.select(1)
    selected = str(NPU.current())
    block = torch.empty(1 << 20, dtype=torch.uint8, device="npu")
    during = NPU.memory()
    del block
    NPU.synchronize()
    NPU.select(0)
    return {
        "available": available,
        "devices": [first, selected],
        "allocated": during.used_bytes - before.used_bytes,
        "peak": during.peak_bytes,
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    package.load()
    kept = _missing_meta_kernels()
    recorder = CallRecorder(torch.ops.npu)
    torch.ops.npu = recorder
    cases: dict[str, dict[str, Any]] = {}
    for name, case in CASES.items():
        cases[name] = {"cpu": _on_cpu(case)}
        try:
            cases[name]["npu"] = _on_fake_npu(case)
        except Exception as error:  # noqa: BLE001 - the test of this case shows it, and the others go on
            cases[name]["npu"] = f"{type(error).__name__}: {error}"
    device = _device()
    # Megatron on an NPU begins with it.
    importlib.import_module("torch_npu.contrib.transfer_to_npu")
    print(json.dumps({"cases": cases, "calls": sorted(recorder.calls), "device": device}))
    del kept


if __name__ == "__main__":
    main()
