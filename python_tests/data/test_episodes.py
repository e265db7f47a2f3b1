from __future__ import annotations

import pytest
import torch

from bidfmkd_fast.data import Dataset, EpisodeSampler
from bidfmkd_fast.errors import InputError


def numbered(n_classes: int = 7, per_class: int = 6) -> Dataset:
    """Return a data set whose images are constants: 10 * class + number within the class."""
    labels = torch.arange(n_classes).repeat(per_class)
    values = 10 * labels + torch.arange(per_class).repeat_interleave(n_classes)
    images = values.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    splits = ("meta_train",) * (n_classes - 1) + ("meta_test",)
    return Dataset(
        "numbered", images, labels, tuple(f"class {i}" for i in range(n_classes)), splits
    )


def test_episode_is_made_of_its_classes(seed: int) -> None:
    sampler = EpisodeSampler(numbered(), "meta_train", n_way=3, n_shot=2, n_query=4, seed=seed)
    for index in range(20):
        episode = sampler.episode(index)
        assert episode.support_images.shape == (6, 1, 4, 4) and episode.query_images.shape == (
            12,
            1,
            4,
            4,
        )
        assert episode.support_labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert episode.query_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert len(set(episode.classes)) == 3 and max(episode.classes) < 6
        support, query = (
            (images[:, 0, 0, 0] * 255).round().long()
            for images in (episode.support_images, episode.query_images)
        )
        classes = torch.tensor(episode.classes)
        assert torch.equal(support // 10, classes[episode.support_labels])
        assert torch.equal(query // 10, classes[episode.query_labels])
        assert len(set(support.tolist() + query.tolist())) == 18  # every image once


def test_episode_is_a_function_of_seed_and_index(seed: int) -> None:
    def draw(sampler_seed: int, order: list[int]) -> dict[int, torch.Tensor]:
        sampler = EpisodeSampler(numbered(), "meta_train", 5, 1, 5, seed=sampler_seed)
        return {index: sampler.episode(index).query_images for index in order}

    forward, backward, other = (
        draw(seed, [0, 1, 2]),
        draw(seed, [2, 0, 1]),
        draw(seed + 1, [0, 1, 2]),
    )
    assert all(torch.equal(forward[i], backward[i]) for i in range(3))
    assert not torch.equal(forward[0], forward[1]) and not torch.equal(forward[0], other[0])


def test_all_classes_and_images_are_drawn_alike() -> None:
    sampler = EpisodeSampler(numbered(), "meta_train", n_way=2, n_shot=1, n_query=1, seed=1)
    n = 1500
    seen = torch.zeros(60)
    for index in range(n):
        seen[(sampler.episode(index).support_images[:, 0, 0, 0] * 255).round().long()] += 1
    counts = seen.view(6, 10)[:, :6]
    expected = n * 2 / 36
    assert counts.sum() == 2 * n
    assert (counts - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_way": 7}, "meta_train .* has 6 classes; n_way=7"),
        ({"n_way": 0}, "n_way must be at least 1; got 0"),
        ({"n_shot": 0}, "n_shot"),
        ({"n_query": -1}, "n_query"),
        ({"n_way": 2.5}, "n_way must be an integer; got 2.5"),
        ({"n_shot": True}, "n_shot must be an integer; got True"),
        ({"n_shot": 3}, r"class 'class 0' .* has 6 images; n_shot \+ n_query = 3 \+ 4"),
        ({"split": "meta_val"}, "has 0 classes"),
        ({"split": "validation"}, "'validation'"),
    ],
)
def test_refusals(change: dict, says: str) -> None:
    arguments = {"split": "meta_train", "n_way": 3, "n_shot": 2, "n_query": 4, "seed": 0} | change
    with pytest.raises(InputError, match=says):
        EpisodeSampler(numbered(), **arguments)
