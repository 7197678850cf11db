"""What must hold between the keys of the section rollout_correction."""

from __future__ import annotations

from qerl_rl.config.correction_schema import RolloutCorrectionConfig
from qerl_rl.config.learning_schema import AlgorithmConfig

Fault = tuple[str, str, str] | None
"""The key at fault, the problem, the fix."""
SECTION = "rollout_correction"


def correction_fault(correction: RolloutCorrectionConfig, loss: str) -> Fault:
    """The first value, or pair of values, of the section that can't work. Args: loss: algorithm.loss."""
    if correction.is_reinforce and not correction.bypass_mode:
        key = f"{SECTION}.loss_type"
        problem = f"{key}=reinforce, but without {SECTION}.bypass_mode the loss is algorithm.loss={loss}."
        return key, problem, f"set {key} to ppo_clip, or {SECTION}.bypass_mode to true"
    if correction.is_reinforce and loss != AlgorithmConfig.loss:
        key = "algorithm.loss"
        problem = f"{key}={loss}, but {SECTION}.loss_type=reinforce takes its place."
        return key, problem, f"leave {key} out, or set {SECTION}.loss_type to ppo_clip"
    if correction.bypass_mode and not correction.is_reinforce and correction.rollout_is != "none":
        key = f"{SECTION}.rollout_is"
        problem = f"{key}={correction.rollout_is}, but with {SECTION}.bypass_mode the ratio in the loss is that weight."
        return key, problem, f"set {key} to none, {SECTION}.loss_type to reinforce, or {SECTION}.bypass_mode to false"
    if correction.rollout_is_batch_normalize and correction.rollout_is == "none":
        key = f"{SECTION}.rollout_is_batch_normalize"
        problem = f"{key}=true, but {SECTION}.rollout_is=none has no weights to normalize."
        return key, problem, f"set {SECTION}.rollout_is to token or sequence, or {key} to false"
    try:
        _ = correction.is_band
    except ValueError as error:
        key = f"{SECTION}.rollout_is_threshold"
        return key, f"{SECTION}.{error}.", f"set {key} to a number such as 2.0, or to a band such as 0.5_5.0"
    if correction.rollout_rs == "none" and correction.rollout_rs_threshold:
        key = f"{SECTION}.rollout_rs_threshold"
        problem = f"{key}={correction.rollout_rs_threshold}, but {SECTION}.rollout_rs=none rejects nothing."
        return key, problem, f"leave {key} empty, or set {SECTION}.rollout_rs to seq_mean_k1"
    try:
        _ = correction.rs_bands
    except ValueError as error:
        key = f"{SECTION}.{str(error).partition('=')[0].partition(' ')[0]}"
        example = "a criterion such as seq_mean_k3" if key.endswith("_rs") else "0.5_2.0 for k1, a number for others"
        return key, f"{SECTION}.{error}.", f"set {key} to {example}"
    if not 0 <= correction.rollout_token_veto_threshold < 1:
        key = f"{SECTION}.rollout_token_veto_threshold"
        problem = f"{key}={correction.rollout_token_veto_threshold} would reject what both engines agree on."
        return key, problem, f"set {key} to 0 (off) or to a small ratio such as 1e-4"
    return None
