"""What the rules of Ascend are held against, and how they answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qerl_rl.config.schema import Config
from qerl_rl.layout.architecture import MoeArchitecture

Fault = tuple[str, str, str] | None
"""The key (of the launch file, or a variable's name), what is wrong with it, and the fix."""

CARD = "910"
"""Atlas A2 and A3 in the table of formats; which card it is, only the card can say."""
MC2_RANKS = 16
"""Ranks of experts from which on Atlas A2 exchanges tokens by MC2, and the experts of a rank up to which."""
MC2_EXPERTS = 24
MC2_TOKENS = 512
"""Tokens of a rank that MC2 takes at once."""


@dataclass(frozen=True)
class Setting:
    """environment: of a worker. linears: quant.format of the checkpoint's weights outside routed experts.

    has_cache_scales: whether the checkpoint has scales of an int8 KV cache (msmodelslim's C8). ephemeral_ports: first
    and last of what outgoing connections get. shadow: what hides an engine, or None.
    """

    config: Config
    architecture: MoeArchitecture
    environment: Mapping[str, str]
    linears: frozenset[str] = frozenset()
    has_cache_scales: bool = False
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
        """Whether vllm-ascend exchanges tokens by MC2; where the card is not known, as on Atlas A2."""
        if self.config.rollout.ascend.card == "a3":
            return self.expert_ranks > 1
        return self.expert_ranks >= MC2_RANKS and self.architecture.experts // self.expert_ranks <= MC2_EXPERTS

    @property
    def adapts_experts_beside(self) -> bool:
        """Whether adapters may act beside the engine's experts, not merged into them."""
        lora = self.config.lora
        return lora.rank > 0 and lora.experts and lora.in_rollout != "merge"

    @property
    def trains_experts(self) -> bool:
        """Whether experts change while the run goes on, in whichever way."""
        return self.config.lora.rank == 0 or self.config.lora.experts

    def number(self, name: str) -> int | None:
        """A variable that is a whole number; None where it is not set or is none."""
        text = self.environment.get(name, "")
        return int(text) if text.isdecimal() else None


def named(variable: str) -> str:
    """How a fix speaks of an environment variable."""
    return f"{variable} (cluster.environment)"


def wrong_variable(name: str, value: str | None, problem: str, allowed: str) -> Fault:
    """The fault of an environment variable, or of its absence (None)."""
    shown = f"{name} is not set, which" if value is None else f"{name}={value}"
    return f"cluster.environment.{name}", f"{shown} {problem}.", f"set cluster.environment.{name} to {allowed}"
