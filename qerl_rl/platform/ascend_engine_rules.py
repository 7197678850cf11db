"""What must hold between the keys of rollout, rollout.ascend and what is trained, on Ascend; see `ascend_rules`.

Sources: vllm-ascend 0.23.0 (ascend_config.py, platform.py, batch_invariant.py, ascend_forward_context.py, utils.py,
worker/worker.py, eplb/core/eplb_utils.py, ops/fused_moe, quantization/modelslim_config.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qerl_rl.platform.ascend_setting import MC2_EXPERTS, MC2_RANKS, Fault, Setting
from qerl_rl.quant.platforms import CONVERT, support

CARD = "910"
"""Atlas A2 and A3 in the table of formats; which card it is, only the card can say."""
KV_BLOCK = 128
"""Tokens of a block of the KV cache, for which the attention kernels are made."""
FUSED_RANKS = 32
"""Most ranks of experts that dispatch_ffn_combine serves."""


def format_runs(setting: Setting) -> Fault:
    """vllm-ascend has no kernels for NVFP4 on any card, nor for MXFP formats on 910B and 910C."""
    key, format = "quant.format", setting.config.quant.format
    how = support(format, CARD)
    if how.how != CONVERT:
        return None
    fix = f"quantize the model to {' or '.join(how.formats)} (python -m qerl_rl quantize), and set {key} to it"
    return key, f"{key}={format} does not run on Ascend 910B and 910C.", fix


def linear_format(setting: Setting) -> Fault:
    """W4A16 has kernels for experts but no linear method. W4A8's linear method reads groups in msmodelslim's layout
    alone, multiplies with activations as they are, and what it keeps can't be replaced in a running engine."""
    key, format = "quant.format", setting.config.quant.format
    allowed = support(format, CARD).attention
    wrong = sorted(setting.linears - set(allowed))
    if not allowed or not wrong:
        return None
    fix = f"quantize again with --attention {' or '.join(allowed)}"
    problem = f"{key}={format} on Ascend is for experts only, and attention or other layers are {', '.join(wrong)}."
    return key, problem, fix


def cache_block(setting: Setting) -> Fault:
    """vllm-ascend sets blocks of another size to 128 with prefix caching, and has no kernel for them without."""
    key, size = "rollout.kv_block_tokens", setting.config.rollout.kv_block_tokens
    return None if size == KV_BLOCK else (key, f"{key}={size} on Ascend.", f"set {key} to {KV_BLOCK}")


def cache_scales(setting: Setting) -> Fault:
    """The scales of an int8 KV cache come from the checkpoint; without them the cache stays in bfloat16."""
    key = "rollout.kv_cache_dtype"
    if setting.config.rollout.kv_cache_dtype != "int8" or setting.has_cache_scales:
        return None
    problem = f"{key}=int8, but the checkpoint's quant_model_description.json has no kv_cache_type C8."
    return key, problem, f"calibrate the model with msmodelslim for C8, or set {key} to auto"


def sleeping(setting: Setting) -> Fault:
    """Without sleep mode nothing of the engine can leave the card."""
    swap, key = setting.config.swap, "rollout.ascend.sleep_mode"
    released = [name for name in ("release_kv_cache", "release_weights") if getattr(swap, name)]
    if setting.config.rollout.ascend.sleep_mode or not released or not setting.config.has_rollout_engine:
        return None
    problem = f"{key}=false, but swap.{released[0]}=true has the engine's memory leave the card."
    return key, problem, f"set {key} to true, or {' and '.join(f'swap.{name}' for name in released)} to false"


def weight_layout(setting: Setting) -> Fault:
    """With weights in NZ layout, waking up and replacing weights raise."""
    key, ascend, lora = "rollout.ascend.weight_nz_mode", setting.config.rollout.ascend, setting.config.lora
    replaced = lora.rank == 0 or lora.in_rollout == "merge"
    if ascend.weight_nz_mode == 0 or not (ascend.sleep_mode or replaced):
        return None
    why = "trained weights are written into them" if replaced else "rollout.ascend.sleep_mode=true wakes them up"
    return key, f"{key}={ascend.weight_nz_mode} keeps weights in NZ layout, but {why}.", f"set {key} to 0"


def graphs(setting: Setting) -> Fault:
    """Keys of graphs say nothing to an engine that captures none."""
    rollout = setting.config.rollout
    given = {
        "rollout.ascend.graph_mode": rollout.ascend.graph_mode != "auto",
        "rollout.ascend.capture_sizes": bool(rollout.ascend.capture_sizes),
        "rollout.ascend.max_capture_size": rollout.ascend.max_capture_size > 0,
    }
    for key, is_given in given.items():
        if is_given and rollout.enforce_eager:
            fix = "set rollout.enforce_eager to false, or leave the key out"
            return key, f"{key} is set, but rollout.enforce_eager=true captures nothing.", fix
    sizes, key = rollout.ascend.capture_sizes, "rollout.ascend.capture_sizes"
    if sizes and rollout.ascend.max_capture_size:
        return key, f"{key} and rollout.ascend.max_capture_size are both set.", f"leave one of them out of {key}"
    if any(size < 1 for size in sizes):
        return key, f"{key}={sizes} holds sizes below 1.", f"set {key} to numbers of tokens"
    return None


def fused_products(setting: Setting) -> Fault:
    """The product with its all-reduce is for row-parallel layers over several ranks of A2. It reads a weight as it is,
    int8 too, and nothing that stands beside it: scales and adapters would be left out."""
    key, rollout, lora = "rollout.ascend.matmul_all_reduce", setting.config.rollout, setting.config.lora
    if not rollout.ascend.matmul_all_reduce:
        return None
    reasons = {
        "rollout.tensor_parallel=1 reduces nothing": rollout.tensor_parallel == 1,
        "rollout.ascend.card=a3 has no such kernel": rollout.ascend.card == "a3",
        "rollout.ascend.batch_invariant=true switches it off": rollout.ascend.batch_invariant,
        "it would leave out the scales of quantized attention": bool(setting.linears - {"none"}),
        "it would leave out the adapters of lora.attention=true": lora.rank > 0 and lora.attention,
    }
    why = next((reason for reason, holds in reasons.items() if holds), None)
    return None if why is None else (key, f"{key}=true, but {why}.", f"set {key} to false")


def noise_in_graphs(setting: Setting) -> Fault:
    """A captured graph reads the norms that it was captured with: noise on others would be noise on none."""
    key = "rollout.enforce_eager"
    if setting.config.rollout.enforce_eager or not setting.config.noise.enabled:
        return None
    problem = f"{key}=false, but noise.enabled=true changes norms that captured graphs don't read again."
    return key, problem, f"set {key} to true, or noise.enabled to false"


def scattered_tokens(setting: Setting) -> Fault:
    """FlashComm1 needs ranks to scatter over, and keeps shared experts whole on each: another layout than ours."""
    key, rollout = "rollout.ascend.flash_comm", setting.config.rollout
    if not rollout.ascend.flash_comm:
        return None
    if rollout.tensor_parallel == 1:
        return key, f"{key}=true, but rollout.tensor_parallel=1 has no ranks to scatter over.", f"set {key} to false"
    if setting.architecture.shared_expert_width:
        return key, f"{key}=true keeps the model's shared experts whole on each rank.", f"set {key} to false"
    return None


def fused_dispatch(setting: Setting) -> Fault:
    """Each of the fused kernels of experts and their dispatch serves some layouts, and no adapters beside experts."""
    key, ascend = "rollout.ascend.fused_mc2", setting.config.rollout.ascend
    if ascend.fused_mc2 == 0:
        return None
    ranks, fix = setting.expert_ranks, f"set {key} to 0"
    per_rank = setting.architecture.experts // ranks
    if ascend.card == "a2":
        return key, f"{key}={ascend.fused_mc2}, but only Atlas A3 has these kernels.", fix
    if ranks == 1 or (ascend.card == "auto" and not setting.has_mc2):
        needed = f"{MC2_RANKS} ranks of experts with up to {MC2_EXPERTS} each, or rollout.ascend.card=a3 with several"
        return key, f"{key}={ascend.fused_mc2} needs {needed}; here are {ranks} with {per_rank}.", fix
    if ascend.fused_mc2 == 1 and ranks > FUSED_RANKS:
        return key, f"{key}=1 serves up to {FUSED_RANKS} ranks of experts; here are {ranks}.", fix
    if setting.config.quant.format != "w8a8":
        return key, f"{key}={ascend.fused_mc2} is for w8a8, not for {setting.config.quant.format}.", fix
    if ascend.hierarchical_mc2:
        return key, f"{key}={ascend.fused_mc2} and rollout.ascend.hierarchical_mc2=true exclude each other.", fix
    if ascend.fused_mc2 == 1 and ascend.overlap_shared_experts:
        problem = f"{key}=1 switches rollout.ascend.overlap_shared_experts=true off."
        return key, problem, f"{fix}, or rollout.ascend.overlap_shared_experts to false"
    if setting.adapts_experts_beside:
        problem = f"{key}={ascend.fused_mc2} computes experts without their adapters."
        return "lora.in_rollout", problem, f"set lora.in_rollout to merge, or {key} to 0"
    return None


def hierarchy(setting: Setting) -> Fault:
    """The way of MC2 over several machines has nothing to do where MC2 is not taken."""
    key = "rollout.ascend.hierarchical_mc2"
    if not setting.config.rollout.ascend.hierarchical_mc2 or setting.has_mc2:
        return None
    problem = f"{key}=true, but MC2 needs {MC2_RANKS} ranks of experts (Atlas A2) with up to {MC2_EXPERTS} each"
    return key, f"{problem}; here are {setting.expert_ranks}.", f"set {key} to false"


def moved_experts(setting: Setting) -> Fault:
    """Load balancing puts experts elsewhere than the layout says by which trained weights are sent to them."""
    ascend = setting.config.rollout.ascend
    if not ascend.moves_experts:
        return None
    key = "rollout.ascend.dynamic_eplb" if ascend.dynamic_eplb else "rollout.ascend.expert_map_path"
    if ascend.eplb_record_path and not ascend.dynamic_eplb:
        key = "rollout.ascend.eplb_record_path"
        return key, f"{key} is set, but nothing moves.", f"set rollout.ascend.dynamic_eplb to true, or {key} to nothing"
    if setting.expert_ranks == 1:
        problem = f"{key} is set, but each of {setting.config.rollout.data_parallel} engines has all experts to itself."
        return key, problem, "set rollout.expert_parallel to true (one engine over all ranks), or leave the key out"
    if setting.trains_experts:
        problem = f"{key} is set: experts would be trained in one place and served in another."
        return key, problem, f"leave {key} out, or set lora.experts to false (with lora.rank above 0)"
    slots = setting.architecture.experts + ascend.eplb_redundant_experts
    if ascend.dynamic_eplb and slots % setting.expert_ranks:
        key, extra = "rollout.ascend.eplb_redundant_experts", -setting.architecture.experts % setting.expert_ranks
        problem = (
            f"{key}={ascend.eplb_redundant_experts}: {slots} experts do not divide over {setting.expert_ranks} ranks."
        )
        return key, problem, f"set {key} to {extra} or {extra + setting.expert_ranks}"
    return None


def expert_map(setting: Setting) -> Fault:
    """A map for another number of ranks, layers or experts ends in a wrong shape, or in experts that nobody has."""
    key, text = "rollout.ascend.expert_map_path", setting.config.rollout.ascend.expert_map_path
    if not text:
        return None
    fix = f"set {key} to a map for {setting.expert_ranks} ranks, as rollout.ascend.eplb_record_path records it"
    path = Path(text)
    if path.suffix != ".json" or not path.is_file():
        return key, f"{key}={text} is no JSON file.", fix
    try:
        wrong = _wrong_map(json.loads(path.read_text()), setting)
    except (ValueError, KeyError, TypeError) as error:
        wrong = f"is no expert map ({type(error).__name__}: {error})"
    return (key, f"{key}={text} {wrong}.", fix) if wrong else None


def _wrong_map(described: Any, setting: Setting) -> str | None:
    """What is wrong with the file's content: for each layer, for each rank, the experts that it holds."""
    layers, experts = described["layer_list"], range(setting.architecture.experts)
    if described["moe_layer_count"] != len(layers):
        return "counts other layers than it has"
    for number, layer in enumerate(layers):
        ranks = [rank["device_expert"] for rank in layer["device_list"]]
        if len(ranks) != setting.expert_ranks:
            return f"is for {len(ranks)} ranks of experts, not for {setting.expert_ranks}"
        if len({len(held) for held in ranks}) > 1:
            return f"gives ranks of layer {number} unequal numbers of experts"
        if {expert for held in ranks for expert in held} != set(experts):
            return f"does not hold the experts 0 to {experts[-1]} in layer {number}"
    return None


ENGINE_RULES = (
    format_runs,
    linear_format,
    cache_block,
    cache_scales,
    sleeping,
    weight_layout,
    graphs,
    fused_products,
    noise_in_graphs,
    scattered_tokens,
    fused_dispatch,
    hierarchy,
    moved_experts,
    expert_map,
)
