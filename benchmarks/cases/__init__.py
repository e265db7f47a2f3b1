"""The benchmark cases; importing this package registers all of them."""

from benchmarks.cases import api, ops, steps

__all__ = ["api", "ops", "steps"]
