"""What must hold on Ascend before a process starts; each rule says what breaks without it and how to mend it.

Here are those of the environment; `ascend_engine_rules` has those of the section rollout.
Sources: vllm-ascend 0.23.0 (platform.py, worker.py, camem.py, ascend_forward_context.py), CANN's descriptions of HCCL's
environment variables and of aclnnMoeDistributeDispatchV2, torch_npu's of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from qerl_rl.config.ascend_schema import VARIABLE_KEYS
from qerl_rl.config.errors import ConfigError
from qerl_rl.doctor.findings import NETWORK_VARIABLES, unknown_interfaces
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.platform.ascend_engine_rules import ENGINE_RULES
from qerl_rl.platform.ascend_setting import MC2_TOKENS, Fault, Setting, named, wrong_variable

DEFAULT_BUFFER_MB = 200
"""HCCL_BUFFSIZE where it is not set."""
STREAMS = 1920
"""Of a card's 2,048, those that captured graphs may hold."""
LARGEST_CAPTURE = 512
"""Tokens of the largest batch that is captured where nothing is said."""
HCCL_PORTS = 16
"""Ports that HCCL takes from HCCL_IF_BASE_PORT on."""
_AS_NUMBER = {"true": "1", "false": "0"}


def check_rules(setting: Setting, locate: Callable[[str], str]) -> None:
    """Raise ConfigError for the first rule that does not hold."""
    for rule in RULES:
        fault = rule(setting)
        if fault:
            key, problem, fix = fault
            raise ConfigError(problem, fix=fix, where=locate(key))


def task_queue(setting: Setting) -> Fault:
    """The second level of torch_npu's task queue reorders launches, which a graph that is being captured can't hold."""
    value, eager = setting.environment.get("TASK_QUEUE_ENABLE", "1"), setting.config.rollout.enforce_eager
    if value not in ("0", "1", "2"):
        return wrong_variable("TASK_QUEUE_ENABLE", value, "is no level of the task queue", "0, 1 or 2")
    if value == "2" and not eager:
        problem = "TASK_QUEUE_ENABLE=2 with rollout.enforce_eager=false: graphs can't be captured."
        return "rollout.enforce_eager", problem, f"set {named('TASK_QUEUE_ENABLE')} to 1, or enforce_eager to true"
    return None


def launch_blocking(setting: Setting) -> Fault:
    """vllm-ascend raises: launches that wait for their end are none that a graph could hold."""
    name, eager = "ASCEND_LAUNCH_BLOCKING", setting.config.rollout.enforce_eager
    if eager or setting.environment.get(name, "0") != "1":
        return None
    problem = f"{name}=1 with rollout.enforce_eager=false: graphs can't be captured."
    return "rollout.enforce_eager", problem, f"set {named(name)} to 0, or enforce_eager to true"


def expandable_segments(setting: Setting) -> Fault:
    """Memory in expandable segments can't be given back by vLLM's sleep mode, whose allocator asserts it."""
    name, key = "PYTORCH_NPU_ALLOC_CONF", "rollout.ascend.sleep_mode"
    value = setting.environment.get(name, "")
    if "expandable_segments:True" not in value or not setting.config.rollout.ascend.sleep_mode:
        return None
    problem = f"{name}={value} with {key}=true: the engine can't give memory back."
    return key, problem, f"take expandable_segments:True out of {named(name)}"


def same_as_the_keys(setting: Setting) -> Fault:
    """A variable that a key of rollout.ascend decides is set by it in each worker, whatever the launch file says."""
    for name, value in setting.config.rollout.ascend.variables.items():
        given = setting.environment.get(name)
        if given is not None and given.lower() != value and given != _AS_NUMBER.get(value):
            problem = f"{name}={given} contradicts the section rollout.ascend, which stands for {value}."
            fix = f"take {name} out of cluster.environment, and set rollout.ascend.{VARIABLE_KEYS[name]} instead"
            return f"cluster.environment.{name}", problem, fix
    return None


def expansion_mode(setting: Setting) -> Fault:
    """A mode that HCCL does not know is taken for its slowest."""
    value, known = setting.environment.get("HCCL_OP_EXPANSION_MODE"), ("AI_CPU", "AIV", "HOST", "HOST_TS")
    if value is None or value in known:
        return None
    return wrong_variable("HCCL_OP_EXPANSION_MODE", value, "is no mode of HCCL", "AIV")


def buffer_size(setting: Setting) -> Fault:
    """MC2 exchanges tokens through HCCL's buffer; beyond its end the card reports an address out of range."""
    name, text = "HCCL_BUFFSIZE", setting.environment.get("HCCL_BUFFSIZE")
    size = DEFAULT_BUFFER_MB if text is None else setting.number(name)
    if not size:
        return wrong_variable(name, text, "is no size in MB", f"{DEFAULT_BUFFER_MB} or more")
    if not setting.has_mc2:
        return None
    needed = mc2_buffer_mb(setting.architecture, setting.expert_ranks, setting.config.rollout.max_sequences)
    if size >= needed:
        return None
    problem = f"is too small for {setting.expert_ranks} ranks of experts"
    return wrong_variable(name, text, problem, f"{needed} or more")


def mc2_buffer_mb(architecture: MoeArchitecture, ranks: int, sequences: int) -> int:
    """MB of HCCL's buffer that MC2 needs: twice what its ranks send and get back (aclnnMoeDistributeDispatchV2).

    2 * (local experts * tokens * ranks * align512(align32(2 h) + 64) + (k + shared experts) * tokens * align512(2 h)).
    """
    tokens, row = min(sequences, MC2_TOKENS), 2 * architecture.hidden_size
    sent = architecture.experts // ranks * tokens * ranks * _aligned(_aligned(row, 32) + 64, 512)
    # Shared experts are computed where the token is.
    returned = architecture.experts_per_token * tokens * _aligned(row, 512)
    return math.ceil(2 * (sent + returned) / (1 << 20))


def port(setting: Setting) -> Fault:
    """Ports that the kernel may give away meanwhile make a start fail now and then."""
    name, text = "HCCL_IF_BASE_PORT", setting.environment.get("HCCL_IF_BASE_PORT")
    if text is None:
        return None
    first, (low, high) = setting.number(name), setting.ephemeral_ports
    if first is None or not 1024 <= first <= 65535 - HCCL_PORTS:
        return wrong_variable(name, text, "is no port", f"1024 to {65535 - HCCL_PORTS}")
    if first + HCCL_PORTS > low and first <= high:
        problem = f"lies among the ports {low} to {high} that outgoing connections get"
        return wrong_variable(name, text, problem, f"{low - HCCL_PORTS} or less")
    return None


def network(setting: Setting) -> Fault:
    """A name that no interface has makes the first collective wait until its time is up."""
    for name in NETWORK_VARIABLES:
        value = setting.environment.get(name)
        wrong = unknown_interfaces(value, setting.interfaces) if value else []
        if wrong:
            problem = f"names no network interface of this machine ({', '.join(setting.interfaces)})"
            return wrong_variable(name, value, problem, "one of these")
    return None


def stream_budget(setting: Setting) -> Fault:
    """Unless collectives run on the vector cores, a captured graph holds a stream a layer and a group of ranks."""
    rollout, mode = setting.config.rollout, setting.environment.get("HCCL_OP_EXPANSION_MODE")
    if rollout.enforce_eager or mode == "AIV":
        return None
    groups = sum(size > 1 for size in (rollout.tensor_parallel, rollout.data_parallel, setting.expert_ranks))
    fitting = STREAMS // ((setting.architecture.layers + 1) * (1 + groups))
    largest = rollout.ascend.max_capture_size or min(rollout.max_sequences, LARGEST_CAPTURE)
    wanted = len(rollout.ascend.capture_sizes or {1, 2, 4, *range(8, largest + 1, 8)})
    if wanted <= fitting:
        return None
    problem = f"{wanted} batch sizes are to be captured, and a card has streams for {fitting} with {groups} groups of"
    fix = f"set {named('HCCL_OP_EXPANSION_MODE')} to AIV, or rollout.ascend.capture_sizes to {fitting} sizes or fewer"
    return "rollout.enforce_eager", f"{problem} ranks.", fix


def installed_engine(setting: Setting) -> Fault:
    """A checkout that is found before the installed vLLM is another version than vllm-ascend was built for."""
    if setting.shadow is None:
        return None
    return "rollout", f"{setting.shadow}.", "uninstall the checkout, or take its folder out of PYTHONPATH"


RULES = (
    task_queue,
    launch_blocking,
    expandable_segments,
    same_as_the_keys,
    expansion_mode,
    buffer_size,
    port,
    network,
    stream_budget,
    installed_engine,
    *ENGINE_RULES,
)


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to
