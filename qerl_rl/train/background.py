"""One job at a time beside the main thread; its error is not lost."""

from __future__ import annotations

import threading
from collections.abc import Callable


class BackgroundWriter:
    """Runs a job in a thread of this process. An error of the job is raised by the next `start` or `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin `job`, once the one before has ended. Raises: what that one raised."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the job has ended. Raises: what it raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - whatever ended the job has to reach the main thread
            self._error = error
