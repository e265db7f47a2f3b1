"""Task memory replay: model-agnostic meta-learning with cross entropy on tasks drawn across APIs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from bidfmkd_fast.data.episodes import Episode
from bidfmkd_fast.meta.model import adapt_parameters, cross_entropy_with, forward, outer_step


def maml_loss(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    episode: Episode,
    *,
    steps: int = 5,
    learning_rate: float = 0.01,
    first_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross entropy and accuracy on the query set after `steps` inner steps on the support set; two scalars.

    The loss hangs on `parameters` through the inner loop (`first_order` drops its second derivatives). The episode is
    moved to the parameters' device. Source: Finn et al., ICML 2017, arXiv 1703.03400.
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
    """One step of `optimizer` (over `module`'s parameters) on the sum of `maml_loss` over `episodes`.

    Returns `loss` and `accuracy`, both means over the episodes' query sets. Raises InputError when `episodes` is empty
    or the loss is not finite (the step is then not taken).
    """
    parameters = dict(module.named_parameters())

    def task_loss(episode: Episode) -> tuple[Tensor, Tensor]:
        return maml_loss(module, parameters, episode, steps=steps, learning_rate=learning_rate, first_order=first_order)

    loss, accuracy = outer_step(optimizer, episodes, task_loss)
    return {"loss": loss, "accuracy": accuracy}
