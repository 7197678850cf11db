"""`python -m qerl_rl verify`: do trainer, rollout engine and transformers compute the same from one checkpoint?"""
