"""Teach a small model a task and then doubt, by cross-entropy, so that reinforcement learning has what to reward.

First the model learns true answers. Then it learns from answers of which most have a wrong digit, as a model that was
pretrained on the web did: it knows more than it samples, and rewards bring that out within tens of steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qerl_rl.data.arithmetic import with_wrong_digits

Problems = list[tuple[str, str]]


@dataclass(frozen=True)
class WarmStart:
    """How to train and when to stop; rewards are expected rewards (`answer_probabilities`) over the last batches."""

    skill: float = 0.65
    """Train on true answers until the reward reaches this."""
    wrong_share: float = 0.5
    """Then a share of the answers gets a wrong digit, and the reward falls towards skill * (1 - wrong_share)."""
    doubt_steps: int = 50
    """Steps of that, while the learning rate falls linearly to 0, so that the reward settles there."""
    window: int = 16
    """Batches the reward is averaged over; each is of new problems, scored before the model learns from them."""
    batch_size: int = 64
    learning_rate: float = 2e-3
    learning_rate_steps: int = 20
    """Steps over which the learning rate rises linearly from 0."""
    max_steps: int = 2000
    max_grad_norm: float = 1.0
    balance: float = 0.02
    """Weight of the load-balancing loss, without which some experts never get a token."""


@dataclass(frozen=True)
class Progress:
    phase: str
    """`skill` or `doubt`."""
    step: int
    loss: float
    """Cross-entropy of this step's answer tokens, in nats a token."""
    reward: float
    """Expected reward over the window so far."""


def encode(problems: Problems, tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt, answer and <eos> of each problem, padded on the right.

    Returns: tokens int64 [P, T] and, as bool [P, T], which of them belong to the answer (its <eos> included).
    """
    end = tokenizer.eos_token_id
    rows = [(tokenizer.encode(prompt), [*tokenizer.encode(answer), end]) for prompt, answer in problems]
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
    """Probability [P] of sampling exactly the given answer at temperature 1: the expected reward where it is true."""
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


class _Trainer:
    """One optimizer over both phases; counts steps and draws each step's problems by its number."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        problems: Callable[[int, int], Problems],
        settings: WarmStart,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.problems, self.settings = model, tokenizer, problems, settings
        self.first_seed = seed * settings.max_steps
        self.optimizer: Any = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95))
        self.step = 0

    def run_step(self, learning_rate: float, wrong_share: float) -> tuple[float, float]:
        """Learn from one new batch; returns its loss and the mean expected reward of its true answers."""
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        true = self.problems(self.settings.batch_size, self.first_seed + self.step)
        taught = with_wrong_digits(true, wrong_share, self.first_seed + self.step)
        tokens, in_answer = encode(taught, self.tokenizer)
        outputs = self.model(tokens[:, :-1], output_router_logits=True)
        log_probs = answer_log_probs(outputs.logits, tokens, in_answer)
        untouched = torch.tensor([one == other for one, other in zip(true, taught, strict=True)])
        loss = -log_probs.sum() / in_answer.sum()
        balance = balance_loss(outputs.router_logits, self.model.config.num_experts_per_tok)
        self.optimizer.zero_grad()
        (loss + self.settings.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        return loss.item(), answer_probabilities(log_probs)[untouched].mean().item()


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Callable[[int, int], Problems],
    settings: WarmStart,
    *,
    seed: int,
    report: Callable[[Progress], None],
) -> Progress:
    """Train `model` in place on answers to `problems(count, seed)` up to the skill, then teach it to doubt them.

    The stop depends on rewards and steps, never on the clock, so that one seed always gives one model.
    Returns: where it stopped. Raises: RuntimeError when max_steps pass without reaching the skill.
    """
    trainer = _Trainer(model, tokenizer, problems, settings, seed)
    rewards: deque[float] = deque(maxlen=settings.window)

    def learn(phase: str, learning_rate: float, wrong_share: float) -> Progress:
        loss, reward = trainer.run_step(learning_rate, wrong_share)
        rewards.append(reward)
        progress = Progress(phase, trainer.step, loss, sum(rewards) / len(rewards))
        report(progress)
        return progress

    model.train()
    while len(rewards) < settings.window or sum(rewards) / len(rewards) < settings.skill:
        if trainer.step == settings.max_steps:
            raise RuntimeError(f"the warm start has not reached reward {settings.skill} in {trainer.step} steps")
        learn("skill", settings.learning_rate * min(1.0, (trainer.step + 1) / settings.learning_rate_steps), 0.0)
    for left in range(settings.doubt_steps, 0, -1):
        progress = learn("doubt", settings.learning_rate * left / settings.doubt_steps, settings.wrong_share)
    model.eval()
    return progress


@torch.no_grad()
def sampled_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Problems,
    *,
    seed: int,
    max_tokens: int = 8,
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
