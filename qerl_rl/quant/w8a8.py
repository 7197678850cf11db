"""W8A8: int8 weights with one symmetric scale for each output channel; activations become int8 a token at a time.

The rounding is the compressed-tensors library's, so that vLLM, vLLM-Ascend and transformers read the same weights.
"""

from __future__ import annotations

from typing import Any

import torch


def _scheme() -> Any:
    # Imported where it is needed: it takes two seconds, and who only reads a checkpoint has no use for it.
    from compressed_tensors.quantization import preset_name_to_scheme

    return preset_name_to_scheme("W8A8", ["Linear"])


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to the nearest point of each row's int8 grid.

    Args: weight [..., N, K], any float dtype; computed in float32.
    Returns: int8 [..., N, K] and scale [..., N, 1] float32 (a row of zeros gets the float32 epsilon), such that
    weight is about int8 * scale with scale = max |row| / 127.5.
    """
    from compressed_tensors.quantization.lifecycle.forward import quantize as round_to_grid
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = _scheme().weights
    exact = weight.detach().to(torch.float32)
    scale, zero_point = calculate_qparams(exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True), arguments)
    return round_to_grid(exact, scale, zero_point, arguments, dtype=torch.int8), scale


def dequantize(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """int8 [..., N, K] times scale [..., N, 1], multiplied in the scale's dtype, then rounded to `dtype`.

    Bit-identical to compressed-tensors' dequantize; written out because the trainer calls it in every forward pass.
    """
    return quantized.to(scale.dtype).mul_(scale).to(dtype)


def quantization_config(ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json for this format.

    Args: ignore: names (or re:patterns) of the Linear modules that stay unquantized.
    """
    from compressed_tensors.compressors.format import infer_module_format

    scheme = _scheme()
    layout = infer_module_format(torch.nn.Linear, scheme).value
    group = scheme.model_dump(mode="json") | {"format": layout}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {"group_0": group},
        "kv_cache_scheme": None,
    }
