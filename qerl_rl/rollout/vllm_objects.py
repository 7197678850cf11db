"""vLLM's objects that this package works with and never imports: what a name stands for, and in which class.

`model_runner` is the way to the one that computes. The tables are read by tests/rollout/ascend/test_reliances.py, which
looks up each attribute that the code takes from these names, and the arguments that it calls them with, in the sources
of both vLLM versions and of vllm-ascend.
"""

from __future__ import annotations

from typing import Any


def engine_worker(engine: Any) -> Any:
    """What holds weights and KV cache in this process, for a vLLM LLMEngine without processes of its own."""
    return engine.model_executor.driver_worker.worker


def model_runner(engine: Any) -> Any:
    """What computes in this process."""
    return engine_worker(engine).model_runner


CPU, NPU = "vllm 0.32.0 on a CPU", "vllm and vllm-ascend 0.23.0"

KINDS: dict[str, dict[str, str]] = {
    "engine": dict.fromkeys((CPU, NPU), "vllm.v1.engine.llm_engine:LLMEngine"),
    "executor": dict.fromkeys((CPU, NPU), "vllm.v1.executor.uniproc_executor:ExecutorWithExternalLauncher"),
    "wrapper": dict.fromkeys((CPU, NPU), "vllm.v1.worker.worker_base:WorkerWrapperBase"),
    "worker": {CPU: "vllm.v1.worker.cpu_worker:CPUWorker", NPU: "vllm_ascend.worker.worker:NPUWorker"},
    "runner": {
        CPU: "vllm.v1.worker.cpu_model_runner:CPUModelRunner",
        NPU: "vllm_ascend.worker.model_runner_v1:NPUModelRunner",
    },
    "client": dict.fromkeys((CPU, NPU), "vllm.v1.engine.core_client:InprocClient"),
    "core": dict.fromkeys((CPU, NPU), "vllm.v1.engine.core:EngineCore"),
    "scheduler": dict.fromkeys((CPU, NPU), "vllm.v1.core.sched.scheduler:Scheduler"),
    "scheduled": dict.fromkeys((CPU, NPU), "vllm.v1.core.sched.output:SchedulerOutput"),
    "cache manager": dict.fromkeys((CPU, NPU), "vllm.v1.core.kv_cache_manager:KVCacheManager"),
    "request": dict.fromkeys((CPU, NPU), "vllm.v1.request:Request"),
    "configuration": dict.fromkeys((CPU, NPU), "vllm.config.vllm:VllmConfig"),
    "model configuration": dict.fromkeys((CPU, NPU), "vllm.config.model:ModelConfig"),
    "outputs": dict.fromkeys((CPU, NPU), "vllm.v1.engine.output_processor:OutputProcessor"),
    "request state": dict.fromkeys((CPU, NPU), "vllm.v1.engine.output_processor:RequestState"),
    "request output": dict.fromkeys((CPU, NPU), "vllm.outputs:RequestOutput"),
    "sample": dict.fromkeys((CPU, NPU), "vllm.outputs:CompletionOutput"),
    "log-probs": dict.fromkeys((CPU, NPU), "vllm.logprobs:FlatLogprobs"),
    "sampler": dict.fromkeys((CPU, NPU), "vllm.v1.sample.sampler:Sampler"),
    "batch": dict.fromkeys((CPU, NPU), "vllm.v1.worker.gpu_input_batch:InputBatch"),
    "cache configuration": dict.fromkeys((CPU, NPU), "vllm.config.cache:CacheConfig"),
    "cache groups": dict.fromkeys((CPU, NPU), "vllm.v1.kv_cache_interface:KVCacheConfig"),
    "ascend worker": {NPU: "vllm_ascend.worker.worker:NPUWorker"},
    "allocation": {NPU: "vllm_ascend.device_allocator.camem:AllocationData"},
    "experts' input": {NPU: "vllm_ascend.ops.fused_moe.moe_stage_contracts:MoEMlpComputeInput"},
    "experts' weights": {NPU: "vllm_ascend.ops.fused_moe.moe_stage_contracts:MoEWeights"},
    "ascend configuration": {NPU: "vllm_ascend.ascend_config:AscendConfig"},
    "capturer": dict.fromkeys(
        (CPU, NPU), "vllm.model_executor.layers.fused_moe.routed_experts_capturer:RoutedExpertsCapturer"
    ),
}
"""The class of each kind of object, as module:class, where the engine runs."""

PARTS = {
    "engine.model_executor": "executor",
    "executor.driver_worker": "wrapper",
    "wrapper.worker": "worker",
    "worker.model_runner": "runner",
    "engine.engine_core": "client",
    "client.engine_core": "core",
    "core.scheduler": "scheduler",
    "scheduler.kv_cache_manager": "cache manager",
    "engine.vllm_config": "configuration",
    "configuration.model_config": "model configuration",
    "engine.output_processor": "outputs",
    "ascend worker.vllm_config": "configuration",
    "experts' input.weights": "experts' weights",
    "runner.sampler": "sampler",
    "runner.input_batch": "batch",
    "runner.cache_config": "cache configuration",
    "runner.kv_cache_config": "cache groups",
    "request output.prompt_logprobs": "log-probs",
}
"""The kind of an attribute of an object of a kind."""

NAMES: dict[str, dict[str, str]] = {
    "vllm_objects.py": {"engine": "engine"},
    "vllm_engine.py": {
        "self._engine": "engine",
        "worker": "worker",
        "runner": "runner",
        "output": "request output",
    },
    "engine_memory.py": {"worker": "worker", "runner": "runner"},
    "routing.py": {
        "engine": "engine",
        "runner": "runner",
        "scheduler": "scheduler",
        "self._scheduler": "scheduler",
        "scheduler_output": "scheduled",
        "capturer": "capturer",
        "request": "request",
        "sample": "sample",
    },
    "score.py": {"engine": "engine", "sampler": "sampler", "output": "request output"},
    "collector.py": {"engine": "engine", "sample": "sample", "state": "request state"},
    "partial_prefill.py": {"self": "runner"},
    "repack.py": {"vllm_config": "configuration"},
    "weight_target.py": {"vllm_config": "configuration"},
    "merge.py": {"vllm_config": "configuration"},
    "ascend/sleep.py:SleepMode": {"self._worker": "ascend worker", "each": "allocation"},
    "ascend/decode.py": {
        "mlp_compute_input": "experts' input",
        "given": "experts' input",
        "weights": "experts' weights",
    },
    "ascend/rewrite.py": {"config": "ascend configuration", "vllm_config": "configuration"},
}
"""Names in the files of this package (or in one class or function of a file) that stand for an object of vLLM's, and
its kind. What our code itself puts on such an object begins with qerl_."""

ON_CPU = (
    "cpu_norm.py",
    "partial_prefill.py",
    "expert_path.py",
    "int8_experts.py",
    "routing.py:record_on_cpu",
    "routing.py:SlotRecords",
)
"""Files, or functions and classes of a file, that run on a CPU alone; so do the patches that PATCHES has for it."""
