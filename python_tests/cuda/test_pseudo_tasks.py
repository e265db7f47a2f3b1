"""Compare the training on pseudo-tasks in graphs with the same training without them."""

from __future__ import annotations

import pytest
import torch

import bidfmkd_fast as bf
from bidfmkd_fast.runtime.full_float32 import full_float32
from bidfmkd_fast.training import pseudo_tasks
from bidfmkd_fast.training.default_model import initial_module


def test_a_graph_learns_what_plain_steps_learn(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Compare the movement of all parameters in six steps, three of them from a graph."""
    specs = [bf.APISpec(n_classes=5, image_shape=(1, 28, 28))]
    config = bf.TrainConfig(seed=seed % 1000, replay=bf.ReplayConfig(rotations=4))
    start = initial_module(specs, config).to(device)

    def movement() -> torch.Tensor:
        trained = pseudo_tasks.learn_from_pictures(specs, config, 6, device=device, progress=False)
        pairs = zip(trained.parameters(), start.parameters(), strict=True)
        return torch.cat([(after - before).flatten() for after, before in pairs]).detach()

    # With TF32 the two would choose other convolutions and drift apart within these steps.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with full_float32():
        in_graph = movement()
        monkeypatch.setattr(pseudo_tasks, "can_stack", lambda *_: False)
        plain = movement()
    # Adam moves a parameter with hardly any gradient by as much as all others, to either side; on
    # other tasks the movements would differ by more than they are long.
    assert (in_graph - plain).abs().mean() < 0.5 * plain.abs().mean()
