"""The keys of a launch file that say what is learned: algorithm, critic, preference pairs, rewards."""

from __future__ import annotations

from dataclasses import dataclass, field

from qerl_rl.config.correction_schema import RolloutCorrectionConfig

__all__ = [
    "AlgorithmConfig",
    "CriticConfig",
    "DpoConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RolloutCorrectionConfig",
]


@dataclass(frozen=True)
class AlgorithmConfig:
    """How the policy learns: advantages, policy loss, KL to the reference (the base without adapters).

    docs/algorithms.md has the formula and the source of everything that can be named here.
    """

    name: str = "grpo"
    """grpo, dapo (samples again where a group has no signal), ppo (with a critic) or dpo (from pairs, no rollout)."""
    prompts_per_step: int = 16
    """In dpo: pairs."""
    samples_per_prompt: int = 8
    """2 in dpo: the chosen response and the rejected one."""
    prompts_per_mini_batch: int = 16
    """Prompts in one optimizer update."""
    epochs_per_step: int = 1
    """Times each step's samples are trained on."""
    advantage: str = "grpo"
    """grpo, dr_grpo, rloo, reinforce_plus_plus, reinforce_plus_plus_baseline, or a dotted path to a function; gae in
    ppo."""
    normalize_std: bool = True
    """Divide grpo's advantages by the standard deviation of their group."""
    discount: float = 1.0
    """Of rewards by token, in reinforce_plus_plus and gae."""
    gae_lambda: float = 1.0
    """Of gae: 1 compares what came with the critic's value (least bias), 0 one token's step with it (least noise)."""
    loss: str = "ppo"
    """ppo, dual_clip, gspo, cispo, or a dotted path to a function."""
    clip_low: float = 0.2
    """The ratio to the old policy counts from 1 - clip_low on."""
    clip_high: float = 0.2
    """The ratio to the old policy counts up to 1 + clip_high; larger than clip_low is DAPO's clip-higher."""
    dual_clip: float = 3.0
    """Largest ratio that counts against a bad token, in dual_clip."""
    loss_aggregation: str = "token_mean"
    """token_mean, sequence_mean or sequence_sum_constant (the sum over a sequence's tokens / loss_constant_tokens)."""
    loss_constant_tokens: int = 0
    """What sequence_sum_constant divides by; 0 takes rollout.max_response_tokens."""
    kl_coefficient: float = 0.0
    kl_in: str = "loss"
    """loss, or reward: each token then earns -kl_coefficient * KL before advantages are taken."""
    kl_estimator: str = "k3"
    """k1, k2, k3, abs or mse."""
    kl_target: float = 0.0
    """KL, in nats a token, that kl_coefficient is steered to; 0 keeps it fixed."""
    kl_horizon: int = 10000
    """Samples over which the steering acts: larger is slower."""
    entropy_coefficient: float = 0.0
    sampling_rounds: int = 1
    """Rollouts in a step, at most (DAPO's dynamic sampling): after each, new prompts take the place of those whose
    samples all earned the same; after the last, those fill what is still missing. 1 takes what comes."""
    overlong_buffer_tokens: int = 0
    """Tokens before rollout.max_response_tokens in which a response's reward falls linearly (DAPO); 0 punishes none."""
    overlong_penalty: float = 1.0
    """Reward that a response of rollout.max_response_tokens loses, where overlong_buffer_tokens is above 0."""
    mask_truncated: bool = False
    """Leave responses that the token limit cut off out of the update (they stay in their group's advantages)."""


@dataclass(frozen=True)
class CriticConfig:
    """The value model of ppo, on the cards and in the layout of the policy; out of memory while idle."""

    path: str = ""
    """Folder of the model that it starts from, of the policy's tokenizer; empty takes model.path."""
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    """Optimizer updates over which its learning rate rises linearly from 0."""
    value_clip: float = 0.2
    """How far a value may move from the one that the advantages were taken with before its loss counts no more."""
    head_start_steps: int = 0
    """Steps at the start in which only the critic learns."""


@dataclass(frozen=True)
class DpoConfig:
    """Learning from pairs of a chosen and a rejected response."""

    loss: str = "dpo"
    """dpo, ipo or cdpo."""
    beta: float = 0.1
    """Weight of the KL to the reference that the loss stands for; larger stays closer."""
    flip_probability: float = 0.1
    """Share of pairs whose label is taken to be wrong, in cdpo."""


@dataclass(frozen=True)
class RewardConfig:
    """What a sample earns: one function, or a weighted sum of several (docs/rewards_and_data.md lists them)."""

    function: str = ""
    """Name of a reward (exact, math, format, ...) or a dotted path to a function; empty is exact, unless
    reward.functions is given."""
    functions: dict[str, float] = field(default_factory=dict)
    """Weight by name or dotted path, instead of reward.function; 0 only reports the function's mean."""
    length_characters: int = 1000
    """Characters from which the reward `length` is 1."""
    workers: int = 1
    timeout_s: float = 10.0
    """Seconds a function may take for one sample; past them it scores 0."""
    memory_bytes: int = 2147483648
    """Address space, in bytes, that a function may take for one sample; past it it scores 0. 0 sets no limit."""

    @property
    def weights(self) -> dict[str, float]:
        """Weight by function, whichever of the two keys was given."""
        return self.functions or {self.function or "exact": 1.0}


@dataclass(frozen=True)
class RewardModelConfig:
    """A model that scores whole responses, beside the functions of the section reward."""

    path: str = ""
    """Folder of a Hugging Face sequence classification model with one label; empty has none."""
    backend: str = "hf"
    """hf (transformers, in the reward worker, any architecture with any tokenizer) or megatron (a supported MoE family
    with the policy's tokenizer: on the policy's cards, sharded like it, out of memory while it has nothing to do)."""
    weight: float = 1.0
    """What a sample's score is multiplied by before it joins the sum of the rewards."""
    max_length: int = 0
    """Tokens of prompt and response that it reads, at most, the last ones of a longer text; 0 takes its own limit."""

    @property
    def on_the_cards(self) -> bool:
        """Whether the workers hold it and not the reward worker."""
        return bool(self.path) and self.backend == "megatron"
