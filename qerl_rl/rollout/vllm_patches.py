"""Changes to vLLM that the engine needs, one function each; `PATCHES` says which platform needs which of them.

Those of a CPU change vLLM 0.32; an NPU's is right in vLLM 0.23.
"""

from __future__ import annotations

import functools
import math
import os
import uuid
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from qerl_rl.config.schema import RolloutConfig
from qerl_rl.rollout.ascend.decode import fuse_small_int4_experts
from qerl_rl.rollout.cpu_norm import norms_in_one_pass
from qerl_rl.rollout.int8_experts import experts_on_tiles
from qerl_rl.rollout.partial_prefill import partial_prompts_draw_from_spare_generators
from qerl_rl.rollout.patching import existing

_applied: set[str] = set()
SHARED_MEMORY = "/dev/shm"


def apply_patches(rollout: RolloutConfig | None = None) -> None:
    """Apply what this platform needs and `rollout` asks for, once. Call it after `configure_environment()` and before
    an engine is made."""
    platform = platform_name()
    wanted = platform == "910" and rollout is not None and rollout.ascend.fused_int4_decode
    for patch in (*PATCHES.get(platform, ()), *((fuse_small_int4_experts,) if wanted else ())):
        if patch.__name__ not in _applied:
            patch()
            _applied.add(patch.__name__)


def platform_name() -> str:
    """This platform as the table of quant/platforms.py names it."""
    from vllm.platforms import current_platform

    if current_platform.device_type == "npu":
        from vllm_ascend.utils import AscendDeviceType, get_ascend_device_type

        return "a5" if get_ascend_device_type() == AscendDeviceType.A5 else "910"
    return "cpu" if current_platform.is_cpu() else "cuda"


def unique_shared_memory_names() -> None:
    """Name the shared memory of a group after a token that its first rank draws.

    Without it the names are the same in every job (under external_launcher they hold neither port nor process): two
    jobs on a machine read each other's buffers, and leftovers of a killed one fail the next start with errno 17.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    original: Callable[[Any], str] = existing(_CPUSHMDistributed, "make_group_name")

    def make_group_name(communicator: Any) -> str:
        if not hasattr(communicator, "shared_memory_token"):
            token = [uuid.uuid4().hex[:16]]
            dist.broadcast_object_list(token, src=communicator.ranks[0], group=communicator.cpu_group)
            communicator.shared_memory_token = token[0]
        # The host is part of it: a group over two machines finds its names unequal and falls back to gloo.
        name = f"{communicator.shared_memory_token}-{os.uname().nodename}-{original(communicator)}"
        return name.replace("/", "_")

    _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)


def unlink_shared_memory_early() -> None:
    """Remove the names of a group's shared memory as soon as every rank has mapped it.

    Without it a killed process leaves its segments in /dev/shm (64 MiB and more of memory) until the machine restarts.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    original = existing(_CPUSHMDistributed, "_init_cpu_shm")

    @functools.wraps(original)
    def init_cpu_shm(self: Any) -> int:
        handle = original(self)
        # `original` ends with a barrier: from here on nobody opens the segments by name.
        if self.communicator.rank_in_group == 0:
            for name in os.listdir(SHARED_MEMORY):
                if self.group_name in name:
                    os.unlink(os.path.join(SHARED_MEMORY, name))
        return handle

    _CPUSHMDistributed._init_cpu_shm = init_cpu_shm


def unlink_message_queues_early() -> None:
    """Remove the name of a group's message queue as soon as every rank has mapped it.

    Without it a killed process of a tensor-parallel engine leaves 24 MiB in /dev/shm until the machine restarts.
    """
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    original = existing(MessageQueue, "create_from_process_group")

    @functools.wraps(original)
    def create_from_process_group(*arguments: Any, **options: Any) -> Any:
        queue = original(*arguments, **options)
        # `original` waited for all readers, unless it was told not to.
        if options.get("blocking", True) and queue.buffer is not None and queue.buffer.is_creator:
            queue.buffer.shared_memory.unlink()
            # Else its destructor would look for the name once more.
            queue.buffer.is_creator = False
        return queue

    MessageQueue.create_from_process_group = staticmethod(create_from_process_group)


def cpu_experts_honour_expert_map() -> None:
    """Give the CPU expert kernels local expert ids, and weight 0 for experts of other ranks.

    Without it they index the local experts with global ids: expert parallel reads past the weights and segfaults (bf16)
    or is refused (int8, int4).
    """
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    for name in ("CPUUnquantizedExperts", "CPUExpertsInt8", "CPUExpertsInt4"):
        owner = existing(cpu_moe, name)
        owner.apply = _with_local_experts(existing(owner, "apply"))
        owner.supports_expert_map = lambda self: True


def _with_local_experts(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def apply(
        self: Any,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        *rest: Any,
        **options: Any,
    ) -> None:
        if expert_map is not None:
            local = expert_map[topk_ids.long()]
            topk_weights = topk_weights.masked_fill(local < 0, 0.0)
            topk_ids = local.clamp_min(0).to(topk_ids.dtype)
        original(
            self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
            *rest, **options,
        )  # fmt: skip

    return apply


def quantized_experts_without_amx() -> None:
    """Let the int8 and int4 CPU experts run on x86 with AVX512-VNNI.

    Without it they demand AMX, and a W8A8 or W4A16 MoE model is refused ("No Int8 MoE backend supports ...") on CPUs
    that have none, although the kernel takes its VNNI path there. Below VNNI it aborts the process, so the gate stays.
    """
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    vnni = existing(torch.cpu, "_is_vnni_supported")
    for name in ("CPUExpertsInt8", "CPUExpertsInt4"):
        owner = existing(cpu_moe, name)
        original = existing(owner, "_supports_current_device")
        owner._supports_current_device = staticmethod(functools.partial(_either, original, vnni))


def quantized_experts_of_any_routing() -> None:
    """Let the int8 and int4 CPU experts follow every router.

    Without it they know plain softmax alone and refuse DeepSeek's, although the router is a module of its own that
    hands them expert ids and weights (the class for bfloat16 says so of itself).
    """
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    for name in ("CPUExpertsInt8", "CPUExpertsInt4"):
        owner = existing(cpu_moe, name)
        existing(owner, "_supports_routing_method")
        owner._supports_routing_method = staticmethod(lambda routing_method, weight_key, activation_key: True)


def _either(first: Callable[[], bool], second: Callable[[], bool]) -> bool:
    return first() or second()


def int4_experts_of_any_group_size() -> None:
    """Let the int4 CPU experts take weights in groups of any size that their tiles divide.

    Without it they know the key of one scheme only, and W4A16 in groups of 32 finds no backend.
    """
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    owner = existing(cpu_moe, "CPUExpertsInt4")
    existing(owner, "_supports_quant_scheme")
    owner._supports_quant_scheme = staticmethod(
        lambda weight_key, activation_key: activation_key is None and "uint4b8" in str(weight_key)
    )


def int8_products_keep_their_scales() -> None:
    """Keep the scales of an int8 product as long as its oneDNN handler.

    Without it weights that are written anew in place (merged adapters) give NaN on CPUs without AMX: the handler has
    nothing but the address of scales that the reload frees.
    """
    from vllm import _custom_ops

    original = existing(_custom_ops, "create_onednn_scaled_mm")

    @functools.wraps(original)
    def create_onednn_scaled_mm(weight: torch.Tensor, weight_scales: torch.Tensor, *rest: Any, **options: Any) -> Any:
        scales = weight_scales.detach().clone()
        handler = original(weight, scales, *rest, **options)
        handler.scales_kept = scales
        return handler

    _custom_ops.create_onednn_scaled_mm = create_onednn_scaled_mm


def latent_attention_without_amx() -> None:
    """Leave the up projection of latent attention an empty weight once oneDNN has the int8 one.

    Without it a W8A8 DeepSeek does not start on CPUs without AMX: the attention asks the layer for its answers to unit
    vectors, and asks the weight, which is None, for its device.
    """
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel

    original = existing(CPUInt8ScaledMMLinearKernel, "process_weights_for_onednn")

    @functools.wraps(original)
    def process_weights_for_onednn(self: Any, layer: Any) -> None:
        original(self, layer)
        # vLLM's own mark of this layer.
        if getattr(layer, "_cpu_skip_gemm_dispatch", False):
            layer.weight = torch.nn.Parameter(torch.empty(0, dtype=layer.params_dtype), requires_grad=False)

    CPUInt8ScaledMMLinearKernel.process_weights_for_onednn = process_weights_for_onednn


def cpu_communicator_gathers_unequal_parts() -> None:
    """Give the CPU communicator all_gatherv and reduce_scatterv, for any group that has more than one rank.

    Without them data parallel with expert parallel raises NotImplementedError at the first expert layer: the tokens of
    all data-parallel ranks are gathered for the experts, and their outputs summed and handed back.
    """
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    for name in ("all_gatherv", "reduce_scatterv"):
        existing(CpuCommunicator, name)
        if name in vars(CpuCommunicator):
            raise RuntimeError(f"vLLM's CpuCommunicator has its own {name} now: drop the patch of qerl_rl.rollout")
    CpuCommunicator.all_gatherv = _all_gatherv
    CpuCommunicator.reduce_scatterv = _reduce_scatterv


def _all_gatherv(
    self: Any, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """Concatenate the ranks' tensors [sizes[rank], ...] along dim 0; a list is gathered in one message."""
    if dim != 0:
        raise NotImplementedError(f"all_gatherv along dim {dim}")
    tensors = input_ if isinstance(input_, list) else [input_]
    rows = tensors[0].shape[0]
    sizes = sizes or [rows] * self.world_size
    widths = [tensor.element_size() * math.prod(tensor.shape[1:]) for tensor in tensors]
    padded = torch.zeros(max(sizes), sum(widths), dtype=torch.uint8)
    for tensor, part in zip(tensors, padded.split(widths, dim=1), strict=True):
        part[:rows] = tensor.contiguous().view(torch.uint8).view(rows, part.shape[1])
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=self.device_group)
    whole = torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
    outputs = [
        part.contiguous().view(tensor.dtype).view(-1, *tensor.shape[1:])
        for tensor, part in zip(tensors, whole.split(widths, dim=1), strict=True)
    ]
    return outputs if isinstance(input_, list) else outputs[0]


def _reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
    """Sum the ranks' tensors [sum(sizes), ...] and keep this rank's sizes[rank] rows."""
    if dim % input_.dim() != 0:
        raise NotImplementedError(f"reduce_scatterv along dim {dim}")
    total = input_.contiguous().clone()
    dist.all_reduce(total, group=self.device_group)
    sizes = sizes or [total.shape[0] // self.world_size] * self.world_size
    start = sum(sizes[: self.rank_in_group])
    return total[start : start + sizes[self.rank_in_group]].clone()


def rotary_of_parts_of_heads() -> None:
    """Give the CPU kernel of rotary embedding rows of heads that follow each other.

    Without it latent attention without YaRN is wrong: it hands over a slice of each head, [tokens, heads, width], of
    which the kernel, that counts heads by the last dimension, turns the first. (With YaRN vLLM computes in torch.)
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    original = existing(RotaryEmbedding, "forward_cpu")

    @functools.wraps(original)
    def forward_cpu(self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None) -> Any:
        if query.dim() != 3:
            return original(self, positions, query, key)
        rows = [None if x is None else x.flatten(1).contiguous() for x in (query, key)]
        turned = original(self, positions, *rows)
        return tuple(x if x is None else x.view(was.shape) for x, was in zip(turned, (query, key), strict=True))

    RotaryEmbedding.forward_cpu = forward_cpu


def numa_policy_left_alone() -> None:
    """Don't let the engine set this process' memory policy.

    Without it every later allocation of the process, the trainer's too, is bound strictly to one NUMA node, and a
    warning says so on stderr.
    """
    existing(torch.ops._C, "init_cpu_memory_env")
    torch.ops._C.init_cpu_memory_env = lambda nodes: None


def kernels_are_found_beside_numba() -> None:
    """Let llvmlite's library have no `__dict__`.

    Without it no engine starts once numba is imported: vLLM looks for its kernels in the `__dict__` of everything that
    a module names, and this library makes a function of every name that it is asked for.
    """
    from llvmlite.binding import ffi

    library = type(ffi.lib)
    original = existing(library, "__getattr__")

    def __getattr__(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return original(self, name)

    library.__getattr__ = __getattr__


PATCHES: dict[str, tuple[Callable[[], None], ...]] = {
    "cpu": (
        unique_shared_memory_names,
        unlink_shared_memory_early,
        unlink_message_queues_early,
        cpu_experts_honour_expert_map,
        quantized_experts_without_amx,
        quantized_experts_of_any_routing,
        int4_experts_of_any_group_size,
        int8_products_keep_their_scales,
        latent_attention_without_amx,
        cpu_communicator_gathers_unequal_parts,
        numa_policy_left_alone,
        norms_in_one_pass,
        experts_on_tiles,
        rotary_of_parts_of_heads,
        partial_prompts_draw_from_spare_generators,
        kernels_are_found_beside_numba,
    ),
    "910": (unlink_message_queues_early,),
    "a5": (unlink_message_queues_early,),
}
"""By a column of quant/platforms.py. vllm-ascend has collectives of unequal parts, expert maps and int8 and int4
experts of its own, and patches vLLM itself when it is imported; nothing else of the CPU's list applies there."""
