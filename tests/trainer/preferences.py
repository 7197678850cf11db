"""A data set of pairs for tests of whole runs, named by its dotted path."""

from __future__ import annotations

from qerl_rl.config.schema import DataConfig


def more_sevens(data: DataConfig, split: str) -> list[dict[str, str]]:
    """Sums whose chosen answer has more sevens than the rejected one: a taste that any model can learn."""
    return [
        {"question": f"{left}+{right}=", "good": "7" * (1 + left % 3), "bad": str(right) * (1 + left % 3)}
        for left in range(10, 90)
        for right in (3, 4, 8)
    ]
