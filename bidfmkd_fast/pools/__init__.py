"""Provide pools of APIs to learn from: trained here, read from files, or reached as services."""

from __future__ import annotations

from bidfmkd_fast.pools.api_training import train_pool
from bidfmkd_fast.pools.pool import Pool, PoolEntry, load_modules, load_pool, read_pool
from bidfmkd_fast.pools.services import Services, find_services, pool_from_services

__all__ = [
    "Pool",
    "PoolEntry",
    "Services",
    "find_services",
    "load_modules",
    "load_pool",
    "pool_from_services",
    "read_pool",
    "train_pool",
]
