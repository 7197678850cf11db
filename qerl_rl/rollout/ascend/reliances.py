"""What this package takes for granted of vllm-ascend that no import shows: attributes of objects it is handed.

`module:Class.attribute`, with the arguments passed where it is called. A test looks each up in the wheel.
"""

from __future__ import annotations

from qerl_rl.rollout.ascend.routing import QUANTIZED_EXPERTS

_WORKER = "vllm_ascend.worker.worker:NPUWorker"
_ALLOCATOR = "vllm_ascend.device_allocator.camem"
_METHODS = "vllm_ascend.quantization.methods"
_EXPERTS = "vllm_ascend.ops.fused_moe"
_MLP_INPUT = (
    "hidden_states",
    "dynamic_scale",
    "group_list",
    "group_list_type",
    "weights",
    "activation",
    "swiglu_limit",
)

RELIANCES = (
    f"{_WORKER}.sleep(level=)",
    f"{_WORKER}.wake_up(tags=)",
    f"{_ALLOCATOR}:CaMemAllocator.get_instance()",
    f"{_ALLOCATOR}:CaMemAllocator.pointer_to_data",
    f"{_ALLOCATOR}:CaMemAllocator.sleep_persistent_tag",
    f"{_ALLOCATOR}:AllocationData.tag",
    "vllm_ascend.ascend_config:get_ascend_config()",
    "vllm_ascend.ascend_config:AscendConfig.weight_nz_mode",
    "vllm_ascend.ascend_config:AscendConfig.enable_fused_mc2",
    "vllm_ascend.quantization.method_adapters:AscendLinearMethod.quant_method",
    "vllm_ascend.quantization.method_adapters:AscendFusedMoEMethod.quant_method",
    f"{_METHODS}.w8a8_dynamic:AscendW8A8DynamicLinearMethod",
    f"{_METHODS}.w8a8_dynamic:AscendW8A8DynamicFusedMoEMethod",
    f"{_METHODS}.w4a16:AscendW4A16FusedMoEMethod",
    *(
        f"{_METHODS}.w4a8:AscendW4A8DynamicFusedMoEMethod.{name}"
        for name in ("is_per_channel_weight", "quant_method", "tp_size")
    ),
    f"{_METHODS}.w8a8_mxfp8:AscendW8A8MXFP8DynamicLinearMethod",
    f"{_METHODS}.w8a8_mxfp8:AscendW8A8MXFP8DynamicFusedMoEMethod",
    "vllm_ascend.ops.linear:AscendUnquantizedLinearMethod",
    "vllm_ascend.ops.fused_moe.fused_moe:AscendUnquantizedFusedMoEMethod",
    f"{_METHODS}.w8a8_dynamic:AscendW8A8DynamicFusedMoEMethod.apply",
    "vllm_ascend.quantization.method_adapters:AscendFusedMoEMethod.apply",
    *(f"{_METHODS}.{name}:select_experts" for name in QUANTIZED_EXPERTS),
    f"{_EXPERTS}.moe_comm_method:MoECommMethod._apply_mlp(1)",
    *(f"{_EXPERTS}.moe_stage_contracts:MoEMlpComputeInput.{name}" for name in _MLP_INPUT),
    *(f"{_EXPERTS}.moe_stage_contracts:MoEWeights.{name}" for name in ("w1", "w2", "w1_scale", "w2_scale")),
    "vllm_ascend.ops.linear:AscendQKVParallelLinear.custom_op",
    f"{_WORKER}.compile_or_warm_up_model()",
    "vllm_ascend.attention.mla_v1:AscendMLAImpl.kv_b_proj",
    "vllm_ascend.attention.mla_v1:AscendMLAImpl.process_weights_after_loading(1)",
)
