"""An export that lost, added or misshaped a tensor is refused with its name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qerl_rl.train.export import write_merged
from qerl_rl.train.export_check import ExportError, check_adapters
from tests.train.models import make_config, make_samples, policy_gradient, start_engine


def source_weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def test_an_export_of_fused_experts_has_them_one_by_one(checkpoints, tiny_fused, tmp_path):
    write_merged(tmp_path, tiny_fused(Path(checkpoints["none"])), source_weights(checkpoints["none"]).items())
    assert (tmp_path / "config.json").exists()


def lose(tensors):
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]


def add(tensors):
    tensors["model.layers.2.mlp.gate.weight"] = torch.ones(8, 64)


def transpose(tensors):
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name].reshape(32, -1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose, r"lacks model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight$"),
        (add, r"superfluous model\.layers\.2\.mlp\.gate\.weight$"),
        (transpose, r"o_proj\.weight .* has shape \(32, 128\), not \(64, 64\)"),
    ],
)
@pytest.mark.parametrize("quant", ["none", "w8a8", "w4a16", "nvfp4"])
def test_a_merged_export_must_have_the_tensors_of_its_source(checkpoints, tmp_path, quant, damage, message):
    # What a merge gives has the names of the model before quantization, whichever of them was trained.
    tensors = source_weights(checkpoints["none"])
    write_merged(tmp_path / "good", Path(checkpoints[quant]), tensors.items())
    assert json.loads((tmp_path / "good" / "config.json").read_text())["dtype"] == "bfloat16"
    damage(tensors)
    with pytest.raises(ExportError, match=message):
        write_merged(tmp_path / "bad", Path(checkpoints[quant]), tensors.items())
    # Without a config nothing loads it by mistake.
    assert not (tmp_path / "bad" / "config.json").exists()


def train_everything(paths: dict[str, str], folder: str) -> dict[str, np.ndarray]:
    engine = start_engine(make_config(paths, quant="none", rank=0))
    engine.update(make_samples(), policy_gradient)
    engine.export(folder)
    return {name: tensor.detach().numpy().copy() for name, tensor in engine.model.named_parameters()}


def test_a_fully_trained_model_exports_its_weights_and_no_adapter(one_rank, checkpoints, tmp_path):
    trained = one_rank(train_everything, checkpoints, str(tmp_path))[0]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    written, before = source_weights(str(tmp_path / "hf")), source_weights(checkpoints["none"])
    assert {name: tensor.shape for name, tensor in written.items()} == {n: t.shape for n, t in before.items()}
    norm = torch.from_numpy(trained["decoder.final_layernorm.weight"])
    assert written["model.norm.weight"].equal(norm.to(torch.bfloat16))
    assert not norm.equal(before["model.norm.weight"])


def adapters() -> dict[str, torch.Tensor]:
    module = "model.layers.0.mlp.experts.2.down_proj"
    return {f"{module}.lora_A": torch.ones(4, 48), f"{module}.lora_B": torch.ones(64, 4)}


@pytest.mark.parametrize("quant", ["w8a8", "w4a16", "nvfp4"])
def test_adapters_must_fit_a_weight_of_the_source(checkpoints, quant):
    source = Path(checkpoints[quant])
    check_adapters(adapters(), source, rank=4)
    (a, matrix_a), (b, matrix_b) = adapters().items()
    for tensors, message in (
        ({a: matrix_a}, "has no model.layers.0.mlp.experts.2.down_proj.lora_B"),
        ({a: matrix_b, b: matrix_a}, "lora_A has shape (64, 4), not (4, 48)"),
        ({a.replace("experts.2", "experts.8"): matrix_a}, "has no model.layers.0.mlp.experts.8.down_proj.weight"),
    ):
        with pytest.raises(ExportError) as refused:
            check_adapters(tensors, source, rank=4)
        assert message in str(refused.value)
