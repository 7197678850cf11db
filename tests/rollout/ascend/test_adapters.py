"""Adapters beside the weights of a vllm-ascend engine, inside W8A8 experts too, by its own way to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import LoraConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.engine import EngineLayout
from qerl_rl.layout.tensors import Adapters, Weights
from qerl_rl.rollout.adapters import AdapterSet
from qerl_rl.rollout.ascend.capture import before_graphs_are_captured
from qerl_rl.rollout.ascend.routing import record_quantized_experts
from qerl_rl.rollout.load_plan import LoadPlan
from qerl_rl.rollout.merge import merges_adapters
from tests.rollout.ascend import layers, models, wheel
from tests.rollout.ascend.layers import EXPERT_KINDS, EXPERTS, HIDDEN, WIDTH, Importer, Shard
from tests.rollout.ascend.test_live_target import CHECKPOINTS

FUSED_MOE = "vllm_ascend.ops.fused_moe"
MODULES = (
    *wheel.MODULES,
    *(f"{FUSED_MOE}.{name}" for name in ("moe_comm_method", "moe_runtime_args", "moe_stage_contracts")),
    f"{FUSED_MOE}.moe_stage_params",
)
TOKENS, TOP_K, RANK, SCALE = 64, 2, 8, 2.0
LORA = LoraConfig(rank=RANK, alpha=RANK * SCALE)


class _Dispatcher:
    """Sorts tokens by the rank's experts, as vllm-ascend's dispatchers do, and adds up what comes back."""

    def __init__(self, experts: range, in_int8: bool, counts: bool) -> None:
        self._experts, self._in_int8, self._counts = experts, in_int8, counts

    def token_dispatch(self, token_dispatch_input: Any) -> SimpleNamespace:
        ids = token_dispatch_input.topk_ids
        own = [(ids == expert).nonzero() for expert in self._experts]
        places = torch.cat(own)
        counts = torch.tensor([len(each) for each in own])
        rows, scale = token_dispatch_input.hidden_states[places[:, 0]], None
        if self._in_int8:
            scale = rows.float().abs().amax(-1) / 127
            rows = (rows.float() / scale[:, None]).round().to(torch.int8)
        kind = {"group_list": counts, "group_list_type": 1}
        if not self._counts:
            kind = {"group_list": counts.cumsum(0), "group_list_type": 0}
        weights = token_dispatch_input.topk_weights[places[:, 0], places[:, 1]]
        metadata = SimpleNamespace(token=places[:, 0], weights=weights, tokens=len(ids))
        return SimpleNamespace(
            hidden_states=rows, dynamic_scale=scale, topk_scales=None, combine_metadata=metadata, **kind
        )

    def token_combine(self, hidden_states: torch.Tensor, combine_metadata: Any) -> torch.Tensor:
        weighted = hidden_states.double() * combine_metadata.weights.double()[:, None]
        output = torch.zeros(combine_metadata.tokens, HIDDEN, dtype=torch.float64)
        return output.index_add_(0, combine_metadata.token, weighted)


def _routed(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    # The first expert gets no token.
    logits = torch.randn(TOKENS, EXPERTS, generator=generator).index_fill_(1, torch.tensor([0]), -100.0)
    weights, ids = logits.softmax(-1).topk(TOP_K)
    return x, weights, ids


def _adapters(seed: int, deviation: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "w13.lora_A": (EXPERTS, RANK, HIDDEN),
        "w13.lora_B": (EXPERTS, 2, WIDTH, RANK),
        "w2.lora_A": (EXPERTS, RANK, WIDTH),
        "w2.lora_B": (EXPERTS, HIDDEN, RANK),
    }
    return {name: deviation * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _dense(adapters: dict[str, torch.Tensor], experts: range) -> torch.Tensor:
    """The same experts in float64, from the weights that their int8 stands for."""
    parts = layers.expert_parts(EXPERT_KINDS["w8a8"].format, 1)
    x, weights, ids = _routed(0)
    first, last = (
        parts[f"{name}_weight"].double() * parts[f"{name}_weight_scale"].bfloat16().double() for name in ("w13", "w2")
    )
    first = first + SCALE * (adapters["w13.lora_B"].flatten(1, 2) @ adapters["w13.lora_A"]).double()
    last = last + SCALE * (adapters["w2.lora_B"] @ adapters["w2.lora_A"]).double()
    output = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for token, expert in (ids >= 0).nonzero().tolist():
        number = int(ids[token, expert])
        if number in experts:
            gate, up = (first[number] @ x[token].double()).chunk(2)
            output[token] += weights[token, expert].bfloat16().double() * (
                last[number] @ (torch.nn.functional.silu(gate) * up)
            )
    return output


def _computed(load: Importer, layer: torch.nn.Module, experts: range, context: SimpleNamespace, **how: bool) -> Any:
    comm = load(f"{FUSED_MOE}.moe_comm_method")
    x, weights, ids = _routed(0)

    class Comm(comm.MoECommMethod):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            self.token_dispatcher, self.use_fusion_ops = _Dispatcher(experts, **how), True

        _get_token_dispatcher = _get_prepare_finalize = None

    context.moe_comm_method, context.routed = Comm(), (weights, ids)
    # vllm-ascend's own way from a layer's quantized method to its experts.
    result = layer.quant_method.apply(layer, x, torch.zeros(TOKENS, EXPERTS), TOP_K, True, num_experts=EXPERTS)
    return result.routed_out


def _given(
    context: SimpleNamespace, fused: int = 0, description: dict[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    given = wheel.given(description or {}, wheel.AscendConfig(enable_fused_mc2=fused))
    # What is kept is looked at as a matrix here, as a card's kernels do.
    given["torch_npu"] = given["torch_npu"] | {"npu_format_cast": lambda weight, acl_format: weight}
    given["vllm_ascend.ascend_forward_context"] = {"_EXTRA_CTX": context}
    given[f"{FUSED_MOE}.experts_selector"] = {"select_experts": lambda **asked: context.routed}
    return given


@pytest.mark.parametrize("how", [{"in_int8": False, "counts": True}, {"in_int8": True, "counts": False}])
@pytest.mark.parametrize("experts", [range(EXPERTS), range(EXPERTS // 2, EXPERTS)])
def test_adapters_act_inside_each_expert_of_each_layer(experts: range, how: dict[str, bool]) -> None:
    context, shard = SimpleNamespace(moe_comm_type=None), slice(experts.start, experts.stop)
    with wheel.wheel(*MODULES, given=_given(context)) as load:
        first, second = (layers.experts_of(load, EXPERT_KINDS["w8a8"], len(experts), WIDTH) for _ in range(2))
        for layer in (first, second):
            layers.fill(layer, layers.expert_parts(EXPERT_KINDS["w8a8"].format, 1, Shard(experts=shard)))
            layer.swiglu_limit = 0
        sets = [
            AdapterSet(_model_of(layer, len(experts)), dataclasses.replace(LORA, attention=False))
            for layer in (first, second)
        ]
        for deviation, adapted in ((0.0, sets[0]), (0.2, sets[1])):
            adapted.begin(1)
            for name, tensor in _adapters(3, deviation).items():
                local = f"model.layers.0.mlp.experts.{name}"
                adapted.write(local).copy_(tensor[shard].reshape(adapted.locals[local]))
                adapted.complete(local)
            adapted.finish()
        plain, changed = (_computed(load, layer, experts, context, **how) for layer in (first, second))
    expected = [_dense(_adapters(3, deviation), experts) for deviation in (0.0, 0.2)]
    # int8 activations, and bfloat16 between the matrices.
    assert _distance(plain, expected[0]) < 0.02
    assert _distance(changed, expected[1]) < 0.02
    assert _distance(plain, expected[1]) > 0.2


def _model_of(layer: torch.nn.Module, experts: int) -> torch.nn.Module:
    layer.hidden_size, layer.intermediate_size_per_partition, layer.local_num_experts = HIDDEN, WIDTH, experts
    root = torch.nn.Module()
    models.module_at(root, "model.layers.0.mlp").add_module("experts", layer)
    return root


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_experts_that_are_one_kernel_with_their_exchange_take_no_adapters() -> None:
    with wheel.wheel(*MODULES, given=_given(SimpleNamespace(), fused=1)) as load:
        layer = layers.experts_of(load, EXPERT_KINDS["w8a8"], EXPERTS, WIDTH)
        with pytest.raises(RuntimeError, match=r"rollout\.ascend\.fused_mc2 to 0"):
            AdapterSet(_model_of(layer, EXPERTS), LORA)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_adapters_are_beside_w8a8_experts_and_merged_into_others(
    name: str, tiny_checkpoint: Callable[..., Path], tiny_quantized: Callable[..., Path]
) -> None:
    folder = tiny_quantized(tiny_checkpoint("qwen3_moe", "bfloat16", layers=2), **CHECKPOINTS[name])
    plan, architecture = LoadPlan(folder, "910"), MoeArchitecture.from_folder(folder)
    for rank in range(2):
        with wheel.wheel(*MODULES, given=_given(SimpleNamespace()) | _described(plan)) as load:
            model = models.build(load, plan, EngineLayout(architecture, 2, 1, False, Weights()), rank)
            beside = name == "w8a8"
            assert merges_adapters(model, LORA) is not beside
            if not beside:
                with pytest.raises(ConfigError, match="takes no adapter"):
                    merges_adapters(model, dataclasses.replace(LORA, in_rollout="adapter"))
                continue
            kinds = Adapters(LORA)
            adapters = AdapterSet(model, LORA)
            assert adapters.locals == EngineLayout(architecture, 2, 1, False, kinds).local_shapes(rank)


def _described(plan: LoadPlan) -> dict[str, dict[str, Any]]:
    config = wheel.VllmConfig(models.description(plan))
    return {"vllm.config": {"get_current_vllm_config": lambda: config}}


def test_what_graphs_shall_see_is_there_when_they_are_captured() -> None:
    order: list[str] = []

    class NPUWorker:
        def compile_or_warm_up_model(self) -> str:
            order.append("captured")
            return "time"

    platform = SimpleNamespace(current_platform=SimpleNamespace(device_type="npu"))
    given = {"vllm.platforms": vars(platform), "vllm_ascend.worker.worker": {"NPUWorker": NPUWorker}}
    with wheel.wheel(given=given):
        with before_graphs_are_captured(lambda worker: order.append(type(worker).__name__)):
            assert NPUWorker().compile_or_warm_up_model() == "time"
        NPUWorker().compile_or_warm_up_model()
    assert order == ["NPUWorker", "captured", "captured"]


def test_a_linear_layer_with_a_communication_of_its_own_gets_the_adapter_there_too() -> None:
    with wheel.wheel(*MODULES, given=_given(SimpleNamespace())) as load:
        layer = layers.linear_of(load, layers.LINEAR_KINDS["w8a8"])
        layer.output_partition_sizes, layer.input_size = [layers.OUTPUTS], HIDDEN
        layer.custom_op = SimpleNamespace(quant_method=layer.quant_method)
        root = torch.nn.Module()
        models.module_at(root, "model.layers.0.self_attn").add_module("qkv_proj", layer)
        AdapterSet(root, dataclasses.replace(LORA, experts=False))
    assert layer.custom_op.quant_method is layer.quant_method
    assert layer.quant_method.base.quant_method is not None


@pytest.mark.parametrize("name", ["w8a8", "w4a16", "w4a8", "mxfp8"])
def test_quantized_experts_tell_which_tokens_chose_them(name: str) -> None:
    told: list[tuple[int, torch.Tensor]] = []
    capturer = SimpleNamespace(capture=lambda layer_id, topk_ids: told.append((layer_id, topk_ids)))
    weights, ids = _routed(0)[1:]
    comm = SimpleNamespace(fused_experts=lambda fused_experts_input: fused_experts_input.topk_ids)
    context = SimpleNamespace(moe_comm_type=None, moe_comm_method=comm, routed=(weights, ids))
    kind = EXPERT_KINDS[name]
    with wheel.wheel(*MODULES, given=_given(context, description=kind.description)) as load:
        record_quantized_experts()
        record_quantized_experts()
        for number, own in ((3, capturer), (4, None)):
            layer = layers.experts_of(load, kind, EXPERTS, WIDTH)
            layers.fill(layer, layers.expert_parts(kind.format, 1))
            layer.swiglu_limit, layer.layer_id, layer._ascend_routed_experts_capturer = 0, number, own
            x, logits = torch.zeros(TOKENS, HIDDEN).bfloat16(), torch.zeros(TOKENS, EXPERTS)
            layer.quant_method.apply(
                layer=layer, x=x, router_logits=logits, top_k=TOP_K, renormalize=True, num_experts=EXPERTS
            )
    [(number, chosen)] = told
    assert number == 3
    assert torch.equal(chosen, ids)
