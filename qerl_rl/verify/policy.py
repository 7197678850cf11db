"""The trainer's side: the Megatron model of a checkpoint in this process, frozen, open to be looked into."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from qerl_rl.config.schema import Config, LoraConfig, ModelConfig, QuantConfig, TrainConfig
from qerl_rl.layout.slots import LANGUAGE_MODEL
from qerl_rl.platform import detect
from qerl_rl.quant.checkpoint import stored_format
from qerl_rl.train.model_engine import ModelEngine
from qerl_rl.train.packing import make_pack
from qerl_rl.train.samples import Samples
from qerl_rl.verify.reference import Trace


def start_world() -> None:
    """A world of this process alone, unless there is one; the trainer and vLLM both find it."""
    if dist.is_initialized():
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0")
    os.environ.update(WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    dist.init_process_group(detect("auto").collective_backend, rank=0, world_size=1)


class FrozenPolicy(ModelEngine):
    """The model of `folder` as the trainer computes it, in float32, without adapters, on one rank."""

    def __init__(self, folder: Path) -> None:
        start_world()
        config = Config(
            model=ModelConfig(path=str(folder)),
            train=TrainConfig(dtype="float32"),
            lora=LoraConfig(rank=0),
            quant=QuantConfig(format=stored_format(folder)),
        )
        super().__init__(config, None, head=LANGUAGE_MODEL)
        self.model.requires_grad_(requires_grad=False)

    @property
    def _layers(self) -> list[torch.nn.Module]:
        return list(self.model.decoder.layers)

    @torch.no_grad()
    def logits(self, sequences: Sequence[Tensor]) -> Tensor:
        """Logits [T, V] after each token of int64 [n] sequences, packed one after another."""
        from qerl_rl.train.passes import packed_parameters

        tokens = [sequence.numpy() for sequence in sequences]
        samples = Samples(tokens, [len(own) - 1 for own in tokens])
        pack = make_pack(samples, range(len(tokens)), 1, self.device)
        found = self.model(pack.tokens, pack.position_ids, None, packed_seq_params=packed_parameters(pack))
        return found[0, :, : self.architecture.vocabulary_size].float().cpu()

    def trace(self, sequences: Sequence[Tensor], inputs: Mapping[int, Tensor] | None = None) -> Trace:
        """What the layers compute; layer i takes inputs[i] [T, H], where given, for what the one before gave."""
        seen: dict[tuple[str, int], Tensor] = {}

        def keep(kind: str, index: int) -> Callable[..., None]:
            def hook(module: Any, arguments: Any, output: Any) -> None:
                value = output[0] if isinstance(output, tuple) else output
                seen[kind, index] = value[:, 0].float().cpu()

            return hook

        def keep_input(kind: str, index: int) -> Callable[..., None]:
            def hook(module: Any, arguments: Any, named: Any) -> None:
                value = named["hidden_states"] if "hidden_states" in named else arguments[0]
                seen[kind, index] = value[:, 0].float().cpu()

            return hook

        with self._replaced_inputs(inputs or {}):
            hooks = [self.model.decoder.final_layernorm.register_forward_hook(keep("final", 0))]
            for index, layer in enumerate(self._layers):
                hooks += [
                    layer.register_forward_pre_hook(keep_input("inputs", index), with_kwargs=True),
                    layer.self_attention.register_forward_hook(keep("attention", index)),
                    layer.mlp.register_forward_hook(keep("experts", index)),
                    layer.mlp.register_forward_pre_hook(keep_input("expert_inputs", index), with_kwargs=True),
                ]
            try:
                found = self.logits(sequences)
            finally:
                for hook in hooks:
                    hook.remove()
        by_layer = {
            kind: [seen[kind, i] for i in range(len(self._layers))] for kind in {kind for kind, _ in seen} - {"final"}
        }
        return Trace(**by_layer, final=seen["final", 0], logits=found)

    def logits_from(self, sequences: Sequence[Tensor], layer: int, stream: Tensor) -> Tensor:
        """`logits`, with `stream` [T, H] in place of what layers 0 .. `layer` - 1 give."""
        with self._replaced_inputs({layer: stream}):
            return self.logits(sequences)

    @contextmanager
    def _replaced_inputs(self, inputs: Mapping[int, Tensor]) -> Iterator[None]:
        """Inside, layer i (the one behind the last: the final norm) sees inputs[i] [T, H]."""
        places = [*self._layers, self.model.decoder.final_layernorm]

        def replace(value: Tensor) -> Callable[..., Any]:
            def hook(module: Any, arguments: Any, named: dict[str, Any]) -> Any:
                if "hidden_states" in named:
                    given = named["hidden_states"]
                    return arguments, named | {"hidden_states": value[:, None].to(given)}
                return (value[:, None].to(arguments[0]), *arguments[1:]), named

            return hook

        hooks = [places[i].register_forward_pre_hook(replace(value), with_kwargs=True) for i, value in inputs.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def log_probs(self, samples: Samples) -> list[np.ndarray]:
        """Log-probs of the response tokens at temperature 1, one float32 array a sample."""
        found = []
        # One sample after another: logits of a large vocabulary at all tokens at once would fill the memory.
        for tokens, length in zip(samples.tokens, samples.response_lengths, strict=True):
            sequence = torch.from_numpy(tokens)
            of_tokens = self.logits([sequence])[:-1].log_softmax(-1).gather(1, sequence[1:, None])[:, 0]
            found.append(of_tokens[len(of_tokens) - length :].numpy())
        return found
