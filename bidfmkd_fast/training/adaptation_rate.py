"""Choose the learning rate of the adaptation without real images, on procedural pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from bidfmkd_fast.black_box import APISpec
from bidfmkd_fast.data import Dataset
from bidfmkd_fast.meta import MetaModel
from bidfmkd_fast.meta.evaluate import evaluate
from bidfmkd_fast.priors.library import can_draw, draw_pictures
from bidfmkd_fast.seeds import derive_seed
from bidfmkd_fast.settings import AUTO
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.default_model import task_shape

# The first is taken where all are equally good, and where no pictures can be drawn.
RATES = (0.1, 0.03, 0.3)
_CLASSES, _SHOTS, _QUERIES, _EPISODES = 100, 5, 15, 16


def adapting(
    module: nn.Module,
    specs: Sequence[APISpec],
    config: TrainConfig,
    learned_at: float | None = None,
) -> MetaModel:
    """Return the meta-model of a trained module, with the rate of its adaptation.

    With `config.adapt_lr` "auto" it is the one of `RATES` with the highest accuracy on 16 tasks of
    procedural pictures, five images per class. A class is one scene, and its images are jittered
    copies. `specs` are those of the APIs, for the shape of the images and the number of classes. A
    module that has learned to adapt at the rate `learned_at` keeps that rate instead, since it may
    know tasks of pictures better than others.
    """

    def at(rate: float) -> MetaModel:
        return MetaModel(module, adapt_steps=config.adapt_steps, adapt_learning_rate=rate)

    if config.adapt_lr != AUTO:
        return at(float(config.adapt_lr))
    if learned_at is not None:
        return at(learned_at)
    shape = task_shape(specs, config) or specs[0].image_shape
    if not can_draw(shape):
        return at(RATES[0])
    pictures = _pictures(shape, derive_seed(config.seed, "adaptation rate"))
    n_way = min(20, *(spec.n_classes for spec in specs))
    accuracies = {
        rate: evaluate(
            at(rate),
            pictures,
            n_way=n_way,
            n_shot=_SHOTS,
            n_query=_QUERIES,
            n_episodes=_EPISODES,
            split="meta_val",
        ).mean
        for rate in RATES
    }
    return at(max(RATES, key=lambda rate: accuracies[rate]))


def _pictures(shape: tuple[int, int, int], seed: int) -> Dataset:
    """Draw a data set whose classes are scenes of the picture library, which no API has seen."""
    per_class = _SHOTS + _QUERIES
    scenes = torch.arange(_CLASSES).repeat_interleave(per_class)
    members = torch.arange(per_class).repeat(_CLASSES)
    images = (255 * draw_pictures(scenes, members, shape, seed)).round_().to(torch.uint8)
    names = tuple(f"scene {number}" for number in range(_CLASSES))
    return Dataset("pictures", images, scenes, names, ("meta_val",) * _CLASSES)
