"""Test the adaptation to more classes than the meta-model has outputs."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import bidfmkd_fast as bf
from bidfmkd_fast.data.episodes import Episode
from bidfmkd_fast.meta import MetaModel
from bidfmkd_fast.models import build_model
from bidfmkd_fast.models.head import with_classes

STEPS, RATE, N_OUTPUTS = 4, 0.2, 4


def model(seed: int) -> MetaModel:
    torch.manual_seed(seed)
    module = build_model(
        "conv4",
        in_channels=1,
        n_classes=N_OUTPUTS,
        image_size=(16, 16),
        width=4,
        batch_statistics=True,
    ).double()
    return MetaModel(module, adapt_steps=STEPS, adapt_learning_rate=RATE)


def scores_by_hand(model: MetaModel, episode: Episode, head_factor: float) -> torch.Tensor:
    """Adapt with torch's own SGD, the last layer at a rate of its own; classify transductively."""
    module = copy.deepcopy(with_classes("test", model.module, len(episode.classes)))
    head = list(module.parameters())[-2:]
    body = list(module.parameters())[:-2]
    optimizer = torch.optim.SGD(
        [{"params": body, "lr": RATE}, {"params": head, "lr": head_factor * RATE}]
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = module(episode.support_images.double())
        functional.cross_entropy(logits, episode.support_labels).backward()
        optimizer.step()
    return module(episode.query_images.double()).detach()


@pytest.mark.parametrize("n_way", [4, 12])
def test_a_grown_layer_learns_at_a_rate_that_grows_with_it(n_way: int, seed: int) -> None:
    print(f"seed {seed}")
    dataset = bf.load_dataset("glyphs")
    episode = bf.EpisodeSampler(dataset, "meta_test", n_way, 1, 2, seed=seed).episode(0)
    small = functional.interpolate(episode.support_images, (16, 16))
    queries = functional.interpolate(episode.query_images, (16, 16))
    episode = replace(episode, support_images=small, query_images=queries)
    meta_model = model(seed)
    classifier = meta_model.adapt(small.double(), episode.support_labels, transductive=True)
    scores = classifier.scores(episode.query_images.double())
    expected = scores_by_hand(meta_model, episode, n_way / N_OUTPUTS)
    torch.testing.assert_close(scores, expected)
    if n_way > N_OUTPUTS:
        assert not torch.allclose(scores, scores_by_hand(meta_model, episode, 1.0))


def test_evaluate_adapts_as_adapt_does(seed: int) -> None:
    print(f"seed {seed}")
    dataset = bf.load_dataset("glyphs")
    torch.manual_seed(seed)
    shape = dataset.image_shape
    module = build_model(
        "conv4",
        in_channels=shape[0],
        n_classes=N_OUTPUTS,
        image_size=shape[1:],
        width=4,
        batch_statistics=True,
    )
    meta_model = MetaModel(module, adapt_steps=STEPS, adapt_learning_rate=RATE)
    settings = {"n_way": 10, "n_shot": 2, "n_query": 4, "n_episodes": 6, "seed": seed}
    evaluation = bf.evaluate(meta_model, dataset, **settings)
    sampler = bf.EpisodeSampler(dataset, "meta_test", 10, 2, 4, seed=seed)
    by_hand = []
    for number in range(6):
        episode = sampler.episode(number)
        classifier = meta_model.adapt(
            episode.support_images, episode.support_labels, transductive=True
        )
        by_hand.append(classifier.score(episode.query_images, episode.query_labels))
    # Stacked tasks are summed in another order, so that a tie may fall to another class.
    differ = (evaluation.per_episode - torch.tensor(by_hand, dtype=torch.float64)).abs()
    assert differ.max() <= 1 / 40 + 1e-9 and differ.gt(0).sum() <= 1
