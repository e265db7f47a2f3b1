"""Check that a black box may be called `teacher`: harmless calls of a module do nothing."""

from __future__ import annotations

import pytest
import torch

import bidfmkd_fast as bf
from bidfmkd_fast.errors import InputError

SPEC = bf.APISpec(3, (1, 8, 8), name="teacher")


def boxes() -> list[bf.BlackBox]:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    return [
        bf.TorchBlackBox(module, SPEC),
        bf.FunctionBlackBox(lambda x: x.flatten(1)[:, :3], SPEC),
    ]


@pytest.mark.parametrize("box", boxes(), ids=lambda box: type(box).__name__)
def test_harmless_calls_change_nothing(box: bf.BlackBox) -> None:
    images = torch.rand(4, 1, 8, 8)
    before = box(images)
    for teacher in (
        box.eval(),
        box.train(False),
        box.train(mode=False),
        box.to("cpu"),
        box.to(device="cpu", dtype=torch.float64),
        box.to(torch.zeros(1)),
        box.cuda(),
        box.cuda(0),
        box.cpu(),
        box.requires_grad_(False),
    ):
        assert teacher is box
    box.zero_grad()
    box.zero_grad(set_to_none=False)
    assert list(box.parameters()) == [] and box.training is False
    assert torch.equal(box(images), before)
    assert box.ledger.queries == 8


@pytest.mark.parametrize("box", boxes(), ids=lambda box: type(box).__name__)
def test_what_would_train_it_is_refused(box: bf.BlackBox) -> None:
    for call in (box.train, lambda: box.train(True)):
        with pytest.raises(InputError, match=r"^teacher: train.*only answers.*call eval\(\)"):
            call()
    for call in (box.requires_grad_, lambda: box.requires_grad_(True)):
        with pytest.raises(InputError, match=r"^teacher: requires_grad_.*no parameters"):
            call()
    assert box.ledger.queries == 0


def test_it_stands_as_the_teacher_of_a_distillation(seed: int) -> None:
    """Run an ordinary loop of distillation that treats its teacher as a module."""
    torch.manual_seed(seed)
    teacher = boxes()[0]
    student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    device = torch.device("cpu")
    teacher.to(device).eval()
    for parameter in teacher.parameters():
        parameter.requires_grad = False
    optimiser = torch.optim.Adam([*student.parameters()], lr=0.02)
    images, losses = torch.rand(32, 1, 8, 8), []
    for _ in range(30):
        with torch.no_grad():
            wanted = teacher(images.to(device)).softmax(1)
        loss = torch.nn.functional.cross_entropy(student(images), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
