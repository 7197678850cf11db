"""Stands in for MindSpeed, which is not on PyPI: says when it was asked what, and changes nothing."""

from __future__ import annotations

import sys
from typing import Any

seen: list[tuple[str, dict[str, Any]]] = []
"""(what was asked for, the arguments at that moment) in the order of asking; of Megatron, whether it was imported."""


def record(event: str, arguments: Any) -> None:
    """Add to `seen`."""
    seen.append((event, {**vars(arguments), "megatron imported": "megatron.core" in sys.modules}))
