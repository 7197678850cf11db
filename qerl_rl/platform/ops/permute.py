"""Rows for experts: copied and sorted by expert, and added up again afterwards."""

from __future__ import annotations

import torch

from qerl_rl.platform.ops.checks import require, require_floats
from qerl_rl.platform.ops.selection import fused


def token_permute(tokens: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token once for each of its experts, sorted by expert; those of one expert in the tokens' order.

    Args: tokens [T, H] float; experts int64 [T, k].
    Returns: [T * k, H], and int32 [T * k]: where the copy for experts.flatten()[i] is. A gradient reaches tokens.
    Raises: ValueError when shapes or types do not fit.
    torch_npu: npu_moe_token_permute(tokens, indices) -> (permuted, sorted indices) ("npu_moe_token_permute" in the API
    reference); its gradient is torch_npu's.
    """
    require_floats("token_permute", tokens=tokens)
    fits = tokens.dim() == experts.dim() == 2 and len(tokens) == len(experts) and experts.shape[1] > 0
    fits = fits and experts.dtype == torch.int64 and experts.device == tokens.device
    require(fits, "token_permute", "tokens [T, H] and experts int64 [T, k]", tokens=tokens, experts=experts)
    if fused("token_permute", tokens) and len(tokens):
        permuted, positions = torch.ops.npu.npu_moe_token_permute(tokens, experts)
        return permuted, positions
    order = experts.flatten().argsort(stable=True)
    return tokens[order // experts.shape[1]], order.argsort().int()


def token_unpermute(permuted: torch.Tensor, positions: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """The sum of each token's rows, weighted: undoes `token_permute` where the probabilities of a token sum to 1.

    Args: permuted [T * k, H] float; positions int32 [T * k] of `token_permute`; probabilities [T, k] in the type of
    permuted.
    Returns: [T, H]. Gradients reach permuted and probabilities.
    Raises: ValueError when shapes or types do not fit.
    torch_npu: npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs) ("npu_moe_token_unpermute" in the API
    reference); its gradient is torch_npu's.
    """
    require_floats("token_unpermute", permuted=permuted, probabilities=probabilities)
    fits = permuted.dim() == probabilities.dim() == 2 and positions.shape == permuted.shape[:1]
    fits = fits and probabilities.numel() == len(permuted) and positions.dtype == torch.int32
    given = {"permuted": permuted, "positions": positions, "probabilities": probabilities}
    require(fits, "token_unpermute", "permuted [T * k, H], positions int32 [T * k], probabilities [T, k]", **given)
    if fused("token_permute", permuted) and len(permuted):
        return torch.ops.npu.npu_moe_token_unpermute(permuted, positions, probabilities)
    rows = permuted[positions.long()].unflatten(0, probabilities.shape)
    return (rows * probabilities[..., None]).sum(1)
