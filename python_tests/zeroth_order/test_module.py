"""Test `as_differentiable`: scores forward, zeroth-order gradient backward."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import bidfmkd_fast as bf
from bidfmkd_fast.errors import InputError


def test_gradient_of_any_loss(seed: int) -> None:
    """Check that with a linear box and many directions the gradient is exact, for any loss."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 5, generator=generator)
    x = torch.randn(2, 8, generator=generator).requires_grad_()
    teacher = bf.as_differentiable(
        lambda images: images @ weight, num_directions=20000, mu=0.1, seed=seed
    )
    assert torch.equal(teacher(x), x @ weight)
    for loss in (
        lambda s: F.cross_entropy(s, torch.tensor([0, 3])),
        lambda s: s.square().sum(),
        lambda s: s[0, 1],
    ):
        (estimate,) = torch.autograd.grad(loss(teacher(x)), x)
        (exact,) = torch.autograd.grad(loss(x @ weight), x)
        assert F.cosine_similarity(estimate.flatten(), exact.flatten(), dim=0) > 0.99


def test_queries_are_spent_only_when_wanted(seed: int) -> None:
    asked: list[int] = []

    def query(images: torch.Tensor) -> torch.Tensor:
        asked.append(len(images))
        return images.flatten(1)

    teacher = bf.as_differentiable(query, num_directions=6, mu=0.1, max_images=8, seed=seed)
    x = torch.randn(4, 1, 2, 2)
    teacher(x)
    assert asked == [4]
    asked.clear()
    teacher(x.requires_grad_()).sum().backward()
    assert asked == [4, 8, 8, 8]


def test_trains_a_generator_through_a_black_box(seed: int) -> None:
    """Train through the module in a plain loop, which lowers the cross entropy of the box."""
    torch.manual_seed(seed)
    secret = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    spec = bf.APISpec(n_classes=3, image_shape=(1, 4, 4))
    teacher = bf.as_differentiable(
        bf.TorchBlackBox(secret, spec), num_directions=20, mu=0.05, seed=seed
    )
    generator = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Unflatten(1, (1, 4, 4)))
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.05)
    latents, labels = torch.randn(12, 8), torch.arange(12) % 3
    before = None
    for _ in range(300):  # the worst of 61 seeds ends at 0.70 of the first loss
        optimizer.zero_grad()
        loss = F.cross_entropy(teacher(generator(latents)), labels)
        before = float(loss.detach()) if before is None else before
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.8 * before


def test_bad_answer() -> None:
    with pytest.raises(
        InputError, match=r"query must return scores \[N, n_classes\], N = 2; got \[8\]"
    ):
        bf.as_differentiable(lambda images: images.flatten())(torch.zeros(2, 4))
    with pytest.raises(InputError, match="N = 2, as a tensor; got list"):
        bf.as_differentiable(lambda images: images.tolist())(torch.zeros(2, 4))
    # The gradient asks about 20 points and gets the answer to 2 images.
    images = torch.zeros(2, 4, requires_grad=True)
    scores = bf.as_differentiable(lambda images: torch.zeros(2, 3))(images)
    with pytest.raises(InputError, match=r"N = 20; got \[2, 3\]"):
        scores.sum().backward()
    with pytest.raises(InputError, match="query must be callable on images; got str"):
        bf.as_differentiable("teacher")
    with pytest.raises(InputError, match="as_differentiable: max_images must be at least 1; got 0"):
        bf.as_differentiable(nn.Identity(), max_images=0)


def test_a_module_that_is_asked_stays_outside(seed: int) -> None:
    """Check that training through the module changes nothing of the teacher.

    Its parameters, its batch norms and its mode (train or eval) stay.
    """
    torch.manual_seed(seed)
    victim = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)
    ).eval()
    before = {name: value.clone() for name, value in victim.state_dict().items()}
    teacher = bf.as_differentiable(victim, num_directions=4, mu=0.1, seed=seed)
    assert list(teacher.parameters()) == list(teacher.buffers()) == list(teacher.children()) == []
    assert set(teacher.state_dict()) == {"_extra_state"}
    student = nn.ModuleDict({"teacher": teacher, "generator": nn.Linear(4, 16)})
    student.train()
    assert not any(module.training for module in victim.modules())
    student.double()
    assert all(parameter.dtype == torch.float32 for parameter in victim.parameters())
    student.float()
    x = student["generator"](torch.randn(5, 4)).view(5, 1, 4, 4)
    F.cross_entropy(teacher(x), torch.arange(5) % 3).backward()
    assert student["generator"].weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in victim.parameters())
    assert all(torch.equal(value, before[name]) for name, value in victim.state_dict().items())


class Project(nn.Module):
    """A model as in a user's script: a network, and perhaps a teacher."""

    def __init__(self, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.network = nn.Linear(4, 3)
        self.teacher = teacher


def teacher_of(seed: int) -> nn.Module:
    return bf.as_differentiable(lambda images: images[:, :3], num_directions=4, mu=0.1, seed=seed)


def test_strict_checkpoints_keep_the_position(tmp_path: Path, seed: int) -> None:
    x = torch.randn(2, 4, requires_grad=True)

    def gradients(project: Project, n: int) -> list[torch.Tensor]:
        return [torch.autograd.grad(project.teacher(x).square().sum(), x)[0] for _ in range(n)]

    first = Project(teacher_of(seed))
    gradients(first, 2)
    torch.save(first.state_dict(), tmp_path / "a.pt")
    safetensors.torch.save_file(first.state_dict(), tmp_path / "a.safetensors")
    wanted = gradients(first, 2)
    for state in (
        torch.load(tmp_path / "a.pt"),
        safetensors.torch.load_file(tmp_path / "a.safetensors"),
    ):
        second = Project(teacher_of(seed + 1))
        assert not torch.equal(gradients(second, 1)[0], wanted[0])
        second.load_state_dict(state, strict=True)
        assert all(torch.equal(*pair) for pair in zip(gradients(second, 2), wanted))

    without = Project().state_dict()  # of a run that had no such teacher
    third = Project(teacher_of(seed))
    gradients(third, 2)
    third.load_state_dict(without, strict=True)
    assert all(torch.equal(*pair) for pair in zip(gradients(third, 2), wanted))
    with pytest.raises(
        RuntimeError, match="network.weight"
    ):  # strict remains strict about the rest
        third.load_state_dict({"teacher._extra_state": torch.tensor([0, 0])}, strict=True)
    with pytest.raises(InputError, match=r"the extra state must be int64 \[seed, step\]"):
        third.teacher.set_extra_state({"seed": 1})


def test_copies_and_seeds(seed: int) -> None:
    victim = nn.Linear(4, 3)
    teacher = bf.as_differentiable(victim, num_directions=4, mu=0.1, seed=seed)
    x = torch.randn(2, 4, requires_grad=True)
    for other in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        pair = [torch.autograd.grad(box(x).sum(), x)[0] for box in (teacher, other)]
        assert torch.equal(*pair)
        teacher.load_state_dict({}, strict=True)
        teacher.set_extra_state(torch.tensor([seed, 0]))
    torch.manual_seed(seed)
    several = [bf.as_differentiable(victim).estimator.seed for _ in range(3)]
    assert len(set(several)) == 3  # teachers made alike share no directions


def test_an_ask_of_the_users_own_is_not_lost(seed: int) -> None:
    teacher = teacher_of(seed)
    x = torch.randn(2, 4, requires_grad=True)
    losses = teacher.estimator.ask(x).square().sum(-1)
    teacher(x).sum().backward()
    teacher.estimator.tell(losses)


def test_an_api_of_labels_is_refused() -> None:
    spec = bf.APISpec(3, (1, 2, 2), scores_kind="labels", name="tags")
    box = bf.FunctionBlackBox(lambda images: images.flatten(1).argmax(1) % 3, spec)
    with pytest.raises(InputError, match="as_differentiable: tags gives labels only, and a label"):
        bf.as_differentiable(box)
    assert box.ledger.queries == 0
