"""A line of requests that can't be served yet, without polling."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class WaitingLine:
    """Requests wait in order of arrival; `serve` tries them again after something changed.

    Args: in_order: the first request that can't be served holds up those behind it, so that small ones don't starve a
    large one; otherwise each is tried by itself.
    """

    def __init__(self, in_order: bool) -> None:
        self.in_order = in_order
        self._waiting: dict[asyncio.Future[Any], Callable[[], Any]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self, attempt: Callable[[], Any], timeout: float) -> Any:
        """The first result of `attempt` that is not None, or None after `timeout` seconds; raises what it raises."""
        if not (self.in_order and self._waiting) and (result := attempt()) is not None:
            return result
        future = asyncio.get_running_loop().create_future()
        self._waiting[future] = attempt
        try:
            # Not wait_for: a result that arrives together with the deadline must not be lost, it may be a lease.
            await asyncio.wait([future], timeout=max(timeout, 0.0))
        finally:
            self._waiting.pop(future, None)
        return future.result() if future.done() else None

    def serve(self) -> None:
        """Give every waiting request that can be served now its result."""
        for future, attempt in list(self._waiting.items()):
            try:
                result = attempt()
            except Exception as error:  # noqa: BLE001 - it belongs to the waiting request, not to who changed the state
                future.set_exception(error)
            else:
                if result is None:
                    if self.in_order:
                        return
                    continue
                future.set_result(result)
            del self._waiting[future]
