"""Causal attention over packed sequences."""

from __future__ import annotations

import functools
from itertools import accumulate

import torch
import torch.nn.functional as F

from qerl_rl.platform.ops.checks import require, require_floats
from qerl_rl.platform.ops.selection import fused

MASK_SIZE = 2048
"""The kernel's causal modes read a lower triangle of this size, whatever the lengths are."""
RIGHT_DOWN_CAUSAL = 3
WIDEST_HEAD = 768
MOST_HEADS = 256


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scale: float | None = None
) -> torch.Tensor:
    """Softmax attention in which a token sees itself and what comes before it in its own sequence.

    Args: query [T, N, D], key [T, G, D], value [T, G, V] with N a multiple of G (each key head serves N / G
    neighbouring query heads); lengths: of the sequences, whose sum is T, zeros allowed; scale: of the products, 1 /
    sqrt(D) unless told.
    Returns: [T, N, V]. Gradients reach query, key and value.
    Raises: ValueError when shapes or types do not fit.
    torch_npu: npu_fusion_attention(query, key, value, head_num, "TND", atten_mask=, scale=, actual_seq_qlen=,
    actual_seq_kvlen=, sparse_mode=3) -> (attention, ...) ("npu_fusion_attention" in the API reference); its gradient
    is torch_npu's.
    """
    _check(query, key, value, lengths)
    if fused("packed_attention", query):
        if not len(query):
            return query.new_empty(*query.shape[:2], value.shape[2])
        # The kernel takes where each sequence ends.
        ends = list(accumulate(lengths))
        return torch.ops.npu.npu_fusion_attention(
            query,
            key,
            value,
            query.shape[1],
            "TND",
            atten_mask=_hidden_positions(query.device),
            scale=query.shape[2] ** -0.5 if scale is None else scale,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
            sparse_mode=RIGHT_DOWN_CAUSAL,
        )[0]
    parts = [x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (query, key, value)]
    grouped = query.size(1) != key.size(1)
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)


@functools.lru_cache(maxsize=1)
def _hidden_positions(device: torch.device) -> torch.Tensor:
    """[2048, 2048] bool, True where a key must not be seen."""
    # Kept for all calls: one that is made without gradients must not forbid those with.
    with torch.inference_mode(False):
        return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool, device=device).triu(1)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> None:
    given = {"query": query, "key": key, "value": value}
    require_floats("packed_attention", **given)
    fits = query.dim() == key.dim() == value.dim() == 3 and query.shape[2] == key.shape[2]
    fits = fits and key.shape[:2] == value.shape[:2] and query.shape[0] == key.shape[0]
    fits = fits and 0 < key.shape[1] <= query.shape[1] and query.shape[1] % key.shape[1] == 0
    needed = "query [T, N, D], key [T, G, D], value [T, G, V], N a multiple of G"
    require(fits, "packed_attention", needed, **given)
    counted = sum(lengths) == len(query) and min(lengths, default=0) >= 0
    require(counted, "packed_attention", "lengths whose sum is T", lengths=lengths, **given)
    if fused("packed_attention", query):
        fits = value.shape[2] <= query.shape[2] <= WIDEST_HEAD and query.shape[1] <= MOST_HEADS
        needed = f"values no wider than keys, those at most {WIDEST_HEAD} wide, at most {MOST_HEADS} query heads"
        require(fits, "packed_attention", needed, **given)
