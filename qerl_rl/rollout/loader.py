"""vLLM's way to this repository's checkpoints: a model loader of its own."""

from __future__ import annotations

from typing import Any

import torch

from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.rollout.load_plan import LoadPlan, local_tensors
from qerl_rl.rollout.repack import packed_modules

LOAD_FORMAT = "qerl_rl"
_plans: dict[str, LoadPlan] = {}


def loader_options(plan: LoadPlan) -> dict[str, Any]:
    """The EngineArgs with which vLLM loads as `plan` says; none where all runs as it is stored, off a CPU.

    (vLLM's own loader knows layouts there that only its kernels have, and skips other ranks' experts likewise. Fused
    experts it reads for some families, of each in one order: they come from here.)
    """
    if plan.platform != "cpu" and plan.is_native:
        return {} if plan.is_described else {"hf_overrides": shown_config(plan)}
    _register_loader(plan)
    return {"load_format": LOAD_FORMAT, "hf_overrides": shown_config(plan)}


def _register_loader(plan: LoadPlan) -> None:
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    _plans[str(plan.reader.path)] = plan

    class PlannedLoader(BaseModelLoader):
        """Streams the tensors of a LoadPlan; of experts, those that this rank computes."""

        def download_model(self, model_config: Any) -> None:
            """Nothing: the folder is there."""

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            plan = _plans[model_config.model]
            model.load_weights(local_tensors(plan, foreign_experts(model, plan)))

    register_model_loader(LOAD_FORMAT)(PlannedLoader)


def foreign_experts(model: torch.nn.Module, plan: LoadPlan) -> frozenset[str]:
    """The modules of the checkpoint that are experts of other ranks."""
    architecture, foreign = MoeArchitecture.from_folder(plan.reader.path), set()
    for path, module in packed_modules(model).items():
        if path.endswith(".experts") and getattr(module, "expert_map", None) is not None:
            elsewhere = torch.nonzero(module.expert_map < 0).flatten().tolist()
            foreign |= {f"{path}.{expert}.{name}" for expert in elsewhere for name in architecture.expert_weight_names}
    return frozenset(foreign)


def shown_config(plan: LoadPlan) -> Any:
    """vLLM's hf_overrides: the config.json with what the plan lets the engine know of quantization."""
    described = plan.quantization_config()

    def override(config: Any) -> Any:
        if described is not None:
            config.quantization_config = described
        elif hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    return override
