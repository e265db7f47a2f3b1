"""Task memory replay: model-agnostic meta-learning with cross entropy on tasks drawn across APIs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from bidfmkd_fast.data.episodes import Episode
from bidfmkd_fast.meta.model import adapt_parameters, cross_entropy_with, forward, outer_step
from bidfmkd_fast.meta.stacked import (
    can_stack,
    forward_in_turn,
    stacked_forward,
    stacked_parameters,
    stacks_of,
    task_losses,
)


def maml_loss(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    episode: Episode,
    *,
    steps: int = 5,
    learning_rate: float = 0.01,
    first_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross entropy and accuracy on the query set after `steps` inner steps on the support set; two
    scalars.

    The loss hangs on `parameters` through the inner loop (`first_order` drops its second
    derivatives). The episode is moved to the parameters' device. Source: Finn et al., ICML 2017,
    arXiv 1703.03400.
    """
    device = next(iter(parameters.values())).device
    adapted = adapt_parameters(
        module,
        parameters,
        cross_entropy_with(episode.support_labels.to(device)),
        episode.support_images.to(device),
        steps=steps,
        learning_rate=learning_rate,
        first_order=first_order,
    )
    labels = episode.query_labels.to(device)
    logits = forward(module, adapted, episode.query_images.to(device))
    return functional.cross_entropy(logits, labels), (logits.argmax(dim=1) == labels).float().mean()


def outer_replay_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    episodes: Sequence[Episode],
    *,
    steps: int = 5,
    learning_rate: float = 0.01,
    first_order: bool = False,
) -> dict[str, float]:
    """One step of `optimizer` (over `module`'s parameters) on the sum of `maml_loss` over
    `episodes`.

    Returns `loss` and `accuracy`, both means over the episodes' query sets. Raises InputError when
    `episodes` is empty or the loss is not finite (the step is then not taken).
    """
    parameters = dict(module.named_parameters())

    def task_loss(episode: Episode) -> tuple[Tensor, Tensor]:
        return maml_loss(
            module,
            parameters,
            episode,
            steps=steps,
            learning_rate=learning_rate,
            first_order=first_order,
        )

    def stack_loss(stack: list[Episode]) -> tuple[Tensor, Tensor]:
        return stacked_maml_loss(
            module,
            parameters,
            stack,
            steps=steps,
            learning_rate=learning_rate,
            first_order=first_order,
        )

    if episodes and all(can_stack(module, len(episode.classes)) for episode in episodes):
        loss, accuracy = outer_step(optimizer, stacks_of(module, episodes), stack_loss)
    else:
        loss, accuracy = outer_step(optimizer, episodes, task_loss)
    return {"loss": loss, "accuracy": accuracy}


def stacked_maml_loss(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    episodes: Sequence[Episode],
    *,
    steps: int,
    learning_rate: float,
    first_order: bool,
) -> tuple[Tensor, Tensor]:
    """`maml_loss` of several episodes of one shape at once: two `[E]`. The module must be one that
    `can_stack`.
    """
    device = next(iter(parameters.values())).device
    names = ("support_images", "support_labels", "query_images", "query_labels")
    stacked = (
        torch.stack([getattr(episode, name) for episode in episodes]).to(device) for name in names
    )
    return loss_of_stack(
        module,
        parameters,
        *stacked,
        steps=steps,
        learning_rate=learning_rate,
        first_order=first_order,
    )


def loss_of_stack(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    support_images: Tensor,
    support_labels: Tensor,
    query_images: Tensor,
    query_labels: Tensor,
    *,
    steps: int,
    learning_rate: float,
    first_order: bool,
) -> tuple[Tensor, Tensor]:
    """The same of stacked images `[E, N, C, H, W]` and labels `[E, N]` on the module's device."""
    adapted = adapt_parameters(
        module,
        stacked_parameters(parameters, len(support_images)),
        lambda logits: task_losses(logits, support_labels).sum(),
        support_images,
        steps=steps,
        learning_rate=learning_rate,
        first_order=first_order,
        forward=stacked_forward,
    )
    forward_queries = stacked_forward if query_images.is_cuda else forward_in_turn
    logits = forward_queries(module, adapted, query_images)
    return task_losses(logits, query_labels), (logits.argmax(2) == query_labels).float().mean(1)
