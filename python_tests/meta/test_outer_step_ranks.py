"""Share an outer step out over ranks: the parameters stay equal, bit for bit, for any number."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bidfmkd_fast.data.episodes import Episode
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta import outer_replay_step
from bidfmkd_fast.meta.inner_loop import InnerLoop, outer_step
from bidfmkd_fast.models import build_model
from bidfmkd_fast.runtime.ranks import ALONE, Ranks
from bidfmkd_fast.seeds import seeded


class Threads(Ranks):
    """The ranks of a job whose processes are threads."""

    def __init__(self, rank: int, size: int, held: list[Tensor], meet: threading.Barrier) -> None:
        self.rank, self.size, self._held, self._meet = rank, size, held, meet

    def gather(self, own: Tensor) -> Tensor:
        self._held[self.rank] = own.clone()
        self._meet.wait(60)
        gathered = torch.stack(self._held)
        self._meet.wait(60)
        return gathered


def stepped(
    module: nn.Module, episodes: list[Episode], ranks: Ranks, n_steps: int = 3
) -> tuple[list[Tensor], list[dict[str, float]]]:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    metrics = []
    for _ in range(n_steps):
        metrics.append(
            outer_replay_step(module, optimizer, episodes, InnerLoop(2, 0.05), ranks=ranks)
        )
    return [value.detach() for value in module.parameters()], metrics


def in_threads(size: int, module: nn.Module, episodes: list[Episode]) -> list[object]:
    held = [torch.empty(0)] * size
    meet = threading.Barrier(size)
    copies = [copy.deepcopy(module) for _ in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return list(
            pool.map(
                lambda rank: stepped(copies[rank], episodes, Threads(rank, size, held, meet)),
                range(size),
            )
        )


def episodes(seed: int, n: int) -> list[Episode]:
    generator = torch.Generator().manual_seed(seed)

    def images(n_images: int) -> Tensor:
        return torch.rand(n_images, 1, 16, 16, generator=generator)

    labels = torch.arange(3)
    return [
        Episode(images(3), labels, images(6), labels.repeat_interleave(2), classes=(0, 1, 2))
        for _ in range(n)
    ]


@pytest.mark.parametrize("name", ["conv4", "resnet10"])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_parameters_are_equal_for_any_number_of_ranks(name: str, size: int, seed: int) -> None:
    """Five tasks: some ranks have more than others, and of seven two have none."""
    with seeded(seed, "model"):
        module = build_model(name, in_channels=1, n_classes=3, image_size=(16, 16), width=8)
    given = episodes(seed, 5)
    wanted, metrics = stepped(copy.deepcopy(module), given, ALONE)
    for parameters, theirs in in_threads(size, module, given):  # type: ignore[misc]
        assert theirs == metrics
        for ours, expected in zip(parameters, wanted, strict=True):
            assert torch.equal(ours, expected)


def test_a_task_draws_the_same_whoever_computes_it(seed: int) -> None:
    """Dropout draws from torch's generator, which the tasks of a step must not share."""

    def gradient(shares: list[list[int]]) -> Tensor:
        total = torch.zeros(50)
        for share in shares:  # the ranks, one after the other

            class One(Ranks):
                rank, size = 0, 2

                def share(self, items: object) -> list[tuple[int, int]]:
                    return [(number, number) for number in share]  # noqa: B023

                def gather(self, own: Tensor) -> Tensor:
                    return torch.stack([own, torch.zeros_like(own)])

            weight = torch.ones(50, requires_grad=True)
            drawn: list[Tensor] = []

            def loss(task: int) -> tuple[Tensor, Tensor]:
                drawn.append(functional.dropout(weight, 0.5).sum())  # noqa: B023
                return drawn[-1], drawn[-1]  # noqa: B023

            with seeded(seed, "step"):
                outer_step(torch.optim.SGD([weight], lr=1.0), [0, 1, 2, 3], loss, One())
            total += weight.grad if weight.grad is not None else 0
        return total

    with seeded(seed, "step"):
        weight = torch.ones(50, requires_grad=True)

        def loss(task: int) -> tuple[Tensor, Tensor]:
            value = functional.dropout(weight, 0.5).sum()
            return value, value

        outer_step(torch.optim.SGD([weight], lr=1.0), [0, 1, 2, 3], loss)
    assert weight.grad is not None
    assert torch.equal(gradient([[0, 2], [1, 3]]), weight.grad)
    assert not torch.equal(weight.grad, weight.grad.mean().expand(50))


def test_a_parameter_without_a_gradient_is_not_stepped() -> None:
    used, unused = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    held = [torch.empty(0)] * 2
    meet = threading.Barrier(2)

    def step(rank: int) -> Tensor | None:
        mine = used.detach().clone().requires_grad_()
        idle = unused.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([mine, idle], lr=0.1, weight_decay=0.5)
        ranks = Threads(rank, 2, held, meet)
        outer_step(optimizer, [0, 1], lambda task: (mine.sum(), mine.sum().detach()), ranks)
        assert not torch.equal(mine.detach(), used.detach())
        assert torch.equal(idle.detach(), unused.detach())
        return idle.grad

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(step, range(2))) == [None, None]


def test_every_rank_refuses_a_step_that_is_not_finite() -> None:
    held = [torch.empty(0)] * 2
    meet = threading.Barrier(2)

    def step(rank: int) -> str:
        weight = torch.ones(3, requires_grad=True)

        def loss(task: int) -> tuple[Tensor, Tensor]:
            value = weight.sum() * (float("nan") if task == 1 else 1.0)
            return value, value.detach()

        with pytest.raises(InputError, match="not finite") as raised:
            outer_step(
                torch.optim.SGD([weight], lr=1.0), [0, 1], loss, Threads(rank, 2, held, meet)
            )
        assert torch.equal(weight.detach(), torch.ones(3))
        return str(raised.value)

    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(step, range(2)))) == 1
