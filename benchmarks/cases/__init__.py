"""Register the benchmark cases: importing this package is enough."""

from benchmarks.cases import api, ops, pictures, steps, survey

__all__ = ["api", "ops", "pictures", "steps", "survey"]
