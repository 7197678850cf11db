"""Reward functions (prompt, response, answer) -> float, and how many samples are scored safely at once."""

from qerl_rl.rewards.load import load_reward, load_rewards

__all__ = ["load_reward", "load_rewards"]
