"""What each platform's engine does with each weight format: docs/quantization.md shows the same as a table."""

from __future__ import annotations

from typing import NamedTuple

NATIVE, DEQUANTIZED, CONVERT = "native", "dequantized", "convert"
"""How weights run: by kernels of their own format; as bfloat16, dequantized when they are loaded; not at all."""


class Support(NamedTuple):
    """How an engine runs a format; formats: what to quantize to instead, best first, where it does not.

    attention: what attention, dense MLPs and shared experts must be where the format has kernels for experts alone
    (`--attention`); empty: anything.
    """

    how: str
    note: str = ""
    formats: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()


PLATFORMS = ("cpu", "cuda", "910", "a5")
"""Of which 910 stands for Atlas A2 and A3 (910B, 910C), a5 for Ascend 950."""

_CUDA = Support(NATIVE, "vLLM's kernels for the card at hand")
_FROM_MSMODELSLIM = "vllm-ascend reads it from msmodelslim checkpoints only"

TABLE: dict[tuple[str, str], Support] = {
    ("none", "cpu"): Support(NATIVE),
    ("w8a8", "cpu"): Support(NATIVE, "int8 products"),
    # (But rows with a single scale, which are dequantized.)
    ("w4a16", "cpu"): Support(NATIVE, "int4 unpacked to int8 products in the kernel: activations become int8 too"),
    ("w4a8", "cpu"): Support(NATIVE, "in the kernel and layout of w4a16"),
    ("nvfp4", "cpu"): Support(DEQUANTIZED),
    ("mxfp4", "cpu"): Support(DEQUANTIZED),
    ("mxfp8", "cpu"): Support(DEQUANTIZED),
    **{(format, "cuda"): _CUDA for format in ("none", "w8a8", "w4a16", "w4a8", "nvfp4", "mxfp4", "mxfp8")},
    ("none", "910"): Support(NATIVE),
    ("w8a8", "910"): Support(NATIVE, "W8A8_DYNAMIC"),
    ("w4a16", "910"): Support(NATIVE, "experts only", attention=("w8a8", "none")),
    # (msmodelslim's layout of it has groups as well.)
    ("w4a8", "910"): Support(NATIVE, "W4A8_DYNAMIC: experts only, one scale a row", attention=("w8a8", "none")),
    ("nvfp4", "910"): Support(CONVERT, formats=("w4a16", "w4a8")),
    ("mxfp4", "910"): Support(CONVERT, formats=("w4a16", "w4a8")),
    ("mxfp8", "910"): Support(CONVERT, formats=("w8a8",)),
    ("none", "a5"): Support(NATIVE),
    ("w8a8", "a5"): Support(NATIVE, "W8A8_DYNAMIC"),
    ("w4a16", "a5"): Support(CONVERT, formats=("mxfp4",)),
    ("w4a8", "a5"): Support(CONVERT, formats=("mxfp4",)),
    ("nvfp4", "a5"): Support(CONVERT, formats=("mxfp4",)),
    ("mxfp4", "a5"): Support(NATIVE, f"W4A16_MXFP4; {_FROM_MSMODELSLIM}"),
    ("mxfp8", "a5"): Support(NATIVE, f"W8A8_MXFP8; {_FROM_MSMODELSLIM}"),
}


def support(format: str, platform: str) -> Support:
    """How `platform` runs quant.format `format`. Raises: KeyError for a pair that the table does not have."""
    return TABLE[format, platform]
