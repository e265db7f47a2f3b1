"""Evaluate a meta-model on episodes of unseen classes; compare two models episode by episode."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bidfmkd_fast.data.dataset import Dataset
from bidfmkd_fast.data.episodes import Episode, EpisodeSampler
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta.checks import check_images, failures_explained
from bidfmkd_fast.meta.inner_loop import adapt_parameters, labels_predicted
from bidfmkd_fast.meta.model import MetaModel
from bidfmkd_fast.meta.stacked import (
    can_stack,
    stacked_forward,
    stacked_parameters,
    stacks_of,
    task_losses,
)
from bidfmkd_fast.runtime.allocator import keep_freed_memory
from bidfmkd_fast.runtime.progress import Bar


def mean_and_ci95(values: Tensor) -> tuple[float, float]:
    """Return the mean of float64 `[n]` and the half width of its 95 % confidence interval.

    The half width is `1.96 * sd / sqrt(n)`, sd with n - 1; NaN for a single value.
    """
    n = len(values)
    return float(values.mean()), 1.96 * float(values.std()) / math.sqrt(n) if n > 1 else math.nan


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Accuracy in [0, 1] over episodes, and which episodes they are.

    Attributes:
        mean: mean over the episodes.
        ci95: half width of the 95 % confidence interval of the mean.
        per_episode: float64 `[n_episodes]`.
        dataset, split, n_way, n_shot, n_query, seed: the arguments that decide the episodes.
        steps: gradient steps of each adaptation.
    """

    mean: float
    ci95: float
    per_episode: Tensor = field(repr=False)
    dataset: str
    split: str
    n_way: int
    n_shot: int
    n_query: int
    seed: int
    steps: int

    def __str__(self) -> str:
        return (
            f"{100 * self.mean:.2f} % ± {100 * self.ci95:.2f} on {len(self.per_episode)} episodes "
            f"of {self.dataset} {self.split}, {self.n_way}-way {self.n_shot}-shot"
        )

    def to_record(self) -> dict[str, Any]:
        """Return plain values for a JSON file, which `from_record` reads."""
        values = asdict(replace(self, per_episode=torch.empty(0)))
        return {**values, "per_episode": self.per_episode.tolist()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation of a record that `to_record` made."""
        per_episode = torch.tensor(record["per_episode"], dtype=torch.float64)
        return cls(**{**record, "per_episode": per_episode})


@dataclass(frozen=True)
class PairedDifference:
    """Mean over episodes of the difference of two accuracies.

    `ci95` is the half width of its 95 % confidence interval.
    """

    mean: float
    ci95: float

    def __str__(self) -> str:
        return f"{100 * self.mean:+.2f} points ± {100 * self.ci95:.2f}"


def evaluate(
    meta_model: MetaModel,
    dataset: Dataset,
    *,
    n_way: int = 5,
    n_shot: int = 1,
    n_query: int = 15,
    n_episodes: int = 600,
    split: str = "meta_test",
    seed: int = 0,
    steps: int | None = None,
    transductive: bool = True,
    progress: bool = False,
) -> Evaluation:
    """Adapt to each of `n_episodes` episodes and measure the accuracy on its query set.

    Episode i is a pure function of `seed` and i, so any two models are compared on the same
    episodes.

    >>> from bidfmkd_fast import load_dataset
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 5))
    >>> few = evaluate(MetaModel(module), load_dataset("glyphs"), n_episodes=4, n_query=5)
    >>> few.per_episode.shape, 0 <= few.mean <= 1
    (torch.Size([4]), True)

    Args:
        meta_model: the model to evaluate.
        dataset: where the episodes come from.
        n_way: classes of an episode. A module with more outputs predicts among the first `n_way`;
            the last layer of one with fewer grows, as in `MetaModel.adapt`.
        n_shot: support images per class.
        n_query: query images per class.
        n_episodes: number of episodes.
        split: the part of the data set whose classes are used.
        seed: seed of the episodes.
        steps: gradient steps of each adaptation; the meta-model's own number when None.
        transductive: as in `MetaModel.adapt`. By default batch norm sees a whole query set at
            once, as in the paper.
        progress: show a bar.

    Raises:
        InputError: the data set has too few classes or images, or the module cannot take its
            images.
    """
    keep_freed_memory()
    if n_episodes < 1:
        raise InputError(f"evaluate: n_episodes must be 1 or more; got {n_episodes}")
    sampler = EpisodeSampler(dataset, split, n_way, n_shot, n_query, seed)
    first = sampler.episode(0).support_images.to(_device(meta_model))
    check_images("evaluate", f"the images of {dataset.name}", first, meta_model.module)
    with failures_explained("evaluate", first):
        meta_model = meta_model.for_classes("evaluate", n_way, first[:2])
    if transductive and can_stack(meta_model.module, n_way):
        stacks = stacks_of(
            meta_model.module, (sampler.episode(index) for index in range(n_episodes))
        )
        accuracies = (_stacked_accuracies(meta_model, stack, steps) for stack in stacks)
    else:
        accuracies = (
            _accuracy(meta_model, sampler.episode(i), steps, transductive)
            for i in range(n_episodes)
        )
    done: list[Tensor] = []
    with Bar(
        f"evaluate on {dataset.name} {split}", n_episodes, "episodes", progress, keep=False
    ) as bar:
        for some in accuracies:
            done.append(some)
            bar.advance(len(some))
    per_episode = torch.cat(done)
    mean, ci95 = mean_and_ci95(per_episode)
    steps = meta_model.adapt_steps if steps is None else steps
    return Evaluation(
        mean, ci95, per_episode, dataset.name, split, n_way, n_shot, n_query, seed, steps
    )


def _device(meta_model: MetaModel) -> torch.device:
    """Return the device of the module's parameters; the CPU if it has none."""
    return next(
        (parameter.device for parameter in meta_model.module.parameters()), torch.device("cpu")
    )


def _accuracy(
    meta_model: MetaModel, episode: Episode, steps: int | None, transductive: bool
) -> Tensor:
    """Return the accuracy on one episode, float64 `[1]`."""
    device = _device(meta_model)
    classifier = meta_model.adapt(
        episode.support_images.to(device),
        episode.support_labels.to(device),
        steps,
        transductive=transductive,
    )
    predicted = torch.as_tensor(classifier.predict(episode.query_images.to(device))).cpu()
    return (predicted == episode.query_labels).double().mean()[None]


def _stacked_accuracies(
    meta_model: MetaModel, episodes: list[Episode], steps: int | None
) -> Tensor:
    """Return the accuracies on several episodes of one shape, computed at once, float64 `[E]`."""
    module = meta_model.module
    device = _device(meta_model)
    support_labels = torch.stack([episode.support_labels for episode in episodes]).to(device)
    adapted = adapt_parameters(
        module,
        stacked_parameters(dict(module.named_parameters()), len(episodes)),
        lambda logits: task_losses(logits, support_labels).sum(),
        torch.stack([episode.support_images for episode in episodes]).to(device),
        meta_model.inner_loop(steps),
        create_graph=False,
        forward=stacked_forward,
    )
    with torch.no_grad():
        logits = stacked_forward(
            module, adapted, torch.stack([episode.query_images for episode in episodes]).to(device)
        )
    query_labels = torch.stack([episode.query_labels for episode in episodes])
    predicted = labels_predicted(logits, len(episodes[0].classes))
    return (predicted.cpu() == query_labels).double().mean(1)


def paired_difference(a: Evaluation, b: Evaluation) -> PairedDifference:
    """Return `a - b` over the episodes that both have seen.

    Since the episodes are the same, the interval of the difference is narrower than that of either
    accuracy.

    >>> from bidfmkd_fast import load_dataset
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 5))
    >>> model, data = MetaModel(module), load_dataset("glyphs")
    >>> some = {n: evaluate(model, data, n_episodes=4, n_query=5, steps=n) for n in (1, 3)}
    >>> str(paired_difference(some[3], some[1]))
    '... points ± ...'

    Raises:
        InputError: the episodes differ in data set, split, `n_way`, `n_shot`, `n_query`, seed or
            number.
    """
    for name in ("dataset", "split", "n_way", "n_shot", "n_query", "seed"):
        if getattr(a, name) != getattr(b, name):
            raise InputError(
                f"paired_difference: both evaluations must be of the same episodes; {name} is "
                f"{getattr(a, name)!r} and {getattr(b, name)!r}"
            )
    if len(a.per_episode) != len(b.per_episode):
        raise InputError(
            "paired_difference: both evaluations must be of the same episodes; there are "
            f"{len(a.per_episode)} and {len(b.per_episode)}"
        )
    return PairedDifference(*mean_and_ci95(a.per_episode - b.per_episode))
