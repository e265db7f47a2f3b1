"""Bi-level distillation: an API's knowledge goes into a task model, and through it into the meta-model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bidfmkd_fast import ops
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta.model import adapt_parameters, forward, outer_step
from bidfmkd_fast.ops.scores import probabilities_of


@dataclass(frozen=True, repr=False)
class DistillationTask:
    """What was recovered from one API: images `[N, C, H, W]` in unit range and its scores `[N,
    n_classes]` for them.

    The query set is the boundary query set. `scores_kind` is the API's. Raises InputError where
    lengths differ.
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
            if (
                images.ndim != 4
                or scores.ndim != 2
                or len(images) != len(scores)
                or len(images) == 0
            ):
                raise InputError(
                    f"DistillationTask: {part}_images and {part}_scores must be [N, C, H, W] and [N, n_classes]; "
                    f"got {list(images.shape)} and {list(scores.shape)}"
                )

    def __repr__(self) -> str:
        sizes = f"{len(self.support_images)} support and {len(self.query_images)} query images"
        return f"DistillationTask({sizes}, {self.support_scores.shape[1]} {self.scores_kind})"


def paper_kd_loss(logits: Tensor, scores: Tensor, scores_kind: str = "logits") -> Tensor:
    """The authors' loss as their public code has it: `mean_{n,c} p_c (log p_c - s_c)`.

    `p` are the API's probabilities, from scores `[N, n_classes]`; `s` the student's
    *probabilities*, where log-probabilities are due, from logits `[N, n_classes]`. It also divides
    by the number of classes.
    """
    p = probabilities_of(scores, scores_kind)
    return (torch.xlogy(p, p) - p * logits.softmax(-1)).mean()


def _kd(logits: Tensor, scores: Tensor, scores_kind: str, paper_compat: bool) -> Tensor:
    if paper_compat:
        return paper_kd_loss(logits, scores, scores_kind)
    return ops.kd_loss(logits, scores, scores_kind=scores_kind)


def adapt_to_api(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    images: Tensor,
    scores: Tensor,
    *,
    steps: int = 10,
    learning_rate: float = 0.01,
    first_order: bool = False,
    scores_kind: str = "logits",
    paper_compat: bool = False,
) -> dict[str, Tensor]:
    """The task model's parameters theta_A: `steps` steps of gradient descent on `KD(f(images),
    scores)`.

    `images` `[N, C, H, W]` in unit range, `scores` `[N, n_classes]` the API's. The result hangs on
    `parameters` as `adapt_parameters` says. With `paper_compat` KD is `paper_kd_loss`.
    Source: Hu et al., ICML 2023, arXiv 2305.18413, inner level.
    """
    device = next(iter(parameters.values())).device
    scores = scores.to(device)
    return adapt_parameters(
        module,
        parameters,
        lambda logits: _kd(logits, scores, scores_kind, paper_compat),
        images.to(device),
        steps=steps,
        learning_rate=learning_rate,
        first_order=first_order,
    )


def distillation_loss(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    task: DistillationTask,
    *,
    steps: int = 10,
    learning_rate: float = 0.01,
    first_order: bool = False,
    paper_compat: bool = False,
) -> Tensor:
    """The outer level's loss for one API, `KD(f_theta_A(Q), A(Q))`: a scalar that hangs on
    `parameters`.
    """
    return _loss_and_agreement(
        module, parameters, task, steps, learning_rate, first_order, paper_compat
    )[0]


def outer_distillation_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    tasks: Sequence[DistillationTask],
    *,
    steps: int = 10,
    learning_rate: float = 0.01,
    first_order: bool = False,
    paper_compat: bool = False,
) -> dict[str, float]:
    """One step of `optimizer` (over `module`'s parameters) on the sum of `distillation_loss` over
    `tasks`.

    Returns `loss` and `agreement`, both means over the tasks' query sets; agreement is the share of
    images on which the highest score of task model and API is for the same class. Raises InputError
    when `tasks` is empty or the loss is not finite (the step is then not taken).
    """
    parameters = dict(module.named_parameters())

    def task_loss(task: DistillationTask) -> tuple[Tensor, Tensor]:
        return _loss_and_agreement(
            module, parameters, task, steps, learning_rate, first_order, paper_compat
        )

    loss, agreement = outer_step(optimizer, tasks, task_loss)
    return {"loss": loss, "agreement": agreement}


def _loss_and_agreement(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    task: DistillationTask,
    steps: int,
    learning_rate: float,
    first_order: bool,
    paper_compat: bool,
) -> tuple[Tensor, Tensor]:
    adapted = adapt_to_api(
        module,
        parameters,
        task.support_images,
        task.support_scores,
        steps=steps,
        learning_rate=learning_rate,
        first_order=first_order,
        scores_kind=task.scores_kind,
        paper_compat=paper_compat,
    )
    device = next(iter(parameters.values())).device
    scores = task.query_scores.to(device)
    logits = forward(module, adapted, task.query_images.to(device))
    loss = _kd(logits, scores, task.scores_kind, paper_compat)
    return loss, (logits.argmax(dim=1) == scores.argmax(dim=1)).float().mean()
