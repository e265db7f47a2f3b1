"""Distil an API into its task model, and through the task model into the meta-model (two levels).

Inner level: a task model starts from the meta-model's parameters and learns the API's scores for
the support set. Outer level: the meta-model learns from how well the task models match their APIs
on the query sets. Source: Hu et al., ICML 2023, arXiv 2305.18413.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bidfmkd_fast import ops
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta.inner_loop import InnerLoop, adapt_parameters, forward, outer_step
from bidfmkd_fast.ops.scores import probabilities_of
from bidfmkd_fast.runtime.ranks import ALONE, Ranks

INNER = InnerLoop(steps=10, learning_rate=0.01)


@dataclass(frozen=True, repr=False)
class DistillationTask:
    """The two sets recovered from one API: images in unit range and the API's scores for them.

    Args:
        support_images, query_images: `[N, C, H, W]`; the query set is the boundary query set.
        support_scores, query_scores: `[N, n_classes]`.
        scores_kind: kind of the API's scores.

    Raises:
        InputError: images and scores of a set do not fit each other.
    """

    support_images: Tensor
    support_scores: Tensor
    query_images: Tensor
    query_scores: Tensor
    scores_kind: str = "logits"

    def __post_init__(self) -> None:
        for part, images, scores in (
            ("support", self.support_images, self.support_scores),
            ("query", self.query_images, self.query_scores),
        ):
            fit = images.ndim == 4 and scores.ndim == 2 and len(images) == len(scores)
            if not fit or len(images) == 0:
                raise InputError(
                    f"DistillationTask: {part}_images and {part}_scores must be [N, C, H, W] and "
                    f"[N, n_classes] with N >= 1; got {list(images.shape)} and "
                    f"{list(scores.shape)}"
                )

    def __repr__(self) -> str:
        sizes = f"{len(self.support_images)} support and {len(self.query_images)} query images"
        return f"DistillationTask({sizes}, {self.support_scores.shape[1]} {self.scores_kind})"


def paper_kd_loss(logits: Tensor, scores: Tensor, scores_kind: str = "logits") -> Tensor:
    """Compute the loss of the authors' public code, `mean_{n,c} p_c (log p_c - s_c)`.

    p are the API's probabilities, from scores `[N, n_classes]`; s are the student's
    *probabilities*, from logits `[N, n_classes]`, where a KL divergence has log-probabilities. The
    mean also divides by the number of classes.
    """
    p = probabilities_of(scores, scores_kind)
    return (torch.xlogy(p, p) - p * logits.softmax(-1)).mean()


def _kd(logits: Tensor, scores: Tensor, scores_kind: str, paper_compat: bool) -> Tensor:
    """Compute the distillation loss (KD) of the package, or that of the authors' code."""
    logits = logits[:, : scores.shape[1]]  # an API may have fewer classes than the module
    if paper_compat:
        return paper_kd_loss(logits, scores, scores_kind)
    return ops.kd_loss(logits, scores, scores_kind=scores_kind)


def adapt_to_api(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    images: Tensor,
    scores: Tensor,
    inner: InnerLoop = INNER,
    *,
    scores_kind: str = "logits",
    paper_compat: bool = False,
) -> dict[str, Tensor]:
    """Compute the parameters of an API's task model by descending `KD(f(images), scores)`.

    KD is the distillation loss `ops.kd_loss`, or `paper_kd_loss` with `paper_compat`. The result
    carries a graph to `parameters`, as described at `adapt_parameters`.

    Args:
        module: f.
        parameters: where the task model starts.
        images: `[N, C, H, W]` in unit range.
        scores: the API's scores for the images, `[N, n_classes]`.
        inner: steps, learning rate and order.
        scores_kind: kind of the scores.
        paper_compat: compute the loss as the authors' code does.
    """
    device = next(iter(parameters.values())).device
    scores = scores.to(device)
    return adapt_parameters(
        module,
        parameters,
        lambda logits: _kd(logits, scores, scores_kind, paper_compat),
        images.to(device),
        inner,
    )


def distillation_loss(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    task: DistillationTask,
    inner: InnerLoop = INNER,
    *,
    paper_compat: bool = False,
) -> Tensor:
    """Compute the outer loss of one API: the distillation loss (KD) on the query set.

    The loss compares the task model with the API. It is a scalar with a graph to `parameters`.
    """
    return _loss_and_agreement(module, parameters, task, inner, paper_compat)[0]


def outer_distillation_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    tasks: Sequence[DistillationTask],
    inner: InnerLoop = INNER,
    *,
    paper_compat: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Take one step of `optimizer` on the sum of `distillation_loss` over `tasks`.

    `optimizer` is over the parameters of `module`. The `ranks`, which all give the same tasks,
    share them out.

    Returns:
        `loss` and `agreement`, both means over the tasks' query sets; agreement is the share of
        images on which the highest score of task model and API is for the same class.

    Raises:
        InputError: `tasks` is empty or the loss is not finite; the step is then not taken.
    """
    parameters = dict(module.named_parameters())

    def task_loss(task: DistillationTask) -> tuple[Tensor, Tensor]:
        return _loss_and_agreement(module, parameters, task, inner, paper_compat)

    loss, agreement = outer_step(optimizer, tasks, task_loss, ranks)
    return {"loss": loss, "agreement": agreement}


def _loss_and_agreement(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    task: DistillationTask,
    inner: InnerLoop,
    paper_compat: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the outer loss of one API and the agreement of task model and API, two scalars."""
    adapted = adapt_to_api(
        module,
        parameters,
        task.support_images,
        task.support_scores,
        inner,
        scores_kind=task.scores_kind,
        paper_compat=paper_compat,
    )
    device = next(iter(parameters.values())).device
    scores = task.query_scores.to(device)
    logits = forward(module, adapted, task.query_images.to(device))
    loss = _kd(logits, scores, task.scores_kind, paper_compat)
    predicted = logits[:, : scores.shape[1]].argmax(dim=1)
    return loss, (predicted == scores.argmax(dim=1)).float().mean()
