"""torch.profiler around a piece of work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def profiled(folder: Path | None) -> Iterator[None]:
    """Record what runs inside and write it as a Chrome trace into `folder`; None records nothing."""
    if folder is None:
        yield
        return
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield
    profile.export_chrome_trace(str(folder / "update.json"))
