"""Stands in for what Megatron-LM has and megatron-core on PyPI has not."""
