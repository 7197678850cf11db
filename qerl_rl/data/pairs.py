"""Prompts with a chosen and a rejected response, tokenized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import DataConfig
from qerl_rl.data.paths import read_records
from qerl_rl.data.prompts import Prompt, PromptSet, tokenized


@dataclass(frozen=True, eq=False)
class Pair(Prompt):
    """A prompt with two responses; its `answer` is the text of the chosen one.

    chosen, rejected: [tokens] int32, with the end-of-sequence token. rejected_text: the other response as it was read.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    rejected_text: str

    @property
    def content(self) -> tuple[bytes, ...]:
        return (*super().content, self.rejected_text.encode())


def load_pairs(
    data: DataConfig, tokenizer: Any, *, max_prompt_tokens: int, max_response_tokens: int, seed: int, count_needed: int
) -> PromptSet:
    """The pairs of `data.train_path`, prompts as in `load_prompts`, all checked, in the order of the file.

    A response is the tokens of its text and the end-of-sequence token, as the rollout engine ends one.

    Raises: ConfigError with the line of the file, as `load_prompts`, also when a response is longer than
        max_response_tokens or the tokenizer knows no end of a sequence.
    """
    records = read_records(data, seed=seed, count_needed=count_needed, pairs=True)
    texts, prompts, kept = tokenized(records, data, tokenizer, max_prompt_tokens=max_prompt_tokens)
    chosen = _responses(tokenizer, [records[row].answer for row in kept])
    rejected = _responses(tokenizer, [records[row].rejected for row in kept])
    longer = [max(len(good), len(bad)) for good, bad in zip(chosen, rejected, strict=True)]
    _check_lengths(longer, [records[row].place for row in kept], max_response_tokens)
    pairs: list[Prompt] = [
        Pair(row, texts[row], prompts[row], records[row].answer, good, bad, records[row].rejected)
        for row, good, bad in zip(kept, chosen, rejected, strict=True)
    ]
    return PromptSet(pairs, len(records) - len(kept))


def _responses(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError(
            "the model's tokenizer has no end-of-sequence token, with which the responses of pairs end.",
            fix="set eos_token in tokenizer_config.json of model.path",
        )
    # A data set made for this model may have written the mark itself.
    return [
        np.array(tokens if tokens[-1:] == [end] else [*tokens, end], dtype=np.int32)
        for tokens in tokenizer(texts, add_special_tokens=False)["input_ids"]
    ]


def _check_lengths(lengths: list[int], places: list[str], most: int) -> None:
    too_long = [row for row, length in enumerate(lengths) if length > most]
    if too_long:
        others = f" ({len(too_long)} of {len(lengths)} pairs are too long)" if len(too_long) > 1 else ""
        raise ConfigError(
            f"the longer response of this pair has {lengths[too_long[0]]} tokens with the end-of-sequence token, "
            f"rollout.max_response_tokens={most}{others}.",
            fix=f"set rollout.max_response_tokens to {max(lengths)} or more, or shorten or remove the pair",
            where=places[too_long[0]],
        )
