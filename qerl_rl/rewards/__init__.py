"""Reward functions (prompt, response, answer) -> float, and how many samples are scored safely at once."""
