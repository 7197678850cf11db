"""What must hold on Ascend before a process starts; each rule says what breaks without it and how to mend it.

Sources: vllm-ascend 0.23.0 (platform.py, worker.py, camem.py, ascend_forward_context.py), CANN's descriptions of HCCL's
environment variables and of aclnnMoeDistributeDispatchV2, torch_npu's of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import Config
from qerl_rl.doctor.findings import NETWORK_VARIABLES, unknown_interfaces
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.quant.platforms import CONVERT, support

Fault = tuple[str, str, str] | None
"""The key (of the launch file, or a variable's name), what is wrong with it, and the fix."""

CARD = "910"
"""Atlas A2 and A3 in the table of formats; which card it is, only the card can say."""
MC2_RANKS = 16
"""Ranks of experts from which on dispatch and products are fused (MC2), and the experts of a rank up to which."""
MC2_EXPERTS = 24
MC2_TOKENS = 512
"""Tokens of a rank that MC2 takes at once."""
DEFAULT_BUFFER_MB = 200
"""HCCL_BUFFSIZE where it is not set."""
STREAMS = 1920
"""Of a card's 2,048, those that captured graphs may hold."""
HCCL_PORTS = 16
"""Ports that HCCL takes from HCCL_IF_BASE_PORT on."""


@dataclass(frozen=True)
class Setting:
    """environment: of a worker. attention: quant.format of each kind of attention weight in the checkpoint.

    ephemeral_ports: first and last of what outgoing connections get. shadow: what hides an engine, or None.
    """

    config: Config
    architecture: MoeArchitecture
    environment: Mapping[str, str]
    attention: frozenset[str] = frozenset()
    interfaces: tuple[str, ...] = ()
    ephemeral_ports: tuple[int, int] = (32768, 60999)
    shadow: str | None = None

    @property
    def expert_ranks(self) -> int:
        """Ranks that share the experts of the rollout engine."""
        rollout = self.config.rollout
        return rollout.tensor_parallel * rollout.data_parallel if rollout.expert_parallel else 1

    @property
    def has_mc2(self) -> bool:
        """Whether vllm-ascend fuses the experts' dispatch with their products."""
        return self.expert_ranks >= MC2_RANKS and self.architecture.experts // self.expert_ranks <= MC2_EXPERTS

    def number(self, name: str) -> int | None:
        """A variable that is a whole number; None where it is not set or is none."""
        text = self.environment.get(name, "")
        return int(text) if text.isdecimal() else None


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
        return _variable("TASK_QUEUE_ENABLE", value, "is no level of the task queue", "0, 1 or 2")
    if value == "2" and not eager:
        problem = "TASK_QUEUE_ENABLE=2 with rollout.enforce_eager=false: graphs can't be captured."
        return "rollout.enforce_eager", problem, f"set {_named('TASK_QUEUE_ENABLE')} to 1, or enforce_eager to true"
    return None


def expandable_segments(setting: Setting) -> Fault:
    """Memory in expandable segments can't be given back by vLLM's sleep mode, whose allocator asserts it."""
    name, value = "PYTORCH_NPU_ALLOC_CONF", setting.environment.get("PYTORCH_NPU_ALLOC_CONF", "")
    if "expandable_segments:True" not in value or not setting.config.swap.release_kv_cache:
        return None
    problem = f"{name}={value} with swap.release_kv_cache=true: the engine can't give memory back."
    return "swap.release_kv_cache", problem, f"take expandable_segments:True out of {_named(name)}"


def engine_version(setting: Setting) -> Fault:
    """vllm-ascend has the V1 engine only."""
    value = setting.environment.get("VLLM_USE_V1", "1")
    return None if value == "1" else _variable("VLLM_USE_V1", value, "asks for an engine that is gone", "1")


def weight_layout(setting: Setting) -> Fault:
    """With weights in NZ layout (the default), waking up and replacing weights raise."""
    value = setting.environment.get("VLLM_ASCEND_ENABLE_NZ", "unset")
    problem = "has the engine keep weights in NZ layout, which can't be replaced"
    return None if value == "0" else _variable("VLLM_ASCEND_ENABLE_NZ", value, problem, "0")


def expansion_mode(setting: Setting) -> Fault:
    """A mode that HCCL does not know is taken for its slowest."""
    value, known = setting.environment.get("HCCL_OP_EXPANSION_MODE"), ("AI_CPU", "AIV", "HOST", "HOST_TS")
    if value is None or value in known:
        return None
    return _variable("HCCL_OP_EXPANSION_MODE", value, "is no mode of HCCL", "AIV")


def format_runs(setting: Setting) -> Fault:
    """vllm-ascend has no kernels for NVFP4 on any card, nor for MXFP formats on 910B and 910C."""
    key, format = "quant.format", setting.config.quant.format
    how = support(format, CARD)
    if how.how != CONVERT:
        return None
    fix = f"quantize the model to {' or '.join(how.formats)} (python -m qerl_rl quantize), and set {key} to it"
    return key, f"{key}={format} does not run on Ascend 910B and 910C.", fix


def attention_format(setting: Setting) -> Fault:
    """W4A8 and W4A16 have kernels for experts but no linear method: attention of that format fails to load."""
    key, format = "quant.format", setting.config.quant.format
    allowed = support(format, CARD).attention
    wrong = sorted(setting.attention - set(allowed))
    if not allowed or not wrong:
        return None
    fix = f"quantize again with --attention {' or '.join(allowed)}"
    return key, f"{key}={format} on Ascend is for experts only, and attention is {', '.join(wrong)}.", fix


def fused_dispatch(setting: Setting) -> Fault:
    """The fused kernel behind VLLM_ASCEND_ENABLE_FUSED_MC2 takes 16 ranks of experts, and no adapters beside them."""
    name, lora = "VLLM_ASCEND_ENABLE_FUSED_MC2", setting.config.lora
    value = setting.environment.get(name, "0")
    if value in ("", "0"):
        return None
    if not setting.has_mc2:
        problem = f"needs {MC2_RANKS} ranks of experts with up to {MC2_EXPERTS} each; here are {setting.expert_ranks}"
        return _variable(name, value, problem, "0")
    if lora.experts and lora.in_rollout != "merge":
        problem = f"{name}={value} computes experts without their adapters."
        return "lora.in_rollout", problem, f"set lora.in_rollout to merge, or {_named(name)} to 0"
    return None


def balancing(setting: Setting) -> Fault:
    """Expert load balancing moves experts between ranks; adapters beside them would stay where they were."""
    value, lora = setting.environment.get("DYNAMIC_EPLB", "false").lower(), setting.config.lora
    if value not in ("true", "1") or not lora.experts or lora.in_rollout == "merge":
        return None
    problem = f"DYNAMIC_EPLB={value} moves experts away from their adapters."
    return "lora.in_rollout", problem, f"set {_named('DYNAMIC_EPLB')} to false, or lora.in_rollout to merge"


def buffer_size(setting: Setting) -> Fault:
    """MC2 exchanges tokens through HCCL's buffer; beyond its end the card reports an address out of range."""
    name, text = "HCCL_BUFFSIZE", setting.environment.get("HCCL_BUFFSIZE")
    size = DEFAULT_BUFFER_MB if text is None else setting.number(name)
    if not size:
        return _variable(name, text, "is no size in MB", f"{DEFAULT_BUFFER_MB} or more")
    if not setting.has_mc2:
        return None
    needed = mc2_buffer_mb(setting.architecture, setting.expert_ranks, setting.config.rollout.max_sequences)
    if size >= needed:
        return None
    problem = f"is too small for {setting.expert_ranks} ranks of experts"
    return _variable(name, "unset" if text is None else text, problem, f"{needed} or more")


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
        return _variable(name, text, "is no port", f"1024 to {65535 - HCCL_PORTS}")
    if first + HCCL_PORTS > low and first <= high:
        problem = f"lies among the ports {low} to {high} that outgoing connections get"
        return _variable(name, text, problem, f"{low - HCCL_PORTS} or less")
    return None


def network(setting: Setting) -> Fault:
    """A name that no interface has makes the first collective wait until its time is up."""
    for name in NETWORK_VARIABLES:
        value = setting.environment.get(name)
        wrong = unknown_interfaces(value, setting.interfaces) if value else []
        if wrong:
            problem = f"names no network interface of this machine ({', '.join(setting.interfaces)})"
            return _variable(name, value, problem, "one of these")
    return None


def stream_budget(setting: Setting) -> Fault:
    """Unless collectives run on the vector cores, a captured graph holds a stream a layer and a group of ranks."""
    rollout, mode = setting.config.rollout, setting.environment.get("HCCL_OP_EXPANSION_MODE")
    if rollout.enforce_eager or mode == "AIV":
        return None
    groups = sum(size > 1 for size in (rollout.tensor_parallel, rollout.data_parallel, setting.expert_ranks))
    fitting = STREAMS // ((setting.architecture.layers + 1) * (1 + groups))
    wanted = len({1, 2, 4, *range(8, rollout.max_sequences + 1, 8)})
    if wanted <= fitting:
        return None
    problem = f"{wanted} batch sizes up to rollout.max_sequences={rollout.max_sequences} are to be captured, and a card"
    problem = f"{problem} has streams for {fitting} with {groups} groups of ranks."
    return "rollout.enforce_eager", problem, f"set {_named('HCCL_OP_EXPANSION_MODE')} to AIV, or enforce_eager to true"


def installed_engine(setting: Setting) -> Fault:
    """A checkout that is found before the installed vLLM is another version than vllm-ascend was built for."""
    if setting.shadow is None:
        return None
    return "rollout", f"{setting.shadow}.", "uninstall the checkout, or take its folder out of PYTHONPATH"


RULES = (
    task_queue,
    expandable_segments,
    engine_version,
    weight_layout,
    expansion_mode,
    format_runs,
    attention_format,
    fused_dispatch,
    balancing,
    buffer_size,
    port,
    network,
    stream_budget,
    installed_engine,
)


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to


def _named(variable: str) -> str:
    return f"{variable} (cluster.environment)"


def _variable(name: str, value: str | None, problem: str, allowed: str) -> Fault:
    shown = f"{name} is not set, which" if value in (None, "unset") else f"{name}={value}"
    return f"cluster.environment.{name}", f"{shown} {problem}.", f"set cluster.environment.{name} to {allowed}"
