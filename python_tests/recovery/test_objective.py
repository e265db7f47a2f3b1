"""Check the objective of a recovery against float64, and the augmentation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerances import TOLERANCES

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.recovery import Objective, as_scores, augment
from bidfmkd_fast.seeds import torch_generator
from bidfmkd_fast.zeroth_order import ZerothOrder

KINDS = ["logits", "probabilities", "log_probabilities"]


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def expected_losses(
    api_logits: np.ndarray,
    student_logits: np.ndarray,
    labels: np.ndarray,
    weight: float,
    kind: str,
    divergence: str,
) -> np.ndarray:
    """Compute the objective image by image in float64."""
    to_kind = {
        "logits": lambda s: s,
        "probabilities": softmax,
        "log_probabilities": lambda s: np.log(softmax(s)),
    }[kind]
    losses = []
    for api, student, label in zip(api_logits, student_logits, labels, strict=True):
        p, p_student = softmax(api), softmax(student)
        distance = {
            "l1": np.abs(to_kind(api) - to_kind(student)).sum(),
            "l1_prob": np.abs(p - p_student).sum(),
            "kl": (p * np.log(p / p_student)).sum(),
        }[divergence]
        losses.append(-np.log(p[label]) - weight * (api.argmax() == student.argmax()) * distance)
    return np.array(losses)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", ["l1", "l1_prob", "kl"])
def test_losses_and_tell_are_the_objective_in_float64(
    kind: str, divergence: str, seed: int
) -> None:
    draws = torch_generator(seed, "scores")
    api_logits = torch.randn(40, 4, generator=draws, dtype=torch.float64)
    student_logits = api_logits + 0.7 * torch.randn(40, 4, generator=draws, dtype=torch.float64)
    labels = torch.randint(4, (40,), generator=draws)
    assert 0 < (api_logits.argmax(1) == student_logits.argmax(1)).sum() < 40
    objective = Objective(labels, kind, lambda images: student_logits.float(), 0.6, divergence)

    x = torch.rand(40, 1, 4, 4, generator=draws)
    student_scores = objective.student_scores(x, 4)
    scores = as_scores(api_logits, kind).float()
    wanted = expected_losses(
        api_logits.numpy(), student_logits.numpy(), labels.numpy(), 0.6, kind, divergence
    )
    rtol, atol = TOLERANCES["float32"]
    np.testing.assert_allclose(
        objective.losses(scores, student_scores).numpy(), wanted, rtol=rtol, atol=atol
    )

    zeroth_order = ZerothOrder(num_directions=3, mu=0.1, seed=seed)
    zeroth_order.ask(x)
    loss, losses = objective.tell(zeroth_order, scores.expand(4, -1, -1), student_scores)
    np.testing.assert_allclose(loss.item(), wanted.mean(), rtol=rtol, atol=atol)
    np.testing.assert_allclose(losses.numpy(), wanted, rtol=rtol, atol=atol)


def test_without_a_student_the_boundary_weight_is_idle(seed: int) -> None:
    scores = torch.randn(6, 3, generator=torch_generator(seed, "scores"))
    labels = torch.arange(6) % 3
    with_weight = Objective(labels, "logits", None, 9.0, "l1")
    assert with_weight.student_scores(torch.zeros(6, 1, 4, 4), 3) is None
    wanted = torch.nn.functional.cross_entropy(scores.double(), labels, reduction="none")
    rtol, atol = TOLERANCES["float32"]
    torch.testing.assert_close(
        with_weight.losses(scores, None).double(), wanted, rtol=rtol, atol=atol
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_is_asked_without_a_graph(kind: str) -> None:
    weight = torch.ones(3, requires_grad=True)
    objective = Objective(
        torch.zeros(2, dtype=torch.int64), kind, lambda x: x.mean() * weight.expand(2, 3), 1.0, "l1"
    )
    scores = objective.student_scores(torch.rand(2, 1, 4, 4), 3)
    assert scores is not None
    assert not scores.requires_grad


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (torch.zeros(2, 4), InputError, r"student must return logits .* = \(2, 3\); got \(2, 4\)"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            InputTypeError,
            "floating-point logits; got torch.int64",
        ),
        ([[0.0, 0.0, 0.0]], InputTypeError, "floating-point logits; got list"),
        (torch.full((2, 3), torch.nan), InputError, "student returned NaN or infinity"),
    ],
)
def test_bad_students(answer: object, error: type[Exception], message: str) -> None:
    objective = Objective(torch.zeros(2, dtype=torch.int64), "logits", lambda x: answer, 1.0, "l1")  # type: ignore
    with pytest.raises(error, match=message):
        objective.student_scores(torch.rand(2, 1, 4, 4), 3)


def test_augment_is_one_crop_and_flip_for_the_batch(seed: int) -> None:
    # No pixel is 0, so that padding can be told from the images.
    images = 0.1 + torch.rand(3, 2, 16, 8, generator=torch_generator(seed, "images"))
    padded = np.pad(images.numpy(), [(0, 0), (0, 0), (2, 2), (1, 1)])
    possible = {}
    for top in range(5):
        for left in range(3):
            crop = padded[..., top : top + 16, left : left + 8]
            possible[crop.tobytes()] = (top, left, False)
            possible[np.ascontiguousarray(crop[..., ::-1]).tobytes()] = (top, left, True)
    assert len(possible) == 30
    seen = [
        possible[augment(images, seed, step).contiguous().numpy().tobytes()] for step in range(300)
    ]
    # 300 fair draws miss a given one of the 30 cases with probability 4e-5, and five of them with
    # a probability near 0.
    assert len(set(seen)) > 25
    again = possible[augment(images, seed, 7).contiguous().numpy().tobytes()]
    assert again == seen[7]


def test_augment_hands_the_gradient_back_to_the_pixels_it_shows(seed: int) -> None:
    images = torch.rand(2, 1, 16, 16, generator=torch_generator(seed, "images"), requires_grad=True)
    for step in range(5):
        shown = augment(images, seed, step)
        (gradient,) = torch.autograd.grad(shown.square().sum() / 2, images)
        # Half the square has the value itself as its gradient if the pixel is shown, else 0.
        visible = gradient != 0
        torch.testing.assert_close(gradient[visible], images.detach()[visible], rtol=0, atol=0)
        assert visible.sum() == (shown != 0).sum() > 0
