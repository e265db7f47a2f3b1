"""Meta-test: accuracy on episodes of unseen classes, and differences paired by episode."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bidfmkd_fast.data.dataset import Dataset
from bidfmkd_fast.data.episodes import Episode, EpisodeSampler
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta.checks import check_images
from bidfmkd_fast.meta.inner_loop import adapt_parameters
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
    """Mean and `1.96 * sd / sqrt(n)` of float64 `[n]` (sd with n - 1; the interval of a single
    value is NaN).
    """
    n = len(values)
    return float(values.mean()), 1.96 * float(values.std()) / math.sqrt(n) if n > 1 else math.nan


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Accuracy in [0, 1] over episodes: `mean`, half width `ci95`, `per_episode` float64
    `[n_episodes]`.
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
            f"{100 * self.mean:.2f} % ± {100 * self.ci95:.2f} on {len(self.per_episode)} episodes of {self.dataset} "
            f"{self.split}, {self.n_way}-way {self.n_shot}-shot"
        )


@dataclass(frozen=True)
class PairedDifference:
    """Mean over episodes of the difference of two accuracies, and its half width `ci95`."""

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
    """Adapt to each of `n_episodes` episodes of `dataset`'s `split` (`steps` steps) and score its
    query set.

    Episode i is a pure function of `seed` and i, so any two models are compared on the same
    episodes. `transductive` is as in `MetaModel.adapt`: by default batch norm sees a whole query
    set at once, as the paper does. Raises InputError for settings that the data set cannot serve,
    and for a data set whose images are not what the module takes.
    """
    keep_freed_memory()
    if n_episodes < 1:
        raise InputError(f"evaluate: n_episodes must be 1 or more; got {n_episodes}")
    sampler = EpisodeSampler(dataset, split, n_way, n_shot, n_query, seed)
    first = sampler.episode(0).support_images.to(_device(meta_model))
    check_images("evaluate", f"the images of {dataset.name}", first, meta_model.module)
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
    return next(
        (parameter.device for parameter in meta_model.module.parameters()), torch.device("cpu")
    )


def _accuracy(
    meta_model: MetaModel, episode: Episode, steps: int | None, transductive: bool
) -> Tensor:
    """float64 `[1]`."""
    device = _device(meta_model)
    classifier = meta_model.adapt(
        episode.support_images.to(device),
        episode.support_labels.to(device),
        steps,
        transductive=transductive,
    )
    predicted = classifier.predict(episode.query_images.to(device)).cpu()
    return (predicted == episode.query_labels).double().mean()[None]


def _stacked_accuracies(
    meta_model: MetaModel, episodes: list[Episode], steps: int | None
) -> Tensor:
    """The same for several episodes at once, float64 `[E]`."""
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
    return (logits.argmax(2).cpu() == query_labels).double().mean(1)


def paired_difference(a: Evaluation, b: Evaluation) -> PairedDifference:
    """`a - b`, episode by episode: a narrower interval than that of either, since both saw the same
    episodes.

    Raises InputError if they did not: other data set, split, `n_way`, `n_shot`, `n_query`, seed or
    number of episodes.
    """
    for name in ("dataset", "split", "n_way", "n_shot", "n_query", "seed"):
        if getattr(a, name) != getattr(b, name):
            raise InputError(
                f"paired_difference: both evaluations must be of the same episodes; {name} is {getattr(a, name)!r} and "
                f"{getattr(b, name)!r}"
            )
    if len(a.per_episode) != len(b.per_episode):
        raise InputError(
            f"paired_difference: both evaluations must be of the same episodes; there are {len(a.per_episode)} and "
            f"{len(b.per_episode)}"
        )
    return PairedDifference(*mean_and_ci95(a.per_episode - b.per_episode))
