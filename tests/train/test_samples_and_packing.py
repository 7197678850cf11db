"""Which samples go together, and where their response tokens lie in the packed sequence."""

import dataclasses
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.train.packing import make_pack, partition, partition_alike
from qerl_rl.train.samples import Samples

LENGTHS = st.lists(st.integers(1, 40), max_size=30)


def make_samples(lengths: list[int], seed: int = 0) -> Samples:
    generator = np.random.default_rng(seed)
    responses = [int(generator.integers(0, length)) for length in lengths]
    return Samples(
        tokens=[generator.integers(3, 90, size=length) for length in lengths],
        response_lengths=responses,
        columns={"advantages": [generator.normal(size=count).astype(np.float32) for count in responses]},
    )


@settings(deadline=None)
@given(lengths=LENGTHS, capacity=st.integers(1, 60), at_least=st.integers(1, 8))
def test_partition_holds_every_sample_once_within_the_capacity(lengths, capacity, at_least):
    batches = partition(lengths, capacity, at_least)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(batch == sorted(batch) and batch for batch in batches)
    assert all(len(batch) == 1 or sum(lengths[index] for index in batch) <= capacity for batch in batches)
    assert len(batches) >= min(at_least, len(lengths))
    assert batches == partition(lengths, capacity, at_least)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), capacity=st.integers(40, 120))
def test_partition_is_balanced(lengths, capacity):
    sizes = [sum(lengths[index] for index in batch) for batch in partition(lengths, capacity)]
    assert max(sizes) - min(sizes) <= max(lengths)
    assert sizes == sorted(sizes, reverse=True)


@settings(deadline=None)
@given(ranks=st.lists(LENGTHS, min_size=1, max_size=4), capacity=st.integers(1, 60))
def test_ranks_agree_on_the_number_of_micro_batches(ranks, capacity):
    """Each rank is a thread; the collective is a barrier around a shared list."""
    barrier, proposed = threading.Barrier(len(ranks)), [0] * len(ranks)

    def run(rank: int) -> list[list[int]]:
        def largest(own: int) -> int:
            proposed[rank] = own
            barrier.wait()
            found = max(proposed)
            barrier.wait()
            return found

        return partition_alike(ranks[rank], capacity, largest)

    with ThreadPoolExecutor(len(ranks)) as pool:
        found = list(pool.map(run, range(len(ranks))))
    assert len({len(batches) for batches in found}) == 1
    for lengths, batches in zip(ranks, found, strict=True):
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        assert all(len(batch) <= 1 or sum(lengths[index] for index in batch) <= capacity for batch in batches)


def test_a_sample_longer_than_the_capacity_makes_its_own_micro_batch():
    assert partition([5, 100, 4], 10) == [[1], [0, 2]]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 12), max_size=8), multiple=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_pack_predicts_exactly_the_response_tokens(lengths, multiple, seed):
    samples = make_samples(lengths, seed)
    pack = make_pack(samples, range(len(samples)), multiple, torch.device("cpu"))
    tokens = pack.tokens[0].numpy()
    assert len(tokens) % multiple == 0
    assert pack.cumulative_lengths[-1] == len(tokens)
    bounds = pack.cumulative_lengths.tolist()
    assert pack.longest == max(end - start for start, end in itertools.pairwise(bounds))
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        assert pack.position_ids[0, start:end].tolist() == list(range(end - start))
        if index < len(samples):
            assert tokens[start:end].tolist() == samples.tokens[index].tolist()
    expected = [t[len(t) - n :] for t, n in zip(samples.tokens, samples.response_lengths, strict=True)]
    assert pack.targets.tolist() == [token for response in expected for token in response.tolist()]
    assert tokens[pack.positions.numpy() + 1].tolist() == pack.targets.tolist()
    flat = [value for column in samples.columns["advantages"] for value in column.tolist()]
    assert pack.columns["advantages"].tolist() == flat


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=6), multiple=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_a_pack_sends_each_token_to_its_own_experts_and_knows_which_have_none(lengths, multiple, seed):
    random = np.random.default_rng(seed)
    known = [int(random.integers(0, length + 1)) for length in lengths]
    routed = [random.integers(0, 9, (rows, 3, 2)).astype(np.uint8) for rows in known]
    samples = dataclasses.replace(make_samples(lengths, seed), routed_experts=routed)
    chosen = random.permutation(len(lengths))[: max(1, len(lengths) - 1)].tolist()
    pack = make_pack(samples, chosen, multiple, torch.device("cpu"))
    covered = torch.zeros(pack.tokens.shape[1], dtype=torch.bool)
    for start, index in zip(pack.cumulative_lengths.tolist(), chosen, strict=False):
        covered[start : start + known[index]] = True
        for layer in range(3):
            experts, mask = pack.forced.of(layer, start, known[index])
            assert experts.tolist() == routed[index][:, layer].tolist()
            assert mask.all()
    assert pack.forced.known.equal(covered)


def test_experts_for_more_tokens_than_there_are_is_refused():
    with pytest.raises(ValueError, match="routed_experts"):
        Samples([np.arange(4)], [2], {}, [np.zeros((5, 3, 2), np.uint8)])


def test_an_empty_pack_has_tokens_for_the_collectives_but_no_targets():
    pack = make_pack(make_samples([3, 4]), [], 2, torch.device("cpu"))
    assert pack.is_empty
    assert pack.tokens.shape == (1, 2)
    assert pack.targets.numel() == pack.positions.numel() == pack.columns["advantages"].numel() == 0


def test_select_keeps_samples_and_columns_together():
    samples = make_samples([5, 9, 7])
    chosen = samples.select([2, 0])
    assert [len(tokens) for tokens in chosen.tokens] == [7, 5]
    assert chosen.columns["advantages"][1] is samples.columns["advantages"][0]


def test_a_sample_without_a_prompt_is_refused():
    with pytest.raises(ValueError, match="no prompt"):
        Samples(tokens=[np.arange(3)], response_lengths=[3])


def test_a_column_of_another_length_is_refused():
    with pytest.raises(ValueError, match="advantages"):
        Samples(tokens=[np.arange(3)], response_lengths=[2], columns={"advantages": [np.zeros(3, np.float32)]})
