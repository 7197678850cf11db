"""Whether a layout of the trainer fits a model."""

from __future__ import annotations

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import TrainConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.routing import chosen_rule
from qerl_rl.layout.train import check_stages, parallel_sizes


def check_layout(architecture: MoeArchitecture, train: TrainConfig) -> None:
    """Raise ConfigError when a parallel size of the trainer does not divide what it splits of this model, or when its
    routers can't work as train says."""
    latent = architecture.latent
    splits = [
        ("tensor_parallel", "key-value heads", architecture.key_value_heads),
        ("tensor_parallel", "intermediate columns of the shared expert", architecture.shared_expert_width),
        ("tensor_parallel", "intermediate columns of the dense layers", architecture.dense_width),
        ("expert_parallel", "experts", architecture.experts),
        ("expert_tensor_parallel", "intermediate columns of an expert", architecture.expert_width),
    ]
    if latent:
        splits += [
            ("tensor_parallel", "rows of the compressed queries", latent.query_rank or 0),
            ("tensor_parallel", "rows of the compressed keys", latent.key_value_rank + latent.rope_head_dim),
        ]
    for key, what, count in splits:
        ways = getattr(train, key)
        if count % ways:
            fitting = [size for size in range(1, ways) if count % size == 0]
            raise ConfigError(
                f"train.{key}={ways} does not divide the model's {count} {what}.",
                fix=f"set train.{key} to {' or '.join(map(str, fitting))}",
            )
    sizes = parallel_sizes(train)
    check_stages(sizes, architecture.layers)
    if len(set(sizes.layers_per_stage[1:-1])) > 1:
        raise ConfigError(
            f"train.layers_per_stage={train.layers_per_stage} has stages of different sizes in the middle.",
            fix="make all between the first and the last stage alike: Megatron builds no others",
        )
    if train.tensor_parallel > 1 and not train.sequence_parallel:
        raise ConfigError(
            f"train.sequence_parallel=false with train.tensor_parallel={train.tensor_parallel} trains no MoE.",
            fix="set train.sequence_parallel to true",
        )
    chosen_rule(architecture.routing, architecture.experts, train)
