"""One measured figure and the bar it has to pass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A measured value with its bar, if it has one; at_least: it must reach the bar, else it must not exceed it."""

    name: str
    value: float
    bar: float | None
    at_least: bool
    unit: str = "x"

    @property
    def met(self) -> bool:
        """Always, without a bar."""
        return self.bar is None or (self.value >= self.bar if self.at_least else self.value <= self.bar)

    def __str__(self) -> str:
        row = f"{self.name:<68} {self.value:>9.2f} {self.unit:<5}"
        if self.bar is None:
            return row
        relation, verdict = ">=" if self.at_least else "<=", "met" if self.met else "MISSED"
        return f"{row} (bar {relation} {self.bar:g})  {verdict}"
