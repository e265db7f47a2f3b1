"""Recover label-conditional images from a black box."""

from bidfmkd_fast.ops.scores import as_scores
from bidfmkd_fast.recovery.augment import augment
from bidfmkd_fast.recovery.config import RecoveryConfig
from bidfmkd_fast.recovery.generator import Generator
from bidfmkd_fast.recovery.journal import Journal
from bidfmkd_fast.recovery.objective import Objective
from bidfmkd_fast.recovery.recover import recover
from bidfmkd_fast.recovery.recovered import Recovered

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
