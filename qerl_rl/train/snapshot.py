"""The changing state of one rank as named tensors, and back. Import after `prepare_megatron`.

parameter/NAME                     a trainable parameter of this rank, as it lies in the model
optimizer/NAME/{master,exp_avg,exp_avg_sq,step}   this rank's float32 shard of it and its Adam state
random/torch, random/tracker/NAME  states of the random generators, uint8
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from qerl_rl.config.errors import ConfigError
from qerl_rl.train.state import TrainState

KINDS = ("exp_avg", "exp_avg_sq", "step")


def take(state: TrainState) -> dict[str, torch.Tensor]:
    """A copy of the state."""
    tensors = {f"parameter/{name}": parameter.data for name, parameter in state.trainable().items()}
    for name, shard, moments in state.shards():
        tensors[f"optimizer/{name}/master"] = shard.data
        for kind, moment in moments.items():
            tensors[f"optimizer/{name}/{kind}"] = moment
    tensors["random/torch"] = torch.get_rng_state()
    for name, generator in get_cuda_rng_tracker().get_states().items():
        tensors[f"random/tracker/{name}"] = generator
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
    torch.set_rng_state(tensors["random/torch"])
    prefix = "random/tracker/"
    get_cuda_rng_tracker().set_states(
        {key.removeprefix(prefix): value.clone() for key, value in tensors.items() if key.startswith(prefix)}
    )


def _copy(target: torch.Tensor, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    source = tensors.get(name)
    if source is None or source.shape != target.shape:
        found = "nothing" if source is None else f"shape {tuple(source.shape)}"
        raise ConfigError(
            f"the checkpoint holds {found} for {name}, the model has shape {tuple(target.shape)}.",
            fix="resume with the model the checkpoint was written with",
        )
    target.copy_(source)
