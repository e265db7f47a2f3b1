"""Run several tasks of a Conv4 as one stack: every layer is one operation over all tasks.

E tasks with parameters of their own become one network on `[N, E * C, H, W]`. Convolutions become
grouped convolutions. Batch norm needs no change, since its statistics are per channel. The stack
runs channels-last, where pooling and batch norm are several times faster on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from bidfmkd_fast.data.episodes import Episode
from bidfmkd_fast.models import AnySizeConv4, Conv4, fit_images
from bidfmkd_fast.ops.native_norm_pool import norm_pool_format
from bidfmkd_fast.ops.norm_pool import norm_pool

# The most tasks of a stack, and the most bytes of its largest layer. A larger stack would gain
# nothing, since it no longer fits the CPU's cache.
_CPU_STACK = (8, 64 << 20)
# Of an outer step on the CPU two tasks at once take 0.9 to 1.07 times as long as four, and ranks
# share out what is left.
OUTER_STACK = 2
_GPU_STACK = (64, 1 << 30)


def can_stack(module: nn.Module, n_way: int = 0) -> bool:
    """Return True if `stacked_forward` can run this module for tasks of `n_way` classes.

    It can if the module is a Conv4 with batch statistics and at least `n_way` scores.
    """
    return (
        (type(module) is Conv4 or type(module) is AnySizeConv4)
        and module.batch_statistics
        and n_way <= module.n_classes
    )


def stacks_of(
    module: nn.Module, episodes: Iterable[Episode], most_on_cpu: int | None = None
) -> Iterator[list[Episode]]:
    """Yield `episodes` in order, in lists that are worth running at once.

    The episodes of a list agree in shape and number of classes. On the CPU a list holds at most
    `most_on_cpu` of them, if that is given.
    """
    assert isinstance(module, Conv4)
    most_tasks, most_bytes = _GPU_STACK if module.classifier.weight.is_cuda else _CPU_STACK
    if most_on_cpu is not None and not module.classifier.weight.is_cuda:
        most_tasks = min(most_tasks, most_on_cpu)
    stack: list[Episode] = []
    for episode in episodes:
        shapes = (episode.support_images.shape, episode.query_images.shape)
        n_images, _, height, width = max(shapes)
        if isinstance(module, AnySizeConv4):
            height, width = module.image_size
        most = max(1, min(most_tasks, most_bytes // (4 * n_images * module.width * height * width)))
        if stack and (
            len(stack) >= most
            or shapes != (stack[0].support_images.shape, stack[0].query_images.shape)
            or len(episode.classes) != len(stack[0].classes)
        ):
            yield stack
            stack = []
        stack.append(episode)
    if stack:
        yield stack


def stacked_parameters(parameters: Mapping[str, Tensor], n_tasks: int) -> dict[str, Tensor]:
    """Expand each parameter `[...]` to `[E, ...]`, one row per task.

    The rows are views, so their gradients add up in the parameter.
    """
    return {name: value.expand(n_tasks, *value.shape) for name, value in parameters.items()}


def stacked_forward(module: nn.Module, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Compute the logits `[E, N, n_classes]` of images `[E, N, C, H, W]` for E tasks.

    Task e uses row e of `parameters` `[E, ...]`.
    """
    features = stacked_features(module, parameters, images)
    bias = parameters["classifier.bias"][:, None]
    return torch.baddbmm(bias, features, parameters["classifier.weight"].transpose(1, 2))


def stacked_features(module: nn.Module, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Compute what enters the last layer, `[E, N, n_features]`; the arguments are those of
    `stacked_forward`.
    """
    assert isinstance(module, Conv4)
    n_tasks = images.shape[0]
    if isinstance(module, AnySizeConv4):
        images = fit_images(images, (module.in_channels, *module.image_size))
    # [N, E * C, H, W]
    x = images.transpose(0, 1).flatten(1, 2).contiguous(memory_format=norm_pool_format(images))
    for i, block in enumerate(module.blocks):
        weight = parameters[f"blocks.{i}.0.weight"].flatten(0, 1)
        scale, shift = (
            parameters[f"blocks.{i}.1.weight"].flatten(),
            parameters[f"blocks.{i}.1.bias"].flatten(),
        )
        x = functional.conv2d(x, weight, padding=1, groups=n_tasks)
        x = norm_pool(x, scale, shift, block[1].eps)  # type: ignore[index]
    return x.unflatten(1, (n_tasks, -1)).transpose(0, 1).flatten(2)


def forward_in_turn(module: nn.Module, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Compute `stacked_forward` one task after the other.

    This is faster on the CPU if a task has many images and a backward pass follows. Stacking saves
    calls, but a large stack does not fit the cache, and grouped convolutions are a little slower
    than plain ones.
    """
    pieces = enumerate(images.split(1))
    return torch.cat(
        [
            stacked_forward(module, {name: p[i : i + 1] for name, p in parameters.items()}, own)
            for i, own in pieces
        ]
    )


def task_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross entropy of each task, `[E]`.

    Takes logits `[E, N, n_classes]` and labels `[E, N]`.
    """
    return (
        functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        .view(labels.shape)
        .mean(1)
    )
