"""Register the benchmark cases: importing this package is enough."""

from benchmarks.cases import api, ops, steps

__all__ = ["api", "ops", "steps"]
