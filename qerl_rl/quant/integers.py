"""Formats whose grid is the integers between two ends, which are rounded in one pass on a CPU."""

from __future__ import annotations

import torch

from qerl_rl.platform.integer_loops import has_loops, round_quotients
from qerl_rl.quant.base import Format


class IntegerFormat(Format):
    ends: tuple[int, int]
    """The least and the largest integer that is stored."""

    def _rounded(self, scaled: torch.Tensor) -> torch.Tensor:
        return self._packed(scaled.clamp_(*self.ends).round_())

    def _rounded_quotients(self, weights: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        if not has_loops(weights):
            return super()._rounded_quotients(weights, steps)
        return self._packed(round_quotients(weights, steps, *self.ends))

    def _packed(self, integers: torch.Tensor) -> torch.Tensor:
        """Elements of the first part that hold these integers (which may come as floats, and be overwritten)."""
        return integers
