"""What the fused operators of torch_npu compute, after their documentation: forward and backward, on the CPU.

Written apart from the references in platform.ops, by other means where there are some, since one is tested against the
other. Sums are float32 (float64 for integers), results have the types that the documentation gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

TEMPLATE = 2048
MAX_INT8 = 127.0


def rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    rstd = (x.float().pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
    return (x.float() * rstd * gamma.float()).to(x.dtype), rstd


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    normalized, weighted = x.float() * rstd, dy.float() * gamma.float()
    dx = rstd * (weighted - normalized * (weighted * normalized).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * normalized).flatten(0, -2).sum(0)


def swiglu(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    gate, up = x.float().chunk(2, dim)
    return (gate / (1.0 + torch.exp(-gate)) * up).to(x.dtype)


def swiglu_backward(dy: torch.Tensor, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    gate, up = x.float().chunk(2, dim)
    share = 1.0 / (1.0 + torch.exp(-gate))
    d_gate = dy.float() * up * share * (1.0 + gate * (1.0 - share))
    return torch.cat([d_gate, dy.float() * gate * share], dim).to(x.dtype)


def _turned(x: torch.Tensor, sign: int) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-sign * x[..., half:], sign * x[..., :half]), -1)


def rotary_mul(
    x: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half", rotate: Any = None
) -> torch.Tensor:
    _only(rotary_mode == "half" and rotate is None, "the half mode")
    return r1 * x + r2 * _turned(x, 1)


def rotary_mul_backward(
    dy: torch.Tensor, x: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = dy * r1 + _turned(dy * r2, -1)
    return dx, (dy * x).sum_to_size(r1.shape), (dy * _turned(x, 1)).sum_to_size(r2.shape)


def _sequences(options: dict[str, Any], *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """The float32 parts of [T, N, D] tensors, as [N, S, D], of every sequence that has a token."""
    ends = options["actual_seq_qlen"]
    _only(ends == options["actual_seq_kvlen"] and options["sparse_mode"] == 3, "causal attention to itself")
    mask = options["atten_mask"]
    expected = torch.ones(TEMPLATE, TEMPLATE, dtype=torch.bool).triu(1)
    _only(mask is not None and torch.equal(mask, expected), "the mask of the causal modes")
    _only(ends[-1] == tensors[0].shape[0], "sequences that end with the tensor")
    spans = zip([0, *ends[:-1]], ends, strict=True)
    return [tuple(each[a:b].float().transpose(0, 1) for each in tensors) for a, b in spans if b > a]


def _weights(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    products = query @ key.transpose(1, 2) * scale
    return products.masked_fill(torch.ones_like(products[0], dtype=torch.bool).triu(1), float("-inf")).softmax(-1)


def fusion_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, head_num: int, input_layout: str, **options: Any
) -> tuple[Any, ...]:
    _only(input_layout == "TND" and head_num == query.shape[1], "the layout TND")
    copies, parts = head_num // key.shape[1], []
    for q, k, v in _sequences(options, query, key, value):
        weights = _weights(q, k.repeat_interleave(copies, 0), options["scale"])
        parts.append((weights @ v.repeat_interleave(copies, 0)).transpose(0, 1))
    output = torch.cat(parts).to(query.dtype)
    statistics = torch.zeros(query.shape[0], head_num, 8)
    return output, statistics, statistics.clone(), query.new_empty(0), 0, 0, 0


def fusion_attention_grad(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dy: torch.Tensor,
    head_num: int,
    input_layout: str,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    copies, found = head_num // key.shape[1], []
    scale = options["scale_value"]
    for q, k, v, d in _sequences(options, query, key, value, dy):
        k_all, v_all = k.repeat_interleave(copies, 0), v.repeat_interleave(copies, 0)
        weights = _weights(q, k_all, scale)
        d_weights = d @ v_all.transpose(1, 2)
        d_products = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * scale
        d_key, d_value = d_products.transpose(1, 2) @ q, weights.transpose(1, 2) @ d
        shared = [each.unflatten(0, (-1, copies)).sum(1) for each in (d_key, d_value)]
        found.append([each.transpose(0, 1) for each in (d_products @ k_all, *shared)])
    gradients = [torch.cat(parts).to(query.dtype) for parts in zip(*found, strict=True)]
    return *gradients, query.new_empty(0), query.new_empty(0)


def _int4(packed: torch.Tensor) -> torch.Tensor:
    """[..., N / 8] int32 -> [..., N] float32, by way of bytes: the low half of the first byte comes first."""
    octets = packed.contiguous().view(torch.uint8)
    codes = torch.stack([octets & 15, octets >> 4], -1).flatten(-2).float()
    return torch.where(codes > 7, codes - 16, codes)


def grouped_matmul(x: list[torch.Tensor], weight: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    [left], [right], ends = x, weight, options["group_list"].tolist()
    _only(options["split_item"] == 2 and options["group_list_type"] == 0, "one output, groups by their ends")
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    if options["group_type"] == 2:
        _only(ends[-1] == left.shape[1] == right.shape[0], "groups that end with the tensor")
        # What has nothing to add up is not written.
        found = torch.full((len(ends), left.shape[0], right.shape[1]), float("nan"), dtype=left.dtype)
        for group, (a, b) in enumerate(spans):
            if b > a:
                found[group] = (left[:, a:b].float() @ right[a:b].float()).to(left.dtype)
        return [found]
    _only(ends[-1] == left.shape[0], "groups that end with the tensor")
    scales = {name: options[name][0] for name in options if name.endswith(("scale", "offset")) and options[name]}
    parts = [_group_product(left[a:b], right[group], group, slice(a, b), scales) for group, (a, b) in enumerate(spans)]
    dtype = left.dtype
    if dtype == torch.int8:
        dtype = torch.bfloat16 if scales["scale"].dtype == torch.bfloat16 else torch.float16
    return [torch.cat(parts).to(dtype)]


def _group_product(
    x: torch.Tensor, weight: torch.Tensor, group: int, span: slice, scales: dict[str, torch.Tensor]
) -> torch.Tensor:
    if "antiquant_scale" in scales:
        values = weight.float() if weight.dtype == torch.int8 else _int4(weight)
        factors = scales["antiquant_scale"][group].float()
        offsets = scales["antiquant_offset"][group].float()
        copies = values.shape[0] // (factors.shape[0] if factors.dim() == 2 else 1)
        factors, offsets = (each.view(-1, values.shape[1]).repeat_interleave(copies, 0) for each in (factors, offsets))
        # What is multiplied with has the type of the activations.
        weight = ((values + offsets) * factors).to(x.dtype)
    if x.dtype != torch.int8:
        return x.float() @ weight.float()
    products = (x.double() @ weight.double()).float()
    return products * scales["scale"][group].float() * scales["per_token_scale"][span, None]


def moe_token_permute(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    _only(num_out_tokens is None and not padded_mode, "all tokens, without padding")
    first = torch.sort(indices.flatten(), stable=True).indices
    sorted_indices = torch.empty_like(first).scatter_(0, first, torch.arange(len(first)))
    permuted = torch.empty(len(first), tokens.shape[1], dtype=tokens.dtype)
    permuted[sorted_indices] = tokens.repeat_interleave(indices.shape[1], 0)
    return permuted, sorted_indices.int()


def moe_token_permute_grad(
    gradient: torch.Tensor,
    sorted_indices: torch.Tensor,
    tokens: int,
    dtype: torch.dtype,
    chosen: int,
    padded_mode: bool = False,
) -> torch.Tensor:
    return gradient[sorted_indices.long()].unflatten(0, (tokens, chosen)).float().sum(1).to(dtype)


def moe_token_unpermute(
    permuted: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Any = None,
) -> torch.Tensor:
    if probs is None or padded_mode:
        raise NotImplementedError("the simulated operator is for rows with probabilities only")
    rows = permuted[sorted_indices.long()].unflatten(0, probs.shape).float()
    return torch.einsum("tkh,tk->th", rows, probs.float()).to(permuted.dtype)


def moe_token_unpermute_saving(
    permuted: torch.Tensor, *arguments: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The form that torch_npu's autograd calls, with what its backward needs."""
    return moe_token_unpermute(permuted, *arguments, **options), permuted


def moe_token_unpermute_grad(
    gradient: torch.Tensor,
    sorted_indices: torch.Tensor,
    rows: int,
    dtype: torch.dtype,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Any = None,
    permuted_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if probs is None or permuted_tokens is None:
        raise NotImplementedError("the simulated operator is for rows with probabilities only")
    order = sorted_indices.long()
    of_rows = torch.einsum("th,tk->tkh", gradient.float(), probs.float()).flatten(0, 1)
    of_permuted = torch.empty(rows, gradient.shape[1], dtype=dtype)
    of_permuted[order] = of_rows.to(dtype)
    products = torch.einsum("th,tkh->tk", gradient.float(), permuted_tokens[order].unflatten(0, probs.shape).float())
    return of_permuted, products.to(probs.dtype)


def moe_gating_top_k_softmax(
    x: torch.Tensor, finished: torch.Tensor | None = None, k: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _only(finished is None, "rows that all take part")
    weights = torch.exp(x.float() - x.float().amax(-1, keepdim=True))
    values, experts = torch.sort(weights / weights.sum(-1, keepdim=True), dim=-1, descending=True, stable=True)
    rows = torch.arange(x.shape[0] * k, dtype=torch.int32).view(k, -1).t().contiguous()
    return values[:, :k].to(x.dtype), experts[:, :k].int(), rows


def dynamic_quant(x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.float().abs().amax(-1) / MAX_INT8
    return torch.round(x.float() / scale[..., None]).to(torch.int8), scale


def convert_weight_to_int4pack(weight: torch.Tensor, inner_k_tiles: int = 0) -> torch.Tensor:
    _only(weight.dim() == 2 and weight.is_contiguous(), "a contiguous matrix")
    codes = (weight & 15).to(torch.uint8)
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).contiguous().view(torch.int32)


def format_cast(weight: torch.Tensor, acl_format: int, **options: Any) -> torch.Tensor:
    return weight.clone()


def _only(holds: bool, what: str) -> None:
    """The simulation knows what the code uses, and nothing else."""
    if not holds:
        raise NotImplementedError(f"the simulated operator is for {what} only")


KERNELS: dict[str, Callable[..., Any]] = {
    "npu_rms_norm": rms_norm,
    "npu_rms_norm_backward": rms_norm_backward,
    "npu_swiglu": swiglu,
    "npu_swiglu_backward": swiglu_backward,
    "npu_rotary_mul": rotary_mul,
    "npu_rotary_mul_backward": rotary_mul_backward,
    "npu_fusion_attention": fusion_attention,
    "npu_fusion_attention_grad": fusion_attention_grad,
    "npu_grouped_matmul": grouped_matmul,
    "npu_moe_token_permute": moe_token_permute,
    "npu_moe_token_permute_grad_v2": moe_token_permute_grad,
    "npu_moe_token_unpermute": moe_token_unpermute,
    "_npu_moe_token_unpermute": moe_token_unpermute_saving,
    "npu_moe_token_unpermute_grad_v2": moe_token_unpermute_grad,
    "npu_moe_gating_top_k_softmax": moe_gating_top_k_softmax,
    "npu_dynamic_quant": dynamic_quant,
    "npu_convert_weight_to_int4pack": convert_weight_to_int4pack,
    "npu_format_cast": format_cast,
}
