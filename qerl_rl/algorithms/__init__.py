"""Reinforcement-learning mathematics as pure functions on tensors; no Ray, no Megatron, no vLLM."""
