"""What every change to vLLM asks first."""

from __future__ import annotations

from typing import Any


def existing(owner: Any, name: str) -> Any:
    """The attribute a patch replaces; raises RuntimeError where this vLLM has none."""
    if not hasattr(owner, name):
        raise RuntimeError(
            f"vLLM has no {getattr(owner, '__name__', owner)}.{name}: a patch in qerl_rl/rollout is out of date"
        )
    return getattr(owner, name)
