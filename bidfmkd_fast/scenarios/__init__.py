"""Ready-made settings: pools of APIs to learn from."""

from __future__ import annotations

from bidfmkd_fast.scenarios.api_training import train_pool
from bidfmkd_fast.scenarios.pool import Pool, PoolEntry, load_modules, load_pool, read_pool

__all__ = ["Pool", "PoolEntry", "load_modules", "load_pool", "read_pool", "train_pool"]
