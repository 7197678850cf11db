"""From the data section of a launch file to tokenized prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import DataConfig
from qerl_rl.data.packed import ANSWERS, TOKENS, is_packed, read_packed
from qerl_rl.data.paths import read_records
from qerl_rl.data.records import Record


@dataclass(frozen=True, eq=False)
class Prompt:
    """One question to the model."""

    index: int
    """Position in the data set, before shuffling, counted from 0."""
    text: str
    """The prompt field and the instruction, before the chat template: what rewards and samples.jsonl see."""
    tokens: np.ndarray
    """[tokens] int32, with chat template and special tokens: what the engine gets."""
    answer: str

    @property
    def content(self) -> tuple[bytes, ...]:
        """What makes this prompt another than others, for digests of a data set."""
        return self.tokens.astype("<i4").tobytes(), self.answer.encode()


@dataclass(frozen=True)
class PromptSet:
    """What a data set gave."""

    prompts: list[Prompt]
    left_out: int
    """Prompts that were longer than data.max_prompt_tokens."""


def held_out(prompts: Sequence[Prompt], count: int) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts to train on, `count` different prompts to evaluate on).

    The draw depends on the data only, so that runs with different seeds are evaluated on the same prompts. A prompt
    that occurs again in the data set is held out with its twin, so that training sees none of the evaluation.
    Raises: ConfigError when nothing would be left to train on.
    """
    identities = [prompt.tokens.tobytes() for prompt in prompts]
    order = np.random.default_rng(0).permutation(len(prompts))
    different = list(dict.fromkeys(identities[position] for position in order))
    if len(different) <= count:
        raise ConfigError(
            f"eval.prompts={count} of the training data's {len(different)} different prompts leave none to train on.",
            fix=f"lower eval.prompts below {len(different)}, set eval.path to a file of its own, or eval.every to 0",
        )
    held = set(different[:count])
    train = [prompt for prompt, identity in zip(prompts, identities, strict=True) if identity not in held]
    first_of = dict(zip(reversed(identities), reversed(prompts), strict=True))
    return train, [first_of[identity] for identity in different[:count]]


def load_prompts(
    data: DataConfig,
    tokenizer: Any,
    *,
    max_prompt_tokens: int,
    seed: int,
    count_needed: int,
    eval_path: str = "",
    eval_split: str = "",
) -> PromptSet:
    """The tokenized prompts of `data.train_path`, all checked, in the order of the file.

    Args: tokenizer: of transformers. max_prompt_tokens: of the engine. seed, count_needed: of the generated prompts and
        how many of them (data.limit overrides it); a file gives all of its own. eval_path, eval_split: eval.path and
        eval.split, read instead of data.train_path and data.split.
    Raises: ConfigError with the line of the file when it can't be used, or a prompt that data.max_prompt_tokens doesn't
        leave out is longer than max_prompt_tokens.
    """
    if is_packed(eval_path or data.train_path):
        return _packed_prompts(eval_path or data.train_path, data, tokenizer, max_prompt_tokens)
    records = read_records(data, seed=seed, count_needed=count_needed, eval_path=eval_path, eval_split=eval_split)
    texts, token_lists, kept = tokenized(records, data, tokenizer, max_prompt_tokens=max_prompt_tokens)
    prompts = [Prompt(row, texts[row], token_lists[row], _answer(records[row], data)) for row in kept]
    return PromptSet(prompts, len(records) - len(kept))


def _packed_prompts(prefix: str, data: DataConfig, tokenizer: Any, max_prompt_tokens: int) -> PromptSet:
    """Prompts that are tokens already, with the chat template in them; rewards see them without special tokens."""
    settled = {"chat_template": data.chat_template, "prompt_template": data.prompt_template}
    settled |= {"instruction": data.instruction, "system_prompt": data.system_prompt}
    for key, given in settled.items():
        if given:
            problem = f"data.{key} can't be put into {prefix}, whose prompts are tokens already."
            raise ConfigError(problem, fix=f"leave data.{key} out, or give the data that these were made from")
    documents, answers = read_packed(prefix, TOKENS), read_packed(prefix, ANSWERS)
    if len(documents) != len(answers) or not documents:
        problem = f"{prefix} has {len(documents)} prompts and {len(answers)} answers."
        raise ConfigError(problem, fix="preprocess the data again")
    documents = documents[: data.limit or None]
    kept = [row for row, tokens in enumerate(documents) if len(tokens) <= (data.max_prompt_tokens or len(tokens))]
    if not kept:
        shortest = min(map(len, documents))
        problem = f"data.max_prompt_tokens={data.max_prompt_tokens} leaves out every prompt of {len(documents)}."
        raise ConfigError(problem, fix=f"set data.max_prompt_tokens to {shortest} or more")
    _check_lengths(
        [documents[row].tolist() for row in kept], [f"{prefix}, document {row + 1}" for row in kept], max_prompt_tokens
    )

    def text(tokens: np.ndarray) -> str:
        return tokenizer.decode(tokens.tolist(), skip_special_tokens=True)

    prompts = [
        Prompt(row, text(documents[row]), documents[row].astype(np.int32), text(answers[row]).strip()) for row in kept
    ]
    return PromptSet(prompts, len(documents) - len(kept))


def tokenized(
    records: Sequence[Record], data: DataConfig, tokenizer: Any, *, max_prompt_tokens: int
) -> tuple[list[str], list[np.ndarray], list[int]]:
    """Text and tokens (int32) of each record's prompt, and the rows that data.max_prompt_tokens does not leave out.

    Raises: ConfigError when that leaves none, or one of those rows is longer than max_prompt_tokens.
    """
    texts = [record.prompt + data.instruction for record in records]
    token_lists = _tokenize(texts, data, tokenizer)
    kept = [row for row, tokens in enumerate(token_lists) if len(tokens) <= (data.max_prompt_tokens or len(tokens))]
    _check_lengths([token_lists[row] for row in kept], [records[row].place for row in kept], max_prompt_tokens)
    if not kept:
        shortest = min(map(len, token_lists))
        raise ConfigError(
            f"data.max_prompt_tokens={data.max_prompt_tokens} leaves out every prompt of {len(records)}.",
            fix=f"set data.max_prompt_tokens to {shortest} or more",
        )
    return texts, [np.asarray(tokens, dtype=np.int32) for tokens in token_lists], kept


def _tokenize(texts: list[str], data: DataConfig, tokenizer: Any) -> list[list[int]]:
    if not data.chat_template:
        if data.system_prompt:
            raise ConfigError(
                "data.system_prompt has no place in a prompt without a chat template.",
                fix="set data.chat_template to true, or data.system_prompt to an empty text",
            )
        return tokenizer(texts)["input_ids"]
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "data.chat_template is true, but the model's tokenizer has no chat template.",
            fix="set data.chat_template to false, or add chat_template.jinja to model.path",
        )
    system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    conversations = [[*system, {"role": "user", "content": text}] for text in texts]
    rendered = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    # The template has written the special tokens already.
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def _check_lengths(token_lists: list[list[int]], places: list[str], max_prompt_tokens: int) -> None:
    lengths = [len(tokens) for tokens in token_lists]
    too_long = [position for position, length in enumerate(lengths) if length > max_prompt_tokens]
    if too_long:
        first, longest = too_long[0], max(lengths)
        others = f" ({len(too_long)} of {len(lengths)} prompts are too long)" if len(too_long) > 1 else ""
        raise ConfigError(
            f"this prompt has {lengths[first]} tokens, rollout.max_prompt_tokens={max_prompt_tokens}{others}.",
            fix=f"set rollout.max_prompt_tokens to {longest} or more, or shorten or remove the prompt",
            where=places[first],
        )
    if 0 in lengths:
        raise ConfigError(
            "this prompt has no tokens.", fix="correct or remove the line", where=places[lengths.index(0)]
        )


def _answer(record: Record, data: DataConfig) -> str:
    if not data.answer_after:
        return record.answer
    _, mark, after = record.answer.rpartition(data.answer_after)
    if not mark:
        raise ConfigError(
            f"the answer {record.answer[:40]!r} has no {data.answer_after!r} (data.answer_after).",
            fix="correct the line, or set data.answer_after to the mark before the answers, or to an empty text",
            where=record.place,
        )
    return after.strip()
