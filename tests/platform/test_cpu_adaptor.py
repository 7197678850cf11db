"""The CPU adaptor: it fails when it can't work, works once, and leaves everybody but Megatron alone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qerl_rl.platform import cpu_adaptor, detect, prepare_megatron
from qerl_rl.platform.cpu_adaptor import PatchError
from tests.ranks import run_ranks

TARGETS = [
    ("current_device", "torch.cuda", "current_device"),
    ("current_device", "torch.cuda", "synchronize"),
    ("streams", "torch.cuda", "Stream"),
    ("streams", "torch.cuda", "current_stream"),
    ("random_state", "torch.cuda.random", "set_rng_state"),
    ("device_arguments", "torch", "arange"),
    ("tracked_random_state", "megatron.core.tensor_parallel.random", "_set_cuda_rng_state"),
    ("empty_fp8_shards", "megatron.core.fp8_utils", "_quantize_param_shard_impl"),
    ("uneven_shares", "megatron.core.tensor_parallel.mappings", "_gather_along_first_dim"),
    ("uneven_shares", "megatron.core.tensor_parallel.mappings", "_reduce_scatter_along_first_dim"),
    ("alltoall_splits", "megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu"),
]


class _Without:
    """A view of an object that lacks one attribute."""

    def __init__(self, original: object, missing: str) -> None:
        self.__dict__.update({name: getattr(original, name) for name in dir(original) if name != missing})


@pytest.mark.parametrize("name", ["current_device", "Stream", "get_rng_state"])
def test_replacing_what_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(PatchError, match=name):
        cpu_adaptor.replace(_Without(torch.cuda, name), name, None)


def _patches_without_their_target() -> dict[str, str]:
    """What each patch says when its target has gone."""
    prepare_megatron(detect("cpu"))
    said = {}
    for patch, module_name, name in TARGETS:
        module = importlib.import_module(module_name)
        original = getattr(module, name)
        delattr(module, name)
        try:
            getattr(cpu_adaptor, patch)()
        except PatchError as error:
            said[f"{module_name}.{name}"] = str(error)
        setattr(module, name, original)
    return said


def test_every_patch_refuses_a_version_without_its_target() -> None:
    [said] = run_ranks(_patches_without_their_target, 1)
    for _, module, name in TARGETS:
        assert f"{module} has no {name}" in said[f"{module}.{name}"]


def _import_megatron_first() -> str:
    importlib.import_module("megatron.core")
    try:
        prepare_megatron(detect("cpu"))
    except PatchError as error:
        return str(error)
    return ""


def test_megatron_imported_too_early_is_an_error() -> None:
    assert "before anything imports it" in run_ranks(_import_megatron_first, 1)[0]


def _side_effects(checkpoint: Path) -> dict[str, bool]:
    from transformers import AutoModelForCausalLM

    compile_before, empty_before = torch.compile, torch.empty
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(checkpoint)(tokens).logits
    prepare_megatron(detect("cpu"))
    wrapped = torch.empty
    prepare_megatron(detect("cpu"))
    with torch.no_grad():
        after = AutoModelForCausalLM.from_pretrained(checkpoint)(tokens).logits
    with torch.device("meta"):
        on_meta = torch.empty(2).device.type
    return {
        "patched": torch.empty is not empty_before and torch.empty(2, device="cuda").device.type == "cpu",
        "applied once": torch.empty is wrapped,
        "compile is the real one": torch.compile is compile_before,
        "megatron compiles nothing": sys.modules["megatron.core.jit"].jit_fuser(_side_effects) is _side_effects,
        "type names are true": torch.ones(2).type() == "torch.FloatTensor",
        "device contexts work": on_meta == "meta",
        "transformers computes the same": torch.equal(before, after),
    }


def test_everything_but_megatron_works_as_before(tiny_checkpoint: Callable[..., Path]) -> None:
    [found] = run_ranks(_side_effects, 1, tiny_checkpoint("qwen3_moe", layers=2))
    assert [name for name, holds in found.items() if not holds] == []


def _random_tracker() -> list[float]:
    """Draws inside and outside a fork of Megatron's tracker."""
    prepare_megatron(detect("cpu"))
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(1)
    expected_outside = [float(torch.rand(())) for _ in range(2)]
    torch.manual_seed(7)
    expected_inside = [float(torch.rand(())) for _ in range(2)]
    torch.manual_seed(1)
    tracker.add("dropout", 7)
    found_outside = [float(torch.rand(()))]
    with tracker.fork("dropout"):
        found_inside = [float(torch.rand(()))]
    found_outside.append(float(torch.rand(())))
    with tracker.fork("dropout"):
        found_inside.append(float(torch.rand(())))
    return [*np.subtract(expected_outside, found_outside), *np.subtract(expected_inside, found_inside)]


def test_random_tracker_keeps_its_own_stream() -> None:
    assert not any(run_ranks(_random_tracker, 1)[0])
