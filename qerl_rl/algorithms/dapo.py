"""What DAPO (arXiv 2503.14476) does with samples before they are learned from."""

from __future__ import annotations

import torch
from torch import Tensor


def overlong_penalties(lengths: Tensor, *, longest: int, buffer: int) -> Tensor:
    """Soft overlong punishment, eq. 13: 0 up to longest - buffer tokens, then linearly down to -1 at `longest`.

    Args: lengths int [S], response tokens. longest: the most a response may have. buffer: tokens before that; 0 turns
        the punishment off below `longest` and gives -1 beyond it.
    Returns: [S] float32 in [-1, 0].
    Raises: ValueError when buffer is not within 0 .. longest.
    """
    if not 0 <= buffer <= longest:
        raise ValueError(f"a buffer of {buffer} tokens is not within 0 .. {longest}")
    beyond = (lengths - (longest - buffer)).clamp(min=0).float()
    return -(beyond / max(buffer, 1)).clamp(max=1.0)


def kept_samples(truncated: Tensor) -> Tensor:
    """Overlong filtering, section 3.4: bool [S], false for samples that the token limit cut off, [S] of 0 and 1.

    What a cut-off response would have earned is unknown; without its loss it teaches nothing.
    """
    return truncated == 0


def groups_with_signal(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Dynamic sampling, eq. 11: bool [S], true for samples of a prompt whose rewards are not all equal.

    Only these have group advantages other than zero. Args: rewards [S] float; group_ids [S] int, in any order.
    """
    groups, members = torch.unique(group_ids, return_inverse=True)
    zeros = rewards.new_zeros(len(groups))
    lowest = zeros.scatter_reduce(0, members, rewards, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, members, rewards, "amax", include_self=False)
    return (lowest < highest)[members]
