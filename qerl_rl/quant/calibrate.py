"""Quantizing by what a model does with text (GPTQ, arXiv 2210.17323; AWQ, arXiv 2306.00978): llmcompressor's work.

llmcompressor is not among this project's packages: it wants a newer compressed-tensors than the engines pin. It goes
into an environment of its own; what it writes there is the layout that everything here reads.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.quant.quantize import Recipe, Written

SAMPLES, LENGTH = 512, 2048
"""Texts, and tokens of each, that a calibration takes at most."""


def calibrate(
    source: Path,
    out: Path,
    format: str,
    *,
    data: Path,
    method: str,
    group_size: int,
    attention: str,
    keep_layers: Collection[int],
) -> Written:
    """Write `source` quantized to `out`, with weights and scales chosen by GPTQ or AWQ on the texts of `data`.

    Args: as `quantize_checkpoint`; data: .jsonl, one object a line with `text` or `prompt`. method: gptq or awq.
    Raises: ConfigError when llmcompressor is not installed, or data holds no text.
    """
    recipe = Recipe(format, attention, frozenset(keep_layers), group_size)
    texts = _texts(data)
    try:
        import llmcompressor
    except ImportError:
        raise ConfigError(
            "--calibrate needs llmcompressor, which is not installed.",
            fix="pip install llmcompressor==0.14.0.1 in an environment of its own, or leave out --calibrate",
        ) from None
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = [tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"] for text in texts[:SAMPLES]]
    rows = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(row) for row in tokens]})
    llmcompressor.oneshot(
        model=model,
        dataset=rows,
        recipe=_modifiers(recipe, method),
        max_seq_length=LENGTH,
        num_calibration_samples=len(rows),
    )
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)
    with CheckpointReader(out) as reader:
        names = reader.weights()
        return Written(
            weight_bytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
            source_bytes=sum(file.stat().st_size for file in source.glob("*.safetensors")),
            quantized=sum(reader.is_quantized(name) for name in names),
            error=_error(source, reader) if method == "gptq" else None,
        )


def _modifiers(recipe: Recipe, method: str) -> list[Any]:
    """What llmcompressor is to do; the recipe's own groups and exceptions, as they would stand in config.json."""
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    described = recipe.quantization_config()
    groups = {"config_groups": described["config_groups"], "ignore": described["ignore"]}
    if method == "gptq":
        return [GPTQModifier(**groups)]
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        # Its AWQ pins what it keeps, to bring it to a card faster; where there is none, torch refuses that.
        IntermediatesCache.pin_memory = lambda *_: None
    return [AWQModifier(), QuantizationModifier(**groups)]


def _error(source: Path, quantized: CheckpointReader) -> float:
    """Root of the squares of what calibration changed over the squares of what was there (see `Written`)."""
    lost = whole = 0.0
    with CheckpointReader(source) as reader:
        for name in quantized.weights():
            if quantized.is_quantized(name) and name in reader:
                exact = reader.get(name).float()
                whole += exact.square().sum().item()
                lost += quantized.weight(name).sub_(exact).square_().sum().item()
    return (lost / whole) ** 0.5 if whole else 0.0


def _texts(data: Path) -> list[str]:
    try:
        rows = [json.loads(line) for line in data.read_text().splitlines() if line.strip()]
        texts = [row.get("text") or row["prompt"] for row in rows]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"--calibrate {data} can't be read: {error}.", fix="give a .jsonl file with `text` or `prompt` in each line"
        ) from None
    if not texts:
        raise ConfigError(f"--calibrate {data} is empty.", fix="give some hundred lines of text")
    return texts
