"""What the tests of the model share: build it on this rank, run packed sequences through it, collect gradients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qerl_rl.config.schema import LoraConfig, TrainConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.platform import detect, prepare_megatron
from qerl_rl.quant.checkpoint import CheckpointReader
from tests.ranks import fresh_world

LENGTHS = [7, 1, 22, 12, 6]
"""Tokens of the packed sequences: 48 together, which two tensor-parallel ranks can halve."""


def start(train: TrainConfig, device: str = "cpu") -> None:
    """Process group and Megatron's groups for `train`, in place of those of another layout."""
    found = detect(device)
    prepare_megatron(found)
    from megatron.core import parallel_state

    from qerl_rl.model.parallel import current_sizes, initialize_parallel, parallel_sizes

    # Every layout makes about 20 process groups: keep those there are when they fit.
    if parallel_state.model_parallel_is_initialized() and current_sizes() == parallel_sizes(train):
        return
    fresh_world(found.collective_backend)
    initialize_parallel(train)


@dataclass
class Loaded:
    architecture: MoeArchitecture
    model: Any
    reader: CheckpointReader


def load(folder: Path, train: TrainConfig, lora: LoraConfig | None = None) -> Loaded:
    """The model of this rank with the weights of `folder`, stored as they are there."""
    from qerl_rl.model.build import build_model
    from qerl_rl.model.formats import stored_formats
    from qerl_rl.model.weight_map import load_hf

    architecture, reader = MoeArchitecture.from_folder(folder), CheckpointReader(folder)
    model = build_model(architecture, train, lora, stored_formats(reader, architecture))
    load_hf(model, reader, architecture)
    return Loaded(architecture, model, reader)


def set_random_adapters(loaded: Loaded, seed: int = 5) -> None:
    """Give the adapters (their B is zero at first) values that show."""
    from qerl_rl.model.lora import gather_adapters, load_adapters

    generator = torch.Generator().manual_seed(seed)
    shapes = gather_adapters(loaded.model, loaded.architecture)
    tensors = {name: torch.randn(tensor.shape, generator=generator) * 0.2 for name, tensor in shapes.items()}
    load_adapters(loaded.model, loaded.architecture, tensors)


def sequences(vocabulary_size: int, lengths: list[int] | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, vocabulary_size, (length,), generator=generator) for length in lengths or LENGTHS]


def packed(tokens: list[torch.Tensor], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Arguments of GPTModel for packed sequences."""
    from megatron.core.packed_seq_params import PackedSeqParams

    lengths = [len(sequence) for sequence in tokens]
    starts = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    longest = max(lengths)
    return {
        "input_ids": torch.cat(tokens)[None].to(device),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(device),
        "attention_mask": None,
        "packed_seq_params": PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
    }


def loss_and_gradients(loaded: Loaded, tokens: list[torch.Tensor]) -> float:
    """Sum of the next-token losses through Megatron's schedule, its gradients in `.grad`; 0.0 off the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    arguments = packed(tokens, next(loaded.model.parameters()).device)
    labels = arguments["input_ids"].roll(-1, 1)

    def forward(batches: Any, model: Any) -> Any:
        output = model(**arguments, labels=labels)

        def loss(per_token: torch.Tensor) -> Any:
            total = per_token.float().sum()
            return total, torch.tensor(per_token.numel(), dtype=torch.int), {"loss": total.detach()}

        return output, loss

    results = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=[loaded.model],
        num_microbatches=1,
        seq_length=arguments["input_ids"].size(1),
        micro_batch_size=1,
        forward_only=False,
    )
    return float(results[0]["loss"]) if results else 0.0


def summed_gradients(loaded: Loaded) -> dict[str, torch.Tensor]:
    """Gradients of the adapters in the exchange format, when every data-parallel rank had the same tokens."""
    from megatron.core import parallel_state

    from qerl_rl.model.lora import gather_adapters

    for parameter in loaded.model.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, "an adapter got no gradient"
            own_group = not getattr(parameter, "allreduce", True)
            group = (
                parallel_state.get_expert_data_parallel_group if own_group else parallel_state.get_data_parallel_group
            )
            dist.all_reduce(parameter.grad, group=group())
            parameter.data.copy_(parameter.grad / parallel_state.get_data_parallel_world_size())
    return gather_adapters(loaded.model, loaded.architecture)


@torch.no_grad()
def replace_weights_by_gradients(loaded: Loaded) -> None:
    """Put the gradient of every weight in its place (what Megatron's DDP and finalize_model_grads sum is summed)."""
    from megatron.core import parallel_state

    tensor_group = parallel_state.get_tensor_model_parallel_group()
    for parameter in loaded.model.parameters():
        assert parameter.grad is not None, "a weight got no gradient"
        if not getattr(parameter, "allreduce", True):
            dist.all_reduce(parameter.grad, group=parallel_state.get_expert_data_parallel_group())
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=tensor_group)
    if loaded.model.share_embeddings_and_output_weights and parallel_state.get_pipeline_model_parallel_world_size() > 1:
        shared = loaded.model.shared_embedding_or_output_weight()
        dist.all_reduce(shared.grad, group=parallel_state.get_embedding_group())
    for parameter in loaded.model.parameters():
        parameter.copy_(parameter.grad)
