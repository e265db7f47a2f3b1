"""Check evaluation on episodes and paired differences."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch
from torch import Tensor, nn

from bidfmkd_fast.data.dataset import Dataset
from bidfmkd_fast.data.episodes import EpisodeSampler
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta import Evaluation, MetaModel, evaluate, paired_difference
from bidfmkd_fast.models import build_model
from bidfmkd_fast.seeds import seeded

SIZES = {"n_way": 3, "n_shot": 2, "n_query": 4, "n_episodes": 6}


def noisy_patterns(seed: int, noise: float) -> Dataset:
    """Make six meta-test and two meta-train classes of 8 images.

    The images of a class are a random pattern plus noise.
    """
    with seeded(seed, "data"):
        labels = torch.arange(8).repeat_interleave(8)
        images = torch.rand(8, 1, 16, 16)[labels] + noise * torch.randn(64, 1, 16, 16)
    return Dataset(
        name="patterns",
        images=(images.clamp(0, 1) * 255).byte(),
        labels=labels,
        class_names=tuple("abcdefgh"),
        split_of_class=("meta_test",) * 6 + ("meta_train",) * 2,
    )


def meta_model(seed: int) -> MetaModel:
    with seeded(seed, "model"):
        module = build_model(
            "conv4", in_channels=1, n_classes=3, image_size=(16, 16), width=4, batch_statistics=True
        )
    return MetaModel(module, adapt_steps=2, adapt_learning_rate=0.1)


def test_accuracies_are_those_of_adapting_to_each_episode_by_hand(seed: int) -> None:
    dataset, model = noisy_patterns(seed, 0.5), meta_model(seed)
    result = evaluate(model, dataset, **SIZES, seed=seed, steps=3)
    sampler = EpisodeSampler(dataset, "meta_test", 3, 2, 4, seed)
    expected = []
    for index in range(6):
        episode = sampler.episode(index)
        classifier = model.adapt(
            episode.support_images, episode.support_labels, steps=3, transductive=True
        )
        predicted = classifier.predict(episode.query_images).tolist()
        hits = sum(
            p == label for p, label in zip(predicted, episode.query_labels.tolist(), strict=True)
        )
        expected.append(hits / 12)
    assert result.per_episode.dtype == torch.float64
    assert result.per_episode.tolist() == expected
    assert result.mean == pytest.approx(statistics.mean(expected))
    assert result.ci95 == pytest.approx(1.96 * statistics.stdev(expected) / math.sqrt(6))
    assert result.steps == 3
    assert evaluate(model, dataset, **SIZES, seed=seed).steps == 2
    assert f"{100 * result.mean:.2f} %" in str(result)
    assert "6 episodes of patterns meta_test" in str(result)


@pytest.mark.parametrize("transductive", [True, False])
def test_more_classes_than_the_module_has(seed: int, transductive: bool) -> None:
    """Check 5-way episodes of a module for 3 classes: stacked as adapted by hand."""
    dataset, model = noisy_patterns(seed, 0.1), meta_model(seed)
    sizes = SIZES | {"n_way": 5}
    result = evaluate(model, dataset, **sizes, seed=seed, steps=8, transductive=transductive)
    sampler, expected = EpisodeSampler(dataset, "meta_test", 5, 2, 4, seed), []
    for index in range(6):
        episode = sampler.episode(index)
        classifier = model.adapt(
            episode.support_images, episode.support_labels, steps=8, transductive=transductive
        )
        assert classifier.scores(episode.query_images).shape == (20, 5)
        hits = classifier.predict(episode.query_images) == episode.query_labels
        expected.append(hits.double().mean().item())
    assert result.per_episode.tolist() == pytest.approx(expected)
    assert model.module.classifier.out_features == 3  # the meta-model itself stays as it is


def test_a_perfect_and_a_constant_classifier_get_their_accuracies(seed: int) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([0.0, 1.0, 0.0]) + 0 * self.weight.expand(len(images), 3)

    dataset = noisy_patterns(seed, 0.0)
    constant = evaluate(MetaModel(Constant()), dataset, **SIZES)
    assert constant.per_episode.tolist() == [pytest.approx(1 / 3)] * 6
    assert constant.ci95 == pytest.approx(0.0)
    with seeded(seed, "linear"):
        linear = MetaModel(
            nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), adapt_steps=100, adapt_learning_rate=0.1
        )
    assert evaluate(linear, dataset, **SIZES).mean == 1.0


@pytest.mark.parametrize("transductive", [True, False])
def test_evaluation_is_deterministic_and_leaves_the_model_alone(
    seed: int, transductive: bool
) -> None:
    dataset, model = noisy_patterns(seed, 0.5), meta_model(seed)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    results = []
    for _ in range(2):
        torch.rand(3)  # torch's global generator must have no influence
        results.append(evaluate(model, dataset, **SIZES, seed=seed, transductive=transductive))
    assert torch.equal(results[0].per_episode, results[1].per_episode)
    assert all(
        torch.equal(value, before[name]) for name, value in model.module.state_dict().items()
    )
    assert all(parameter.grad is None for parameter in model.module.parameters())
    shorter = evaluate(
        model, dataset, **SIZES | {"n_episodes": 4}, seed=seed, transductive=transductive
    )
    assert torch.equal(shorter.per_episode, results[0].per_episode[:4])


@pytest.mark.parametrize("transductive", [True, False])
@pytest.mark.parametrize("own", [False, True])
def test_outputs_beyond_the_classes_of_an_episode_win_no_image(
    own: bool, transductive: bool, seed: int
) -> None:
    """Evaluate as if a head of 5 outputs had the 3 that the episodes use, one stack or not."""
    dataset, models = noisy_patterns(seed, 0.5), []
    for n_outputs in (3, 5):
        with seeded(seed, "model"):
            module = build_model(
                "conv4",
                in_channels=1,
                n_classes=n_outputs,
                image_size=(16, 16),
                width=4,
                batch_statistics=True,
            )
        models.append(MetaModel(nn.Sequential(module) if own else module, adapt_steps=0))
    small, large = ([*model.module.modules()][-1] for model in models)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(large, name)[:3] = getattr(small, name)
        large.bias[3:] = 100.0
    sizes = SIZES | {"n_episodes": 4}
    exact, wide = (evaluate(model, dataset, **sizes, transductive=transductive) for model in models)
    assert wide.per_episode.tolist() == exact.per_episode.tolist()


def test_a_paired_difference_is_narrower_than_its_parts_and_exact(seed: int) -> None:
    with seeded(seed, "accuracies"):
        hardness = torch.rand(50, dtype=torch.float64)
        gain = 0.1 + 0.01 * torch.randn(50, dtype=torch.float64)
    common = {
        "dataset": "d",
        "split": "meta_test",
        "n_way": 5,
        "n_shot": 1,
        "n_query": 15,
        "seed": 0,
        "steps": 10,
    }
    a = Evaluation(mean=0.0, ci95=0.0, per_episode=hardness + gain, **common)  # type: ignore[arg-type]
    b = Evaluation(mean=0.0, ci95=0.0, per_episode=hardness, **common)  # type: ignore[arg-type]
    difference = paired_difference(a, dataclasses.replace(b, steps=5))
    assert difference.mean == pytest.approx(statistics.mean(gain.tolist()))
    assert difference.ci95 == pytest.approx(1.96 * statistics.stdev(gain.tolist()) / math.sqrt(50))
    assert str(difference).startswith(f"{100 * difference.mean:+.2f} points")
    for name, value in (
        ("dataset", "e"),
        ("split", "meta_val"),
        ("n_way", 4),
        ("n_shot", 5),
        ("n_query", 9),
        ("seed", 1),
    ):
        with pytest.raises(InputError, match=f"the same episodes; {name} is"):
            paired_difference(a, dataclasses.replace(b, **{name: value}))
    with pytest.raises(InputError, match="there are 50 and 49"):
        paired_difference(a, dataclasses.replace(b, per_episode=hardness[:49]))


def test_settings_that_cannot_be_served_are_refused(seed: int) -> None:
    dataset, model = noisy_patterns(seed, 0.5), meta_model(seed)
    with pytest.raises(InputError, match="n_episodes must be 1 or more; got 0"):
        evaluate(model, dataset, **SIZES | {"n_episodes": 0})
    with pytest.raises(InputError):
        evaluate(model, dataset, **SIZES | {"n_way": 7})
    fixed = MetaModel(nn.Sequential(nn.Conv2d(1, 3, 16), nn.Flatten()))
    with pytest.raises(InputError, match=r"evaluate: .* no nn\.Linear.* changed to 4"):
        evaluate(fixed, dataset, **SIZES | {"n_way": 4})
    assert math.isnan(evaluate(model, dataset, **SIZES | {"n_episodes": 1}).ci95)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 28, 28), (1, 17, 17)])
@pytest.mark.parametrize("transductive", [True, False])
@pytest.mark.parametrize("n_episodes", [1, 6])
def test_images_of_another_size_or_colour_are_refused(
    shape: tuple[int, int, int], transductive: bool, n_episodes: int, seed: int
) -> None:
    """Refuse the images, whether episodes are stacked or not.

    A side of 17 pixels gives as many features as 16, so the module itself would not fail.
    """
    dataset = noisy_patterns(seed, 0.5)
    other = dataclasses.replace(
        dataset, images=dataset.images[:, :1, :1, :1].expand(-1, *shape).contiguous()
    )
    sizes = SIZES | {"n_episodes": n_episodes}
    wanted = (
        r"^evaluate: the images of patterns must be \[N, 1, 16, 16\], as the module takes; "
        rf"got .*, {shape[1]}\]"
    )
    with pytest.raises(InputError, match=wanted):
        evaluate(meta_model(seed), other, **sizes, transductive=transductive)
    own = MetaModel(nn.Sequential(nn.Flatten(), nn.Linear(256, 3)))
    with pytest.raises(InputError, match=r"the module fails on images \[6, "):
        evaluate(own, other, **sizes, transductive=transductive)


def test_an_any_size_model_takes_other_sizes_and_refuses_other_channels(seed: int) -> None:
    dataset = noisy_patterns(seed, 0.5)
    with seeded(seed, "model"):
        module = build_model(
            "conv4_any_size",
            in_channels=3,
            n_classes=3,
            image_size=(16, 16),
            width=4,
            batch_statistics=True,
        )
    large = dataclasses.replace(dataset, images=dataset.images.repeat(1, 1, 2, 2))
    assert 0 <= evaluate(MetaModel(module), large, **SIZES).mean <= 1
    with seeded(seed, "model"):
        module = build_model(
            "conv4_any_size",
            in_channels=1,
            n_classes=3,
            image_size=(16, 16),
            width=4,
            batch_statistics=True,
        )
    coloured = dataclasses.replace(dataset, images=dataset.images.repeat(1, 3, 1, 1))
    with pytest.raises(InputError, match="must have 1 channel; got"):
        evaluate(MetaModel(module), coloured, **SIZES)
