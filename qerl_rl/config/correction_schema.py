"""The keys of a launch file that make up for tokens of another policy, and how their values are read."""

from __future__ import annotations

import math
from dataclasses import dataclass

CRITERIA = (
    *("token_k1", "token_k2", "token_k3", "binary_kl"),
    *("seq_sum_k1", "seq_sum_k2", "seq_sum_k3"),
    *("seq_mean_k1", "seq_mean_k2", "seq_mean_k3"),
    *("seq_max_k2", "seq_max_k3"),
)
"""What rollout_correction.rollout_rs can name; `qerl_rl.algorithms.rejection` has the formulas."""


@dataclass(frozen=True)
class RolloutCorrectionConfig:
    """What makes up for tokens that another policy sampled than the one that learns (names and values as in verl)."""

    rollout_is: str = "none"
    """none, or the importance weight p_trainer / p_rollout of each token, or of each sequence: token or sequence."""
    rollout_is_threshold: str = "2.0"
    """The importance weight counts up to this (truncated importance sampling); as LOW_HIGH, such as 0.5_5.0, a weight
    outside the band counts 0 (IcePop)."""
    rollout_is_batch_normalize: bool = False
    """Divide these weights by their mean, so that they are 1 on average: the mean over the tokens of the whole step, of
    its sequences where rollout_is=sequence; in bypass_mode over those of the mini-batch, which costs it a pass forward
    before each update."""
    rollout_rs: str = "none"
    """none, or what a token or its whole sequence is rejected by, several with commas: token_k1, token_k2, token_k3,
    binary_kl; of a sequence seq_sum_k1, seq_mean_k1 (the geometric mean of its ratios), seq_sum_k2, seq_mean_k2,
    seq_max_k2, seq_sum_k3, seq_mean_k3, seq_max_k3."""
    rollout_rs_threshold: str = ""
    """One for all of rollout_rs, or one each with commas: for k1 a band of ratios LOW_HIGH (one number: up to it and
    from its inverse on), else the largest divergence in nats."""
    rollout_token_veto_threshold: float = 0.0
    """A sequence is rejected when p_trainer / p_rollout of one of its tokens is below this; 0 rejects none."""
    bypass_mode: bool = False
    """Take the engine's log-probs for the old ones: the loss then clips the ratio to what sampled the tokens."""
    loss_type: str = "ppo_clip"
    """The policy loss in bypass_mode: ppo_clip (algorithm.loss, whose ratio is the importance weight already) or
    reinforce (-A log p, unclipped; rollout_is weighs it by the policy of the moment)."""

    @property
    def is_band(self) -> tuple[float, float]:
        """(low, high) of rollout_is_threshold; low is 0 where it truncates. Raises: ValueError, a sentence."""
        return _band("rollout_is_threshold", self.rollout_is_threshold)

    @property
    def rs_bands(self) -> tuple[tuple[str, float, float], ...]:
        """(criterion, low, high) of each of rollout_rs; low is 0 but for k1. Raises: ValueError, a sentence."""
        if self.rollout_rs == "none":
            return ()
        names = list(dict.fromkeys(name.strip() for name in self.rollout_rs.split(",")))
        unknown = [name for name in names if name not in CRITERIA]
        if unknown:
            raise ValueError(f"rollout_rs={self.rollout_rs}: {unknown[0]!r} is none of {', '.join(CRITERIA)}")
        texts = [text.strip() for text in self.rollout_rs_threshold.split(",")]
        if len(texts) == 1:
            texts *= len(names)
        if len(texts) != len(names):
            raise ValueError(f"rollout_rs_threshold has {len(texts)} values, but rollout_rs {len(names)} criteria")
        return tuple((name, *_rs_band(name, text)) for name, text in zip(names, texts, strict=True))

    @property
    def rejects(self) -> bool:
        """Whether a token may be rejected."""
        return self.rollout_rs != "none" or self.rollout_token_veto_threshold > 0.0

    @property
    def compares(self) -> bool:
        """Whether an update needs the rollout engine's log-probs."""
        return self.rejects or self.rollout_is != "none"

    @property
    def is_reinforce(self) -> bool:
        """Whether loss_type takes the place of algorithm.loss."""
        return self.loss_type == "reinforce"


def _rs_band(criterion: str, text: str) -> tuple[float, float]:
    if not criterion.endswith("k1"):
        if "_" in text:
            raise ValueError(f"rollout_rs_threshold={text}: {criterion} takes one number, the largest divergence")
        return _band("rollout_rs_threshold", text)
    low, high = _band("rollout_rs_threshold", text)
    if low == 0.0 and high < 1.0:
        raise ValueError(f"rollout_rs_threshold={text}: a band from 1 / {text} to {text} holds nothing")
    return low or 1.0 / high, high


def _band(key: str, text: str) -> tuple[float, float]:
    """LOW_HIGH, or HIGH from 0 on."""
    try:
        *lower, high = (float(part) for part in text.split("_"))
    except ValueError:
        raise ValueError(f"{key}={text or '(empty)'} is neither a number nor a band LOW_HIGH") from None
    if len(lower) > 1 or not all(math.isfinite(bound) and bound > 0 for bound in (*lower, high)):
        raise ValueError(f"{key}={text} is neither a positive number nor a band LOW_HIGH of two")
    if lower and lower[0] > high:
        raise ValueError(f"{key}={text}: the band's first number is above its second")
    return (lower[0] if lower else 0.0), high
