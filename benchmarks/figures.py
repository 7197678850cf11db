"""One measured figure and the bar it has to pass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A measured value with its bar; at_least: whether the value must reach the bar, else it must not exceed it."""

    name: str
    value: float
    bar: float
    at_least: bool
    unit: str = "x"

    @property
    def met(self) -> bool:
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    def __str__(self) -> str:
        relation, verdict = ">=" if self.at_least else "<=", "met" if self.met else "MISSED"
        return f"{self.name:<58} {self.value:>9.2f} {self.unit:<5} (bar {relation} {self.bar:g})  {verdict}"
