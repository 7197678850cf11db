"""What models differ in, part by part; a family's file in `families/` says which of it a config.json means."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ModuleNames:
    """Names inside a HF layer: of the MoE block, of an expert's three projections, of the shared expert."""

    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared_expert: str = "shared_expert"


USUAL_NAMES = ModuleNames()


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): sizes of what is compressed.

    A query and a key of a head are `nope` elements without position and `rope` with it (the key's are shared by all
    heads); a value has a width of its own.
    """

    query_rank: int | None
    """None: queries come from one projection."""
    key_value_rank: int
    nope_head_dim: int
    rope_head_dim: int
    value_head_dim: int
    interleaved: bool = True
    """Neighbouring elements turn together; otherwise those half a width apart."""


@dataclass(frozen=True)
class Yarn:
    """Longer contexts by slower turning (YaRN, arXiv 2309.00071), with the two scales that DeepSeek adds.

    original_positions: that the model was trained on first. attention_factor: of cosine and sine. scale_all: enters the
    scale of the attention's products (mscale_all_dim of config.json; 0: nothing does).
    """

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    scale_all: float

    @property
    def product_scale(self) -> float:
        """What the attention's products are multiplied by, beside 1 / sqrt(width)."""
        return yarn_scale(self.factor, self.scale_all) ** 2 if self.scale_all else 1.0

    def frequencies(self, theta: float, width: int) -> torch.Tensor:
        """Radians a token [width / 2], float32, of the pairs of elements.

        Pairs that turn more than beta_fast times within the original positions keep their speed, those with fewer than
        beta_slow turns take 1 / factor of it, and those between a mixture (equations 17 and 22 of the paper, with the
        ends of the ramp at whole numbers as in its code).
        """
        plain = theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)

        def pair_with(turns: float) -> float:
            return width * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(pair_with(self.beta_fast)), 0)
        last = min(math.ceil(pair_with(self.beta_slow)), width - 1)
        slow = ((torch.arange(width // 2, dtype=torch.float32) - first) / max(last - first, 0.001)).clamp(0, 1)
        return plain * (1 - slow) + plain / self.factor * slow


@dataclass(frozen=True)
class LongRope:
    """Rotary positions of a model whose context was extended (LongRoPE, arXiv 2402.13753), within its first context.

    factors: [head_dim / 2], what the frequency of each pair of elements is divided by. scale: of cosine and sine.
    """

    factors: tuple[float, ...]
    scale: float

    @property
    def product_scale(self) -> float:
        """What the attention's products are multiplied by, beside 1 / sqrt(width): queries and keys are both scaled."""
        return self.scale**2


@dataclass(frozen=True)
class Scales:
    """Constants of MiniCPM (arXiv 2404.06395, section 4.1): of the embeddings, of what attention and experts add to the
    residual stream, and of what the output layer reads."""

    embedding: float = 1.0
    residual: float = 1.0
    output: float = 1.0


NO_SCALES = Scales()


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """How much sharper attention must be over a context `factor` times as long (equation 22): 1 + 0.1 w ln(factor)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
