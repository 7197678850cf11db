"""An exported model is what transformers loads, and says what the trainer says."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qerl_rl.config.schema import LoraConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.families.mixtral import NAMES
from qerl_rl.layout.slots import adapter_slots
from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.train.export import peft_config, unfused, write_adapters
from tests.train.models import make_config, make_samples, policy_gradient, share, start_engine

LAYOUTS = {
    "tensor 2, expert 2": {"tensor_parallel": 2, "expert_parallel": 2},
    "pipeline 2": {"pipeline_parallel": 2},
}


def train_and_export(paths: dict[str, str], layout: dict, folder: str) -> dict:
    engine = start_engine(make_config(paths, workers=2, learning_rate=1e-2, **layout))
    own = share(make_samples(), engine.data_parallel_rank, engine.data_parallel_size)
    for _ in range(4):
        engine.update(own, policy_gradient)
    engine.export(folder)
    trained, base = engine.log_probs(own), engine.log_probs(own, reference=True)
    return {
        "data_parallel_rank": engine.data_parallel_rank,
        "trained": trained and np.concatenate(trained.log_probs),
        "base": base and np.concatenate(base.log_probs),
        "adapters": {name: tensor.numpy().copy() for name, tensor in engine.gather_adapters().items()},
    }


@pytest.fixture(scope="module", params=LAYOUTS)
def exported(request, two_ranks, checkpoints, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("export")
    (Path(checkpoints["w8a8"]) / "tokenizer.json").write_text("{}")
    ranks = two_ranks(train_and_export, checkpoints, LAYOUTS[request.param], str(folder))
    outputs = {rank["data_parallel_rank"]: rank for rank in ranks if rank["trained"] is not None}
    joined = {name: np.concatenate([outputs[rank][name] for rank in sorted(outputs)]) for name in ("trained", "base")}
    return folder, {**joined, "adapters": ranks[0]["adapters"]}


def hf_log_probs(folder: Path) -> np.ndarray:
    """Log-probs of the response tokens by transformers, computed in float32 from the weights as they are stored."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    samples, found = make_samples(), []
    with torch.no_grad():
        for tokens, length in zip(samples.tokens, samples.response_lengths, strict=True):
            ids = torch.from_numpy(tokens)
            logits = model(ids[None]).logits[0, -length - 1 : -1] / 0.9
            found.append(torch.log_softmax(logits, dim=-1).gather(1, ids[-length:, None])[:, 0])
    return torch.cat(found).numpy()


def exact_merge(folder: Path, checkpoints: dict[str, str]) -> dict[str, torch.Tensor]:
    """Base and PEFT adapters merged as PEFT does it, every Linear W becoming W + alpha / r * B A, in float32."""
    peft = load_file(folder / "adapter" / "adapter_model.safetensors")
    base = load_file(Path(checkpoints["w8a8"]) / "model.safetensors")
    merged = {}
    for name, tensor in base.items():
        if f"{name}_scale" in base:
            matrices = (f"base_model.model.{name.removesuffix('weight')}lora_{matrix}.weight" for matrix in "AB")
            a, b = (peft.pop(matrix) for matrix in matrices)
            merged[name] = tensor.float() * base[f"{name}_scale"] + 8.0 / 4 * b @ a
        elif not name.endswith("_scale"):
            merged[name] = tensor
    assert not peft
    return merged


def test_peft_adapters_on_the_base_say_what_the_trainer_says(exported, checkpoints, tmp_path):
    folder, expected = exported
    save_file(exact_merge(folder, checkpoints), tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folder / "hf" / "config.json", tmp_path)
    found = hf_log_probs(tmp_path)
    np.testing.assert_allclose(found, expected["trained"], atol=2e-4)
    assert np.abs(expected["trained"] - expected["base"]).mean() > 0.5


def test_the_merged_model_is_that_rounded_to_bfloat16(exported, checkpoints):
    folder, _ = exported
    merged = load_file(folder / "hf" / "model.safetensors")
    exact = exact_merge(folder, checkpoints)
    assert merged.keys() == exact.keys()
    for name, tensor in exact.items():
        # The sum of the two products may differ in its last bit, and that decides a rounding now and then.
        torch.testing.assert_close(merged[name].float(), tensor, rtol=2**-8, atol=1e-6)
        assert (merged[name] == tensor.to(torch.bfloat16)).float().mean() > 0.999


def test_transformers_loads_the_merged_model_and_agrees_with_the_trainer(exported):
    folder, expected = exported
    difference = np.abs(hf_log_probs(folder / "hf") - expected["trained"])
    # bfloat16 rounds each weight by up to 2^-9: about 1e-2 in a log-prob here, and far more for the few tokens whose
    # near-tie between two experts falls the other way in this random model.
    assert np.median(difference) < 0.02
    assert difference.mean() < 0.2 * np.abs(expected["trained"] - expected["base"]).mean()


def test_the_merged_folder_is_a_plain_bfloat16_model(exported, checkpoints):
    folder, _ = exported
    config = json.loads((folder / "hf" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert (folder / "hf" / "tokenizer.json").read_text() == "{}"
    tensors = load_file(folder / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    original = load_file(Path(checkpoints["none"]) / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: t.shape for n, t in original.items()}


def test_adapters_are_there_in_both_formats(exported, checkpoints):
    folder, expected = exported
    exchange = load_file(folder / "adapters.safetensors")
    assert exchange.keys() == expected["adapters"].keys()
    for name, values in expected["adapters"].items():
        np.testing.assert_array_equal(exchange[name].numpy(), values)
    peft = load_file(folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert len(peft) == 2 * 2 * (4 + 8 * 3)
    assert all(name.split(".lora_")[0].endswith(tuple(config["target_modules"])) for name in peft)


def test_mixtral_adapters_get_mixtral_names(checkpoints):
    architecture = MoeArchitecture.from_folder(checkpoints["none"])
    mixtral = dataclasses.replace(architecture, names=NAMES)
    w13 = torch.arange(8.0 * 96 * 4).view(8, 96, 4)
    found = dict(unfused({"model.layers.1.mlp.experts.w13.lora_B": w13}, mixtral))
    assert found.keys() == {
        f"model.layers.1.block_sparse_moe.experts.{e}.{n}.lora_B" for e in range(8) for n in ("w1", "w3")
    }
    assert torch.equal(found["model.layers.1.block_sparse_moe.experts.5.w3.lora_B"], w13[5, 48:])


def test_shared_experts_adapters_change_gate_up_and_down_as_the_fused_ones_do(checkpoints):
    architecture = MoeArchitecture.from_folder(checkpoints["none"])
    architecture = dataclasses.replace(architecture, family="qwen2_moe", shared_expert_width=12)
    place, generator = "model.layers.0.mlp.shared_expert", torch.Generator().manual_seed(1)
    shapes = {"gate_up_proj": ((4, 64), (24, 4)), "down_proj": ((4, 12), (64, 4))}
    fused = {
        f"{place}.{module}.lora_{matrix}": torch.randn(shape, generator=generator)
        for module, pair in shapes.items()
        for matrix, shape in zip("AB", pair, strict=True)
    }
    found = dict(unfused(fused, architecture))
    change = {name: found[f"{name}.lora_B"] @ found[f"{name}.lora_A"] for name in {n.rpartition(".")[0] for n in found}}
    gate_up = fused[f"{place}.gate_up_proj.lora_B"] @ fused[f"{place}.gate_up_proj.lora_A"]
    assert torch.equal(torch.cat([change[f"{place}.gate_proj"], change[f"{place}.up_proj"]]), gate_up)
    assert change.keys() == {f"{place}.{name}_proj" for name in ("gate", "up", "down")}
    targets = peft_config(LoraConfig(), architecture, "base")["target_modules"]
    assert all(name.endswith(tuple(targets)) for name in change)
    without = peft_config(LoraConfig(shared_experts=False), architecture, "base")["target_modules"]
    assert not any(name.endswith(tuple(without)) for name in change)


@pytest.mark.parametrize(("family", "options"), [("deepseek_v3", {}), ("deepseek_v2", {"query_rank": 0})])
def test_deepseek_adapters_get_names_and_shapes_of_its_projections(
    family: str, options: dict, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base, lora = tiny_checkpoint(family, layers=2, **options), LoraConfig(rank=4, alpha=8.0)
    architecture, adapters = MoeArchitecture.from_folder(base), {}
    for slot in adapter_slots(architecture, lora):
        [piece] = slot.pieces
        adapters[piece.name] = torch.zeros(piece.shape)
    # It holds every pair against the weight that it belongs to.
    write_adapters(tmp_path, adapters, architecture=architecture, lora=lora, base=str(base))
    peft = load_file(tmp_path / "adapter_model.safetensors")
    modules = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in peft}
    targets = tuple(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"])
    with CheckpointReader(base) as reader:
        projections = {name.removesuffix(".weight") for name in reader if name.endswith(("_proj.weight", "mqa.weight"))}
    # PEFT adapts what ends with one of the names: exactly what has an adapter, all but the absorbed up projection.
    assert {name for name in projections if name.endswith(targets)} == modules
    assert projections - modules == {f"model.layers.{layer}.self_attn.kv_b_proj" for layer in range(2)}
