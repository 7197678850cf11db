"""The quickstart's model: a small Qwen3-MoE that has half learned to add and subtract, by default in W8A8."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qerl_rl.data.arithmetic import arithmetic_problems
from qerl_rl.make_model.characters import character_tokenizer
from qerl_rl.make_model.random_model import MoeSizes, build_moe, save_model
from qerl_rl.make_model.warm_start import Progress, WarmStart, sampled_accuracy, warm_start
from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.quant.quantize import quantize_checkpoint

SIZES = MoeSizes(layers=4, hidden=128, heads=4, kv_heads=2, head_dim=32, experts=8, top_k=2, expert_width=128)
NOTE_NAME = "qerl_rl.json"
_CHECK_PROBLEMS = 512
# Warm-start batches have seeds from 0 up; the problems that measure the result come from elsewhere.
_CHECK_SEED = 1_000_000_007


def copy_checkpoint(source: str | Path, out: Path) -> int:
    """All files of `source` to `out`; returns the bytes of its tensors."""
    shutil.copytree(source, out, dirs_exist_ok=True)
    with CheckpointReader(out) as reader:
        return sum(reader.get(name).nbytes for name in reader)


@dataclass(frozen=True)
class TinyModel:
    """What was made; also written to qerl_rl.json in the folder."""

    task: str
    seed: int
    warm_start_steps: int
    reward_at_start: float
    """Sampled accuracy at temperature 1 just before quantization, on problems drawn apart."""
    weight_bytes: int


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums depend on how many threads share them; with one, a seed gives the same model on 1 core and on 64."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _initialize(model: PreTrainedModel, seed: int) -> None:
    """Weights that keep the variance of what flows through: at this width they learn 3 times faster than HF's 0.02."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            parameter.normal_(0.0, 0.3, generator=generator)
        elif parameter.dim() >= 2 and not name.endswith("mlp.gate.weight"):
            parameter.normal_(0.0, 0.8 / math.sqrt(parameter.shape[-1]), generator=generator)


def make_tiny(
    out: Path,
    seed: int = 1,
    *,
    format: str = "w8a8",
    sizes: MoeSizes = SIZES,
    settings: WarmStart | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> TinyModel:
    """Build, warm-start and quantize the model into folder `out`; one seed always gives the same files.

    Takes about a minute on one core. Args: format: a quant.format; none leaves the weights in bfloat16, of which the
    others are roundings. Raises: RuntimeError when the warm start does not reach its target.
    """
    tokenizer = character_tokenizer()
    model = build_moe("qwen3_moe", sizes, tokenizer, seed)
    _initialize(model, seed)
    model.set_experts_implementation("grouped_mm")
    with _one_thread():
        stopped = warm_start(model, tokenizer, arithmetic_problems, settings or WarmStart(), seed=seed, report=report)
        check = arithmetic_problems(_CHECK_PROBLEMS, _CHECK_SEED + seed)
        accuracy = sampled_accuracy(model, tokenizer, check, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".unquantized-") as unquantized:
        save_model(model, tokenizer, Path(unquantized))
        if format == "none":
            weight_bytes = copy_checkpoint(unquantized, out)
        else:
            weight_bytes = quantize_checkpoint(unquantized, out, format).weight_bytes
    made = TinyModel("arithmetic", seed, stopped.step, accuracy, weight_bytes)
    (out / NOTE_NAME).write_text(json.dumps(asdict(made), indent=2) + "\n")
    return made
