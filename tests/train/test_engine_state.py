"""The engine's state leaves memory, is written, comes back and is handed on without a bit lost."""

import dataclasses
import os
import random
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import CheckpointConfig, SwapConfig
from qerl_rl.platform.state_store import SpillFile
from qerl_rl.train import checkpoint
from tests.train.models import make_config, make_samples, policy_gradient, share, start_engine

LAYOUTS = {
    "data 2": {},
    "tensor 2, expert 2": {"tensor_parallel": 2, "expert_parallel": 2},
    "pipeline 2 in bfloat16": {"pipeline_parallel": 2, "dtype": "bfloat16"},
}


def own_samples(engine):
    return share(make_samples(), engine.data_parallel_rank, engine.data_parallel_size)


def adapters_of(engine) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in engine.gather_adapters().items()}


def assert_identical(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def trained(engine, updates: int) -> dict:
    found = [engine.update(own_samples(engine), policy_gradient) for _ in range(updates)]
    return {"updates": found, "adapters": adapters_of(engine)}


def cycle(paths: dict[str, str], layout: dict, folder: str) -> dict:
    """Three updates straight, and again with the state out of memory before each and after the last."""
    config = make_config(paths, workers=2, **layout)
    straight = trained(start_engine(config), 3)
    engine = start_engine(config, store=SpillFile(folder))
    ledger, updates = [], []
    for _ in range(3):
        held = engine.held_bytes()
        freed = engine.offload()
        away = engine.held_bytes()
        ledger.append({"held": held, "freed": freed, "away": away, "returned": engine.onload()})
        updates.append(engine.update(own_samples(engine), policy_gradient))
    engine.offload()
    try:
        engine.update(own_samples(engine), policy_gradient)
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    engine.onload()
    cycled = {"updates": updates, "adapters": adapters_of(engine)}
    return {"straight": straight, "cycled": cycled, "ledger": ledger, "refused": refused}


@pytest.fixture(scope="module", params=LAYOUTS)
def cycles(request, two_ranks, checkpoints, tmp_path_factory) -> list[dict]:
    return two_ranks(cycle, checkpoints, LAYOUTS[request.param], str(tmp_path_factory.mktemp("spill")))


def test_training_with_offloads_between_updates_is_bit_identical(cycles):
    for rank in cycles:
        assert rank["cycled"]["updates"] == rank["straight"]["updates"]
        assert_identical(rank["cycled"]["adapters"], rank["straight"]["adapters"])


def test_the_ledger_of_an_offload_adds_up(cycles):
    for rank in cycles:
        first, second, third = rank["ledger"]
        for entry in (first, second, third):
            assert entry["freed"] == entry["held"] == entry["returned"]
            assert entry["away"] == {"parameters": 0, "gradients": 0, "optimizer": 0}
        # Adam's moments appear with the first update; parameters and gradients are all there before.
        assert first["freed"]["optimizer"] < second["freed"]["optimizer"] == third["freed"]["optimizer"]
        assert first["freed"]["parameters"] == second["freed"]["parameters"] > 0
        assert first["freed"]["gradients"] > 0


def test_an_update_without_its_state_says_what_to_call(cycles):
    assert all("onload()" in rank["refused"] for rank in cycles)


def by_switches(paths: dict[str, str]) -> list[dict[str, int]]:
    found = []
    for kind in ("parameters", "gradients", "optimizer"):
        switches = dict.fromkeys(("offload_parameters", "offload_gradients", "offload_optimizer"), False)
        swap = SwapConfig(**{**switches, f"offload_{kind}": True})
        engine = start_engine(dataclasses.replace(make_config(paths), swap=swap))
        engine.update(make_samples(), policy_gradient)
        found.append(engine.offload())
        engine.onload()
    return found


def test_only_what_its_switch_names_leaves(one_rank, checkpoints):
    for kind, freed in zip(
        ("parameters", "gradients", "optimizer"), one_rank(by_switches, checkpoints)[0], strict=True
    ):
        assert [name for name, count in freed.items() if count] == [kind]


def resident_bytes(paths: dict[str, str], folder: str) -> dict:
    """A model wide enough for its state to show in the process."""
    config = make_config(paths, quant="none", rank=0)
    engine = start_engine(config, store=SpillFile(folder))
    engine.update(make_samples(), policy_gradient)
    engine.offload()
    engine.onload()
    engine.finish_moves()
    before = psutil.Process().memory_info().rss
    freed = sum(engine.offload().values())
    after = psutil.Process().memory_info().rss
    engine.onload()
    engine.finish_moves()
    return {"freed": freed, "fell": before - after, "returned": psutil.Process().memory_info().rss - after}


def test_the_process_shrinks_by_what_left(one_rank, checkpoints, tmp_path):
    found = one_rank(resident_bytes, checkpoints, str(tmp_path))[0]
    assert found["fell"] >= 0.8 * found["freed"]
    assert found["returned"] >= 0.8 * found["freed"]


def draws() -> list:
    return [*torch.rand(3).tolist(), *np.random.rand(2), np.random.randn(), random.random(), random.gauss(0, 1)]


def resume(paths: dict[str, str], layout: dict, folder: str) -> dict:
    """Four updates straight; two, a checkpoint, and two more in an engine that starts from it."""
    config = make_config(paths, workers=2, warmup_steps=3, **layout)
    engine = start_engine(config)
    updates = [engine.update(own_samples(engine), policy_gradient) for _ in range(2)]
    engine.save_checkpoint(folder, 7)
    at_saving = adapters_of(engine)
    updates += [engine.update(own_samples(engine), policy_gradient) for _ in range(2)]
    straight = {"updates": updates, "adapters": adapters_of(engine), "random": draws()}
    other = start_engine(config)
    step = other.load_checkpoint(folder)
    resumed = trained(other, 2) | {"random": draws()}
    return {"straight": straight, "resumed": resumed, "step": step, "at_saving": at_saving}


def assert_resumed(ranks: list[dict], folder: Path) -> None:
    """Of what `resume` returned."""
    for rank in ranks:
        assert rank["step"] == 7
        assert rank["resumed"]["updates"] == rank["straight"]["updates"][2:]
        assert rank["resumed"]["random"] == rank["straight"]["random"]
        assert_identical(rank["resumed"]["adapters"], rank["straight"]["adapters"])
        written = load_file(folder / "step_00000007" / "adapters.safetensors")
        assert_identical({name: tensor.numpy() for name, tensor in written.items()}, rank["at_saving"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_goes_on_bit_for_bit(two_ranks, checkpoints, tmp_path, layout):
    assert_resumed(two_ranks(resume, checkpoints, LAYOUTS[layout], str(tmp_path)), tmp_path)


SHARED_EXPERTS = {
    "pipeline 2 in bfloat16": ("qwen2_moe", 1),
    # Its first layer has no experts; the MLP there has the adapters of shared experts.
    "tensor 2, expert 2": ("deepseek_v3", 2),
}
"""Families by layout, and on how many of two layers' shared experts a rank has adapters."""


def is_of_shared_experts(name: str) -> bool:
    return ".mlp." in name and ".experts." not in name


@pytest.mark.parametrize("layout", SHARED_EXPERTS)
def test_adapters_of_shared_experts_resume_bit_for_bit(two_ranks, tiny_w8a8, tmp_path, layout):
    family, layers = SHARED_EXPERTS[layout]
    ranks = two_ranks(resume, {"w8a8": str(tiny_w8a8(family, layers=2))}, LAYOUTS[layout], str(tmp_path))
    assert_resumed(ranks, tmp_path)
    # A and B of two matrices a layer: what was resumed went on learning, with the moments of the updates before.
    before, after = ranks[0]["at_saving"], ranks[0]["resumed"]["adapters"]
    assert sum(is_of_shared_experts(name) and (after[name] != before[name]).any() for name in after) == 2 * 4
    for rank in range(2):
        saved = load_file(tmp_path / "step_00000007" / f"rank_0000{rank}.safetensors")
        moments = [name for name in saved if is_of_shared_experts(name) and name.endswith("/exp_avg_sq")]
        assert len(moments) == layers * 4
        assert all(saved[name].any() for name in moments)


ROUND_TRIPS = {
    "data 2 by tensor 2, expert 2": ({}, {"tensor_parallel": 2, "expert_parallel": 2}),
    "expert 2 by pipeline 2": ({"expert_parallel": 2}, {"pipeline_parallel": 2}),
}


def there_and_back(paths: dict[str, str], layouts: tuple[dict, dict], folder: str) -> dict:
    """Two updates, on to another layout, and from there back; a third update in each."""
    keep = CheckpointConfig(keep=3)
    first, second = (
        dataclasses.replace(make_config(paths, workers=2, **layout), checkpoint=keep) for layout in layouts
    )
    engine = start_engine(first)
    trained(engine, 2)
    engine.save_checkpoint(folder, 1)
    saved = adapters_of(engine)
    straight = trained(engine, 1)
    other = start_engine(second)
    other.load_checkpoint(folder, 1)
    loaded = adapters_of(other)
    other.save_checkpoint(folder, 2)
    elsewhere = trained(other, 1)
    back = start_engine(first)
    back.load_checkpoint(folder, 2)
    back.save_checkpoint(folder, 3)
    return {"saved": saved, "loaded": loaded, "straight": straight, "elsewhere": elsewhere}


@pytest.mark.parametrize("layouts", ROUND_TRIPS)
def test_another_layout_goes_on_with_the_same_weights_and_moments(two_ranks, checkpoints, tmp_path, layouts):
    for rank in two_ranks(there_and_back, {**checkpoints}, ROUND_TRIPS[layouts], str(tmp_path)):
        assert_identical(rank["loaded"], rank["saved"])
        for name, values in rank["straight"]["adapters"].items():
            # Sums over ranks round differently. Adam divides by the gradients' size: an update without the moments of
            # the first two would be larger, up to the learning rate of 3e-3.
            np.testing.assert_allclose(rank["elsewhere"]["adapters"][name], values, atol=1e-4, err_msg=name)
            assert np.abs(values - rank["saved"][name]).max() > 1e-3
    for rank in range(2):
        first, last = (load_file(tmp_path / f"step_0000000{step}" / f"rank_0000{rank}.safetensors") for step in (1, 3))
        assert first.keys() == last.keys()
        assert any(name.endswith("exp_avg_sq") for name in first)
        for name in first:
            if not name.startswith("random/"):
                assert torch.equal(first[name], last[name]), name


def other_adapters(paths: dict[str, str], folder: str) -> str:
    start_engine(make_config(paths, rank=4)).save_checkpoint(folder, 1)
    try:
        start_engine(make_config(paths, rank=8)).load_checkpoint(folder)
    except ConfigError as error:
        return str(error)
    return ""


def test_adapters_of_another_rank_are_refused(one_rank, checkpoints, tmp_path):
    assert "lora.rank=4 (now 8)" in one_rank(other_adapters, checkpoints, str(tmp_path))[0]


def save_beside_an_update(paths: dict[str, str], folder: str) -> dict:
    """The thread that writes is held up until the next update is done; a second save finds the disk broken."""
    engine = start_engine(make_config(paths))
    trained(engine, 1)
    gate, save = threading.Event(), checkpoint.save_tensors

    def save_late(path, tensors):
        assert gate.wait(60)
        save(path, tensors)

    def break_off(path, tensors):
        raise OSError("no space left on this disk")

    found = {"at_saving": adapters_of(engine)}
    try:
        checkpoint.save_tensors = save_late
        engine.save_checkpoint(folder, 1, background=True)
        found["moved"] = trained(engine, 1)["adapters"]
        found["complete_meanwhile"] = checkpoint.complete_steps(folder)
        gate.set()
        engine.finish_checkpoint()
        checkpoint.save_tensors = break_off
        engine.save_checkpoint(folder, 2, background=True)
        found["errors"] = [error_of(engine.finish_checkpoint), error_of(engine.finish_checkpoint)]
    finally:
        checkpoint.save_tensors = save
    found["step"] = engine.load_checkpoint(folder)
    return found | {"loaded": adapters_of(engine)}


def error_of(call) -> str:
    try:
        call()
    except checkpoint.CheckpointError as error:
        return str(error)
    return ""


def test_a_checkpoint_in_the_background_holds_the_state_of_its_step(one_rank, checkpoints, tmp_path):
    found = one_rank(save_beside_an_update, checkpoints, str(tmp_path))[0]
    assert found["complete_meanwhile"] == []
    assert any(np.any(found["moved"][name] != values) for name, values in found["at_saving"].items())
    assert_identical(found["loaded"], found["at_saving"])
    # What went wrong beside the main thread reaches it once, and the checkpoint before still counts.
    assert found["errors"] == ["the checkpoint of step 2 was not written: no space left on this disk", ""]
    assert found["step"] == 1


def save_many(paths: dict[str, str], folder: str) -> None:
    engine = start_engine(make_config(paths))
    for step in (2, 4, 6):
        engine.save_checkpoint(folder, step)


def load_error(paths: dict[str, str], folder: str) -> str:
    try:
        return f"step {start_engine(make_config(paths)).load_checkpoint(folder)}"
    except ConfigError as error:
        return str(error)


def test_the_newest_complete_checkpoint_counts_and_only_the_newest_stay(one_rank, checkpoints, tmp_path):
    folder = str(tmp_path)
    assert "no complete checkpoint" in one_rank(load_error, checkpoints, folder)[0]
    one_rank(save_many, checkpoints, folder)
    assert sorted(os.listdir(tmp_path)) == ["step_00000004", "step_00000006"]
    assert not list(tmp_path.glob("*/*.tmp"))
    # What a crash before the last write leaves.
    (tmp_path / "step_00000006" / "meta.json").unlink()
    assert one_rank(load_error, checkpoints, folder)[0] == "step 4"
    rank_file = tmp_path / "step_00000004" / "rank_00000.safetensors"
    rank_file.write_bytes(rank_file.read_bytes()[:-100])
    assert "rank_00000.safetensors of checkpoint step 4 can't be read" in one_rank(load_error, checkpoints, folder)[0]
