"""The oracle: transformers' model in float32 with a checkpoint's weights, dequantized where they are quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qerl_rl.config.errors import ConfigError
from qerl_rl.quant.checkpoint import CheckpointReader, read_config


@dataclass(frozen=True)
class Trace:
    """What a model computed for T tokens of all sequences, one sequence after another; float32.

    By layer, [T, H] each: inputs of the layer, what its attention and its experts add to them, and what the experts
    see. final: [T, H] after the last norm. logits: [T, V].
    """

    inputs: list[Tensor]
    attention: list[Tensor]
    experts: list[Tensor]
    expert_inputs: list[Tensor]
    final: Tensor
    logits: Tensor

    @property
    def outputs(self) -> list[Tensor]:
        """By layer, what it hands to the next one, [T, H]."""
        last = self.inputs[-1] + self.attention[-1] + self.experts[-1]
        return [*self.inputs[1:], last]


def load_reference(folder: Path) -> Any:
    """The HF model of `folder` in float32; a quantized checkpoint's weights are what its numbers stand for.

    Call it after `prepare_megatron`, where both are to live in one process.
    Raises: ConfigError for a folder that can't be read, or a family that transformers does not have.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    family = read_config(folder).get("model_type", "")
    if family not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"transformers {transformers.__version__} has no class for model_type={family}, so there is nothing to"
            " verify against.",
            fix="use a model of another family; docs/families.md says how this one is checked",
            where=str(folder / "config.json"),
        )
    with CheckpointReader(folder) as reader:
        weights = {name: reader.weight(name) for name in reader.weights()}
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Not by config.architectures: Phi-3.5-MoE is published by another name than transformers' class has.
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32).eval()
    # One product an expert, which `quantized` can look into.
    model.set_experts_implementation("eager")
    return model.requires_grad_(requires_grad=False)


@torch.no_grad()
def trace(model: Any, sequences: Sequence[Tensor]) -> Trace:
    """Run int64 [n] sequences through the HF model, each by itself."""
    layers = list(model.model.layers)
    seen: dict[tuple[str, int], list[Tensor]] = {}

    def keep(kind: str, index: int, value: Any) -> None:
        seen.setdefault((kind, index), []).append((value[0] if isinstance(value, tuple) else value)[0])

    hooks = [model.model.norm.register_forward_hook(lambda _, given, output: keep("final", 0, output))]
    for index, layer in enumerate(layers):
        hooks += [
            layer.input_layernorm.register_forward_hook(
                lambda _, inputs, output, i=index: keep("inputs", i, inputs[0])
            ),
            layer.self_attn.register_forward_hook(lambda _, inputs, output, i=index: keep("attention", i, output)),
            layer.mlp.register_forward_hook(lambda _, inputs, output, i=index: keep("expert_inputs", i, inputs[0])),
            layer.mlp.register_forward_hook(lambda _, inputs, output, i=index: keep("experts", i, output)),
        ]
    try:
        found = logits(model, sequences)
    finally:
        for hook in hooks:
            hook.remove()
    by_layer = {
        kind: [torch.cat(seen[kind, i]) for i in range(len(layers))] for kind in {kind for kind, _ in seen} - {"final"}
    }
    return Trace(**by_layer, final=torch.cat(seen["final", 0]), logits=found)


@torch.no_grad()
def logits(model: Any, sequences: Sequence[Tensor]) -> Tensor:
    """Logits [T, V] of the HF model after each token of the sequences, each by itself."""
    return torch.cat([model(sequence[None], use_cache=False).logits[0] for sequence in sequences])


@torch.no_grad()
def greedy(model: Any, prompts: Sequence[Tensor], count: int) -> list[Tensor]:
    """The prompts with `count` more tokens each, always the most likely one; nothing ends a sequence early."""
    finished = []
    for prompt in prompts:
        tokens, cache = prompt, None
        step = prompt
        for _ in range(count):
            output = model(step[None], past_key_values=cache, use_cache=True)
            cache, step = output.past_key_values, output.logits[0, -1:].argmax(-1)
            tokens = torch.cat([tokens, step])
        finished.append(tokens)
    return finished
