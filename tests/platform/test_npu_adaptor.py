"""The adaptor for NPUs gives MindSpeed this run's arguments before Megatron is there, and leaves the process as it was.

In place of torch_npu and of MindSpeed stand packages that record what they see (`stand_ins`).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.mindspeed_schema import MindSpeedConfig
from qerl_rl.config.schema import Config, ModelConfig, TrainConfig
from qerl_rl.platform import npu_adaptor, prepare_megatron
from qerl_rl.platform.cpu_adaptor import PatchError
from qerl_rl.platform.device import NPU
from qerl_rl.platform.mindspeed_arguments import command_line, mindspeed_arguments
from tests.ranks import run_ranks

HERE = Path(__file__).parent
CONFIG = Config(
    train=TrainConfig(
        tensor_parallel=2,
        expert_parallel=4,
        dtype="bfloat16",
        recompute="full",
        recompute_method="block",
        recompute_layers=3,
        mindspeed=MindSpeedConfig(optimizer_selection="fused_torch_adamw", use_flash_attn=False),
    )
)


def _stand_ins(*folders: str) -> None:
    sys.path[:0] = [str(HERE / folder) for folder in folders]
    for name in ("torch_npu", "torch_npu.contrib", "torch_npu.contrib.transfer_to_npu"):
        sys.modules[name] = types.ModuleType(name)


def _lazy_module() -> types.ModuleType:
    """One that imports something, which is not there, to answer what it has; as transformers' without torchvision."""
    module = types.ModuleType("lazy")
    module.__getattr__ = lambda name: importlib.import_module(f"nothing_of_the_name_{name}")  # type: ignore[method-assign]
    return module


def _prepared(config: Config, checkpoint: Path) -> dict[str, Any]:
    """What the stand-ins saw, and what is left of it afterwards."""
    _stand_ins("stand_ins", *(["stand_ins_llm"] if config.model.provider == "mindspeed_llm" else []))
    lazy = sys.modules["lazy"] = _lazy_module()
    compiler, words, answer = torch.compile, list(sys.argv), vars(lazy)["__getattr__"]
    prepare_megatron(NPU, config)
    from megatron.core import jit

    from qerl_rl.platform.ops.selection import OPERATORS, is_left_out

    mindspeed: Any = importlib.import_module("mindspeed")
    return {
        "seen": mindspeed.seen,
        "left out": [operator for operator in OPERATORS if is_left_out(operator)],
        "compiler kept": torch.compile is compiler,
        "words kept": sys.argv == words,
        "lazy module kept": vars(lazy)["__getattr__"] is answer,
        "megatron compiles nothing": jit.jit_fuser(_prepared) is _prepared,
        "permutation": _permutations_agree(),
        "differences": _differences(checkpoint),
    }


def _permutations_agree() -> bool:
    """Whether Megatron's dispatchers sort rows, and add them up, as they do without us: values and gradients."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    spec = importlib.util.spec_from_file_location("untouched", str(moe_utils.__file__))
    assert spec is not None
    assert spec.loader is not None
    untouched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(untouched)
    assert untouched.permute.__code__ is not token_dispatcher.permute.__code__
    generator = torch.Generator().manual_seed(1)
    chosen = torch.rand(11, 6, generator=generator).topk(2).indices
    routing = torch.zeros(11, 6, dtype=torch.bool).scatter_(1, chosen, value=True)
    tokens, probabilities = (torch.rand(11, size, generator=generator).requires_grad_() for size in (5, 6))
    upstream, results = torch.rand(11, 5, generator=generator), []
    # Without a number of rows, as the dispatcher that gathers asks for it, some tokens have fewer experts.
    for routed, count in ((routing, 22), (routing & (torch.arange(6) < 3), None)):
        for module in (token_dispatcher, untouched):
            rows, weights, order = module.permute(tokens, routed, probs=probabilities, num_out_tokens=count)
            back = module.unpermute(rows * weights[:, None], order, tokens.shape, routing_map=routed)
            gradients = torch.autograd.grad((back * upstream).sum(), [tokens, probabilities])
            results.append([rows, weights, back, *gradients])
    pairs = [*zip(*results[:2], strict=True), *zip(*results[2:], strict=True)]
    # Two experts a token: a sum of two in either order.
    return all(torch.equal(first, second) for first, second in pairs)


def _differences(checkpoint: Path) -> list[str]:
    """Arguments that say something else than the TransformerConfig, which MindSpeed fills up from them."""
    from qerl_rl.layout.architecture import MoeArchitecture
    from qerl_rl.model.build import transformer_config

    architecture, found = MoeArchitecture.from_folder(checkpoint), []
    layer_only = dataclasses.replace(TrainConfig(), mindspeed=MindSpeedConfig(moe_layer_recompute=True))
    for train in (TrainConfig(), CONFIG.train, layer_only):
        config = transformer_config(architecture, train)
        names = {field.name for field in dataclasses.fields(config)}
        for name, value in mindspeed_arguments(Config(train=train)).items():
            if name in names and getattr(config, name) != value:
                found.append(f"{name}: {value}, not {getattr(config, name)}")
    return found


def _holds(found: dict[str, Any]) -> None:
    assert found["compiler kept"]
    assert found["words kept"]
    assert found["lazy module kept"]
    assert found["megatron compiles nothing"]
    assert found["permutation"]
    assert found["left out"] == ["packed_attention"]
    assert found["differences"] == []


def test_mindspeed_gets_its_arguments_before_megatron_is_imported(tiny_checkpoint: Callable[..., Path]) -> None:
    [found] = run_ranks(_prepared, 1, CONFIG, tiny_checkpoint("qwen3_moe"))
    _holds(found)
    (first, at_first), (second, at_second) = found["seen"]
    # It must not take this program's words for its own.
    assert (first, at_first["words"]) == ("args_utils", [])
    assert second == "megatron_adaptor"
    assert at_second["megatron imported"] is False
    expected = mindspeed_arguments(CONFIG)
    assert {name: at_second[name] for name in expected} == expected
    assert (expected["tensor_model_parallel_size"], expected["recompute_method"]) == (2, "block")
    assert (expected["optimizer_selection"], expected["use_flash_attn"]) == ("fused_torch_adamw", False)


def test_mindspeed_llm_gets_them_as_words_and_then_as_megatrons_global_arguments(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    config = dataclasses.replace(CONFIG, model=ModelConfig(provider="mindspeed_llm"))
    [found] = run_ranks(_prepared, 1, config, tiny_checkpoint("qwen3_moe"))
    _holds(found)
    seen, expected = dict(found["seen"]), mindspeed_arguments(config)
    assert next(iter(seen)) == "mindspeed_llm"
    assert seen["mindspeed_llm"]["megatron imported"] is False
    assert seen["mindspeed_llm"]["words"] == command_line(expected)
    assert {name: seen["global_vars"][name] for name in expected} == expected


def test_words_of_the_command_say_what_the_arguments_do() -> None:
    parser = argparse.ArgumentParser()
    arguments = mindspeed_arguments(CONFIG)
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, type=str if value is None else type(value))
    assert vars(parser.parse_args(command_line(arguments))) == arguments


def _refusals() -> list[str]:
    """What is said without MindSpeed, without MindSpeed-LLM, and once Megatron is imported."""
    _stand_ins()
    said = []
    for provider in ("megatron", "mindspeed_llm", "megatron"):
        try:
            npu_adaptor.apply(Config(model=ModelConfig(provider=provider)))
        except (ConfigError, PatchError) as error:
            said.append(str(error))
        if len(said) == 2:
            importlib.import_module("megatron.core")
    return said


def test_a_missing_package_is_named_with_how_to_get_it_and_an_early_import_is_an_error() -> None:
    [(mindspeed, mindspeed_llm, early)] = run_ranks(_refusals, 1)
    assert "git clone -b 2.3.0_core_r0.12.1 https://github.com/Ascend/MindSpeed" in mindspeed
    assert "git clone -b core_v0.12.1 https://github.com/NVIDIA/Megatron-LM" in mindspeed_llm
    assert "before anything imports it" in early
