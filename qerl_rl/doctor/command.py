"""The command line of `python -m qerl_rl doctor`."""

from __future__ import annotations

import argparse
from typing import Any

from qerl_rl.doctor.findings import GOOD, MISSING, PLATFORMS, PROVIDERS, Finding, examine, installed_platform
from qerl_rl.doctor.machine import Machine

DESCRIPTION = "What this machine has of what a platform needs. Exit code 0: all of it; 1: something is missing."
_STYLES = {GOOD: "green", MISSING: "bold red"}


def add_doctor(commands: Any) -> None:
    """Add `doctor` to the subcommands."""
    parser = commands.add_parser(
        "doctor", help="check this machine's software, cards and network", description=DESCRIPTION
    )
    help = "default: npu where torch-npu or an Ascend card is, else cpu"
    parser.add_argument("--for", dest="platform", choices=PLATFORMS, default="", help=help)
    parser.add_argument(
        "--provider", choices=PROVIDERS, default="megatron", help="what model.provider is to be, on an NPU"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show the table; returns the exit code."""
    machine = Machine.here()
    platform = options.platform or installed_platform(machine)
    findings = examine(machine, platform, options.provider)
    show(findings, platform)
    return int(any(finding.status == MISSING for finding in findings))


def show(findings: list[Finding], platform: str) -> None:
    """The findings as a table, and what to do about those that are not good."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("", "needed", "found", "", title=f"qerl_rl on {platform}")
    for finding in findings:
        status = Text(finding.status, style=_STYLES.get(finding.status, "yellow"))
        table.add_row(Text(finding.what), Text(finding.needed), Text(finding.found), status)
    console.print(table)
    for finding in findings:
        if finding.advice:
            console.print(f"{finding.status}: {finding.what}: {finding.advice}", markup=False, soft_wrap=True)
