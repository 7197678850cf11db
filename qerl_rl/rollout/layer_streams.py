"""What the layers of vLLM's model hand on, for who wants to know where it departs from another engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qerl_rl.rollout.vllm_engine import VllmEngine


@contextmanager
def layer_streams(engine: VllmEngine) -> Iterator[list[list[torch.Tensor]]]:
    """Inside, the residual stream behind each layer is kept: by layer one float32 [tokens, H] a step of the engine.

    Nothing is pipelined, the engine has one tensor-parallel rank, and its prompts are not in the prefix cache.
    """
    layers = list(engine.model.model.layers)
    seen: list[list[torch.Tensor]] = [[] for _ in layers]

    def keep(index: int) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            # vLLM adds the layer's own part to the stream inside the next norm, where both are one kernel.
            hidden, residual = output
            seen[index].append(hidden.float() + residual.float())

        return hook

    hooks = [layer.register_forward_hook(keep(index)) for index, layer in enumerate(layers)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
