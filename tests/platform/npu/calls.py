"""Every torch_npu call that the code can make, made under the real torch_npu on tensors without memory.

Run as a program, in the environment of `package.environment`: prints one line of JSON. A case is computed twice, on the
CPU by the reference and on a fake NPU, where the dispatcher binds the arguments to the operator's schema, torch_npu's
own autograd records, and its meta kernels say shapes and types. What they do not say is whether a kernel accepts these
shapes, and what it computes.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_npu  # noqa: F401 - the operators and the device
from torch._subclasses.fake_tensor import FakeTensorMode

from qerl_rl.model.base_weight import Base
from qerl_rl.model.expert_mlp import expert_mlp
from qerl_rl.model.grouped_linear import Adapter
from qerl_rl.platform import ops
from qerl_rl.platform.device import NPU
from qerl_rl.quant.formats import FORMATS

ROOT = Path(__file__).parents[3]
TOKENS, HIDDEN, WIDTH, EXPERTS, CHOSEN = 32, 64, 48, 4, 2
ROWS = [20, 0, 12, 0]
BFLOAT16, FLOAT32, INT8, INT32, INT64 = torch.bfloat16, torch.float32, torch.int8, torch.int32, torch.int64


class Tensors:
    """Makes a case's tensors on one device, and remembers which of them take part in the gradient."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.leaves: list[torch.Tensor] = []

    def plain(self, *shape: int, dtype: torch.dtype = BFLOAT16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def leaf(self, *shape: int, dtype: torch.dtype = BFLOAT16) -> torch.Tensor:
        self.leaves.append(self.plain(*shape, dtype=dtype).requires_grad_())
        return self.leaves[-1]


Case = Callable[[Tensors], Any]


def _expert_mlp(kind: str) -> Case:
    def compute(make: Tensors) -> Any:
        def base(outputs: int, inputs: int) -> Base:
            if kind == "float":
                return Base((make.plain(EXPERTS, outputs, inputs),))
            format = FORMATS[kind](32 if kind.startswith("w4") else 0)
            parts = [(inputs // part.columns if part.columns else 1, part.dtype) for part in format.parts]
            return Base(tuple(make.plain(EXPERTS, outputs, columns, dtype=dtype) for columns, dtype in parts), format)

        bases = base(2 * HIDDEN, HIDDEN), base(HIDDEN, HIDDEN)
        first = Adapter(make.leaf(EXPERTS, 8, HIDDEN), make.leaf(EXPERTS, 2 * HIDDEN, 8), 2.0)
        second = Adapter(make.leaf(EXPERTS, 8, HIDDEN), make.leaf(EXPERTS, HIDDEN, 8), 2.0)
        probabilities = make.leaf(TOKENS, dtype=FLOAT32)
        return expert_mlp(make.leaf(TOKENS, HIDDEN), probabilities, ROWS, bases, (first, second))

    return compute


CASES: dict[str, Case] = {
    "rms_norm": lambda make: ops.rms_norm(make.leaf(TOKENS, 1, HIDDEN), make.leaf(HIDDEN), 1e-6),
    "rms_norm, noisy weight": lambda make: ops.rms_norm(
        make.leaf(TOKENS, HIDDEN), make.leaf(HIDDEN, dtype=FLOAT32), 1e-6
    ),
    "swiglu": lambda make: ops.swiglu(make.leaf(TOKENS, 2 * WIDTH), make.leaf(TOKENS, dtype=FLOAT32)),
    "rotary": lambda make: ops.rotary(
        make.leaf(TOKENS, 1, 4, HIDDEN), make.plain(TOKENS, 1, 1, HIDDEN), make.plain(TOKENS, 1, 1, HIDDEN)
    ),
    "rotary, learned angles": lambda make: ops.rotary(
        make.leaf(TOKENS, 2, 4, HIDDEN), make.leaf(TOKENS, 1, 1, HIDDEN), make.leaf(TOKENS, 1, 1, HIDDEN)
    ),
    "packed_attention": lambda make: ops.packed_attention(
        make.leaf(TOKENS, 4, 32), make.leaf(TOKENS, 2, 32), make.leaf(TOKENS, 2, 32), [20, 0, 12]
    ),
    "grouped_matmul": lambda make: ops.grouped_matmul(
        make.leaf(TOKENS, HIDDEN), make.leaf(EXPERTS, WIDTH, HIDDEN), ROWS
    ),
    "grouped_matmul_int8": lambda make: ops.grouped_matmul_int8(
        make.plain(TOKENS, HIDDEN, dtype=INT8),
        make.plain(TOKENS, dtype=FLOAT32),
        make.plain(EXPERTS, WIDTH, HIDDEN, dtype=INT8),
        make.plain(EXPERTS, WIDTH),
        ROWS,
    ),
    "grouped_matmul_int8, float16": lambda make: ops.grouped_matmul_int8(
        make.plain(TOKENS, HIDDEN, dtype=INT8),
        make.plain(TOKENS, dtype=FLOAT32),
        make.plain(EXPERTS, WIDTH, HIDDEN, dtype=INT8),
        make.plain(EXPERTS, WIDTH, dtype=FLOAT32),
        ROWS,
    ),
    "grouped_matmul_int4, a scale a column": lambda make: ops.grouped_matmul_int4(
        make.leaf(TOKENS, HIDDEN),
        make.plain(EXPERTS, HIDDEN, WIDTH // 8, dtype=INT32),
        make.plain(EXPERTS, 1, WIDTH),
        ROWS,
    ),
    "grouped_matmul_int4, groups": lambda make: ops.grouped_matmul_int4(
        make.leaf(TOKENS, HIDDEN),
        make.plain(EXPERTS, HIDDEN, WIDTH // 8, dtype=INT32),
        make.plain(EXPERTS, HIDDEN // 32, WIDTH),
        ROWS,
        make.plain(EXPERTS, HIDDEN // 32, WIDTH),
    ),
    "token_permute": lambda make: ops.token_permute(make.leaf(TOKENS, HIDDEN), make.plain(TOKENS, CHOSEN, dtype=INT64)),
    "token_unpermute": lambda make: ops.token_unpermute(
        make.leaf(TOKENS * CHOSEN, HIDDEN), make.plain(TOKENS * CHOSEN, dtype=INT32), make.leaf(TOKENS, CHOSEN)
    ),
    "gating_top_k_softmax": lambda make: ops.gating_top_k_softmax(make.leaf(TOKENS, EXPERTS, dtype=FLOAT32), CHOSEN),
    "dynamic_quantize": lambda make: ops.dynamic_quantize(make.plain(TOKENS, HIDDEN)),
    "pack_int4": lambda make: ops.pack_int4(make.plain(EXPERTS, HIDDEN, WIDTH, dtype=INT32)),
    "to_fractal_nz": lambda make: ops.to_fractal_nz(make.plain(EXPERTS, HIDDEN, WIDTH)),
    "experts, float": _expert_mlp("float"),
    "experts, w8a8": _expert_mlp("w8a8"),
    "experts, w4a16": _expert_mlp("w4a16"),
}


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


def _computed(case: Case, device: str) -> list[str]:
    """Type and shape of what a case returns, then of the gradients of its leaves."""
    make = Tensors(device)
    found = case(make)
    outputs = list(found) if isinstance(found, tuple) else [found]
    if make.leaves:
        [total, *_] = [output for output in outputs if output.requires_grad]
        outputs += torch.autograd.grad(total, make.leaves, torch.ones_like(total), allow_unused=True)
    return [_described(output) for output in outputs]


def _described(tensor: torch.Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"


def _on_fake_npu(case: Case) -> list[str]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _computed(case, "npu")


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
    kept = _missing_meta_kernels()
    recorder = CallRecorder(torch.ops.npu)
    torch.ops.npu = recorder
    cases: dict[str, dict[str, Any]] = {}
    for name, case in CASES.items():
        cases[name] = {"cpu": _computed(case, "cpu")}
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
