"""Recovering label-conditional images from a black box."""

from bidfmkd_fast.recovery.generator import Generator
from bidfmkd_fast.recovery.journal import Journal
from bidfmkd_fast.recovery.objective import Objective, as_scores, augment
from bidfmkd_fast.recovery.recover import Recovered, RecoveryConfig, recover

__all__ = [
    "Generator",
    "Journal",
    "Objective",
    "Recovered",
    "RecoveryConfig",
    "as_scores",
    "augment",
    "recover",
]
