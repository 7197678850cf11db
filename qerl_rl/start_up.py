"""What makes a process start sooner."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Inside, nothing is collected.

    Importing the engines makes millions of objects that live as long as the process, and the collector would walk over
    all of them each time that their number has grown: about a quarter of the time that the imports take.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
