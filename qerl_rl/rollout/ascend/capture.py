"""Changes to a model that graphs have to see: made when its weights are there, before the first graph is captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def before_graphs_are_captured(change: Callable[[Any], None]) -> Iterator[None]:
    """Inside, an engine that is constructed on NPUs calls `change(worker)` at that moment; elsewhere nothing happens.

    A captured graph repeats what the model did then: what is put into it later would act in eager steps only.
    """
    from vllm.platforms import current_platform

    if current_platform.device_type != "npu":
        yield
        return
    from vllm_ascend.worker.worker import NPUWorker

    original = NPUWorker.compile_or_warm_up_model

    def compile_or_warm_up_model(worker: Any) -> Any:
        change(worker)
        return original(worker)

    NPUWorker.compile_or_warm_up_model = compile_or_warm_up_model
    try:
        yield
    finally:
        NPUWorker.compile_or_warm_up_model = original
