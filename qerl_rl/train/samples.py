"""What the trainer learns from: prompts with their responses, and columns over the response tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Samples:
    """The samples of one data-parallel rank; its tensor- and pipeline-parallel peers hold the same ones.

    tokens: per sample int64 [prompt + response]. response_lengths: tokens of each response, which ends the sample.
    columns: name -> per sample float32 [response_length]. routed_experts: per sample uint8 or int16 [n, layers, k], the
    experts of its first n tokens in the rollout engine; None where the trainer routes by itself.
    Raises: ValueError when a sample has no prompt token, a column does not fit the responses, or more tokens are routed
    than there are.
    """

    tokens: list[np.ndarray]
    response_lengths: list[int]
    columns: dict[str, list[np.ndarray]] = field(default_factory=dict)
    routed_experts: list[np.ndarray] | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.response_lengths):
            raise ValueError(f"{len(self.tokens)} samples but {len(self.response_lengths)} response lengths")
        for index, (tokens, length) in enumerate(zip(self.tokens, self.response_lengths, strict=True)):
            # The first token of a response is predicted by the last of its prompt.
            if not 0 <= length < len(tokens):
                raise ValueError(f"sample {index} has {len(tokens)} tokens, its response {length}: no prompt is left")
        for name, values in self.columns.items():
            found = [len(value) for value in values]
            if found != list(self.response_lengths):
                raise ValueError(f"column {name} has {found} values, the responses have {self.response_lengths} tokens")
        routed = self.lengths if self.routed_experts is None else [len(rows) for rows in self.routed_experts]
        if len(routed) != len(self) or any(rows > own for rows, own in zip(routed, self.lengths, strict=True)):
            raise ValueError(f"routed_experts has {routed} tokens, the samples have {self.lengths}")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample, prompt and response together."""
        return [len(tokens) for tokens in self.tokens]

    @property
    def response_tokens(self) -> int:
        """Response tokens of all samples."""
        return sum(self.response_lengths)

    def select(self, indices: Iterable[int] | Sequence[int]) -> Samples:
        """The samples at `indices`, in that order (the arrays are shared, not copied)."""
        chosen = [int(index) for index in indices]
        return Samples(
            [self.tokens[index] for index in chosen],
            [self.response_lengths[index] for index in chosen],
            {name: [values[index] for index in chosen] for name, values in self.columns.items()},
            None if self.routed_experts is None else [self.routed_experts[index] for index in chosen],
        )
