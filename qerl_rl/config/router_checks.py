"""What must hold between the keys of train that concern routers and dispatchers, and others."""

from __future__ import annotations

from qerl_rl.config.correction_checks import Fault
from qerl_rl.config.schema import Config

KIND, COEFFICIENT = "train.router_load_balancing", "train.router_aux_loss_coefficient"


def router_fault(config: Config) -> Fault:
    """The first value, or pair of values, that can't work."""
    return _balancing_loss(config) or _replay(config) or _groups(config) or _dispatcher(config)


def _balancing_loss(config: Config) -> Fault:
    train = config.train
    balances = train.router_load_balancing == "aux_loss"
    if train.router_aux_loss_coefficient and not balances:
        problem = f"{COEFFICIENT}={train.router_aux_loss_coefficient}, but {KIND}={train.router_load_balancing} has no"
        return COEFFICIENT, f"{problem} loss.", f"set {COEFFICIENT} to 0, or {KIND} to aux_loss"
    if balances and not train.router_aux_loss_coefficient:
        problem = f"{KIND}=aux_loss, but {COEFFICIENT}=0 leaves the loss without effect."
        return COEFFICIENT, problem, f"set {COEFFICIENT} above 0 (0.01 is usual), or {KIND} to auto"
    if balances and config.lora.rank:
        problem = f"{KIND}=aux_loss has no effect on routers: lora.rank={config.lora.rank} freezes them, and the loss"
        return KIND, f"{problem} would pull at the adapters alone.", f"set {KIND} to auto, or lora.rank to 0"
    return None


def _replay(config: Config) -> Fault:
    if config.train.router_load_balancing != "sinkhorn" or not config.router_replay.is_on:
        return None
    problem = f"{KIND}=sinkhorn only chooses experts, and router_replay.mode={config.router_replay.mode} takes those of"
    return KIND, f"{problem} the engine.", f"set {KIND} to auto, or router_replay.mode to disabled"


def _groups(config: Config) -> Fault:
    train = config.train
    for key in ("router_num_groups", "router_group_topk"):
        given = getattr(train, key)
        if given and train.router_load_balancing != "group_limited_greedy":
            problem = f"train.{key}={given}, but {KIND}={train.router_load_balancing} knows no groups."
            return f"train.{key}", problem, f"set train.{key} to 0, or {KIND} to group_limited_greedy"
    return None


def _dispatcher(config: Config) -> Fault:
    train, key = config.train, "train.token_dispatcher"
    if train.token_dispatcher != "alltoall_seq" or train.expert_tensor_parallel == train.tensor_parallel:
        return None
    problem = f"{key}=alltoall_seq splits the columns of tokens, and then experts, over train.tensor_parallel="
    problem = (
        f"{problem}{train.tensor_parallel} ranks, but train.expert_tensor_parallel={train.expert_tensor_parallel}."
    )
    fix = f"set {key} to alltoall, or train.expert_tensor_parallel to {train.tensor_parallel}"
    return key, problem, fix
