"""Replay tasks without the host: outer steps on the module's device, in a CUDA graph.

The host only draws which images a task has (`task_draw`). The device gathers these images from its
copy of the memory, adapts to them and learns from them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bidfmkd_fast.data.episodes import Episode, turned
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta.inner_loop import InnerLoop
from bidfmkd_fast.meta.maml import loss_of_stack
from bidfmkd_fast.meta.memory import TaskMemory
from bidfmkd_fast.meta.task_draw import TaskSize, draw_task
from bidfmkd_fast.runtime.captured_step import RepeatedStep

MOST_UNREAD = 1000  # steps


class _DeviceSteps:
    """Outer steps as `outer_replay_step` takes them.

    Nothing waits for the result until `records` is called, after at most `MOST_UNREAD` steps.

    Args:
        module: a module that `can_stack` accepts.
        optimizer: over the module's parameters; on CUDA made with `capturable=True`.
        sizes: n_way, n_shot and n_query of every task.
        n_tasks: tasks of one outer step, all in one stack.
        inner: steps, learning rate and order of the inner loop.

    Attributes:
        unread: steps since `records` was last called.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        sizes: tuple[int, int, int],
        n_tasks: int,
        inner: InnerLoop,
    ) -> None:
        self.unread = 0
        self._module, self._optimizer, self._inner = module, optimizer, inner
        self._size, self._n_tasks = TaskSize(*sizes), n_tasks
        n_way, n_shot, n_query = sizes
        device = next(module.parameters()).device
        labels = torch.arange(n_way, device=device).expand(n_tasks, n_way)
        self._support_labels = labels.repeat_interleave(n_shot, dim=1)
        self._query_labels = labels.repeat_interleave(n_query, dim=1)
        self._records = torch.zeros(MOST_UNREAD, 2, device=device)  # loss and accuracy of each step
        self._index = torch.zeros(1, dtype=torch.int64, device=device)
        self._finite = torch.ones(1, dtype=torch.bool, device=device)
        self._streams = (
            [torch.cuda.Stream(device) for _ in range(n_tasks)] if device.type == "cuda" else []
        )
        self._repeated = RepeatedStep(device)

    def records(self) -> list[dict[str, float]]:
        """Return `loss` and `accuracy` of the steps since the last call, means over their tasks.

        The host waits for the device.

        Raises:
            InputError: a loss or a gradient was not finite; the parameters are then of no use.
        """
        if not bool(self._finite):
            raise InputError(
                "replay: a loss or its gradient is not finite; lower inner_lr or outer_lr"
            )
        values = self._records[: self.unread].tolist()
        self._index.zero_()
        self.unread = 0
        return [{"loss": loss, "accuracy": accuracy} for loss, accuracy in values]

    def _images_of_step(self) -> Tensor:
        """Return the images of a step on the device, `[E, N, C, H, W]`, support images first."""
        raise NotImplementedError

    def _take(self) -> None:
        """Take a step, from a graph where there is one."""
        self._repeated(self._step)
        self.unread += 1

    def _step(self) -> None:
        """Do the work of one step, in place on the tensors of this object; a graph holds it."""
        n_support = self._size.n_way * self._size.n_shot
        images = self._images_of_step()
        losses, accuracies = self._losses(images[:, :n_support], images[:, n_support:])
        self._optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        gradients = [value.grad for value in self._module.parameters() if value.grad is not None]
        self._finite &= torch.stack(
            [tensor.isfinite().all() for tensor in (losses, *gradients)]
        ).all()
        self._optimizer.step()
        self._records.index_copy_(
            0, self._index, torch.stack([losses.mean(), accuracies.mean()]).detach()[None]
        )
        self._index += 1

    def _losses(self, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Compute each task's loss and accuracy, both `[E]`, from images `[E, N, C, H, W]`.

        On CUDA every task runs on a stream of its own. The kernels of one task are too small to
        fill a device, and cuDNN runs the grouped convolutions of stacked tasks group by group with
        a transposition around each. In a captured graph the streams become branches that run at the
        same time.
        """
        parameters = dict(self._module.named_parameters())
        if not self._streams:
            return self._losses_of(parameters, slice(None), support, query)
        # The views are made on this stream, so that the gradients of all tasks come back to it
        # before they are added up.
        own = [
            {name: value.view_as(value) for name, value in parameters.items()}
            for _ in self._streams
        ]
        current, results = torch.cuda.current_stream(support.device), []
        for task, stream in enumerate(self._streams):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                results.append(self._losses_of(own[task], slice(task, task + 1), support, query))
        for stream in self._streams:
            current.wait_stream(stream)
        losses, accuracies = zip(*results)
        return torch.cat(losses), torch.cat(accuracies)

    def _losses_of(
        self, parameters: Mapping[str, Tensor], tasks: slice, support: Tensor, query: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute loss and accuracy, both `[E]`, of some of the tasks."""
        return loss_of_stack(
            self._module,
            parameters,
            support[tasks],
            self._support_labels[tasks],
            query[tasks],
            self._query_labels[tasks],
            self._inner,
            self._size.n_way,
        )


class DeviceReplay(_DeviceSteps):
    """Outer steps on tasks of a memory as it is now.

    Args:
        module, optimizer, sizes, n_tasks, inner: as for the steps above.
        memory: the images; a copy of them is held on the module's device.
        rotations: as for `TaskMemory.sample_episode`.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        memory: TaskMemory,
        sizes: tuple[int, int, int],
        n_tasks: int,
        inner: InnerLoop,
        *,
        rotations: int = 1,
    ) -> None:
        super().__init__(module, optimizer, sizes, n_tasks, inner)
        self._rotations = rotations
        n_way, n_shot, n_query = sizes
        device = next(module.parameters()).device
        self._images = torch.cat([memory.task_images_of(key) for key in memory.classes]).to(device)
        self._counts = memory.counts
        # The row in `_images` of the first image of each class.
        starts = [0, *itertools.accumulate(self._counts)]
        self._first_rows = torch.tensor(starts[:-1])
        # The row and the quarter turns of each image of a step.
        self._rows = torch.zeros(
            2, n_tasks, n_way * (n_shot + n_query), dtype=torch.int64, device=device
        )

    def step(self, seed: int, first_task: int) -> None:
        """Take one outer step on the tasks `first_task`, `first_task + 1`, ... of stream `seed`."""
        tasks = range(first_task, first_task + self._n_tasks)
        stacked = torch.stack([self._draw(seed, task) for task in tasks], dim=1)
        # Pinned memory is copied without the host waiting for the device.
        self._rows.copy_(stacked.pin_memory() if self._rows.is_cuda else stacked, non_blocking=True)
        self._take()

    def _draw(self, seed: int, index: int) -> Tensor:
        """Draw a task; return row and quarter turns of each image, int64 `[2, N]`.

        The order is that of an episode: support images class by class, then query images.
        """
        draw = draw_task(
            self._counts, self._size, seed=seed, index=index, rotations=self._rotations
        )
        positions, turns = torch.tensor(draw.classes).T
        rows = self._first_rows[positions][:, None] + draw.rows  # [n_way, n_shot + n_query]
        both = torch.stack([rows, turns[:, None].expand_as(rows)])
        n_shot = self._size.n_shot
        return torch.cat([both[..., :n_shot].flatten(1), both[..., n_shot:].flatten(1)], dim=1)

    def _images_of_step(self) -> Tensor:
        rows, turns = self._rows
        images = self._images.index_select(0, rows.flatten())
        images = images.unflatten(0, rows.shape)  # [E, N, C, H, W]
        for quarter in range(4 // self._rotations, 4, 4 // self._rotations):
            images = torch.where(
                (turns == quarter)[:, :, None, None, None], turned(images, quarter), images
            )
        return images


class DeviceEpisodes(_DeviceSteps):
    """Outer steps on episodes from the host, such as those of real data.

    Args:
        module, optimizer, sizes, n_tasks, inner: as for the steps above.
        image_shape: (C, H, W) of the episodes' images.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        image_shape: tuple[int, int, int],
        sizes: tuple[int, int, int],
        n_tasks: int,
        inner: InnerLoop,
    ) -> None:
        super().__init__(module, optimizer, sizes, n_tasks, inner)
        n_way, n_shot, n_query = sizes
        device = next(module.parameters()).device
        self._images = torch.zeros(n_tasks, n_way * (n_shot + n_query), *image_shape, device=device)

    def step(self, episodes: Sequence[Episode]) -> None:
        """Take one outer step on the episodes, all of the sizes and the shape of this object."""
        stacked = torch.stack(
            [torch.cat([one.support_images, one.query_images]) for one in episodes]
        )
        on_gpu = self._images.is_cuda
        self._images.copy_(stacked.pin_memory() if on_gpu else stacked, non_blocking=True)
        self._take()

    def _images_of_step(self) -> Tensor:
        return self._images
