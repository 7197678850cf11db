"""The accuracy gate passes what is right and names the layer of what is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from qerl_rl import __main__ as command_line
from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.quant.formats import get_format
from qerl_rl.verify.gate import LAYER_BAR, Request, engine_checks, verify
from qerl_rl.verify.quantized import Twin
from qerl_rl.verify.report import Check, Report
from tests.ranks import run_engines

LAYERS, BROKEN = 3, 1


def with_swapped_experts(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint in which experts 0 and 1 of one layer have changed places."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    places = [f"layers.{BROKEN}.mlp.experts.{expert}." for expert in (0, 1)]
    renamed = {}
    for name, tensor in tensors.items():
        here = next((place for place in places if place in name), None)
        renamed[name.replace(here, places[1 - places.index(here)]) if here else name] = tensor
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _scene(plain: Path, quantized: Path, families: list[Path], scratch: Path) -> dict[str, Any]:
    broken = with_swapped_experts(plain, scratch / "broken")
    broken_quantized = with_swapped_experts(quantized, scratch / "broken_quantized")
    mixed = scratch / "mixed"
    request = Request(plain)
    return {
        "plain": verify(request),
        "int8": verify(replace(request, format="w8a8")),
        "quantized": verify(Request(quantized, reference=plain, keep_worst=2, out=mixed)),
        "mixed": verify(Request(mixed, reference=plain, by_layer=True)),
        "swapped": verify(Request(broken, reference=plain)),
        "swapped, quantized": verify(Request(broken_quantized, reference=plain)),
        "families": [verify(Request(family, format="mxfp4")) for family in families],
        "activations": _rounded_activations(),
        **_with_engine(plain, broken),
    }


def _with_engine(plain: Path, broken: Path) -> dict[str, Report]:
    """The engine on the whole model, against a trainer that has the same and against one that has the broken one."""
    from qerl_rl.verify.engine import EngineSide
    from qerl_rl.verify.policy import FrozenPolicy

    sequences = list(torch.randint(4, 60, (6, 20), generator=torch.Generator().manual_seed(1)))
    engine, reports = EngineSide(plain, sequences, sequences), {}
    for name, folder in {"engine": plain, "engine, other trainer": broken}.items():
        reports[name] = Report()
        engine_checks(reports[name], engine, FrozenPolicy(folder), sequences, sequences, expected=0, by_layer=True)
    return reports


def _rounded_activations() -> list[float]:
    """Largest change that rounding the activations of a layer of identities makes, and the largest rounding step."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = torch.nn.Module()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(self.self_attn, name, torch.nn.Linear(32, 32, bias=False))
                getattr(self.self_attn, name).weight.data.copy_(torch.eye(32))
            self.mlp = torch.nn.Module()

    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([Layer()])
    inputs = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    project = model.model.layers[0].self_attn.o_proj
    with torch.no_grad(), Twin(model, get_format("w8a8")).quantized([0]):
        rounded = project(inputs)
    # The weights, ones and zeros, lose the same half step of 1 / 127.5 everywhere.
    weight = get_format("w8a8").dequantize(get_format("w8a8").quantize(torch.eye(32)))[0, 0]
    steps = inputs.abs().amax(-1, keepdim=True) / 127.5
    changes = (rounded / weight - inputs).abs() / steps
    return [float(changes.max()), float((project(inputs) - inputs).abs().max())]


@pytest.fixture(scope="module")
def seen(
    tiny_checkpoint: Callable[..., Path],
    tiny_w8a8: Callable[..., Path],
    tiny_fused: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    folders = [build("qwen3_moe", "bfloat16", layers=LAYERS) for build in (tiny_checkpoint, tiny_w8a8)]
    families = [tiny_checkpoint(family, "bfloat16", layers=1) for family in ("qwen2_moe", "mixtral")]
    families[1] = tiny_fused(families[1])
    return run_engines(_scene, 1, *folders, families, tmp_path_factory.mktemp("verify"))[0]


def figures(report: Report, name: str) -> dict[int | None, float]:
    return {check.layer: check.value for check in report.checks if check.name == name}


def test_a_checkpoint_as_it_should_be_passes(seen: dict[str, Any]) -> None:
    for case in ("plain", "int8", "quantized", "mixed", "engine"):
        assert [check.fault() for check in seen[case].faults] == [], case
        assert seen[case].exit_code == 0
    for part in ("attention", "experts", "hidden state"):
        found = figures(seen["plain"], f"{part}, trainer vs HF")
        assert list(found) == list(range(LAYERS))
        assert min(found.values()) > 0.99999


def test_shared_experts_and_other_names_of_weights_are_no_obstacle(seen: dict[str, Any]) -> None:
    for report in seen["families"]:
        assert report.exit_code == 0
        assert 0.95 < figures(report, "experts, mxfp4 vs exact")[0] < 0.999


def test_the_layer_whose_experts_changed_places_is_named_and_no_other(seen: dict[str, Any]) -> None:
    report = seen["swapped"]
    assert report.exit_code == 1
    causes = [(check.layer, check.name) for check in report.faults if not check.name.startswith("hidden state")]
    assert causes[0] == (BROKEN, "experts, trainer vs HF")
    assert {layer for layer, _ in causes} <= {BROKEN, None}
    assert figures(report, "attention, trainer vs HF")[BROKEN] > 0.99999
    # What comes after it is wrong as a consequence, and told apart from it.
    reached = figures(report, "hidden state, trainer vs HF")
    assert reached[BROKEN - 1] > 0.99999
    assert max(reached[layer] for layer in range(BROKEN, LAYERS)) < LAYER_BAR
    console = Console(width=200, record=True)
    with console.capture() as shown:
        report.show(console)
    assert f"FAILED  layer {BROKEN}: experts, trainer vs HF is 0." in shown.get()


def test_a_quantized_layer_unlike_what_it_was_made_from_is_named(seen: dict[str, Any]) -> None:
    assert [(check.layer, check.name) for check in seen["swapped, quantized"].faults] == [
        (BROKEN, "experts, w8a8 vs exact")
    ]


def test_int8_experts_are_close_and_a_stored_twin_says_the_same_as_rounding_here(seen: dict[str, Any]) -> None:
    here, stored = (figures(seen[case], "experts, w8a8 vs exact") for case in ("int8", "quantized"))
    assert here == pytest.approx(stored, abs=1e-5)
    assert all(0.99 < value < 0.999999 for value in here.values())


def test_keeping_the_worst_layers_leaves_less_divergence_and_a_twin_that_has_them_exactly(seen: dict[str, Any]) -> None:
    alone = figures(seen["quantized"], "KL, w8a8 here alone")
    kept = sorted(sorted(alone, key=lambda layer: -alone[layer])[:2])
    (whole,) = figures(seen["quantized"], "KL, all layers w8a8").values()
    (left,) = figures(seen["quantized"], f"KL, all but layers {kept[0]}, {kept[1]}").values()
    assert 0 < left < whole
    mixed = figures(seen["mixed"], "KL, w8a8 here alone")
    assert [mixed[layer] for layer in kept] == pytest.approx([0.0, 0.0], abs=1e-12)
    # Of other tokens: each model's own greedy continuations.
    assert sum(mixed.values()) == pytest.approx(left, rel=0.3)
    assert left == pytest.approx(alone[next(layer for layer in alone if layer not in kept)])


def test_activations_are_rounded_to_a_grid_of_their_token_and_only_while_asked(seen: dict[str, Any]) -> None:
    largest, afterwards = seen["activations"]
    assert 0.4 < largest < 0.51
    assert afterwards == 0


def test_the_engine_is_compared_with_the_trainer_and_timed(seen: dict[str, Any]) -> None:
    values = {check.name: check.value for check in seen["engine"].checks if check.layer is None}
    assert 0 < values["k3_kl, engine vs trainer"] < 0.01
    assert 0.99 < values["pearson, engine vs trainer"] < 1
    assert values["engine: load time"] > 0
    assert min(values["engine: first generation"], values["engine: steady generation"]) > 0


def test_attribution_blames_the_layer_in_which_engine_and_trainer_part(seen: dict[str, Any]) -> None:
    report = seen["engine, other trainer"]
    assert {check.name.partition(",")[0] for check in report.faults} == {"k3_kl"}
    added = figures(report, "KL added, engine vs trainer")
    assert len(added) == LAYERS
    assert max(added, key=lambda layer: added[layer]) == BROKEN
    assert abs(added[0]) < 0.1 * added[BROKEN]
    assert f"worst first: {BROKEN}," in report.remarks[0]


@pytest.mark.parametrize(
    ("options", "problem", "fix"),
    [
        (["--model", "nowhere"], "nowhere has no config.json", "HF checkpoint folder"),
        (["--model", "{w8a8}", "--format", "w8a8"], "is quantized already (w8a8)", "leave --format out"),
        (["--model", "{plain}", "--reference", "{w8a8}"], "is quantized", "bfloat16 checkpoint"),
        (["--model", "{plain}", "--reference", "{other}"], "is another model than", "made from"),
        (["--model", "{w8a8}", "--layers"], "no mismatch to attribute", "give --engine vllm"),
        (["--model", "{plain}", "--keep-worst", "1"], "writes a checkpoint", "give --out DIR"),
        (["--model", "{plain}", "--keep-worst", "1", "--out", "x"], "no format", "give --format F"),
        (["--model", "{plain}", "--keep-worst", "3", "--out", "x", "--format", "w4a16"], "3 of 3", "1 .. 2"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    options: list[str],
    problem: str,
    fix: str,
    tiny_checkpoint: Callable[..., Path],
    tiny_w8a8: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = {
        "plain": tiny_checkpoint("qwen3_moe", "bfloat16", layers=LAYERS),
        "w8a8": tiny_w8a8("qwen3_moe", "bfloat16", layers=LAYERS),
        "other": tiny_checkpoint("qwen3_moe", "bfloat16", layers=2),
    }
    capsys.readouterr()
    assert command_line.main(["verify", *(option.format(**folders) for option in options)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert problem in error
    assert fix in error


def test_a_figure_that_is_not_finite_fails_and_one_without_a_bar_never_does() -> None:
    report = Report([Check("a", float("nan"), bar=0.5), Check("b", float("nan")), Check("c", 2.0, bar=2.0)])
    assert [check.name for check in report.faults] == ["a"]
    assert Check("d", 0.3, bar=0.2, at_least=False).fault() == "d is 0.3, above 0.2"


def test_the_twin_on_the_disk_reads_as_mixed(seen: dict[str, Any], tiny_checkpoint: Callable[..., Path]) -> None:
    line = next(remark for remark in seen["quantized"].remarks if remark.startswith("wrote "))
    folder = Path(line.removeprefix("wrote ").partition(":")[0])
    source = tiny_checkpoint("qwen3_moe", "bfloat16", layers=LAYERS)
    alone = figures(seen["quantized"], "KL, w8a8 here alone")
    with CheckpointReader(folder) as reader, CheckpointReader(source) as plain:
        for layer in range(LAYERS):
            name = f"model.layers.{layer}.mlp.experts.0.up_proj.weight"
            exact = alone[layer] > min(alone.values())
            assert (reader.format_of(name) is None) == exact
            assert torch.equal(reader.weight(name), plain.weight(name)) == exact
