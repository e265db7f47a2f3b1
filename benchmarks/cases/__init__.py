"""The cases; importing this registers them all."""

from benchmarks.cases import api, ops, steps

__all__ = ["api", "ops", "steps"]
