"""Replay without the host: tasks gathered from a memory on the module's device, outer steps from a CUDA graph there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bidfmkd_fast.data.episodes import turned
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta.maml import loss_of_stack
from bidfmkd_fast.meta.memory import TaskMemory
from bidfmkd_fast.runtime.captured_step import RepeatedStep

MOST_UNTOLD = 1000


class DeviceReplay:
    """Outer steps as `outer_replay_step` takes them, on tasks of `memory` as it is now.

    The host draws which images a task has; they are gathered, adapted to and learnt from on the
    device, and nothing waits for the result until `records` is called, after at most `MOST_UNTOLD`
    steps.

    Args:
        module: one that `can_stack`.
        optimizer: over its parameters; on CUDA one made with `capturable=True`.
        memory: what the tasks are drawn from; a copy of its images is held on the module's device.
        sizes: n_way, n_shot and n_query of every task.
        rotations: as for `TaskMemory.sample_episode`.
        n_tasks: tasks of one outer step, all in one stack.
        steps, learning_rate, first_order: of the inner loop.

    Attributes:
        untold: steps since `records` was last called.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        memory: TaskMemory,
        sizes: tuple[int, int, int],
        n_tasks: int,
        *,
        rotations: int = 1,
        steps: int,
        learning_rate: float,
        first_order: bool,
    ) -> None:
        self.untold = 0
        self._module, self._optimizer, self._sizes, self._rotations = (
            module,
            optimizer,
            sizes,
            rotations,
        )
        self._inner = {"steps": steps, "learning_rate": learning_rate, "first_order": first_order}
        n_way, n_shot, n_query = sizes
        device = next(module.parameters()).device
        keys = [key for key in memory.classes for _ in memory.images_of(key)]
        self._images = torch.cat([memory.task_images_of(key) for key in memory.classes]).to(device)
        # A memory of the same classes that holds each image's row: it draws the same tasks, and no
        # image moves.
        self._row_memory = TaskMemory()
        self._row_memory.add(torch.arange(float(len(keys))).view(-1, 1, 1, 1), keys)
        self._n_classes = len(memory.classes)
        # Of each image of a step its row and its quarter turns.
        self._rows = torch.zeros(
            2, n_tasks, n_way * (n_shot + n_query), dtype=torch.int64, device=device
        )
        labels = torch.arange(n_way, device=device).expand(n_tasks, n_way)
        self._support_labels = labels.repeat_interleave(n_shot, dim=1)
        self._query_labels = labels.repeat_interleave(n_query, dim=1)
        self._records = torch.zeros(MOST_UNTOLD, 2, device=device)  # loss and accuracy of each step
        self._index = torch.zeros(1, dtype=torch.int64, device=device)
        self._finite = torch.ones(1, dtype=torch.bool, device=device)
        self._streams = (
            [torch.cuda.Stream(device) for _ in range(n_tasks)] if device.type == "cuda" else []
        )
        self._repeated = RepeatedStep(device)

    def step(self, seed: int, first_task: int) -> None:
        """One outer step on tasks `first_task`, `first_task + 1`, ... of the memory's stream
        `seed`.
        """
        rows, turns = [], []
        for task in range(first_task, first_task + self._rows.shape[1]):
            episode = self._row_memory.sample_episode(
                *self._sizes, seed=seed, index=task, rotations=self._rotations
            )
            rows.append(torch.cat([episode.support_images, episode.query_images]).flatten().long())
            labels = torch.cat([episode.support_labels, episode.query_labels])
            turns.append((torch.tensor(episode.classes) // self._n_classes)[labels])
        stacked = torch.stack([torch.stack(rows), torch.stack(turns)])
        # From pinned memory, so that the host need not wait until the device has taken them.
        self._rows.copy_(stacked.pin_memory() if self._rows.is_cuda else stacked, non_blocking=True)
        self._repeated(self._step)
        self.untold += 1

    def records(self) -> list[dict[str, float]]:
        """`loss` and `accuracy` of the steps since the last call, means over their tasks; waits for
        the device.

        Raises InputError when a loss or a gradient was not finite; the parameters are then of no
        use.
        """
        if not bool(self._finite):
            raise InputError(
                "replay: a loss or its gradient is not finite; lower inner_lr or outer_lr"
            )
        values = self._records[: self.untold].tolist()
        self._index.zero_()
        self.untold = 0
        return [{"loss": loss, "accuracy": accuracy} for loss, accuracy in values]

    def _step(self) -> None:
        n_way, n_shot, _ = self._sizes
        n_support = n_way * n_shot
        rows, turns = self._rows
        images = self._images.index_select(0, rows.flatten()).unflatten(
            0, rows.shape
        )  # [E, N, C, H, W]
        for quarter in range(4 // self._rotations, 4, 4 // self._rotations):
            images = torch.where(
                (turns == quarter)[:, :, None, None, None], turned(images, quarter), images
            )
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
        """Compute each task's loss and accuracy, both `[E]`: support and query images are `[E, N,
        C, H, W]`.

        On CUDA every task runs on a stream of its own. The kernels of one task are too small to
        fill a device, and cuDNN runs the grouped convolutions of stacked tasks group by group with
        a transposition around each. In a captured graph the streams become branches that run at the
        same time.
        """
        parameters = dict(self._module.named_parameters())
        if not self._streams:
            return self._losses_of(parameters, slice(None), support, query)
        # Views made on this stream, so that the gradients of all tasks come back to it before they
        # are added up.
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
        return loss_of_stack(
            self._module,
            parameters,
            support[tasks],
            self._support_labels[tasks],
            query[tasks],
            self._query_labels[tasks],
            **self._inner,  # type: ignore[arg-type]
        )
