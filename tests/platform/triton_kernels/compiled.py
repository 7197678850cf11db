"""Every Triton kernel through the compilers of the cards that are not here; prints what came of it as JSON.

Run as a program. For CUDA the installed Triton compiles to machine code (compute capability 8.0). For Ascend, with the
folder of triton-ascend as argument, its Triton lowers to Linalg, the form that goes to CANN's own compiler.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

KERNELS = Path(__file__).parents[3] / "qerl_rl" / "platform" / "triton_kernels"
GATHERED = "gathered"
"""The name, and the module in this folder, of what the Ascend compiler is to be seen refusing."""
EXPERTS = {
    "x": "*bf16",
    "chosen": "*i32",
    "probabilities": "*fp32",
    "packed13": "*i32",
    "scale13": "*bf16",
    "offset13": "*bf16",
    "packed2": "*i32",
    "scale2": "*bf16",
    "offset2": "*bf16",
    "partial": "*fp32",
    "k": "i32",
    "slices": "i32",
}


class Variant(NamedTuple):
    """A kernel with the types of its arguments and its constants."""

    module: str
    name: str
    types: dict[str, str]
    constants: dict[str, int]


def _experts(group: int, block: int, offsets: bool) -> Variant:
    """Of Qwen3-30B-A3B."""
    sizes = {"hidden": 2048, "width": 768, "group13": group or 2048, "group2": group or 768}
    blocks = {"block": block, "slice_words": block // 8, "down_words": 16}
    return Variant("int4", "_experts", EXPERTS, sizes | blocks | {"has_offset13": offsets, "has_offset2": offsets})


VARIANTS = {
    "gate": Variant(
        "gating",
        "_gate",
        {"logits": "*fp32", "values": "*fp32", "chosen": "*i32", "experts": "i32", "stride": "i32"},
        {"k": 8, "block": 128},
    ),
    "noise": Variant(
        "noise",
        "_add_noise",
        {"clean": "*bf16", "noisy": "*fp32", "count": "i32"}
        | dict.fromkeys(("seed", "stream", "step"), "i64")
        | {"sigma": "fp32"},
        {"block": 1024},
    ),
    "repack": Variant(
        "int4",
        "_repack",
        {"source": "*i32", "target": "*i32", "experts": "i32", "outputs": "i32", "words": "i32"},
        {"row_block": 16, "word_block": 32},
    ),
    "experts, groups of 32": _experts(32, 32, offsets=False),
    "experts, groups of 128": _experts(128, 64, offsets=False),
    "experts, whole rows with offsets": _experts(0, 64, offsets=True),
}


@functools.cache
def _module(name: str) -> Any:
    # Not by way of the package, whose imports the other Triton's folder lacks.
    folder = Path(__file__).parent if name == GATHERED else KERNELS
    specification = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _for_cuda(variant: Variant) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(_module(variant.module), variant.name)
    types = {name: variant.types.get(name, "constexpr") for name in kernel.arg_names}
    compiled = triton.compile(ASTSource(kernel, types, variant.constants), target=GPUTarget("cuda", 80, 32))
    assert compiled.asm["cubin"]


def _for_ascend(variant: Variant) -> None:
    from triton._C.libtriton import ir
    from triton.backends.ascend import compiler
    from triton.compiler import ASTSource

    kernel = getattr(_module(variant.module), variant.name)
    context, options = ir.context(), compiler.NPUOptions()
    ir.load_dialects(context)
    source = ASTSource(kernel, variant.types, variant.constants)
    module = compiler.make_ttir(source.make_ir(options, {}, {}, context), {"hash": variant.name}, options)
    switches = {"enable_nd2nz_on_vector": True, "enable_select_analysis": True}
    switches |= {"compile_on_910_95": False, "force_simt_template": False}
    linalg = compiler.ttir_to_linalg(module, switches, options, named_ops=True)
    assert "func.func" in linalg
    # What it can't turn into copies of blocks becomes a loop that it marks: correct, and very slow.
    assert not {"DiscreteMemAccess", "ExtractedLoadOrStore"} & set(re.findall(r"\w+", linalg)), "number by number"


def main() -> None:
    if len(sys.argv) > 1:
        sys.path.insert(0, sys.argv[1])
    compile_one: Callable[[Variant], None] = _for_ascend if len(sys.argv) > 1 else _for_cuda
    failures = {}
    control = Variant(GATHERED, "_gathered", {"packed": "*i32", "numbers": "*i32"}, {"block": 64})
    for name, variant in {**VARIANTS, GATHERED: control}.items():
        try:
            compile_one(variant)
        except Exception as error:  # noqa: BLE001 - the test of this variant shows it, and the others go on
            written = getattr(error, "stderr", None) or b""
            failures[name] = f"{traceback.format_exc()}\n{written.decode(errors='replace')}"
    print(json.dumps(failures))


if __name__ == "__main__":
    main()
