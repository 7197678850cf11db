"""Quantized experts of vllm-ascend say which tokens chose them, for routing replay."""

from __future__ import annotations

import importlib
from typing import Any

QUANTIZED_EXPERTS = ("w8a8_dynamic", "w4a16", "w4a8", "w8a8_mxfp8")
"""The modules of vllm_ascend.quantization.methods with the schemes that layouts.py knows."""


def record_quantized_experts() -> None:
    """Let them tell the capturer of their layer, as unquantized ones do.

    Without it an engine with enable_return_routed_experts returns zeros for every token of a quantized model
    (vllm-project/vllm-ascend#16314): 0.23.0 asks the capturer in AscendUnquantizedFusedMoEMethod alone.
    """
    from vllm_ascend.quantization.method_adapters import AscendFusedMoEMethod

    original = AscendFusedMoEMethod.apply
    if hasattr(original, "layers"):
        return
    layers: list[Any] = []

    def apply(method: Any, layer: Any, *arguments: Any, **options: Any) -> Any:
        layers.append(layer)
        try:
            return original(method, layer, *arguments, **options)
        finally:
            layers.pop()

    apply.layers = layers  # type: ignore[attr-defined]
    AscendFusedMoEMethod.apply = apply
    for name in QUANTIZED_EXPERTS:
        module = importlib.import_module(f"vllm_ascend.quantization.methods.{name}")
        module.select_experts = _telling(module.select_experts, layers)  # type: ignore[attr-defined]


def _telling(original: Any, layers: list[Any]) -> Any:
    def select_experts(*arguments: Any, **options: Any) -> Any:
        weights, experts = original(*arguments, **options)
        layer: Any = layers[-1] if layers else None
        capturer = getattr(layer, "_ascend_routed_experts_capturer", None)
        if capturer is not None:
            capturer.capture(layer_id=layer.layer_id, topk_ids=experts)
        return weights, experts

    return select_experts
