"""What the rollout tests share: engines on ranks, random adapters, and the HF model as the oracle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from qerl_rl.config.schema import LoraConfig, RolloutConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.slots import adapter_slots
from qerl_rl.quant.checkpoint import CheckpointReader, ShardWriter
from qerl_rl.quant.modelslim import ModelSlimFormats
from qerl_rl.quant.requantize import requantized
from qerl_rl.rollout.adapters import AdapterSet
from qerl_rl.rollout.engine import GroupOutput, GroupRequest
from qerl_rl.rollout.vllm_engine import VllmEngine

LORA = LoraConfig(rank=8, alpha=16.0)
MAX_LENGTH = 400
Plain = dict[int, tuple[list[list[int]], list[list[float]], list[str]]]
"""Group -> responses, log-probs and finish reasons, of types that travel between processes."""


def make_engine(folder: Path, lora: LoraConfig = LORA, *, record_routing: bool = False, **rollout: Any) -> VllmEngine:
    """An engine over as many ranks as RolloutConfig says, in processes started by run_engines."""
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    options = {"data_parallel": 1, "max_response_tokens": 24, "kv_cache_bytes": 32 << 20} | rollout
    return VllmEngine(
        folder, RolloutConfig(**options), lora, max_length=MAX_LENGTH, seed=0, record_routing=record_routing
    )


def request(group: int, samples: int = 2, length: int | None = None) -> GroupRequest:
    """Group `group` with its own prompt (longer for higher groups: 8, 68, 128, ... tokens) and seed."""
    length = 8 + 60 * group if length is None else length
    prompt = np.random.default_rng(group).integers(4, 60, length).astype(np.int32)
    return GroupRequest(group, prompt, samples, seed=1000 + group)


def plain(outputs: Sequence[GroupOutput]) -> Plain:
    return {
        output.group: (
            [response.tolist() for response in output.responses],
            [row.tolist() for row in output.log_probs],
            output.finish_reasons,
        )
        for output in outputs
    }


def generate(engine: VllmEngine, groups: Sequence[int], samples: int = 2, **options: Any) -> Plain:
    return plain(list(engine.generate([request(group, samples) for group in groups], **options)))


def tokens_of(outputs: Plain) -> dict[int, list[list[int]]]:
    return {group: responses for group, (responses, _, _) in outputs.items()}


def log_prob_gaps(left: Plain, right: Plain) -> np.ndarray:
    """|difference| of the log-probs of the groups of `left`, up to where tokens first differ (included)."""
    gaps = []
    for group, (responses, rows, _) in left.items():
        others, other_rows, _ = right[group]
        for tokens, row, other, other_row in zip(responses, rows, others, other_rows, strict=True):
            same = 0
            while same < min(len(tokens), len(other)) and tokens[same] == other[same]:
                same += 1
            gaps.append(np.abs(np.subtract(row[:same], other_row[:same])))
    return np.concatenate(gaps)


def model_of(engine: VllmEngine) -> Any:
    """vLLM's model of this rank."""
    return engine._engine.model_executor.driver_worker.worker.model_runner.model


def act_beside_the_weights(engine: VllmEngine, lora: LoraConfig = LORA) -> None:
    """Make an engine that merges adapters, and has none merged now, one that computes with them beside its weights."""
    engine._adapters = AdapterSet(model_of(engine), lora)


def random_adapters(folder: Path, seed: int, deviation: float = 0.1, rank: int = LORA.rank) -> dict[str, torch.Tensor]:
    """Full adapters in the exchange format for the model in `folder`; deviation 0 gives zeros."""
    generator, shapes = torch.Generator().manual_seed(seed), {}
    lora = LoraConfig(rank=rank, shared_experts=True)
    for slot in adapter_slots(MoeArchitecture.from_folder(folder), lora):
        name, rows = slot.pieces[0].name.partition(":")[0], sum(piece.shape[0] for piece in slot.pieces)
        shapes[name] = (rows, *slot.pieces[0].shape[1:])
    return {name: deviation * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def hf_model(folder: Path, adapters: Mapping[str, torch.Tensor] | None = None, scale: float = 2.0) -> Any:
    """The HF model in float32 with the dequantized weights of `folder`, plus scale * B A where adapters are given."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with CheckpointReader(folder) as reader:
        weights = {name: reader.weight(name) for name in reader.weights()}
    for name in {name.rpartition(".")[0] for name in adapters or {}}:
        delta = scale * adapters[f"{name}.lora_B"] @ adapters[f"{name}.lora_A"]  # type: ignore[index]
        for target, part in _unfused(name, delta, config):
            weights[target] = weights[target] + part
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(_fused_experts(weights, config), strict=not config.tie_word_embeddings)
    return model


def _unfused(name: str, delta: torch.Tensor, config: Any) -> list[tuple[str, torch.Tensor]]:
    """The change of a fused module's weight, as changes of the checkpoint's tensors."""
    layer, _, module = name.partition(".self_attn.")
    if name.endswith("gate_up_proj"):
        place = name.removesuffix("gate_up_proj")
        return [(f"{place}{kind}_proj.weight", half) for kind, half in zip(("gate", "up"), delta.chunk(2), strict=True)]
    if module == "qkv_proj":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        sizes = [config.num_attention_heads * head_dim, *2 * [config.num_key_value_heads * head_dim]]
        names = [f"{layer}.self_attn.{kind}_proj.weight" for kind in "qkv"]
        return list(zip(names, delta.split(sizes), strict=True))
    layer, _, module = name.partition(".mlp.experts.")
    if not module:
        return [(f"{name}.weight", delta)]
    mixtral = config.model_type in ("mixtral", "phimoe")
    place = f"{layer}.block_sparse_moe.experts" if mixtral else f"{layer}.mlp.experts"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    parts = []
    for expert, matrix in enumerate(delta):
        if module == "w2":
            parts.append((f"{place}.{expert}.{down}.weight", matrix))
        else:
            halves = matrix.chunk(2)
            parts += [(f"{place}.{expert}.{kind}.weight", half) for kind, half in zip((gate, up), halves, strict=True)]
    return parts


def write_merged(folder: Path, adapters: Mapping[str, torch.Tensor], out: Path, *, as_floats: bool) -> Path:
    """The checkpoint in `folder` with 2 B A added and rounded to the nearest number of its format, or of bfloat16."""
    from transformers import AutoConfig

    config, changes = AutoConfig.from_pretrained(folder), {}
    for name in {name.rpartition(".")[0] for name in adapters}:
        changes |= dict(_unfused(name, 2.0 * adapters[f"{name}.lora_B"] @ adapters[f"{name}.lora_A"], config))
    writer = ShardWriter(out)
    with CheckpointReader(folder) as reader:
        for name in reader.weights():
            format, change = reader.format_of(name), changes.get(name)
            if format is None or as_floats:
                merged = reader.weight(name)
                writer.add(name, (merged if change is None else merged + change).to(torch.bfloat16))
                continue
            parts = reader.parts(name)
            if change is not None:
                parts, _ = requantized(format, parts, change, None)
            for suffix, tensor in format.stored(parts).items():
                writer.add(name + suffix, tensor)
    writer.finish()
    described = json.loads((folder / "config.json").read_text())
    if as_floats:
        del described["quantization_config"]
    (out / "config.json").write_text(json.dumps(described))
    slim = folder / ModelSlimFormats.file_name
    if slim.exists() and not as_floats:
        (out / slim.name).write_text(slim.read_text())
    return out


def _fused_experts(weights: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors under the names of transformers 5, which stacks the experts."""
    mixtral = config.model_type in ("mixtral", "phimoe")
    count = config.num_local_experts if mixtral else config.num_experts
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    fused = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    fused = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in fused.items()}
    if config.model_type == "phimoe":
        fused = {name.replace(".gate.", ".router."): tensor for name, tensor in fused.items()}
    for layer in range(getattr(config, "first_k_dense_replace", 0), config.num_hidden_layers):
        place = f"model.layers.{layer}.{'block_sparse_moe' if mixtral else 'mlp'}.experts"

        def stacked(kind: str, place: str = place) -> torch.Tensor:
            return torch.stack([weights[f"{place}.{expert}.{kind}.weight"] for expert in range(count)])

        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([stacked(gate), stacked(up)], dim=1)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = stacked(down)
    return fused


@torch.no_grad()
def hf_log_probs(model: Any, outputs: Plain) -> np.ndarray:
    """The oracle's log-probs of the tokens in `outputs`, in the order of log_probs_of."""
    rows = []
    for group, (responses, _, _) in outputs.items():
        prompt = request(group).prompt_tokens.tolist()
        longest = max(map(len, responses))
        # Padding on the right changes nothing to its left.
        logits = model(torch.tensor([prompt + row + [0] * (longest - len(row)) for row in responses])).logits
        log_probs = logits[:, len(prompt) - 1 : -1].log_softmax(-1)
        for row, scores in zip(responses, log_probs, strict=True):
            rows.append(scores[: len(row)].gather(1, torch.tensor(row)[:, None])[:, 0].numpy())
    return np.concatenate(rows)


def log_probs_of(outputs: Plain) -> np.ndarray:
    return np.concatenate([np.asarray(row) for _, rows, _ in outputs.values() for row in rows])
