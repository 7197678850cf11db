"""The memory of a vllm-ascend engine, given back and taken again by its sleep mode: weights and KV cache, each alone.

The worker's own `sleep` frees all it has at once (level 1 copies the weights to the host first, level 2 saves nothing
but buffers) and `wake_up` takes back what it is told to. Addresses stay, so captured graphs do too. What shall stay
awake, or sleeps already, carries the allocator's mark of memory that never sleeps while the rest falls asleep.
Sources: vllm_ascend/worker/worker.py, vllm_ascend/device_allocator/camem.py of 0.23.0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qerl_rl.rollout.ascend.layouts import WRITTEN
from qerl_rl.rollout.weight_memory import ByteStore, weight_bytes

WEIGHTS, KV_CACHE = "weights", "kv_cache"
"""vLLM's tags of what a worker has allocated."""
TO_HOST, GIVEN_UP = 1, 2
"""vLLM's levels of sleep: what becomes of the weights."""


class SleepMode:
    """Sleep and waking of one worker, in the order that keeps what it has whole: weights wake before the KV cache.

    Args: worker: vllm-ascend's NPUWorker.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self.asleep: set[str] = set()

    def sleep(self, tag: str, level: int) -> None:
        """Free the memory with this tag. Raises: RuntimeError when it sleeps, or the engine has no sleep mode."""
        if not self._worker.vllm_config.model_config.enable_sleep_mode:
            raise RuntimeError(
                f"the engine was made without sleep mode, so that its {tag} can't leave memory: set "
                "rollout.ascend.sleep_mode to true, or swap.release_kv_cache and swap.release_weights to false"
            )
        if tag in self.asleep:
            raise RuntimeError(f"the engine's {tag} sleep already")
        with self._others_stay(tag):
            self._worker.sleep(level=level)
        self.asleep.add(tag)

    def wake(self, tag: str) -> None:
        """Take the memory with this tag again. Raises: RuntimeError when it is awake, or weights have to wake first."""
        if tag not in self.asleep:
            raise RuntimeError(f"the engine's {tag} do not sleep")
        if tag == KV_CACHE and WEIGHTS in self.asleep:
            raise RuntimeError(
                "the engine's weights sleep: restore_weights() or weight_target() come before restore_kv_cache()"
            )
        self._worker.wake_up(tags=[tag])
        self.asleep.discard(tag)

    @contextmanager
    def _others_stay(self, tag: str) -> Iterator[None]:
        from vllm_ascend.device_allocator.camem import CaMemAllocator

        others = [each for each in CaMemAllocator.get_instance().pointer_to_data.values() if each.tag != tag]
        tags = [each.tag for each in others]
        for each in others:
            each.tag = CaMemAllocator.sleep_persistent_tag
        try:
            yield
        finally:
            for each, own in zip(others, tags, strict=True):
                each.tag = own


class AscendWeights:
    """The weights of one worker; see `WeightMemory`, whose place it takes."""

    def __init__(self, model: torch.nn.Module, mode: SleepMode) -> None:
        self._model, self._mode, self._all = model, mode, weight_bytes(model)
        self._level = 0
        self._parameters: list[tuple[torch.nn.Module, dict[str, Any]]] = []
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def nbytes(self) -> int:
        """Bytes in memory now."""
        return 0 if WEIGHTS in self._mode.asleep else self._all

    @property
    def is_away(self) -> bool:
        """Whether weights are out of memory, or not yet written anew; the model can't run then."""
        return self._level != 0

    def changed(self) -> None:
        """Other weights were written."""
        self._level = 0

    def release(self, store: ByteStore | None, keep: Collection[int] = ()) -> int:
        """Free the memory; returns the bytes freed.

        store: with one, the weights stay in memory of the host, where vllm-ascend puts them; None gives them up.
        Raises: RuntimeError for `keep`: no other engine can read these weights.
        """
        if self._level:
            return 0
        if keep:
            raise RuntimeError("weights that others read can't sleep: set model.share_base to false")
        level = GIVEN_UP if store is None else TO_HOST
        self._parameters = [(module, dict(module._parameters)) for module in self._model.modules()]
        self._kept = [(each, each.to("cpu", copy=True)) for each in self._never_written()] if store is None else []
        self._mode.sleep(WEIGHTS, level)
        self._level = level
        return self._all

    def restore(self) -> None:
        """Bring the weights back bit for bit. Raises: RuntimeError when they were given up."""
        if self._level == GIVEN_UP:
            raise RuntimeError("the engine's weights were given up: write all of them through weight_target()")
        self.make_writable()
        self._level = 0

    def make_writable(self) -> None:
        """Take the memory again, filled with zeros where weights were given up. What does not sleep stays as it is.

        (No update brings the padding of a vocabulary.)
        """
        if WEIGHTS not in self._mode.asleep:
            return
        self._mode.wake(WEIGHTS)
        for module, parameters in self._parameters:
            # Waking turns unquantized experts around, for a loader that wants them as a checkpoint has them.
            module._parameters.update(parameters)
        if self._level == GIVEN_UP:
            for parameter in self._model.parameters():
                parameter.data.zero_()
        for tensor, copy in self._kept:
            tensor.copy_(copy)
        self._parameters, self._kept = [], []

    def _never_written(self) -> Iterator[torch.Tensor]:
        """What a worker that gives up its weights would lose, and no update brings: offsets, maps of experts.

        (It saves buffers itself.)
        """
        for module in self._model.modules():
            for name, value in (*module._parameters.items(), *vars(module).items()):
                if isinstance(value, torch.Tensor) and name not in WRITTEN:
                    yield value.data


class AscendKvCache:
    """The KV caches of one worker; see `KvCacheMemory`, whose place it takes.

    Args: caches: the runner's, a tensor or some of them a layer.
    """

    def __init__(self, caches: Iterable[Any], mode: SleepMode) -> None:
        self._caches, self._mode = list(_flat(caches)), mode
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in self._caches}
        self._all = sum(storages.values())

    @property
    def nbytes(self) -> int:
        return 0 if KV_CACHE in self._mode.asleep else self._all

    def release(self) -> int:
        """Free the memory; returns the bytes freed. The prefix cache must have been reset."""
        if KV_CACHE in self._mode.asleep:
            return 0
        # Of the weights, which stay, a level says nothing.
        self._mode.sleep(KV_CACHE, TO_HOST)
        return self._all

    def restore(self) -> None:
        """Take the memory again, filled with zeros. Raises: RuntimeError while the weights sleep.

        What is in slots that no token has written must be finite: attention multiplies it by a probability of 0.
        """
        if KV_CACHE not in self._mode.asleep:
            return
        self._mode.wake(KV_CACHE)
        for cache in self._caches:
            cache.zero_()


def _flat(caches: Iterable[Any]) -> Iterator[torch.Tensor]:
    for cache in caches:
        if isinstance(cache, torch.Tensor):
            yield cache
        else:
            yield from _flat(cache)
