"""Replay tasks from the task memory: model-agnostic meta-learning (MAML) with cross entropy.

The tasks are drawn across APIs. Source: Finn et al., ICML 2017, arXiv 1703.03400.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from bidfmkd_fast.data.episodes import Episode
from bidfmkd_fast.meta.inner_loop import (
    InnerLoop,
    adapt_parameters,
    cross_entropy_with,
    forward,
    labels_predicted,
    outer_step,
)
from bidfmkd_fast.meta.stacked import (
    OUTER_STACK,
    can_stack,
    forward_in_turn,
    stacked_forward,
    stacked_parameters,
    stacks_of,
    task_losses,
)
from bidfmkd_fast.runtime.ranks import ALONE, Ranks

INNER = InnerLoop(steps=5, learning_rate=0.01)


def maml_loss(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    episode: Episode,
    inner: InnerLoop = INNER,
) -> tuple[Tensor, Tensor]:
    """Compute cross entropy and accuracy on the query set after adapting to the support set.

    Both are scalars. The loss carries a graph to `parameters` through the inner loop. The episode
    is moved to the parameters' device.
    """
    device = next(iter(parameters.values())).device
    adapted = adapt_parameters(
        module,
        parameters,
        cross_entropy_with(episode.support_labels.to(device)),
        episode.support_images.to(device),
        inner,
    )
    labels = episode.query_labels.to(device)
    logits = forward(module, adapted, episode.query_images.to(device))
    predicted = labels_predicted(logits, len(episode.classes))
    return functional.cross_entropy(logits, labels), (predicted == labels).float().mean()


def outer_replay_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    episodes: Sequence[Episode],
    inner: InnerLoop = INNER,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Take one step of `optimizer` on the sum of `maml_loss` over `episodes`.

    `optimizer` is over the parameters of `module`. Episodes that a stack can hold are computed at
    once. The `ranks`, which all give the same episodes, share them out.

    Returns:
        `loss` and `accuracy`, both means over the episodes' query sets.

    Raises:
        InputError: `episodes` is empty or the loss is not finite; the step is then not taken.
    """
    parameters = dict(module.named_parameters())

    def task_loss(episode: Episode) -> tuple[Tensor, Tensor]:
        return maml_loss(module, parameters, episode, inner)

    def stack_loss(stack: list[Episode]) -> tuple[Tensor, Tensor]:
        return stacked_maml_loss(module, parameters, stack, inner)

    if episodes and all(can_stack(module, len(episode.classes)) for episode in episodes):
        stacks = stacks_of(module, episodes, OUTER_STACK)
        loss, accuracy = outer_step(optimizer, stacks, stack_loss, ranks)
    else:
        loss, accuracy = outer_step(optimizer, episodes, task_loss, ranks)
    return {"loss": loss, "accuracy": accuracy}


def stacked_maml_loss(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    episodes: Sequence[Episode],
    inner: InnerLoop,
) -> tuple[Tensor, Tensor]:
    """Compute `maml_loss` of several episodes of one shape at once, two `[E]`.

    The module must be one that `can_stack` accepts.
    """
    device = next(iter(parameters.values())).device
    support_images, support_labels, query_images, query_labels = (
        torch.stack([getattr(episode, name) for episode in episodes]).to(device)
        for name in ("support_images", "support_labels", "query_images", "query_labels")
    )
    n_way = len(episodes[0].classes)
    return loss_of_stack(
        module, parameters, support_images, support_labels, query_images, query_labels, inner, n_way
    )


def loss_of_stack(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    support_images: Tensor,
    support_labels: Tensor,
    query_images: Tensor,
    query_labels: Tensor,
    inner: InnerLoop,
    n_way: int,
) -> tuple[Tensor, Tensor]:
    """Compute loss and accuracy of stacked images `[E, N, C, H, W]` and labels `[E, N]`.

    The labels are 0 to `n_way` - 1. All are on the module's device. Both results are `[E]`.
    """
    adapted = adapt_parameters(
        module,
        stacked_parameters(parameters, len(support_images)),
        lambda logits: task_losses(logits, support_labels).sum(),
        support_images,
        inner,
        forward=stacked_forward,
    )
    forward_queries = stacked_forward if query_images.is_cuda else forward_in_turn
    logits = forward_queries(module, adapted, query_images)
    predicted = labels_predicted(logits, n_way)
    return task_losses(logits, query_labels), (predicted == query_labels).float().mean(1)
