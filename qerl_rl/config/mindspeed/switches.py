"""MindSpeed's and Megatron's own switches in a launch file of MindSpeed-RL: recomputation, stages, routers, and the
rest of train.mindspeed."""

from __future__ import annotations

from qerl_rl.config.mindspeed.draft import Draft
from qerl_rl.config.mindspeed.tables import ACTOR
from qerl_rl.config.mindspeed_checks import REFUSED
from qerl_rl.config.mindspeed_schema import MindSpeedConfig

_AS_THE_MODEL = (None, "none", "aux_loss", "seq_aux_loss", "noaux_tc")
"""Kinds of balancing that do not change which experts are chosen."""
_BALANCING = "moe_router_load_balancing_type"


def left_out(draft: Draft) -> None:
    """Name each switch that can't act here, with the reason that train.mindspeed has for it."""
    for name, refused in REFUSED.items():
        value = draft.source.get(ACTOR, name)
        is_layout = name in ("moe_tp_extend_ep", "context_parallel_size", "npu_deterministic")
        if value is not None and value != getattr(MindSpeedConfig, name) and not is_layout:
            draft.differ(ACTOR, name, f"left out: {refused.why}")


def recomputation(draft: Draft) -> None:
    """Which layers are computed again; their block counts layers of a stage, as ours does."""
    if draft.source.get(ACTOR, "recompute_granularity") != "full":
        return
    method = draft.source.typed(ACTOR, "recompute_method", str)
    if method is not None:
        draft.put("train.recompute_method", method, ACTOR, "recompute_method")
    draft.put("train.recompute_layers", draft.count(ACTOR, "recompute_num_layers", 1), ACTOR, "recompute_num_layers")


def stages(draft: Draft) -> None:
    """Layers of each pipeline stage, listed, or with empty layers (`noop_layers`) among them.

    Here only the first and the last may differ from the others, and nothing is empty.
    """
    key, count = "num_layer_list", draft.count(ACTOR, "pipeline_model_parallel_size", 1)
    if "train.pipeline_parallel" in draft.overridden or "train.layers_per_stage" in draft.overridden:
        return
    listed = _numbers(draft.source.get(ACTOR, key))
    if listed is None:
        key = "noop_layers"
        empty, layers = _numbers(draft.source.get(ACTOR, key)), draft.count(ACTOR, "num_layers", 0)
        if not empty or layers % count:
            return
        share = layers // count
        listed = [share - sum(layer // share == stage for layer in empty) for stage in range(count)]
    if len(listed) != count or min(listed) < 1:
        fix = f"give train.layers_per_stage, {count} numbers above 0 that add up to the model's layers"
        draft.fault(ACTOR, key, fix, "train.layers_per_stage")
        return
    if len(set(listed)) == 1:
        return
    alike = _alike(listed)
    written = ",".join(map(str, alike))
    if alike != listed:
        sentence = f"only the first and the last stage may differ here: train.layers_per_stage={written}"
        draft.differ(ACTOR, key, sentence, "train.layers_per_stage")
    draft.put("train.layers_per_stage", written, ACTOR, key)


def _numbers(written: object) -> list[int] | None:
    """Of a list, or of text with commas; None of anything else."""
    words = written.split(",") if isinstance(written, str) else written
    if isinstance(words, int):
        words = [words]
    if not isinstance(words, list) or not all(str(word).strip().isdigit() for word in words):
        return None
    return [int(word) for word in words]


def _alike(listed: list[int]) -> list[int]:
    """As many layers over as many stages, of which those in the middle are alike; the longest is as long as before."""
    if len(listed) < 3 or len(set(listed[1:-1])) == 1:
        return listed
    most = max(listed)
    ends = sum(listed) - most * (len(listed) - 2)
    while ends < 2:
        most -= 1
        ends = sum(listed) - most * (len(listed) - 2)
    # The last stage has the output layer beside its own.
    return [ends - ends // 2, *[most] * (len(listed) - 2), ends // 2]


def routers(draft: Draft) -> None:
    """How experts are chosen is the model's own; their loss for balance reaches routers that train."""
    kind, coefficient = draft.source.get(ACTOR, _BALANCING), draft.number(ACTOR, "moe_aux_loss_coeff", 0.0)
    if kind not in _AS_THE_MODEL:
        draft.put("train.router_load_balancing", kind, ACTOR, _BALANCING)
        return
    if not coefficient or kind in ("none", "noaux_tc"):
        return
    if draft.source.get(ACTOR, "lora_target_modules"):
        draft.differ(ACTOR, "moe_aux_loss_coeff", "left out: with adapters routers are frozen")
        return
    if kind == "seq_aux_loss":
        sentence = "the loss is taken over all tokens of a micro-batch, not over each sequence"
        draft.differ(ACTOR, _BALANCING, sentence, "train.router_load_balancing")
    draft.put("train.router_load_balancing", "aux_loss", ACTOR, _BALANCING)
    draft.put("train.router_aux_loss_coefficient", coefficient, ACTOR, "moe_aux_loss_coeff")
