"""Provide image data sets that are split by class, and the few-shot episodes drawn from them."""

from __future__ import annotations

from bidfmkd_fast.data.dataset import SPLITS, Dataset
from bidfmkd_fast.data.episodes import Episode, EpisodeSampler
from bidfmkd_fast.data.glyphs import make_glyphs
from bidfmkd_fast.data.load import load_dataset

__all__ = ["SPLITS", "Dataset", "Episode", "EpisodeSampler", "load_dataset", "make_glyphs"]
