"""The changing state of one rank as named tensors, and back. Import after `prepare_megatron`.

A critic's names begin with critic/; the random states belong to the process and are there once.

parameter/NAME                     a trainable parameter of this rank, as it lies in the model
optimizer/NAME/{master,exp_avg,exp_avg_sq,step}   this rank's float32 shard of it and its Adam state
optimizer/NAME/offset              int64: where in the flat parameter that shard begins
random/torch, random/tracker/NAME  states of torch's generators, uint8
random/numpy, random/python        states of the global generators, uint8 (JSON)
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from qerl_rl.config.errors import ConfigError
from qerl_rl.train.state import TrainState

KINDS = ("exp_avg", "exp_avg_sq", "step")


def take(state: TrainState) -> dict[str, torch.Tensor]:
    """A copy of the parameters and the optimizer."""
    tensors = {f"parameter/{name}": parameter.data for name, parameter in state.trainable().items()}
    runs = state.shard_runs()
    for name, shard, moments in state.shards():
        tensors[f"optimizer/{name}/master"] = shard.data
        tensors[f"optimizer/{name}/offset"] = torch.tensor(runs[name].start)
        for kind, moment in moments.items():
            tensors[f"optimizer/{name}/{kind}"] = moment
    # The shards of float32 parameters are views of the parameters; a file holds each of them on its own.
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def restore(state: TrainState, tensors: Mapping[str, torch.Tensor]) -> None:
    """Set the state to what `take` gave, in place.

    Raises: ConfigError when a parameter is missing or has another shape: the model is another one.
    """
    for name, parameter in state.trainable().items():
        _copy(parameter.data, tensors, f"parameter/{name}")
    for name, shard, moments in state.shards():
        prefix = f"optimizer/{name}/"
        _copy(shard.data, tensors, f"{prefix}master")
        saved = {kind for kind in KINDS if prefix + kind in tensors}
        for kind in moments.keys() - saved:
            del moments[kind]
        for kind in saved:
            if kind in moments:
                _copy(moments[kind], tensors, prefix + kind)
            else:
                moments[kind] = tensors[prefix + kind].clone()


def random_states() -> dict[str, torch.Tensor]:
    """A copy of the states of all generators of this process."""
    kind, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    return {
        "random/torch": torch.get_rng_state().clone(),
        **{f"random/tracker/{name}": tensor.clone() for name, tensor in get_cuda_rng_tracker().get_states().items()},
        "random/numpy": _as_bytes([kind, keys.tolist(), *rest]),
        "random/python": _as_bytes(random.getstate()),
    }


def set_random_states(tensors: Mapping[str, torch.Tensor]) -> None:
    """Set the generators to what `random_states` gave."""
    torch.set_rng_state(tensors["random/torch"])
    prefix = "random/tracker/"
    get_cuda_rng_tracker().set_states(
        {key.removeprefix(prefix): value.clone() for key, value in tensors.items() if key.startswith(prefix)}
    )
    np.random.set_state(tuple(_from_bytes(tensors["random/numpy"])))
    version, internal, gauss = _from_bytes(tensors["random/python"])
    random.setstate((version, tuple(internal), gauss))


def _as_bytes(value: Any) -> torch.Tensor:
    """JSON, whose floats round-trip exactly."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(tensor: torch.Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))


def _copy(target: torch.Tensor, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    source = tensors.get(name)
    if source is None or source.shape != target.shape:
        found = "nothing" if source is None else f"shape {tuple(source.shape)}"
        raise ConfigError(
            f"the checkpoint holds {found} for {name}, the model has shape {tuple(target.shape)}.",
            fix="resume with the model the checkpoint was written with",
        )
    target.copy_(source)
