"""The one error that a user's input can cause: what is wrong, what to do, and where."""

from __future__ import annotations


class ConfigError(Exception):
    """A launch file, a model folder or a data set that can't be used; `launch.py` prints it and exits with code 2.

    Args: problem: one sentence with the key or file and its value. fix: what to change and to what. where: the file
    (and line, where known), or empty.
    """

    def __init__(self, problem: str, *, fix: str, where: str = "") -> None:
        self.problem, self.fix, self.where = problem, fix, where
        super().__init__(f"{problem} Fix: {fix}" + (f" ({where})" if where else ""))

    def __reduce__(self) -> tuple:
        """Exceptions are rebuilt from positional arguments; one raised in a worker has to reach the driver whole."""
        return _rebuild, (self.problem, self.fix, self.where)


def _rebuild(problem: str, fix: str, where: str) -> ConfigError:
    return ConfigError(problem, fix=fix, where=where)
