"""Which complete groups end a rollout that does not wait for all: decided by counting, never by the clock."""

from __future__ import annotations

from collections.abc import Collection


class Quota:
    """Counts complete groups until there are `groups` of them; a place is kept for each that must be among them.

    Complete groups are offered in the order in which they are done, so the same samples are taken in every run.
    Raises: ValueError when more must be among them than there are places.
    """

    def __init__(self, groups: int, must_finish: Collection[int] = ()) -> None:
        if len(must_finish) > groups:
            raise ValueError(f"{len(must_finish)} groups must be among {groups}")
        self._groups, self._missing, self._taken = groups, set(must_finish), 0

    def takes(self, group: int) -> bool:
        """Whether this complete group is one of them; one that is not will have to wait for the next rollout."""
        if group in self._missing:
            self._missing.remove(group)
        elif self._taken + len(self._missing) >= self._groups:
            return False
        self._taken += 1
        return True

    @property
    def is_met(self) -> bool:
        return self._taken >= self._groups
