"""The weights that a run starts from, beside those that train: the reference of a model that trains whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from qerl_rl.platform.state_store import Slots, StateStore


class FirstWeights:
    """A copy of `parameters` as they are now, in `store`; for a while it can take their place.

    The store keeps them twice, the first and (during a pass) the trained ones; memory holds them once. Slots are below
    0, where those of an offloader end. Raises: what the store raises, such as OSError on a full disk.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], store: StateStore) -> None:
        self._parameters, self._store = list(parameters), store
        # Both places are taken now, so that a disk that is too small shows at the start.
        for place in range(2):
            store.begin_write(self._slots(place)).result()

    def _slots(self, place: int) -> Slots:
        """Where the first weights stay (0), and where the trained ones do meanwhile (1)."""
        return {
            -1 - 2 * number - place: parameter.detach().view(-1).view(torch.uint8)
            for number, parameter in enumerate(self._parameters)
        }

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters are the first ones; afterwards they are what they were, bit for bit."""
        self._store.begin_write(self._slots(1)).result()
        try:
            self._store.begin_read(self._slots(0)).result()
            yield
        finally:
            self._store.begin_read(self._slots(1)).result()
