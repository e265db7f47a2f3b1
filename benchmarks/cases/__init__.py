"""Register the benchmark cases: importing this package is enough."""

from benchmarks.cases import api, drop_in, ops, pictures, steps, survey

__all__ = ["api", "drop_in", "ops", "pictures", "steps", "survey"]
