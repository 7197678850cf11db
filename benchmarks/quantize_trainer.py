"""Quantized experts with LoRA in the trainer over the frozen bfloat16 experts of Megatron, forward and backward.

The peer is Megatron-core's own SequentialMLP: the same experts in bfloat16, frozen, without adapters, whose backward
gives the gradients of tokens and probabilities. Ours gives those too, adds the adapters' part and has their gradients.
Both take the same 2,048 tokens, four experts a token, in turns, each in its own process; the shapes are those of one
routing, so that oneDNN has compiled its kernels before anything is timed. In training every step has another routing:
both are measured so too.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F

from benchmarks.figures import Figure
from benchmarks.turns import median_seconds
from qerl_rl.config.schema import LoraConfig, TrainConfig
from qerl_rl.platform import detect, prepare_megatron
from qerl_rl.quant.formats import get_format

HIDDEN, WIDTH, EXPERTS, EXPERTS_PER_TOKEN, TOKENS = 1024, 512, 32, 4, 2048
LORA = LoraConfig(rank=16)
FORMATS = {"int8": ("w8a8", 0), "int4, groups of 128": ("w4a16", 128)}
SHARED = "int8 in the engine's memory"
CHANGING = "another routing every step"
BAR, BAR_CHANGING = 1.25, 1.0
POPULARITY = 0.5
"""Standard deviation of what is added to an expert's scores, which have 1: half as many tokens as the mean expert gets,
or twice as many, are usual then."""
TURNS, CALLS = 9, 4
THREADS = 2


def measure(turns: int = TURNS) -> list[Figure]:
    """Ratios of times, medians of `turns`; prints the times."""
    contenders = {"peer": partial(_contender, None), **{name: partial(_contender, f) for name, f in FORMATS.items()}}
    contenders[SHARED] = partial(_contender, FORMATS["int8"], shared=True)
    changing = {name: f"{name}, {CHANGING}" for name in ("peer", "int8")}
    contenders[changing["peer"]] = partial(_contender, None, changing=True)
    contenders[changing["int8"]] = partial(_contender, FORMATS["int8"], changing=True)
    median = median_seconds(contenders, turns=turns, calls=CALLS)
    print("  " + ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in median.items()))
    return [
        Figure(
            f"experts with LoRA over frozen bfloat16 ones, {name}", median[name] / median["peer"], BAR, at_least=False
        )
        for name in FORMATS
    ] + [
        Figure(
            f"the same, {changing['int8']}",
            median[changing["int8"]] / median[changing["peer"]],
            BAR_CHANGING,
            at_least=False,
        ),
        Figure(f"experts that read {SHARED} over their own", median[SHARED] / median["int8"], None, at_least=False),
    ]


def _contender(format: tuple[str, int] | None, *, shared: bool = False, changing: bool = False) -> Callable[[], None]:
    """A step of the experts in this format (None: of the peer's), in a process of its own.

    shared: they read their int8 in the order of the rollout engine's kernel. changing: each step has its own routing.
    """
    torch.set_num_threads(THREADS)
    _one_rank()
    weights, batch = _weights(), _batch()
    module = _ours(weights, *format) if format else _peer(weights)
    if shared:
        _share(module)
    tokens, probabilities, gradient = batch
    seeds = itertools.count(1) if changing else itertools.repeat(0)
    return lambda: _step(module, tokens, _routing(next(seeds)), probabilities, gradient)


def _share(module: Any) -> None:
    from vllm import _custom_ops  # noqa: F401 - brings the kernels

    from qerl_rl.model.base_weight import Base
    from qerl_rl.rollout.packed_experts import PackedW8A8, int8_tiles

    for name in ("w13", "w2"):
        integers, scales = module.base(name).tensors
        packed = torch.ops._C.convert_weight_packed(integers)
        module.adopt(name, Base((int8_tiles(packed), scales), PackedW8A8()))


def _one_rank() -> None:
    """Megatron's groups, of this process alone."""
    prepare_megatron(detect("cpu"))
    from qerl_rl.model.parallel import initialize_parallel

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    initialize_parallel(TrainConfig())


def _config() -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=8,
        ffn_hidden_size=WIDTH,
        moe_ffn_hidden_size=WIDTH,
        num_moe_experts=EXPERTS,
        moe_router_topk=EXPERTS_PER_TOKEN,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        params_dtype=torch.bfloat16,
        bf16=True,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
    )


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w13": torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator) * HIDDEN**-0.5,
        "w2": torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator) * WIDTH**-0.5,
    }


@torch.no_grad()
def _peer(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    module = SequentialMLP(EXPERTS, _config(), submodules)
    for expert, w13, w2 in zip(module.local_experts, weights["w13"], weights["w2"], strict=True):
        expert.linear_fc1.weight.copy_(w13)
        expert.linear_fc2.weight.copy_(w2)
    return module.requires_grad_(requires_grad=False)


@torch.no_grad()
def _ours(weights: dict[str, torch.Tensor], name: str, group_size: int) -> torch.nn.Module:
    from qerl_rl.model.adapted import LayerWeights
    from qerl_rl.model.experts import StackedExperts

    format = get_format(name, group_size)
    module = StackedExperts(EXPERTS, _config(), LayerWeights(dict.fromkeys(weights, format), LORA))
    for key, weight in weights.items():
        for suffix, tensor in format.quantize(weight).items():
            module.get_buffer(key + suffix).copy_(tensor)
    for parameter in module.parameters():
        parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    return module


def _batch() -> tuple[torch.Tensor, ...]:
    """Tokens sorted by expert, probabilities, and the gradient of the outputs."""
    generator = torch.Generator().manual_seed(2)
    rows = TOKENS * EXPERTS_PER_TOKEN
    tokens, gradient = (torch.randn(rows, HIDDEN, generator=generator).bfloat16() for _ in range(2))
    return tokens, torch.rand(rows, generator=generator), gradient


def _routing(seed: int) -> torch.Tensor:
    """Tokens of each expert: with seed 0 they are as good as balanced, else some are chosen more often than others."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(TOKENS, EXPERTS, generator=generator)
    if seed:
        scores += POPULARITY * torch.randn(EXPERTS, generator=generator)
    chosen = scores.topk(EXPERTS_PER_TOKEN).indices
    return chosen.flatten().bincount(minlength=EXPERTS)


def _step(
    module: torch.nn.Module,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    probabilities: torch.Tensor,
    gradient: torch.Tensor,
) -> None:
    module.zero_grad()
    output, _ = module(tokens.detach().requires_grad_(), counts, probabilities.detach().requires_grad_())
    output.backward(gradient)


if __name__ == "__main__":
    for figure in measure():
        print(figure)
