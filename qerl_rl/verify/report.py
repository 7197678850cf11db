"""What was measured, which bar it is held to, and who is to blame: tables and an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Check:
    """One figure. layer: None for the whole model. bar: what it must reach (at_least) or not exceed; None: none."""

    name: str
    value: float
    layer: int | None = None
    bar: float | None = None
    at_least: bool = True
    unit: str = ""

    @property
    def passed(self) -> bool:
        """Whether the bar is met, or there is none; a number that is not finite meets none."""
        if self.bar is None:
            return True
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    @property
    def shown(self) -> str:
        """The number with its unit."""
        digits = f"{self.value:.6f}" if 0.5 < abs(self.value) < 10 and not self.unit else f"{self.value:.4g}"
        return f"{digits} {self.unit}".rstrip()

    def fault(self) -> str:
        """What is wrong, as a line."""
        where = "" if self.layer is None else f"layer {self.layer}: "
        sign = "below" if self.at_least else "above"
        return f"{where}{self.name} is {self.shown}, {sign} {self.bar:g}"


@dataclass
class Report:
    """All checks of a run, and remarks on them."""

    checks: list[Check] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, *checks: Check) -> None:
        self.checks.extend(checks)

    @property
    def faults(self) -> list[Check]:
        """The checks that failed: whole-model ones last, layers from the first on, where a fault begins."""
        failed = [check for check in self.checks if not check.passed]
        return sorted(failed, key=lambda check: (check.layer is None, check.layer or 0))

    @property
    def exit_code(self) -> int:
        """0, or 1 when a check failed."""
        return 1 if self.faults else 0

    def show(self, console: Console) -> None:
        """A table of the layers, one of the whole model, remarks, and what failed."""
        layers = [check for check in self.checks if check.layer is not None]
        if layers:
            console.print(_layer_table(layers))
        console.print(_model_table([check for check in self.checks if check.layer is None]))
        for remark in self.remarks:
            console.print(remark, soft_wrap=True)
        for check in self.faults:
            console.print(Text(f"FAILED  {check.fault()}", style="bold red"), soft_wrap=True)
        if not self.faults:
            console.print(Text("all checks passed", style="bold green"))


def _layer_table(checks: Sequence[Check]) -> Table:
    names = list(dict.fromkeys(check.name for check in checks))
    bars = {check.name: check for check in checks}
    table = Table(title="By layer", title_justify="left", title_style="bold")
    table.add_column("layer", justify="right")
    for name in names:
        table.add_column(f"{name}\n{_bar(bars[name])}", justify="right")
    for layer in sorted({check.layer for check in checks if check.layer is not None}):
        found = {check.name: check for check in checks if check.layer == layer}
        table.add_row(str(layer), *(_cell(found[name]) if name in found else Text("") for name in names))
    return table


def _model_table(checks: Sequence[Check]) -> Table:
    table = Table(title="Whole model", title_justify="left", title_style="bold")
    for column in ("check", "bar"):
        table.add_column(column)
    table.add_column("found", justify="right")
    for check in checks:
        table.add_row(check.name, _bar(check), _cell(check))
    return table


def _bar(check: Check) -> str:
    return "" if check.bar is None else f"{'≥' if check.at_least else '≤'} {check.bar:g}"


def _cell(check: Check) -> Text:
    return Text(check.shown, style="" if check.passed else "bold red")
