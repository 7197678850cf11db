"""What must hold for train.mindspeed and model.provider."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qerl_rl.config.mindspeed_schema import MindSpeedConfig

if TYPE_CHECKING:
    from qerl_rl.config.schema import Config

SECTION = "train.mindspeed"
Fault = tuple[str, str, str] | None
"""The key at fault, the problem, the fix."""


@dataclass(frozen=True)
class Refused:
    """A switch that MindSpeed has and that can't act here. why: what it changes there; fix: what does the same here."""

    why: str
    fix: str


_OWN_LAYER = (
    "MindSpeed's layer in place of MoELayer multiplies by experts of its own, not by quantized ones with adapters"
)
_NO_CONTEXT = "attention over packed sequences is not split along the sequence"
_SHORTER = "use train.tensor_parallel, which splits sequences between the layers, or a smaller train.micro_batch_tokens"
_SWAPPED = "set swap.offload_optimizer to true: it leaves the card while the other engine has it"
REFUSED = {
    "moe_tp_extend_ep": Refused(
        "it is a layout here", "set train.expert_parallel to EP x TP and train.expert_tensor_parallel to 1"
    ),
    "moe_permutation_async_comm": Refused(
        "MindSpeed asks for it beside moe_tp_extend_ep and its overlapping layers only", "set it to false"
    ),
    "moe_alltoall_overlap_comm": Refused(_OWN_LAYER, "set it to false"),
    "moe_allgather_overlap_comm": Refused(_OWN_LAYER, "set it to false"),
    "moe_alltoall_mc2": Refused(_OWN_LAYER, "set it to false"),
    "moe_fb_overlap": Refused(_OWN_LAYER, "set it to false"),
    "moe_zero_memory": Refused(
        "it is part of MindSpeed's overlapping layers", "set it to disable, and moe_layer_recompute to true"
    ),
    "moe_zero_memory_num_layers": Refused("it is part of moe_zero_memory", "set it to 0"),
    "gemm_gradient_accumulation_fusion": Refused("it is part of MindSpeed's grouped experts", "set it to false"),
    "recompute_activation_function": Refused(
        "experts keep the inputs of SwiGLU only, and compute it again in backward, as it is", "set it to false"
    ),
    "recompute_norm": Refused(
        "it replaces the layers' forward, through which routing replay reaches the routers",
        "set it to false, and train.recompute to selective or full",
    ),
    "swap_attention": Refused(
        "MindSpeed starts it from Megatron's training loop, and excludes LoRA",
        "set it to false, and train.recompute to selective or full",
    ),
    "swap_optimizer": Refused("it moves the optimizer's tensors from under the swap between engines", _SWAPPED),
    "reuse_fp32_param": Refused(
        "it takes away the float32 weights that checkpoints and the swap between engines read", _SWAPPED
    ),
    "use_ascend_coc": Refused("MindSpeed sets it up in a launcher of its own", "set use_ascend_mc2 to true instead"),
    "context_parallel_size": Refused(_NO_CONTEXT, f"set it to 1; {_SHORTER}"),
    "context_parallel_algo": Refused(_NO_CONTEXT, f"set it to megatron_cp_algo; {_SHORTER}"),
    "use_cp_send_recv_overlap": Refused(_NO_CONTEXT, "set it to false"),
    "npu_deterministic": Refused(
        "it acts in Megatron's training loop", "set it to false, and run.deterministic to true"
    ),
}
ON_NPUS = ("optimization_level", "optimizer_selection", "use_ascend_mc2")
"""What only MindSpeed does."""
OF_DISPATCHER = "use_fused_moe_token_permute_and_unpermute"


def mindspeed_fault(config: Config) -> Fault:
    """The first switch that can't act, or that does not fit the others."""
    return _refused(config) or _conflict(config) or _misplaced(config)


def _refused(config: Config) -> Fault:
    for name, refused in REFUSED.items():
        value = getattr(config.train.mindspeed, name)
        if value != getattr(MindSpeedConfig, name):
            key = f"{SECTION}.{name}"
            return key, f"{key}={_shown(value)} can't act: {refused.why}.", refused.fix
    return None


def _conflict(config: Config) -> Fault:
    train, switches = config.train, config.train.mindspeed
    if switches.optimization_level > 2:
        key = f"{SECTION}.optimization_level"
        return key, f"{key}={switches.optimization_level} is no level.", f"set {key} to 0, 1 or 2"
    if switches.use_ascend_mc2:
        key = f"{SECTION}.use_ascend_mc2"
        if train.tensor_parallel == 1:
            problem = f"{key}=true, but train.tensor_parallel=1 has no collective to overlap."
            return key, problem, f"set {key} to false, or train.tensor_parallel above 1"
        if config.lora.rank:
            problem = f"{key}=true, but linear layers with adapters are not Megatron's, which are what it replaces."
            return key, problem, f"set {key} to false, or lora.rank to 0"
    if switches.optimizer_selection == "fused_ema_adamw":
        key = f"{SECTION}.optimizer_selection"
        problem = f"{key}=fused_ema_adamw keeps an average of the weights that nothing here reads or saves."
        return key, problem, f"set {key} to fused_adamw"
    if switches.moe_layer_recompute and train.recompute != "none":
        key = f"{SECTION}.moe_layer_recompute"
        problem = f"{key}=true, but train.recompute={train.recompute} computes MoE layers again already."
        return key, problem, f"set {key} to false, or train.recompute to none"
    return None


def _misplaced(config: Config) -> Fault:
    return None if config.train.device in ("auto", "npu") else misplaced_fault(config)


def misplaced_fault(config: Config) -> Fault:
    """The first switch of MindSpeed's, in a run on a device that has none of it."""
    device = config.train.device
    if config.model.provider != "megatron":
        problem = f"model.provider={config.model.provider} is for NPUs, and train.device={device}."
        return "model.provider", problem, "set model.provider to megatron"
    for name in ON_NPUS:
        value = getattr(config.train.mindspeed, name)
        if value != getattr(MindSpeedConfig, name):
            key = f"{SECTION}.{name}"
            return key, f"{key}={_shown(value)} is for NPUs, and train.device={device}.", f"leave {key} out"
    return None


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
