"""lora.rank=0, where every weight trains: the reference, resuming, and what is kept for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qerl_rl.config.schema import AlgorithmConfig
from qerl_rl.platform.state_store import SpillFile
from qerl_rl.train.first_weights import FirstWeights
from tests.train.models import make_config, make_samples, policy_gradient, share, start_engine

LAYOUTS = {
    "data 2": {},
    "tensor 2, expert 2": {"tensor_parallel": 2, "expert_parallel": 2},
    "pipeline 2 in bfloat16": {"pipeline_parallel": 2, "dtype": "bfloat16"},
}


class KeepsNothing:
    """A store that nobody may give anything."""

    def begin_write(self, slots: Mapping[int, torch.Tensor]) -> Any:
        raise AssertionError("something was kept")


def own_samples(engine: Any) -> Any:
    return share(make_samples(), engine.data_parallel_rank, engine.data_parallel_size)


def scores(engine: Any, *, reference: bool) -> np.ndarray | None:
    found = engine.log_probs(own_samples(engine), reference=reference)
    return found and np.concatenate([*found.log_probs, *found.entropy])


def weights(engine: Any) -> dict[str, np.ndarray]:
    return {name: tensor.detach().float().clone().numpy() for name, tensor in engine.model.named_parameters()}


def update(engine: Any) -> dict[str, float]:
    return engine.update(own_samples(engine), policy_gradient)


def let_go_of_all(engine: Any) -> None:
    """As the source of a swap does, one parameter after the other: memory holds the others."""
    held = engine.held_bytes()["parameters"]
    engine.begin_offload()
    source = engine.weight_source(engine.let_go)
    sizes = {name: parameter.nbytes for name, parameter in engine.model.named_parameters()}
    for name in source.names:
        source.read(name)
        source.finished(name)
        engine.finish_moves()
        held -= sizes.pop(name)
        assert engine.held_bytes() == {"parameters": held, "gradients": 0, "optimizer": 0}
    assert not sizes
    with pytest.raises(RuntimeError, match="trained parameters in memory"):
        engine.weight_source()


def with_and_without_reference(paths: dict[str, str], settings: dict, folder: str) -> dict[str, Any]:
    """Four updates; the same with a reference pass and an absence after each; two more from a checkpoint between."""
    config = make_config(paths, quant="none", rank=0, workers=2, **settings)
    engine = start_engine(config, store=KeepsNothing())
    first = scores(engine, reference=False)
    straight = {"updates": [update(engine) for _ in range(4)], "weights": weights(engine)}

    with_kl = dataclasses.replace(config, algorithm=AlgorithmConfig(kl_coefficient=0.1))
    engine = start_engine(with_kl, store=SpillFile(folder))
    references, updates = [scores(engine, reference=True)], []
    for number in range(4):
        updates.append(update(engine))
        references.append(scores(engine, reference=True))
        if number == 1:
            engine.save_checkpoint(folder, 2)
        let_go_of_all(engine)
        # A transfer that fails leaves it at that.
        if number % 2:
            assert engine.offload()["parameters"] > 0
        engine.onload()
    asked = {"updates": updates, "weights": weights(engine)}

    engine = start_engine(with_kl)
    engine.load_checkpoint(folder)
    references.append(scores(engine, reference=True))
    resumed = {"updates": [update(engine) for _ in range(2)], "weights": weights(engine)}
    return {"first": first, "references": references, "straight": straight, "asked": asked, "resumed": resumed}


@pytest.fixture(scope="module", params=LAYOUTS)
def runs(request, two_ranks, checkpoints, tmp_path_factory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("runs"))
    return two_ranks(with_and_without_reference, checkpoints, LAYOUTS[request.param], folder)


def assert_identical(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_the_reference_stays_the_first_model_bit_for_bit_also_after_resuming(runs):
    knowing = [rank for rank in runs if rank["first"] is not None]
    assert knowing
    for rank in knowing:
        assert len(rank["references"]) == 6
        for reference in rank["references"]:
            np.testing.assert_array_equal(reference, rank["first"])


def test_training_goes_on_as_if_no_reference_had_been_asked_for(runs):
    for rank in runs:
        assert rank["asked"]["updates"] == rank["straight"]["updates"]
        assert_identical(rank["asked"]["weights"], rank["straight"]["weights"])


def test_a_resumed_run_goes_on_bit_for_bit(runs):
    for rank in runs:
        assert rank["resumed"]["updates"] == rank["straight"]["updates"][2:]
        assert_identical(rank["resumed"]["weights"], rank["straight"]["weights"])


def refused_reference(paths: dict[str, str]) -> str:
    engine = start_engine(make_config(paths, quant="none", rank=0), store=KeepsNothing())
    with pytest.raises(ValueError, match="no reference") as error:
        engine.log_probs(make_samples(), reference=True)
    return str(error.value)


def test_without_a_kl_nothing_is_kept_and_the_reference_says_what_keeps_it(one_rank, checkpoints):
    assert "algorithm.kl_coefficient" in one_rank(refused_reference, checkpoints)[0]


class _Broken(SpillFile):
    """Its second read fails half-way, with some tensors filled and some not."""

    reads = 0

    def _read(self, slots: Mapping[int, torch.Tensor]) -> None:
        self.reads += 1
        if self.reads == 1:
            super()._read(dict(list(slots.items())[:1]))
            raise OSError("the disk is gone")
        super()._read(slots)


@pytest.mark.parametrize("breaks", ["the pass", "the store"])
def test_trained_weights_come_back_whatever_happens_to_the_pass(tmp_path: Path, breaks: str) -> None:
    store = _Broken(str(tmp_path)) if breaks == "the store" else SpillFile(str(tmp_path))
    parameters = [torch.randn(3, 5), torch.randn(7).to(torch.bfloat16), torch.randn(())]
    first = [parameter.clone() for parameter in parameters]
    kept = FirstWeights(parameters, store)
    for parameter in parameters:
        parameter.add_(1.0)
    trained = [parameter.clone() for parameter in parameters]

    def fails() -> None:
        with kept.in_place():
            assert all(torch.equal(now, then) for now, then in zip(parameters, first, strict=True))
            raise ZeroDivisionError

    with pytest.raises((ZeroDivisionError, OSError)):
        fails()
    assert all(torch.equal(now, then) for now, then in zip(parameters, trained, strict=True))
