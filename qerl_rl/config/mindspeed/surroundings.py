"""What a run of MindSpeed-RL's stands on: model, data, rewards, environment variables, profiler."""

from __future__ import annotations

from pathlib import Path

import yaml

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.mindspeed.draft import Draft
from qerl_rl.config.mindspeed.tables import ACTOR, CRITIC, PROFILER, RL
from qerl_rl.data.packed import is_packed

_TABLES = (".jsonl", ".json", ".parquet", ".arrow", ".csv")
_ENVIRONMENT = "configs/envs/runtime_env.yaml"
_EXPANDABLE = "expandable_segments:True"
LEFT_OUT = {
    "VLLM_VERSION": "the installed vLLM knows its own version",
    "VLLM_DP_SIZE": "rollout.data_parallel says it",
    "VLLM_USE_V1": "there is no other engine",
}
"""Variables that would contradict what the launch file says, by why they are not set."""


def model(draft: Draft) -> None:
    """The weights are those of the HF folder whose tokenizer they name: Megatron's own checkpoints are not read."""
    path = draft.source.typed(ACTOR, "tokenizer_name_or_path", str, "")
    draft.put("model.path", path, ACTOR, "tokenizer_name_or_path")
    for section, instead in ((ACTOR, "model.path"), (CRITIC, "critic.path")):
        if draft.source.name_of(section, "load") and (section == ACTOR or draft.source.has(CRITIC)):
            sentence = f"Megatron checkpoints are not read: the weights are those of {path or 'model.path'}"
            draft.differ(section, "load", f"{sentence}; set {instead}=FOLDER to a Hugging Face folder of them", instead)
    if draft.source.get(ACTOR, "num_experts") is None and draft.source.get(ACTOR, "model"):
        fix = "is a dense model (no num_experts): name a model file with experts, and its folder as model.path"
        draft.fault(ACTOR, "model", fix, "model.path")


def data(draft: Draft) -> None:
    """What their preprocess_data.py has written (PREFIX_packed_..._document.bin), or raw prompts; pairs only raw."""
    path, raw = draft.source.typed(ACTOR, "data_path", str, ""), "data.train_path"
    dpo = draft.value("algorithm.name") == "dpo"
    if not path.endswith(_TABLES) and (dpo or not is_packed(path)):
        problem = "preprocessed pairs are not read" if dpo else f"there is no {path}_packed_input_ids_document.idx"
        fields = "data.chosen_field and data.rejected_field" if dpo else "data.answer_field"
        fix = f"{problem}; set {raw}=FILE to what they were made from (`input` of configs/datasets/*.yaml),"
        draft.fault(ACTOR, "data_path", f"{fix} data.prompt_field, {fields} to its fields (`map_keys`)", raw)
    draft.put(raw, path, ACTOR, "data_path")
    if not dpo:
        # Theirs leave longer prompts out.
        draft.put("data.max_prompt_tokens", draft.count(RL, "max_prompt_length", 512), RL, "max_prompt_length")


def rewards(draft: Draft) -> None:
    """Verifiers by their names, which our rewards know, with their weights."""
    functions = draft.source.typed(RL, "verifier_function", list, ["base_acc"])
    weights = draft.source.typed(RL, "verifier_weight", list, [1.0])
    if len(functions) != len(weights):
        draft.fault(RL, "verifier_weight", "write one weight for each of verifier_function", "reward.functions")
        return
    draft.put("reward.functions", dict(zip(map(str, functions), weights, strict=True)), RL, "verifier_function")


def environment(draft: Draft) -> None:
    """The variables of runtime_env.yaml, but for those that say what the launch file says, or break its swaps.

    Raises: ConfigError when the file that rl_config.runtime_env_path names is missing or has no env_vars.
    """
    source, key = draft.source, "runtime_env_path"
    written = source.typed(RL, key, str, _ENVIRONMENT)
    # Theirs is relative to the repository, in which launch files lie in configs/.
    places = [source.path.parent.parent / written, Path(written)]
    found = next((place for place in places if place.is_file()), None)
    variables: dict[str, str] = {}
    if found:
        variables = _variables(found)
    elif source.name_of(RL, key):
        fix = f"set rl_config.{key} to an existing file, or cluster.environment instead"
        raise ConfigError(
            f"there is no {places[0]} of rl_config.{key}={written}.", fix=fix, where=source.where(f"{RL}.{key}")
        )
    kept = {name: value for name, value in variables.items() if name not in LEFT_OUT}
    for name in sorted(variables.keys() & LEFT_OUT.keys()):
        draft.differs.append(f"{name} of {found} is not set: {LEFT_OUT[name]}")
    if _EXPANDABLE in kept.get("PYTORCH_NPU_ALLOC_CONF", ""):
        del kept["PYTORCH_NPU_ALLOC_CONF"]
        reason = "memory that is given back between phases must not lie in expandable segments"
        draft.differs.append(f"PYTORCH_NPU_ALLOC_CONF={_EXPANDABLE} of {found} is not set: {reason}")
    kept["HCCL_BUFFSIZE"] = str(draft.count(RL, "hccl_buffersize", 256))
    draft.put("cluster.environment", kept, RL, key)


def _variables(file: Path) -> dict[str, str]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        problem = f"{file} is not readable YAML: {' '.join(str(error).split())}."
        raise ConfigError(problem, fix="correct the YAML", where=str(file)) from None
    variables = values.get("env_vars") if isinstance(values, dict) else None
    if not isinstance(variables, dict):
        raise ConfigError(f"{file} has no env_vars.", fix="write `env_vars:` with NAME: 'value' lines", where=str(file))
    return {str(name): str(value) for name, value in variables.items()}


_STAGES = {
    "actor_generate": "rollout",
    "actor_compute_log_prob": "old_log_probs",
    "reference_compute_log_prob": "reference_log_probs",
    "actor_update": "update",
    "critic_compute_values": "values",
    "critic_update": "critic_update",
    "all": "all",
}
"""Their names of what is profiled, and ours."""


def profiler(draft: Draft) -> None:
    """Steps from the first up to, not including, the last; both count them from 1. Theirs is Ascend's profiler."""
    if not draft.source.has(PROFILER) or not draft.switch(PROFILER, "profile"):
        return
    first = max(draft.count(PROFILER, "profile_step_start", 1), 1)
    last = draft.count(PROFILER, "profile_step_end", first + 1)
    draft.put("profiler.steps", list(range(first, max(last, first + 1))), PROFILER, "profile_step_start")
    stage = draft.source.get(PROFILER, "stage", "all")
    if stage not in _STAGES:
        draft.fault(PROFILER, "stage", f"set it to one of {', '.join(_STAGES)}", "profiler.stages")
    else:
        draft.put("profiler.stages", [_STAGES[stage]], PROFILER, "stage")
    ranks = draft.source.get(PROFILER, "profile_ranks", "all")
    if ranks == "all":
        ranks = list(range(draft.value("cluster.workers") or 1))
    draft.put("profiler.ranks", ranks, PROFILER, "profile_ranks")
    draft.put("profiler.kind", "msprof", PROFILER, "profile")
    level = draft.source.typed(PROFILER, "profile_level", str, "level0").removeprefix("level_")
    draft.put("profiler.level", level, PROFILER, "profile_level")
    draft.put("profiler.memory", draft.switch(PROFILER, "profile_with_memory"), PROFILER, "profile_with_memory")
    draft.put("profiler.shapes", draft.switch(PROFILER, "profile_record_shapes"), PROFILER, "profile_record_shapes")
    draft.put(
        "profiler.export", draft.source.get(PROFILER, "profile_export_type", "text"), PROFILER, "profile_export_type"
    )
    draft.put("profiler.analyse", draft.switch(PROFILER, "profile_analysis"), PROFILER, "profile_analysis")


def quantization(draft: Draft, folder: str) -> None:
    """Their files don't say how weights are stored: the checkpoint does."""
    # Imported here, since reading checkpoints takes torch, which reading a launch file does not.
    from qerl_rl.quant.checkpoint import stored_format

    has_weights = Path(folder, "config.json").is_file() and any(Path(folder).glob("*.safetensors"))
    draft.put("quant.format", stored_format(folder) if has_weights else "none", ACTOR, "tokenizer_name_or_path")
