"""The accuracy gate: which figures are taken of a checkpoint, and which bars they are held to."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qerl_rl.config.errors import ConfigError
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.quant.base import Format
from qerl_rl.quant.checkpoint import CheckpointReader, stored_format
from qerl_rl.quant.formats import WHOLE_ROW, get_format
from qerl_rl.quant.quantize import quantize_checkpoint
from qerl_rl.verify.policy import FrozenPolicy, start_world
from qerl_rl.verify.quantized import Twin, divergence, expert_cosines, mean_cosine, mean_divergence
from qerl_rl.verify.reference import Trace, greedy, load_reference, logits, trace
from qerl_rl.verify.report import Check, Report

if TYPE_CHECKING:
    from qerl_rl.verify.engine import EngineSide

LAYER_BAR, FINAL_BAR, GREEDY_TOKENS = 0.999, 0.98, 20
EXPERT_BARS = {"w8a8": 0.99, "mxfp8": 0.99, "w4a16": 0.95, "w4a8": 0.95, "nvfp4": 0.95, "mxfp4": 0.95}
"""Cosine of a layer's quantized experts with the exact ones; a format's error of weights e, thrice, leaves about
1 - 1.5 e^2, and rounding to 4 bits leaves e of about 0.1."""
ENGINE_KL_BAR, ENGINE_KL_FACTOR = 0.01, 2.0
"""Engine against trainer, k3 in nats a token: at most the larger of the first, and the second times what rounding
activations makes in transformers' model."""
PROMPTS, PROMPT_TOKENS = 8, 28


@dataclass(frozen=True)
class Request:
    """What is asked: see the options of `python -m qerl_rl verify`."""

    model: Path
    engine: str = ""
    format: str = ""
    reference: Path | None = None
    by_layer: bool = False
    keep_worst: int = 0
    out: Path | None = None
    prompts: Path | None = None


def check_request(request: Request) -> None:
    """Raise ConfigError for folders that can't be read, and for options that do not fit the checkpoint."""
    architecture = MoeArchitecture.from_folder(request.model)
    stored = stored_format(request.model)
    if request.format and stored != "none":
        raise ConfigError(
            f"--format {request.format}, but {request.model} is quantized already ({stored}).",
            fix="leave --format out, or give the bfloat16 checkpoint as --model",
        )
    if request.reference:
        found = MoeArchitecture.from_folder(request.reference)
        if found != architecture:
            raise ConfigError(
                f"--reference {request.reference} is another model than {request.model}.",
                fix="give the checkpoint that --model was made from",
            )
        if stored_format(request.reference) != "none":
            raise ConfigError(f"--reference {request.reference} is quantized.", fix="give the bfloat16 checkpoint")
    has_twin = request.format or (stored != "none" and request.reference is not None)
    if request.by_layer and not has_twin and not request.engine:
        raise ConfigError(
            "--layers has no mismatch to attribute.",
            fix="give --engine vllm, --format F, or a quantized --model with the --reference that it was made from",
        )
    if not request.keep_worst:
        return
    if request.out is None:
        raise ConfigError("--keep-worst writes a checkpoint.", fix="give --out DIR")
    if not has_twin:
        raise ConfigError(
            "--keep-worst has no format to quantize the other layers to.",
            fix="give --format F, or a quantized --model with the --reference that it was made from",
        )
    if not 0 < request.keep_worst < architecture.layers:
        fix = f"set it to 1 .. {architecture.layers - 1}"
        raise ConfigError(f"--keep-worst {request.keep_worst} of {architecture.layers} layers.", fix=fix)


def verify(request: Request) -> Report:
    """Take all figures that `request` asks for. Raises: ConfigError as `check_request`."""
    check_request(request)
    from qerl_rl.platform import detect, prepare_megatron

    # Before the first HF model: Megatron's patches must not come between.
    prepare_megatron(detect("auto"))
    start_world()
    report = Report()
    stored = stored_format(request.model)
    # A quantized model is compared as it is; what it was made from is compared with it further below.
    oracle = request.reference if request.reference and stored == "none" else request.model
    model = load_reference(oracle)
    prompts = _prompts(request, model)
    sequences = greedy(model, prompts, GREEDY_TOKENS)
    policy = FrozenPolicy(request.model)
    exact = trace(model, sequences)
    _trainer_checks(report, policy, exact, prompts, sequences)
    twin = _twin(request, model, stored)
    if twin is not None:
        exact = exact if twin.exact is model else trace(twin.exact, sequences)
        _quantization_checks(report, twin, request, exact, sequences)
    if request.engine:
        _engine_report(report, request, policy, model, prompts, sequences)
    return report


def _prompts(request: Request, model: Any) -> list[Tensor]:
    """int64 [n] each: the lines of a file, or seeded tokens that are no special ones."""
    if request.prompts is None:
        special = {getattr(model.config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")}
        usable = [token for token in range(model.config.vocab_size) if token not in special]
        drawn = np.random.default_rng(0).choice(usable, (PROMPTS, PROMPT_TOKENS))
        return list(torch.from_numpy(drawn))
    from transformers import AutoTokenizer

    try:
        lines = [line for line in request.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        fix = "give a text file with a prompt a line"
        raise ConfigError(f"--prompts {request.prompts} can't be read: {error}.", fix=fix) from None
    tokenizer = AutoTokenizer.from_pretrained(request.model)
    prompts = [torch.tensor(tokenizer(line)["input_ids"], dtype=torch.int64) for line in lines]
    longest = model.config.max_position_embeddings - 2 * GREEDY_TOKENS
    if not prompts or max(map(len, prompts)) > longest or min(map(len, prompts)) < 1:
        raise ConfigError(f"--prompts {request.prompts} needs lines of 1 to {longest} tokens.", fix="change the file")
    return prompts


def _trainer_checks(
    report: Report, policy: FrozenPolicy, exact: Trace, prompts: list[Tensor], sequences: list[Tensor]
) -> None:
    """The trainer against transformers, by layer and as a whole."""
    free = policy.trace(sequences)
    # Each layer from the oracle's input, so that a fault stays in the layer that has it.
    fed = policy.trace(sequences, dict(enumerate(exact.inputs)))
    for layer in range(len(exact.inputs)):
        figures = {
            "attention": mean_cosine(fed.attention[layer], exact.attention[layer]),
            "experts": mean_cosine(fed.experts[layer], exact.experts[layer]),
            "hidden state": mean_cosine(free.outputs[layer], exact.outputs[layer]),
        }
        report.add(*(Check(f"{name}, trainer vs HF", value, layer, LAYER_BAR) for name, value in figures.items()))
    chosen = free.logits.argmax(-1).split([len(sequence) for sequence in sequences])
    matches = [
        (row[len(prompt) - 1 : -1] == sequence[len(prompt) :]).float().mean()
        for row, prompt, sequence in zip(chosen, prompts, sequences, strict=True)
    ]
    report.add(
        Check("final hidden state, trainer vs HF (cosine)", mean_cosine(free.final, exact.final), bar=FINAL_BAR),
        Check(f"greedy {GREEDY_TOKENS} tokens, trainer vs HF (share)", float(torch.stack(matches).mean()), bar=1.0),
        Check("logits, trainer vs HF (largest difference)", float((free.logits - exact.logits).abs().max())),
    )


def _twin(request: Request, model: Any, stored: str) -> Twin | None:
    """The quantized model and what it is compared with, where both are known."""
    if request.format:
        return Twin(model, get_format(request.format))
    if stored != "none" and request.reference is not None:
        formats = _expert_formats(request.model)
        kept = frozenset(layer for layer, format in formats.items() if format is None)
        format = next(format for format in formats.values() if format is not None)
        return Twin(load_reference(request.reference), format, weights=model, kept=kept)
    return None


def _expert_formats(folder: Path) -> dict[int, Format | None]:
    """By layer, the format of its routed experts."""
    return _formats(folder, r"\.layers\.(\d+)\..*\.experts\.\d+\.")


def _formats(folder: Path, pattern: str) -> dict[int, Format | None]:
    """By layer (the pattern's group), the format of the last weight whose name has the pattern."""
    with CheckpointReader(folder) as reader:
        places = [(found, name) for name in reader.weights() if (found := re.search(pattern, name))]
        return {int(found[1]): reader.format_of(name) for found, name in places}


def _quantization_checks(report: Report, twin: Twin, request: Request, exact: Trace, sequences: list[Tensor]) -> None:
    """Quantized against exact: experts by layer, and on request what each layer does to the tokens' probabilities."""
    name = f"experts, {twin.format.name} vs exact"
    bar = EXPERT_BARS[twin.format.name]
    report.add(*(Check(name, value, layer, bar) for layer, value in enumerate(expert_cosines(twin, exact))))
    if not (request.by_layer or request.keep_worst):
        return
    everything = range(twin.layers)
    alone = [divergence(twin, [layer], sequences, exact) for layer in everything]
    name = f"KL, {twin.format.name} here alone"
    report.add(*(Check(name, value, layer, unit="nats") for layer, value in enumerate(alone)))
    ranking = sorted(everything, key=lambda layer: -alone[layer])
    whole = divergence(twin, everything, sequences, exact)
    report.add(Check(f"KL, all layers {twin.format.name}", whole, unit="nats"))
    report.remarks.append(f"layers by what their quantization does, worst first: {', '.join(map(str, ranking))}")
    if request.keep_worst:
        kept = sorted(ranking[: request.keep_worst])
        left = divergence(twin, [layer for layer in everything if layer not in kept], sequences, exact)
        report.add(Check(f"KL, all but layers {', '.join(map(str, kept))}", left, unit="nats"))
        report.remarks.append(_write_mixed(request, twin, kept))


def _write_mixed(request: Request, twin: Twin, kept: list[int]) -> str:
    assert request.out is not None, "check_request demands it"
    source, attention = request.model, ""
    if not request.format:
        assert request.reference is not None, "check_request demands it"
        source = request.reference
        # As in the model, which may have left attention alone, or in another format than its experts.
        stored = _formats(request.model, r"\.layers\.(\d+)\.self_attn\.o_proj\.")
        attention = next((format.name for layer, format in stored.items() if format and layer not in twin.kept), "none")
    size = twin.format.group_size or WHOLE_ROW
    written = quantize_checkpoint(
        source, request.out, twin.format.name, group_size=size, attention=attention, keep_layers=kept
    )
    layers, megabytes = ", ".join(map(str, kept)), written.weight_bytes / 2**20
    return f"wrote {request.out}: {twin.format.name}, layers {layers} as they were, {megabytes:.1f} MiB"


def _engine_report(
    report: Report, request: Request, policy: FrozenPolicy, model: Any, prompts: list[Tensor], sequences: list[Tensor]
) -> None:
    """vLLM against the trainer, on the checkpoint or (with --format) on its quantized twin."""
    from qerl_rl.verify.engine import EngineSide

    with tempfile.TemporaryDirectory() as scratch:
        folder = request.model
        if request.format:
            folder = Path(scratch)
            quantize_checkpoint(request.model, folder, request.format)
            policy = FrozenPolicy(folder)
        if request.format or request.reference:
            model = load_reference(folder)
        expected = _activation_divergence(folder, model, sequences)
        engine = EngineSide(folder, prompts, sequences)
    engine_checks(report, engine, policy, prompts, sequences, expected=expected, by_layer=request.by_layer)


def _activation_divergence(folder: Path, model: Any, sequences: list[Tensor]) -> float:
    """KL of what the HF model of `folder` computes and what it does with inputs of products in 8 bits, nats a token."""
    by_layer = _expert_formats(folder)
    formats = {format.name for format in by_layer.values() if format is not None}
    if not formats:
        return 0.0
    kept = frozenset(layer for layer, format in by_layer.items() if format is None)
    # On a CPU those of int4 weights become int8 too; of what is dequantized at load they do not, and less is expected.
    rounding = "mxfp8" if formats == {"mxfp8"} else "w8a8"
    twin = Twin(model, get_format(rounding), weights=model, kept=kept)
    with torch.no_grad():
        exact = logits(model, sequences)
    with twin.quantized(range(twin.layers)):
        return mean_divergence(exact, logits(model, sequences))


def engine_checks(
    report: Report,
    engine: EngineSide,
    policy: FrozenPolicy,
    prompts: list[Tensor],
    sequences: list[Tensor],
    *,
    expected: float,
    by_layer: bool,
) -> None:
    """Engine against trainer: log-probs of what it samples, its speed, and on request where the two part.

    expected: nats a token that rounding activations as the engine's kernels do accounts for.
    """
    from qerl_rl.verify.engine import added_by_layer, mismatch

    engine.answer(prompts)
    for name, value in mismatch(engine, policy, prompts).items():
        kind = name.rpartition("/")[2]
        bar = max(ENGINE_KL_BAR, ENGINE_KL_FACTOR * expected) if kind == "k3_kl" else None
        report.add(Check(f"{kind}, engine vs trainer", value, bar=bar, at_least=False))
    report.add(
        Check("KL of rounded activations alone", expected, unit="nats"),
        Check("engine: load time", engine.load_seconds, unit="s"),
        Check("engine: first generation", engine.speeds[0], unit="tokens/s"),
        Check("engine: steady generation", engine.speeds[-1], unit="tokens/s"),
    )
    if by_layer:
        added = added_by_layer(engine, policy, sequences)
        name = "KL added, engine vs trainer"
        report.add(*(Check(name, value, layer, unit="nats") for layer, value in enumerate(added)))
        ranking = sorted(range(len(added)), key=lambda layer: -added[layer])
        worst = ", ".join(map(str, ranking))
        report.remarks.append(f"layers by what they add between engine and trainer, worst first: {worst}")
