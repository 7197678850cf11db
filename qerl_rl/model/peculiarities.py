"""What some families add to Megatron's GPTModel after it is built. Import after prepare_megatron."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.parts import LongRope, Scales

Add = Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]


def scaled_add(scale: float) -> Callable[[bool, bool], Add]:
    """What takes the place of Megatron's get_bias_dropout_add: residual + scale * (x + bias). There is no dropout."""

    def add(x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, prob: float) -> torch.Tensor:
        x, bias = x_with_bias
        return residual + (x if bias is None else x + bias) * scale

    def choose(training: bool, fused: bool) -> Add:
        return add

    return choose


def add_peculiarities(model: GPTModel, architecture: MoeArchitecture, *, logits: bool) -> None:
    """Give the model the rotary positions, the scales and the bias of the output layer that its family has.

    Args: logits: whether the output layer gives logits.
    """
    if architecture.long_rope:
        _turn_slower(model, architecture, architecture.long_rope)
    _scale(model, architecture.scales, logits=logits)
    if model.post_process and logits and architecture.output_bias:
        layer = model.output_layer
        layer.bias = torch.nn.Parameter(torch.zeros(layer.weight.size(0), dtype=model.config.params_dtype))


def _turn_slower(model: GPTModel, architecture: MoeArchitecture, rope: LongRope) -> None:
    frequencies = model.rotary_pos_emb.inv_freq
    model.rotary_pos_emb.inv_freq = frequencies / torch.tensor(rope.factors, device=frequencies.device)
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.scale = architecture.head_dim**-0.5 * rope.product_scale


def _scale(model: GPTModel, scales: Scales, *, logits: bool) -> None:
    """The residual stream's is in the layers (`scaled_add`)."""
    if model.pre_process and scales.embedding != 1:
        model.embedding.register_forward_hook(lambda module, inputs, output: output * scales.embedding)

    def scale_input(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs[0] * scales.output, *inputs[1:]

    if model.post_process and logits and scales.output != 1:
        model.output_layer.register_forward_pre_hook(scale_input)
