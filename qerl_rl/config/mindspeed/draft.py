"""A launch file of ours in the making, with what has to be said about it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from qerl_rl.config.mindspeed.source import Source
from qerl_rl.config.mindspeed.tables import RL


class Draft:
    """Values by key of ours, where each came from, what differs, and what can't be done.

    Args: overridden: keys of ours that the command line sets, for which the file has no say.
    """

    def __init__(self, source: Source, overridden: Collection[str]) -> None:
        self.source, self.overridden = source, frozenset(overridden)
        self.values: dict[str, dict[str, Any]] = {}
        self.origins: dict[str, str] = {}
        self.differs: list[str] = []
        self.faults: list[str] = []

    def put(self, ours: str, value: Any, section: str, key: str) -> None:
        """Set a key of ours to what a key of theirs means, or is by default."""
        *sections, field = ours.split(".")
        values: dict[str, Any] = self.values
        for name in sections:
            values = values.setdefault(name, {})
        values[field] = value
        self.origins[ours] = self.source.located(section, key)

    def value(self, ours: str) -> Any:
        """What a key of ours was put to, None if it was not."""
        found: Any = self.values
        for name in ours.split("."):
            found = found.get(name, {})
        return None if found == {} else found

    def differ(self, section: str, key: str, sentence: str, instead: str = "") -> None:
        """Say what is done in another way than a key of theirs asks for, unless the command line settles it."""
        if instead not in self.overridden:
            self.differs.append(f"{self._shown(section, key)}: {sentence}")

    def fault(self, section: str, key: str, fix: str, instead: str = "") -> None:
        """Name a key whose value can't be followed, unless the command line settles it by `instead`."""
        if instead not in self.overridden:
            self.faults.append(f"{self._shown(section, key)} ({self.source.where(self._name(section, key))}): {fix}")

    def number(self, section: str, key: str, default: float) -> float:
        return self.source.typed(section, key, float, default)

    def count(self, section: str, key: str, default: int) -> int:
        return self.source.typed(section, key, int, default)

    def switch(self, section: str, key: str, default: bool = False) -> bool:
        return self.source.typed(section, key, bool, default)

    @property
    def samples_per_prompt(self) -> int:
        return self.count(RL, "n_samples_per_prompt", 1)

    def _name(self, section: str, key: str) -> str:
        return self.source.name_of(section, key) or f"{section}.{key}"

    def _shown(self, section: str, key: str) -> str:
        name, value = self._name(section, key), self.source.get(section, key)
        if isinstance(value, bool):
            value = str(value).lower()
        return name if value is None else f"{name}={value}"
