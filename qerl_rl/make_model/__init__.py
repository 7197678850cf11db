"""Builders of the models that the examples, tests and benchmarks train."""
