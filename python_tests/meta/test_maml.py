"""Check the replay of tasks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tolerances import TOLERANCES
from torch import Tensor, nn

from bidfmkd_fast.data.episodes import Episode
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta import InnerLoop, maml_loss, outer_replay_step
from bidfmkd_fast.meta.stacked import stacks_of
from bidfmkd_fast.models import build_model
from bidfmkd_fast.seeds import seeded

N_WAY = 3


def network(seed: int) -> nn.Module:
    with seeded(seed, "network"):
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, N_WAY))


def separable_episode(seed: int, index: int) -> Episode:
    """Make an episode whose classes are patterns plus noise, with labels drawn per episode."""
    with seeded(seed, "patterns"):
        patterns = torch.rand(N_WAY, 1, 4, 4)
    with seeded(seed, "episode", index):
        patterns = patterns[torch.randperm(N_WAY)]
        support = patterns.repeat_interleave(2, dim=0) + 0.05 * torch.randn(2 * N_WAY, 1, 4, 4)
        query = patterns.repeat_interleave(4, dim=0) + 0.05 * torch.randn(4 * N_WAY, 1, 4, 4)
    labels = torch.arange(N_WAY)
    return Episode(
        support, labels.repeat_interleave(2), query, labels.repeat_interleave(4), (0, 1, 2)
    )


def test_an_outer_step_sums_the_losses_of_its_tasks(seed: int) -> None:
    episodes = [separable_episode(seed, index) for index in range(3)]
    module, reference = network(seed), network(seed)
    metrics = outer_replay_step(
        module, torch.optim.SGD(module.parameters(), lr=0.1), episodes, InnerLoop(2, 0.3)
    )
    parameters = dict(reference.named_parameters())
    results = [maml_loss(reference, parameters, episode, InnerLoop(2, 0.3)) for episode in episodes]
    gradients = torch.autograd.grad(sum(loss for loss, _ in results), list(parameters.values()))
    rtol, atol = TOLERANCES["float32"]
    for updated, value, gradient in zip(
        module.parameters(), reference.parameters(), gradients, strict=True
    ):
        torch.testing.assert_close(updated, value - 0.1 * gradient, rtol=rtol, atol=atol)
    assert metrics["loss"] == pytest.approx(sum(loss.item() for loss, _ in results) / 3)
    assert metrics["accuracy"] == pytest.approx(sum(float(accuracy) for _, accuracy in results) / 3)


@pytest.mark.parametrize("stacked", [False, True])
def test_the_accuracy_ignores_outputs_beyond_the_classes_of_a_task(
    stacked: bool, seed: int
) -> None:
    with seeded(seed, "network"):
        module: nn.Module = build_model(
            "conv4",
            in_channels=1,
            n_classes=5,
            image_size=(16, 16),
            width=4,
            batch_statistics=True,
        )
        query = torch.rand(12, 1, 16, 16)
    with torch.no_grad():
        module.classifier.bias[3:] = 100.0
        labels = module(query)[:, :3].argmax(1)
    episode = Episode(torch.rand(6, 1, 16, 16), labels[:6], query, labels, (0, 1, 2))
    module = module if stacked else nn.Sequential(module)
    metrics = outer_replay_step(
        module, torch.optim.SGD(module.parameters(), lr=0.0), [episode], InnerLoop(0, 0.1)
    )
    assert metrics["accuracy"] == 1.0


def test_episodes_of_other_numbers_of_classes_share_no_stack() -> None:
    module = build_model(
        "conv4", in_channels=1, n_classes=3, image_size=(16, 16), width=4, batch_statistics=True
    )
    images, labels = torch.zeros(6, 1, 16, 16), torch.zeros(6, dtype=torch.int64)
    two, three = (
        Episode(images, labels, images, labels, classes) for classes in ((0, 1), (0, 1, 2))
    )
    assert list(map(len, stacks_of(module, [two, two, three]))) == [2, 1]


@pytest.mark.parametrize("first_order", [False, True])
def test_replay_learns_to_adapt(seed: int, first_order: bool) -> None:
    """Replay tasks whose labels change, so that only a better start of the inner loop helps."""
    module = network(seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for step in range(80):
        episodes = [separable_episode(seed, 4 * step + index) for index in range(4)]
        losses.append(
            outer_replay_step(module, optimizer, episodes, InnerLoop(3, 0.3, first_order))["loss"]
        )
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_a_loss_or_gradient_that_is_not_finite_takes_no_step(seed: int) -> None:
    class Root(nn.Module):
        """Add a square root, which is finite at 0 but has no finite derivative there."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(N_WAY))

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :N_WAY] + self.weight.sqrt()

    good = separable_episode(seed, 0)
    with_nan = dataclasses.replace(good, query_images=good.query_images * torch.nan)
    for module, episode in ((network(seed), with_nan), (Root(), good)):
        before = [value.detach().clone() for value in module.parameters()]
        optimizer = torch.optim.Adam(module.parameters())
        with pytest.raises(InputError, match="not finite; the step was not taken"):
            outer_replay_step(module, optimizer, [good, episode], InnerLoop(0, 0.01))
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))


def test_no_episodes_are_refused(seed: int) -> None:
    module = network(seed)
    with pytest.raises(InputError, match="tasks is empty"):
        outer_replay_step(module, torch.optim.Adam(module.parameters()), [])
