"""Adapt a module's parameters to a task (the inner loop), and learn from the result (outer step).

All levels of the method use it: the task model of an API is the meta-model adapted to the API's
recovered images, and a meta-test adapts to the support set of an episode. Source: Finn et al., ICML
2017, arXiv 1703.03400.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta.stacked import can_stack, stacked_forward, stacked_parameters
from bidfmkd_fast.runtime.ranks import ALONE, Ranks
from bidfmkd_fast.seeds import seeded

Task = TypeVar("Task")
Forward = Callable[[nn.Module, Mapping[str, Tensor], Tensor], Tensor]


class InnerLoop(NamedTuple):
    """Settings of an inner loop: `steps` of gradient descent with `learning_rate`.

    With `first_order` its gradients count as constants, so that the outer level gets no second
    derivatives. `factors` multiply the learning rate of single parameters, by name.
    """

    steps: int
    learning_rate: float
    first_order: bool = False
    factors: Mapping[str, float] = MappingProxyType({})


def forward(module: nn.Module, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Compute the logits `[N, n_classes]` of `module` under `parameters`.

    A Conv4 with batch statistics runs as a stack of one task. The module runs in the mode it is in
    and is left as it was: it gets copies of its buffers, so a batch norm that tracks running
    statistics updates a copy that is thrown away.
    """
    if can_stack(module):
        return stacked_forward(module, stacked_parameters(parameters, 1), images[None])[0]
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return functional_call(module, {**parameters, **buffers}, (images,))


def adapt_parameters(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    inner: InnerLoop,
    *,
    create_graph: bool = True,
    forward: Forward = forward,
) -> dict[str, Tensor]:
    """Repeat `theta <- theta - learning_rate * d/dtheta loss(f_theta(images))`.

    The result carries a graph to `parameters` through every step (second order). With
    `inner.first_order` the inner gradients count as constants, so that d(result)/d(parameters) is
    the identity. Parameters without `requires_grad`, or without influence on `loss`, stay as they
    are.

    Args:
        module: f.
        parameters: theta at the start, by name.
        loss: logits `[N, n_classes]` -> scalar.
        images: `[N, C, H, W]`, or what `forward` takes.
        inner: steps, learning rates and order.
        create_graph: False if nothing is trained through the adaptation. The result then has no
            graph and shares no memory with `parameters`.
        forward: computes the logits from (module, parameters, images).

    Raises:
        InputError: a setting is out of range, or no parameter requires a gradient.
    """
    steps, learning_rate, first_order, factors = inner
    if steps < 0:
        raise InputError(f"adapt: steps must be 0 or more; got {steps}")
    if not (math.isfinite(learning_rate) and learning_rate >= 0):
        raise InputError(f"adapt: learning_rate must be finite and 0 or more; got {learning_rate}")
    adapted = dict(parameters)
    if not create_graph:
        adapted = {
            name: value.detach().clone().requires_grad_(value.requires_grad)
            for name, value in adapted.items()
        }
    trained = [name for name, value in adapted.items() if value.requires_grad]
    if not trained:
        raise InputError(
            "adapt: the module has no parameter that requires a gradient, so nothing can adapt"
        )
    with torch.enable_grad():
        for _ in range(steps):
            gradients = torch.autograd.grad(
                loss(forward(module, adapted, images)),
                [adapted[name] for name in trained],
                create_graph=create_graph and not first_order,
                allow_unused=True,
            )
            for name, gradient in zip(trained, gradients, strict=True):
                if gradient is None:
                    continue
                rate = learning_rate * factors.get(name, 1.0)
                if create_graph:
                    adapted[name] = adapted[name] - rate * gradient
                else:
                    adapted[name] = (adapted[name].detach() - rate * gradient).requires_grad_()
    return adapted


def outer_step(
    optimizer: torch.optim.Optimizer,
    tasks: Iterable[Task],
    task_loss: Callable[[Task], tuple[Tensor, Tensor]],
    ranks: Ranks = ALONE,
) -> tuple[float, float]:
    """Take one optimizer step on the sum over `tasks` of the losses `task_loss(task)[0]`.

    A "task" may be a stack of E tasks, for which `task_loss` returns values `[E]`. The loss of a
    task is differentiated before the next task starts, so that only one graph is alive at a time.

    Each of the `ranks` differentiates its share of the tasks. Then every rank adds up the gradients
    of all tasks in their order, so the step is the same, bit for bit, with any number of ranks.
    What a task draws from torch's generator does not depend on the tasks before it either.

    Returns the means of both values that `task_loss` returns.

    Raises:
        InputError: `tasks` is empty, or the loss or its gradient is not finite; the step is then
            not taken.
        RankLost: another rank has died.
    """
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    losses: list[Tensor] = []
    scores: list[Tensor] = []
    seed = int(torch.randint(2**62, ()))

    def differentiate(number: int, task: Task) -> None:
        with seeded(seed, "task", number):
            loss, score = task_loss(task)
            loss.sum().backward()
        losses.append(loss.detach().flatten())
        scores.append(score.detach().flatten())

    optimizer.zero_grad(set_to_none=True)
    if ranks.size == 1:
        for number, task in enumerate(tasks):
            differentiate(number, task)
    else:
        given = list(tasks)
        rows = []
        for number, task in ranks.share(list(enumerate(given))):
            differentiate(number, task)
            rows.append(_packed(parameters, losses.pop(), scores.pop()))
            optimizer.zero_grad(set_to_none=True)
        sizes = [len(task) if isinstance(task, list) else 1 for task in given]
        for row, size in zip(_of_all(ranks, parameters, rows, sizes), sizes, strict=True):
            loss, score = _unpacked(row, parameters, size)
            losses.append(loss)
            scores.append(score)
    if not losses:
        raise InputError("outer step: tasks is empty; give at least one")
    mean_loss = float(torch.cat(losses).mean())
    gradients = [value.grad for value in parameters if value.grad is not None]
    if not (math.isfinite(mean_loss) and all(gradient.isfinite().all() for gradient in gradients)):
        optimizer.zero_grad(set_to_none=True)
        raise InputError(
            f"outer step: the loss is {mean_loss} or its gradient is not finite; the step was not "
            "taken; lower inner_lr or outer_lr"
        )
    optimizer.step()
    return mean_loss, float(torch.cat(scores).mean())


def _packed(parameters: Sequence[Tensor], loss: Tensor, score: Tensor) -> Tensor:
    """Return loss, score and gradients of a task as one row.

    The row also says which parameters have a gradient, since those without are not stepped.
    """
    has = loss.new_tensor([value.grad is not None for value in parameters])
    gradients = [
        (torch.zeros_like(value) if value.grad is None else value.grad).flatten()
        for value in parameters
    ]
    return torch.cat([has, *gradients, loss, score])


def _of_all(
    ranks: Ranks, parameters: Sequence[Tensor], rows: Sequence[Tensor], sizes: Sequence[int]
) -> list[Tensor]:
    """Return the rows of all tasks in order, of which `rows` are this rank's share."""
    width = sum(value.numel() + 1 for value in parameters) + 2 * max(sizes, default=0)
    n_rows = -(-len(sizes) // ranks.size)  # of the rank with the most
    kinds = (value.dtype for value in parameters)
    own = parameters[0].new_zeros(n_rows, width, dtype=reduce(torch.promote_types, kinds))
    for place, row in zip(own, rows, strict=False):
        place[: len(row)] = row
    gathered = ranks.gather(own)
    return [gathered[i % ranks.size, i // ranks.size] for i in range(len(sizes))]


def _unpacked(row: Tensor, parameters: Sequence[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Add the gradients of a row to those of `parameters`; return its losses and scores."""
    lengths = [value.numel() for value in parameters]
    has, *gradients, loss, score, _ = row.split(
        [len(lengths), *lengths, size, size, len(row) - len(lengths) - sum(lengths) - 2 * size]
    )
    for value, exists, gradient in zip(parameters, has.tolist(), gradients, strict=True):
        if not exists:
            continue
        gradient = gradient.to(value.dtype).view_as(value)
        value.grad = gradient.clone() if value.grad is None else value.grad.add_(gradient)
    return loss, score


def cross_entropy_with(labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the loss `logits [N, n_classes] -> mean cross entropy` for int64 `labels` `[N]`.

    The loss raises InputError for labels beyond the number of classes.
    """
    highest = int(labels.max())

    def loss(logits: Tensor) -> Tensor:
        if highest >= logits.shape[1]:
            raise InputError(
                f"adapt: labels must be below {logits.shape[1]}, the module's number of classes; "
                f"got {highest}; number the classes of a task from 0"
            )
        return functional.cross_entropy(logits, labels)

    return loss


def labels_predicted(logits: Tensor, n_way: int) -> Tensor:
    """Return the label with the highest logit, int64 `[...]`, from logits `[..., n_classes]`.

    The labels of an episode are 0 to n_way - 1. Outputs of the module beyond them belong to no
    class of the task, so they are left out.
    """
    return logits[..., :n_way].argmax(-1)
