"""Check the choice of the adaptation's rate against evaluations made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bidfmkd_fast.black_box import APISpec
from bidfmkd_fast.data import EpisodeSampler
from bidfmkd_fast.meta import MetaModel
from bidfmkd_fast.training import TrainConfig, adaptation_rate
from bidfmkd_fast.training.adaptation_rate import RATES, adapting
from bidfmkd_fast.training.default_model import initial_module

CONFIG = TrainConfig(seed=3, adapt_steps=2, adapt_lr="auto", meta_model_width=4)
SPEC = APISpec(n_classes=3, image_shape=(1, 16, 16))


def test_the_rate_is_the_best_on_pseudo_tasks() -> None:
    module = initial_module([SPEC], CONFIG)
    made = adapting(module, [SPEC], CONFIG)
    sampler = EpisodeSampler(
        adaptation_rate._pictures((1, 16, 16), adaptation_rate.derive_seed(3, "adaptation rate")),
        "meta_val",
        n_way=3,
        n_shot=5,
        n_query=15,
        seed=0,
    )
    accuracies = {}
    for rate in RATES:
        model, hits = MetaModel(module, adapt_steps=2, adapt_learning_rate=rate), []
        for index in range(16):
            episode = sampler.episode(index)
            classifier = model.adapt(
                episode.support_images, episode.support_labels, transductive=True
            )
            hits.append((classifier.predict(episode.query_images) == episode.query_labels).float())
        accuracies[rate] = torch.stack(hits).mean().item()
    assert accuracies[made.adapt_learning_rate] == pytest.approx(max(accuracies.values()), abs=0.02)
    assert made.adapt_steps == 2 and made.module is module
    again = adapting(initial_module([SPEC], CONFIG), [SPEC], CONFIG)
    assert again.adapt_learning_rate == made.adapt_learning_rate


def test_a_rate_of_the_settings_is_kept() -> None:
    config = replace(CONFIG, adapt_lr=0.25)
    assert adapting(initial_module([SPEC], config), [SPEC], config).adapt_learning_rate == 0.25


def test_what_has_learned_to_adapt_keeps_its_rate() -> None:
    module = initial_module([SPEC], CONFIG)
    assert adapting(module, [SPEC], CONFIG, 0.07).adapt_learning_rate == 0.07
    fixed = replace(CONFIG, adapt_lr=0.25)
    assert adapting(module, [SPEC], fixed, 0.07).adapt_learning_rate == 0.25


def test_equal_rates_and_shapes_that_cannot_be_drawn_get_the_first() -> None:
    idle = replace(CONFIG, adapt_steps=0)
    assert adapting(initial_module([SPEC], idle), [SPEC], idle).adapt_learning_rate == RATES[0]
    two = APISpec(n_classes=3, image_shape=(2, 16, 16))
    assert adapting(initial_module([two], CONFIG), [two], CONFIG).adapt_learning_rate == RATES[0]
