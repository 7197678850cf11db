"""One job at a time beside the main thread; its error is not lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class BackgroundJob(Generic[Result]):
    """Runs a job in a thread of this process. An error of the job is raised by the next `start` or `wait`.

    Args: name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._result: Result | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], Result]) -> None:
        """Begin `job`, once the one before has ended. Raises: what that one raised."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job,), name=self._name, daemon=True)
        self._thread.start()

    def wait(self) -> Result | None:
        """What the job returned, when it has ended; None where there is none. Raises: what it raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        (result, self._result), (error, self._error) = (self._result, None), (self._error, None)
        if error is not None:
            raise error
        return result

    def _run(self, job: Callable[[], Result]) -> None:
        try:
            self._result = job()
        except BaseException as error:  # noqa: BLE001 - whatever ended the job has to reach the main thread
            self._error = error
