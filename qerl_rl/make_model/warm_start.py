"""Teach a small model a task half-way by cross-entropy, so that reinforcement learning has rewards to begin with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Problems = list[tuple[str, str]]


@dataclass(frozen=True)
class WarmStart:
    """How to train and when to stop."""

    target_reward: float = 0.25
    """Stop once the expected reward (see `answer_probabilities`), averaged over the window, reaches this."""
    window: int = 8
    """Batches in that average; each is of new problems, scored before the model learns from them."""
    batch_size: int = 128
    learning_rate: float = 2e-3
    learning_rate_steps: int = 20
    """Steps over which the learning rate rises linearly from 0."""
    max_steps: int = 1200
    max_grad_norm: float = 1.0
    balance: float = 0.02
    """Weight of the load-balancing loss, without which some experts never get a token."""


@dataclass(frozen=True)
class Progress:
    step: int
    loss: float
    """Cross-entropy of this step's answer tokens, in nats a token."""
    reward: float
    """Expected reward over the window so far."""


def encode(problems: Problems, tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt, answer and <eos> of each problem, padded on the right.

    Returns: tokens int64 [P, T] and, as bool [P, T], which of them belong to the answer (its <eos> included).
    """
    rows = [
        (tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eos_token_id]) for prompt, answer in problems
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
    in_answer = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        tokens[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        in_answer[row, len(prompt) : len(prompt) + len(answer)] = True
    return tokens, in_answer


def answer_log_probs(logits: torch.Tensor, tokens: torch.Tensor, in_answer: torch.Tensor) -> torch.Tensor:
    """Log-probability of each answer token given what precedes it, 0 elsewhere: float [P, T - 1], with gradients.

    Args: logits [P, T - 1, V] of tokens[:, :-1]; padding is on the right, where causal attention never sees it.
    """
    log_probs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return log_probs * in_answer[:, 1:]


def answer_probabilities(log_probs: torch.Tensor) -> torch.Tensor:
    """Probability [P] of sampling exactly the right answer at temperature 1: the expected reward of each problem."""
    return log_probs.detach().sum(-1).exp()


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Switch Transformer's load-balancing loss (arXiv 2101.03961, eq. 4), mean over layers; 1 when perfectly even.

    Args: router_logits: [tokens, experts] of each layer.
    """
    losses = []
    for logits in router_logits:
        experts = logits.shape[-1]
        chosen = torch.nn.functional.one_hot(logits.topk(top_k, dim=-1).indices, experts).sum(-2)
        share = chosen.float().mean(0) / top_k
        losses.append(experts * (share * logits.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Callable[[int, int], Problems],
    settings: WarmStart,
    *,
    seed: int,
    report: Callable[[Progress], None],
) -> Progress:
    """Train `model` in place on answers to `problems(count, seed)` until it earns the target, and say where it stopped.

    The stop depends on the rewards alone, never on the clock, so that one seed always gives one model.
    Raises: RuntimeError when max_steps pass without reaching the target.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95))
    warm_up = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1.0, (done + 1) / settings.learning_rate_steps)
    )
    rewards: deque[float] = deque(maxlen=settings.window)
    model.train()
    for step in range(1, settings.max_steps + 1):
        tokens, in_answer = encode(problems(settings.batch_size, seed * settings.max_steps + step), tokenizer)
        outputs = model(tokens[:, :-1], output_router_logits=True)
        log_probs = answer_log_probs(outputs.logits, tokens, in_answer)
        rewards.append(answer_probabilities(log_probs).mean().item())
        loss = -log_probs.sum() / in_answer.sum()
        progress = Progress(step, loss.item(), sum(rewards) / len(rewards))
        report(progress)
        if len(rewards) == settings.window and progress.reward >= settings.target_reward:
            model.eval()
            return progress
        optimizer.zero_grad()
        total = loss + settings.balance * balance_loss(outputs.router_logits, model.config.num_experts_per_tok)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        warm_up.step()
    raise RuntimeError(f"the warm start reached a reward of {progress.reward:.3f} only in {settings.max_steps} steps")


@torch.no_grad()
def sampled_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Problems, *, seed: int, max_tokens: int = 8
) -> float:
    """Part of `problems` that one answer each, sampled at temperature 1, gets exactly right."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [tokenizer.encode(prompt) for prompt, _ in problems]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    rows = torch.arange(len(problems))
    tokens = torch.full((len(problems), int(lengths.max()) + max_tokens), tokenizer.pad_token_id)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    finished = torch.zeros(len(problems), dtype=torch.bool)
    for made in range(max_tokens):
        logits = model(tokens[:, : int(lengths.max()) + made]).logits[rows, lengths + made - 1]
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
        tokens[rows, lengths + made] = drawn.masked_fill(finished, tokenizer.pad_token_id)
        finished |= drawn == tokenizer.eos_token_id
        if finished.all():
            break
    right = 0
    for row, (_, answer) in enumerate(problems):
        expected = [*tokenizer.encode(answer), tokenizer.eos_token_id]
        begin = int(lengths[row])
        right += tokens[row, begin : begin + len(expected)].tolist() == expected
    return right / len(problems)
