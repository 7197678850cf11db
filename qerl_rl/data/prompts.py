"""From the data section of a launch file to tokenized prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import DataConfig
from qerl_rl.data.arithmetic import arithmetic_problems
from qerl_rl.data.lines import Record, read_records

ARITHMETIC = "arithmetic"
"""The data path that generates sums instead of reading a file."""


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


class PromptSource:
    """Gives prompts epoch after epoch, each epoch in an order of its own that only (seed, epoch) decides."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        self._prompts, self._seed, self._shuffle = prompts, seed, shuffle
        self._given = 0

    def __len__(self) -> int:
        """Prompts in an epoch."""
        return len(self._prompts)

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts; goes on with the next epoch where one ends."""
        taken: list[Prompt] = []
        while len(taken) < count:
            epoch, position = divmod(self._given, len(self._prompts))
            part = self._order(epoch)[position : position + count - len(taken)]
            taken.extend(self._prompts[index] for index in part)
            self._given += len(part)
        return taken

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: `given`, the prompts given so far, and what must not change; whole numbers only."""
        return {"given": self._given, "prompts": len(self._prompts), "seed": self._seed, "shuffle": int(self._shuffle)}

    def load_state(self, state: dict[str, int]) -> None:
        """Go on where `state()` was taken.

        Raises: ConfigError when the number of prompts, the seed or the shuffling is not the one of the checkpoint.
        """
        own = self.state()
        for name, key in (("prompts", "the data section"), ("seed", "run.seed"), ("shuffle", "data.shuffle")):
            if state[name] != own[name]:
                raise ConfigError(
                    f"the checkpoint was made with {name}={state[name]}, this run has {own[name]}.",
                    fix=f"set {key} back to what the checkpoint was made with, or start anew in another run.output_dir",
                )
        self._given = state["given"]

    def _order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self._prompts))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))


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
) -> list[Prompt]:
    """The tokenized prompts of `data.train_path`, all checked, in the order of the file.

    Args: tokenizer: of transformers. seed, count_needed: of the generated prompts and how many of them (data.limit
        overrides it); a file gives all of its own. eval_path: eval.path, read instead of data.train_path.
    Raises: ConfigError with the line of the file when it can't be used or a prompt is longer than max_prompt_tokens.
    """
    path = eval_path or data.train_path
    if path == ARITHMETIC:
        problems = arithmetic_problems(data.limit or count_needed, seed)
        records = [Record(0, prompt, answer) for prompt, answer in problems]
    else:
        records = read_records(
            path,
            prompt_field=data.prompt_field,
            answer_field=data.answer_field,
            limit=data.limit,
            key="eval.path" if eval_path else "data.train_path",
        )
    places = [f"{path}:{record.line}" if record.line else path for record in records]
    texts = [record.prompt + data.instruction for record in records]
    token_lists = _tokenize(texts, data, tokenizer)
    _check_lengths(token_lists, places, max_prompt_tokens)
    answers = [_answer(record, data, place) for record, place in zip(records, places, strict=True)]
    return [
        Prompt(index, text, np.asarray(tokens, dtype=np.int32), answer)
        for index, (text, tokens, answer) in enumerate(zip(texts, token_lists, answers, strict=True))
    ]


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


def _answer(record: Record, data: DataConfig, place: str) -> str:
    if not data.answer_after:
        return record.answer
    _, mark, after = record.answer.rpartition(data.answer_after)
    if not mark:
        raise ConfigError(
            f"the answer {record.answer[:40]!r} has no {data.answer_after!r} (data.answer_after).",
            fix="correct the line, or set data.answer_after to the mark before the answers, or to an empty text",
            where=place,
        )
    return after.strip()
