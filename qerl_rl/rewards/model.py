"""A reward model: a Hugging Face sequence classification model with one label, whatever its architecture and tokenizer.

It scores whole responses in the process that owns it, on the CPU and in float32, so that a sample's score does not
depend on what it is batched with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import DataConfig, RewardModelConfig

if TYPE_CHECKING:
    import torch

MODEL = "model_mean"
"""The name of its part of the reward: reward/model_mean is the mean before reward_model.weight."""
BATCH_TOKENS = 8192
"""Tokens of one batch, padding included; a longer text makes a batch of its own."""
_HEAD = "ForSequenceClassification"


def check_reward_model(path: str) -> None:
    """Raise ConfigError unless the folder's config.json is that of a sequence classification model with one label."""
    from transformers import AutoConfig

    key = f"reward_model.path={path}"
    if not Path(path, "config.json").is_file():
        raise ConfigError(f"{key} holds no config.json.", fix="set reward_model.path to the folder of a reward model")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {_one_line(error)}", fix="correct its config.json", where=path) from None
    named = " ".join(config.architectures or ["no architecture"])
    if _HEAD not in named:
        raise ConfigError(f"{key} is a {named}, which gives no score.", fix=f"name a model ...{_HEAD}", where=path)
    if config.num_labels != 1:
        fix = "name a model with one label, or train one with num_labels=1"
        raise ConfigError(f"{key} has {config.num_labels} labels, where a reward is one number.", fix=fix, where=path)


class RewardModel:
    """Scores (prompt, response, answer) samples by their prompt and response; the answer plays no part.

    With data.chat_template, and a chat template of its own tokenizer, it reads the conversation (data.system_prompt,
    prompt, response); otherwise the prompt and, right behind it, the response.
    Raises: ConfigError when weights of the model are missing, such as those of the head that scores.
    """

    def __init__(self, config: RewardModelConfig, data: DataConfig) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._data = data
        self._tokenizer: Any = AutoTokenizer.from_pretrained(config.path)
        # The end is where most reward models read, and what was just written: the beginning goes.
        self._tokenizer.truncation_side = "left"
        self._model, found = AutoModelForSequenceClassification.from_pretrained(
            config.path, dtype=torch.float32, output_loading_info=True
        )
        if found["missing_keys"]:
            missing = ", ".join(sorted(found["missing_keys"])[:3])
            fix = "set reward_model.path to a trained reward model"
            raise ConfigError(f"reward_model.path={config.path} has no weights {missing}.", fix=fix, where=config.path)
        self._model.eval()
        self._text_config = self._model.config.get_text_config()
        self._padding = self._text_config.pad_token_id
        positions = getattr(self._text_config, "max_position_embeddings", None) or math.inf
        own = min(self._tokenizer.model_max_length, positions)
        self._longest = int(min(own, config.max_length or own, 2**31))

    def score(self, samples: Sequence[tuple[str, str, str]]) -> tuple[np.ndarray, dict[int, str]]:
        """The scores of the samples.

        Returns: [S] float32, 0 for a sample that it failed on, and why it failed by the sample's index.
        """
        tokens = [self._tokens(prompt, response) for prompt, response, _ in samples]
        values = np.zeros(len(samples), dtype=np.float32)
        # Under padding, a text without tokens would be given the score of the padding.
        failures = {row: "it has no token" for row, own in enumerate(tokens) if not own}
        present = [row for row in range(len(samples)) if row not in failures]
        for batch in batches_by_length([len(tokens[row]) for row in present], BATCH_TOKENS):
            rows = [present[index] for index in batch]
            for row, outcome in zip(rows, self._outcomes([tokens[row] for row in rows]), strict=True):
                if isinstance(outcome, str):
                    failures[row] = outcome
                else:
                    values[row] = outcome
        return values, failures

    def _tokens(self, prompt: str, response: str) -> list[int]:
        limits = {"truncation": True, "max_length": self._longest}
        if not (self._data.chat_template and self._tokenizer.chat_template):
            return self._tokenizer(prompt + response, **limits)["input_ids"]
        roles = {"system": self._data.system_prompt, "user": prompt, "assistant": response}
        messages = [{"role": role, "content": text} for role, text in roles.items() if text or role != "system"]
        rendered = self._tokenizer.apply_chat_template(messages, tokenize=False)
        # The template has written the special tokens already.
        return self._tokenizer(rendered, add_special_tokens=False, **limits)["input_ids"]

    def _outcomes(self, texts: list[list[int]]) -> list[float | str]:
        """The score of each text, or why it has none."""
        try:
            scores = self._forward(texts)
        except Exception as error:  # noqa: BLE001 - whatever a text does to the model, the others get their scores
            if len(texts) > 1:
                return [outcome for text in texts for outcome in self._outcomes([text])]
            return [_one_line(error)]
        return [score if math.isfinite(score) else f"the score is {score}" for score in scores]

    def _forward(self, texts: list[list[int]]) -> list[float]:
        import torch

        padding = self._padding
        if padding is None and len(texts) > 1:
            padding = _unused(texts, self._text_config.vocab_size)
            if padding is None:
                return [score for text in texts for score in self._forward([text])]
        # Decoders read the score at the last token that is not this one. A model that names none reads it at the last
        # of all; any token that no text has makes it do so under padding.
        self._text_config.pad_token_id = padding
        longest = max(map(len, texts))
        tokens = torch.full((len(texts), longest), padding or 0, dtype=torch.int64)
        mask = torch.zeros((len(texts), longest), dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = torch.tensor(text, dtype=torch.int64)
            mask[row, : len(text)] = 1
        with torch.inference_mode():
            logits: torch.Tensor = self._model(input_ids=tokens, attention_mask=mask).logits
        return logits[:, 0].tolist()


def batches_by_length(lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """Rows of texts of about equal length, in batches whose rows times longest text stay within `most_tokens`."""
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        # Lengths ascend: the newest is the longest.
        if rows and (len(rows) + 1) * lengths[row] > most_tokens:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _unused(texts: Sequence[Sequence[int]], vocabulary: int) -> int | None:
    used = {token for text in texts for token in text}
    return next((token for token in range(vocabulary) if token not in used), None)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
