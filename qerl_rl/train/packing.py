"""Micro-batches: which samples go together, and how they lie one after another in a packed (thd) sequence."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from qerl_rl.model.forced_experts import ForcedExperts
from qerl_rl.train.samples import Samples


def partition(lengths: Sequence[int], micro_batch_tokens: int, at_least: int = 1) -> list[list[int]]:
    """Split samples into micro-batches of about equal size, of at most `micro_batch_tokens` tokens each.

    A sample longer than that makes a micro-batch of its own. Longest first into the emptiest micro-batch (Graham 1969),
    with as few micro-batches as that allows, but `at_least` many where there are as many samples.

    Args: lengths: tokens of each sample. at_least: the least number of micro-batches.
    Returns: sample indices by micro-batch, each ascending; the largest micro-batch first. Empty for no samples.
    Raises: ValueError when micro_batch_tokens is below 1.
    """
    if micro_batch_tokens < 1:
        raise ValueError(f"micro_batch_tokens is {micro_batch_tokens}, it must be at least 1")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    fitting = [length for length in lengths if length <= micro_batch_tokens]
    fewest = len(lengths) - len(fitting) + -(-sum(fitting) // micro_batch_tokens)
    count = min(len(lengths), max(at_least, fewest))
    while True:
        batches = _longest_first(lengths, order, count)
        sizes = [sum(lengths[index] for index in batch) for batch in batches]
        if all(size <= micro_batch_tokens or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True)):
            by_size = sorted(range(count), key=lambda batch: (-sizes[batch], batches[batch]))
            return [sorted(batches[batch]) for batch in by_size]
        count += 1


def _longest_first(lengths: Sequence[int], order: Sequence[int], count: int) -> list[list[int]]:
    batches: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, batch) for batch in range(count)]
    for index in order:
        size, batch = heapq.heappop(emptiest)
        batches[batch].append(index)
        heapq.heappush(emptiest, (size + lengths[index], batch))
    return batches


def partition_alike(
    lengths: Sequence[int], micro_batch_tokens: int, largest: Callable[[int], int], together: int = 1
) -> list[list[int]]:
    """`partition`, with the same number of micro-batches on all data-parallel ranks.

    Expert-parallel collectives cross data-parallel ranks, so every rank must run as many micro-batches as the others;
    a rank with too few samples gets empty ones at the end.

    Args: largest: an integer of this rank -> the largest over all data-parallel ranks (a collective). together: so many
    samples, one after another, are never parted (2: samples 0 and 1, 2 and 3, ...); they count as one.
    Raises: ValueError when the samples are no multiple of `together`.
    """
    if len(lengths) % together:
        raise ValueError(f"{len(lengths)} samples are no multiple of the {together} that belong together")
    sizes = [sum(lengths[first : first + together]) for first in range(0, len(lengths), together)]
    count = 1
    while True:
        batches = partition(sizes, micro_batch_tokens, at_least=count)
        agreed = largest(len(batches))
        if agreed <= count:
            found = [[unit * together + own for unit in batch for own in range(together)] for batch in batches]
            return found + [[] for _ in range(count - len(found))]
        count = agreed


@dataclass(frozen=True)
class Pack:
    """Samples of one micro-batch, one after another. T: packed tokens, N: response tokens of all its samples.

    tokens, position_ids: int64 [1, T]. cumulative_lengths: int32 [sequences + 1] (a trailing sequence is padding).
    positions: int64 [N], where the logits lie that predict the response tokens. targets: int64 [N], those tokens.
    columns: name -> float32 [N]. response_lengths: int64 [samples]; positions, targets and columns follow the samples.
    forced: the experts of the T tokens that the samples have some for; None where samples have none at all.
    """

    indices: list[int]
    tokens: torch.Tensor
    position_ids: torch.Tensor
    cumulative_lengths: torch.Tensor
    longest: int
    positions: torch.Tensor
    targets: torch.Tensor
    columns: dict[str, torch.Tensor]
    response_lengths: torch.Tensor
    forced: ForcedExperts | None = None

    @property
    def is_empty(self) -> bool:
        return not self.indices


def make_pack(samples: Samples, indices: Sequence[int], multiple_of: int, device: torch.device) -> Pack:
    """Lay the samples at `indices` one after another, padded to a multiple of `multiple_of` tokens.

    Sequence parallelism splits the packed sequence over the tensor-parallel ranks, hence the multiple. The padding is a
    sequence of its own, which no sample attends to. No indices make a pack of padding alone, without targets.
    """
    chosen = samples.select(indices)
    lengths = np.asarray(chosen.lengths, dtype=np.int64)
    total = max(int(lengths.sum()), 1)
    padding = -total % multiple_of + (total - int(lengths.sum()))
    sequences = np.append(lengths, padding) if padding else lengths
    tokens = np.concatenate([*chosen.tokens, np.zeros(padding, dtype=np.int64)])
    ends = np.cumsum(sequences)
    starts = ends - sequences
    responses = np.asarray(chosen.response_lengths, dtype=np.int64)
    # Global position of each response token: its sample's end minus what is left of the response.
    counted = np.arange(responses.sum()) - np.repeat(np.cumsum(responses) - responses, responses)
    response_positions = np.repeat(ends[: len(lengths)] - responses, responses) + counted
    columns = {
        name: torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *values]).astype(np.float32)).to(device)
        for name, values in chosen.columns.items()
    }
    return Pack(
        indices=[int(index) for index in indices],
        tokens=torch.from_numpy(tokens.astype(np.int64))[None].to(device),
        position_ids=torch.from_numpy(np.arange(len(tokens)) - np.repeat(starts, sequences))[None].to(device),
        cumulative_lengths=torch.from_numpy(np.append(0, ends).astype(np.int32)).to(device),
        longest=int(sequences.max()),
        positions=torch.from_numpy(response_positions - 1).to(device),
        targets=torch.from_numpy(tokens[response_positions].astype(np.int64)).to(device),
        columns=columns,
        response_lengths=torch.from_numpy(responses).to(device),
        forced=_forced_experts(chosen.routed_experts, starts, len(tokens), device),
    )


def _forced_experts(
    routed: Sequence[np.ndarray] | None, starts: np.ndarray, total: int, device: torch.device
) -> ForcedExperts | None:
    """Experts of `total` packed tokens from those of each sample's first tokens; `starts` is where samples begin."""
    if not routed:
        return None
    experts = np.zeros((total, *routed[0].shape[1:]), routed[0].dtype)
    known = np.zeros(total, bool)
    for start, rows in zip(starts, routed, strict=False):
        experts[start : start + len(rows)] = rows
        known[start : start + len(rows)] = True
    return ForcedExperts(torch.from_numpy(experts).to(device), torch.from_numpy(known).to(device))


def at_ends(pack: Pack) -> Pack:
    """The same micro-batch, to be read once a sample: at its last token, where a model has seen all of it."""
    samples = len(pack.indices)
    ends = pack.cumulative_lengths[1 : samples + 1].long() - 1
    targets, lengths = pack.tokens[0, ends], torch.ones_like(pack.response_lengths)
    return replace(pack, positions=ends, targets=targets, columns={}, response_lengths=lengths)
