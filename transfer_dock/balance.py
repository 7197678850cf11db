"""Equal work for every rank: parts of equal cardinality and nearly equal token sums."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence


def balanced_parts(tokens: Sequence[int], parts: int) -> list[list[int]]:
    """Cut items into `parts` lists of equally many, their token sums as equal as differencing makes them.

    The balanced largest differencing method (Karmarkar and Karp 1982; balanced: Michiels, Korst, Aarts and van Leeuwen
    2003): the sorted items are cut into tuples of `parts`, each a partial partition with one item a set; the two whose
    sums spread most are joined, the largest set of one with the smallest of the other, until one is left. No spread
    ever grows, so in the end it is at most the largest spread within one tuple. Each part then has one item of each
    tuple, which a few very long items cannot be balanced with; so the largest and the smallest part exchange two items
    for as long as that brings them nearer to each other.

    Args: tokens [parts * m] whole numbers of any sign.
    Returns: `parts` lists of m indices, each rising; the lists by their smallest index. Which tokens meet depends on
    the multiset of tokens only, not on their order.
    Raises: ValueError when `parts` does not divide the number of items.
    """
    if parts < 1 or len(tokens) % parts:
        raise ValueError(f"{len(tokens)} items cannot be cut into {parts} parts of equal cardinality")
    if not len(tokens):
        return [[] for _ in range(parts)]
    # From here on an item is its rank, so that ties too are broken by token and not by where the item stood.
    order = sorted(range(len(tokens)), key=lambda index: (-tokens[index], index))
    by_rank = [int(tokens[index]) for index in order]
    heap = []
    for first in range(0, len(order), parts):
        sets = [(by_rank[rank], rank, [rank]) for rank in range(first, first + parts)]
        heap.append((by_rank[first + parts - 1] - by_rank[first], first, sets))
    heapq.heapify(heap)
    for made in range(len(order), len(order) + len(heap) - 1):
        _, _, widest = heapq.heappop(heap)
        joined = _join(widest, heap[0][2])
        heapq.heapreplace(heap, (joined[-1][0] - joined[0][0], made, joined))
    sets = _exchange(heap[0][2], by_rank)
    return sorted(sorted(order[rank] for rank in ranks) for _, _, ranks in sets)


_Set = tuple[int, int, list[int]]
"""(token sum, smallest rank, ranks)"""


def _join(one: list[_Set], other: list[_Set]) -> list[_Set]:
    """Both hold their sets by falling sum: the largest of one meets the smallest of the other. Uses up the lists."""
    joined = []
    for (sum_one, first_one, ranks_one), (sum_other, first_other, ranks_other) in zip(
        one, reversed(other), strict=True
    ):
        if len(ranks_one) < len(ranks_other):
            ranks_one, ranks_other = ranks_other, ranks_one
        ranks_one += ranks_other
        joined.append((sum_one + sum_other, min(first_one, first_other), ranks_one))
    joined.sort(key=lambda found: (-found[0], found[1]))
    return joined


def _exchange(sets: list[_Set], by_rank: list[int]) -> list[_Set]:
    """Exchange two items between the largest and the smallest set while that lessens what is between them."""
    # Ends by itself; the bound keeps the time in proportion to the items.
    for _ in range(8 * len(sets)):
        high = max(range(len(sets)), key=lambda place: (sets[place][0], -place))
        low = min(range(len(sets)), key=lambda place: (sets[place][0], place))
        gap = sets[high][0] - sets[low][0]
        found = _best_exchange(sets[high][2], sets[low][2], by_rank, gap)
        if found is None:
            break
        moved, left, right = found
        for place, gone, come, change in ((high, left, right, -moved), (low, right, left, moved)):
            ranks = [come if rank == gone else rank for rank in sets[place][2]]
            sets[place] = (sets[place][0] + change, min(ranks), ranks)
    return sets


def _best_exchange(high: list[int], low: list[int], by_rank: list[int], gap: int) -> tuple[int, int, int] | None:
    """(tokens moved, rank in `high`, rank in `low`): the exchange that moves nearest to half the gap, if any."""
    lows = sorted(low, key=lambda rank: (by_rank[rank], rank))
    values = [by_rank[rank] for rank in lows]
    best: tuple[int, int, int, int] | None = None
    for rank in sorted(high):
        # Moving exactly half the gap takes an item of this many tokens; the ones on either side come nearest.
        near = bisect_right(values, by_rank[rank] - gap / 2)
        for other in lows[max(near - 1, 0) : near + 1]:
            moved = by_rank[rank] - by_rank[other]
            if 0 < moved < gap:
                best = min(best or (gap, 0, 0, 0), (abs(gap - 2 * moved), moved, rank, other))
    return best and best[1:]
