"""A dock whose processes die where a test says: the controller around its journal, a stage around its calls."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transfer_dock import TransferDock, wire
from transfer_dock.calls import Caller, Steps
from transfer_dock.controller import Controller

PLAN = "TRANSFER_DOCK_TEST_PLAN"
"""Environment variable with the file that says where the controller dies: {kind of transition: "torn" or "after"}."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


class FragileController(Controller):
    """Dies once at each point of the plan: in the middle of writing a transition, or after it was written."""

    def __init__(self, home: Sequence[str], settings: Sequence[Any]) -> None:
        super().__init__(home, settings)
        self.ledger.record = self._append

    def _append(self, kind: str, args: Sequence[Any]) -> None:
        when = self._due(kind)
        if when == "torn":
            whole = wire.pack([kind, list(args)])
            with open(self.journal.path, "ab") as file:
                file.write(len(whole).to_bytes(4, "little") + bytes(4) + whole[: len(whole) // 2])
            die()
        self.journal.append(kind, args)
        if when == "after":
            die()

    def _due(self, kind: str) -> str | None:
        path = Path(os.environ[PLAN])
        plan = json.loads(path.read_text()) if path.exists() else {}
        when = plan.pop(kind, None)
        if when is not None:
            path.write_text(json.dumps(plan))
        return when


class FragileCaller(Caller):
    """Dies before the given need (0, 1, ...) of the operations that it drives, counted over all of them."""

    def __init__(self, controller: Any, last_need: int) -> None:
        super().__init__(controller)
        self.left = last_need

    def run(self, steps: Steps[Any]) -> Any:
        return super().run(self._counted(steps))

    def _counted(self, steps: Steps[Any]) -> Steps[Any]:
        answer = None
        try:
            while True:
                need = steps.send(answer)
                if not self.left:
                    die()
                self.left -= 1
                answer = yield need
        except StopIteration as done:
            return done.value


def make_fragile(dock: TransferDock, last_need: int) -> None:
    """This process dies before that need of the dock's operations."""
    dock._caller = FragileCaller(dock._caller.controller, last_need)
