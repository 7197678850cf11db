"""Vocabulary-parallel log-probs and entropies against torch.log_softmax over the whole vocabulary."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist

from qerl_rl.train.scores import vocab_parallel_scores


def draw(count: int = 23, vocabulary: int = 37, scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(count, vocabulary, generator=generator, dtype=torch.float64) * scale
    targets = torch.randint(0, vocabulary, (count,), generator=generator)
    weights = torch.randn(2, count, generator=generator, dtype=torch.float64)
    return logits, targets, weights


def reference(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, temperature: float) -> list:
    """log-probs, entropy and the gradient of weights[0] . log_probs + weights[1] . entropy, in float64."""
    logits = logits.clone().requires_grad_()
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    chosen = log_probs.gather(1, targets[:, None])[:, 0]
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    (weights[0] @ chosen + weights[1] @ entropy).backward()
    return [chosen.detach(), entropy.detach(), logits.grad]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_scores_and_gradients_equal_log_softmax(temperature):
    logits, targets, weights = draw()
    local = logits.float().requires_grad_()
    log_probs, entropy = vocab_parallel_scores(local, targets, temperature=temperature, vocabulary=37)
    (weights[0].float() @ log_probs + weights[1].float() @ entropy).backward()
    assert_close([log_probs, entropy, local.grad], reference(logits, targets, weights, temperature))


@pytest.mark.parametrize("used", [0, 1])
def test_each_score_alone_carries_its_gradient(used):
    logits, targets, weights = draw()
    weights[1 - used] = 0
    local = logits.float().requires_grad_()
    scores = vocab_parallel_scores(local, targets, temperature=1.0, vocabulary=37)
    (weights[used].float() @ scores[used]).backward()
    assert_close([local.grad], reference(logits, targets, weights, 1.0)[2:])


def test_huge_and_tiny_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e4, -3e4, -3e4], [0.0, -torch.inf, 0.0]], requires_grad=True)
    log_probs, entropy = vocab_parallel_scores(logits, torch.tensor([0, 1, 2]), temperature=0.5, vocabulary=3)
    (log_probs.sum() + entropy.sum()).backward()
    torch.testing.assert_close(log_probs.detach(), torch.tensor([0.0, -1.0986123, -0.6931472]))
    torch.testing.assert_close(entropy.detach(), torch.tensor([0.0, 1.0986123, 0.6931472]))
    assert torch.isfinite(logits.grad).all()


def test_padding_entries_have_no_probability_and_no_gradient():
    logits, targets, weights = draw()
    padded = torch.cat([logits, torch.full((23, 11), 50.0, dtype=torch.float64)], dim=1).float().requires_grad_()
    log_probs, entropy = vocab_parallel_scores(padded, targets, temperature=1.3, vocabulary=37)
    (weights[0].float() @ log_probs + weights[1].float() @ entropy).backward()
    assert_close([log_probs, entropy, padded.grad[:, :37]], reference(logits, targets, weights, 1.3))
    assert not padded.grad[:, 37:].any()


def scores_of_a_rank(width: int, vocabulary: int) -> list[np.ndarray]:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    logits, targets, weights = draw(vocabulary=vocabulary)
    padded = torch.nn.functional.pad(logits, (0, 2 * width - vocabulary), value=9.0)
    local = padded[:, rank * width : (rank + 1) * width].float().requires_grad_()
    scores = vocab_parallel_scores(
        local, targets, temperature=0.8, vocabulary=vocabulary, first=rank * width, group=dist.group.WORLD
    )
    (weights[0].float() @ scores[0] + weights[1].float() @ scores[1]).backward()
    return [part.detach().numpy() for part in (*scores, local.grad)]


@pytest.mark.parametrize(("width", "vocabulary"), [(20, 37), (40, 37)], ids=["padded tail", "one rank of padding"])
def test_a_split_vocabulary_gives_the_scores_of_the_whole(two_ranks, width, vocabulary):
    logits, targets, weights = draw(vocabulary=vocabulary)
    log_probs, entropy, gradient = reference(logits, targets, weights, 0.8)
    gradient = torch.nn.functional.pad(gradient, (0, 2 * width - vocabulary))
    for rank, found in enumerate(two_ranks(scores_of_a_rank, width, vocabulary)):
        parts = [torch.from_numpy(part) for part in found]
        assert_close(parts, [log_probs, entropy, gradient[:, rank * width : (rank + 1) * width]])
