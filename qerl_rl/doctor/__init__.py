"""`python -m qerl_rl doctor`: what this machine has of what a platform needs."""
