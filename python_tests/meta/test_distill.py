"""Check the bi-level distillation from scores."""

from __future__ import annotations

import warnings

import pytest
import torch
from tolerances import TOLERANCES
from torch import Tensor, nn
from torch.nn import functional

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta import (
    DistillationTask,
    InnerLoop,
    adapt_to_api,
    distillation_loss,
    outer_distillation_step,
)
from bidfmkd_fast.meta.distill import paper_kd_loss
from bidfmkd_fast.seeds import seeded

N_CLASSES = 4


def network(seed: int, *names: str) -> nn.Module:
    with seeded(seed, "network", *names):
        return nn.Sequential(nn.Flatten(), nn.Linear(16, N_CLASSES, bias=False))


def task_of(seed: int, index: int = 0, scores_kind: str = "logits") -> DistillationTask:
    """Make a task whose teacher is a random linear model."""
    teacher = network(seed, "teacher", str(index))
    convert = {
        "logits": lambda s: s,
        "probabilities": lambda s: s.softmax(1),
        "log_probabilities": lambda s: s.log_softmax(1),
    }
    with seeded(seed, "images", index), torch.no_grad():
        support, query = torch.rand(10, 1, 4, 4), torch.rand(12, 1, 4, 4)
        score = lambda images: convert[scores_kind](5 * teacher(images))  # noqa: E731
        return DistillationTask(support, score(support), query, score(query), scores_kind)


def unrolled(weight: Tensor, task: DistillationTask, steps: int, rate: float) -> Tensor:
    """Compute the outer loss of a linear model in float64 by hand.

    The inner gradient is `d mean KL(t || softmax(x W^T)) / dW = (softmax - t)^T x / N`.
    """
    x, teacher = (
        task.support_images.double().flatten(1),
        task.support_scores.double().softmax(dim=1),
    )
    for _ in range(steps):
        weight = weight - rate * ((x @ weight.T).softmax(dim=1) - teacher).T @ x / len(x)
    teacher = task.query_scores.double().softmax(dim=1)
    student = (task.query_images.double().flatten(1) @ weight.T).log_softmax(dim=1)
    return (teacher * (teacher.log() - student)).sum(dim=1).mean()


def test_outer_loss_and_its_second_order_gradient_are_those_of_a_hand_written_loop(
    seed: int,
) -> None:
    module, task = network(seed), task_of(seed)
    loss = distillation_loss(module, dict(module.named_parameters()), task, InnerLoop(6, 0.5))
    (gradient,) = torch.autograd.grad(loss, list(module.parameters()))
    weight = module[1].weight.detach().double().requires_grad_()
    expected = unrolled(weight, task, 6, 0.5)
    rtol, atol = TOLERANCES["float32"]
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(
        gradient.double(), torch.autograd.grad(expected, weight)[0], rtol=rtol, atol=atol
    )


def test_first_order_gradient_is_the_query_gradient_at_the_task_model(seed: int) -> None:
    module, task = network(seed), task_of(seed)
    first_order = InnerLoop(6, 0.5, first_order=True)
    parameters = dict(module.named_parameters())
    (gradient,) = torch.autograd.grad(
        distillation_loss(module, parameters, task, first_order),
        list(parameters.values()),
    )
    adapted = adapt_to_api(
        module, parameters, task.support_images, task.support_scores, first_order
    )
    weight = adapted["1.weight"].detach().double().requires_grad_()
    rtol, atol = TOLERANCES["float32"]
    expected = torch.autograd.grad(unrolled(weight, task, 0, 0.0), weight)[0]
    torch.testing.assert_close(gradient.double(), expected, rtol=rtol, atol=atol)


def test_the_kind_of_scores_does_not_change_the_loss(seed: int) -> None:
    module = network(seed)
    losses = [
        distillation_loss(
            module,
            dict(module.named_parameters()),
            task_of(seed, scores_kind=kind),
            InnerLoop(3, 0.01),
        )
        for kind in ("logits", "probabilities", "log_probabilities")
    ]
    rtol, atol = TOLERANCES["float32"]
    torch.testing.assert_close(losses[1], losses[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(losses[2], losses[0], rtol=rtol, atol=atol)


def test_the_task_model_comes_closer_to_the_api(seed: int) -> None:
    module, task = network(seed), task_of(seed)
    parameters = dict(module.named_parameters())
    before = distillation_loss(module, parameters, task, InnerLoop(0, 0.01))
    after = distillation_loss(module, parameters, task, InnerLoop(50, 0.5))
    assert after.item() < before.item()


def test_an_outer_step_sums_the_losses_of_its_tasks_and_reports_agreement(seed: int) -> None:
    tasks = [task_of(seed, index) for index in range(3)]
    module, reference = network(seed), network(seed)
    metrics = outer_distillation_step(
        module, torch.optim.SGD(module.parameters(), lr=0.1), tasks, InnerLoop(2, 0.3)
    )
    parameters = dict(reference.named_parameters())
    losses = [distillation_loss(reference, parameters, task, InnerLoop(2, 0.3)) for task in tasks]
    (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), list(parameters.values()))
    rtol, atol = TOLERANCES["float32"]
    torch.testing.assert_close(
        module[1].weight, reference[1].weight - 0.1 * gradient, rtol=rtol, atol=atol
    )
    assert metrics["loss"] == pytest.approx(float(torch.stack(losses).detach().mean()), rel=1e-5)
    agreements = []
    for task in tasks:
        adapted = adapt_to_api(
            reference,
            parameters,
            task.support_images,
            task.support_scores,
            InnerLoop(2, 0.3),
        )
        predicted = functional.linear(task.query_images.flatten(1), adapted["1.weight"]).argmax(
            dim=1
        )
        agreements.append(float((predicted == task.query_scores.argmax(dim=1)).double().mean()))
    assert metrics["agreement"] == pytest.approx(sum(agreements) / 3)


def test_parts_that_do_not_fit_are_refused(seed: int) -> None:
    task = task_of(seed)
    with pytest.raises(
        InputError, match=r"support_images and support_scores .*got \[9, 1, 4, 4\] and \[10, 4\]"
    ):
        DistillationTask(
            task.support_images[:9], task.support_scores, task.query_images, task.query_scores
        )
    with pytest.raises(InputError, match="query_images and query_scores"):
        DistillationTask(
            task.support_images, task.support_scores, task.query_images, task.query_scores[:, 0]
        )
    with pytest.raises(InputError, match="query_images and query_scores"):
        DistillationTask(
            task.support_images, task.support_scores, task.query_images[:0], task.query_scores[:0]
        )
    module = network(seed)
    with pytest.raises(InputError, match="tasks is empty"):
        outer_distillation_step(module, torch.optim.Adam(module.parameters()), [])


def test_paper_compat_is_kl_div_of_probabilities_as_the_authors_call_it(seed: int) -> None:
    module, task = network(seed), task_of(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch itself advises against this reduction

        def authors(weight: Tensor, images: Tensor, scores: Tensor) -> Tensor:
            student = functional.softmax(images.double().flatten(1) @ weight.T, dim=-1)
            return functional.kl_div(student, functional.softmax(scores.double(), dim=-1))

        weight = start = module[1].weight.detach().double().requires_grad_()
        for _ in range(4):
            loss = authors(weight, task.support_images, task.support_scores)
            weight = weight - 0.7 * torch.autograd.grad(loss, weight, create_graph=True)[0]
        expected = authors(weight, task.query_images, task.query_scores)
    parameters = dict(module.named_parameters())
    loss = distillation_loss(module, parameters, task, InnerLoop(4, 0.7), paper_compat=True)
    (gradient,) = torch.autograd.grad(loss, list(module.parameters()))
    rtol, atol = TOLERANCES["float32"]
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(
        gradient.double(), torch.autograd.grad(expected, start)[0], rtol=rtol, atol=atol
    )


@pytest.mark.parametrize("scores_kind", ["probabilities", "log_probabilities"])
def test_paper_compat_reads_every_kind_of_scores(scores_kind: str, seed: int) -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))
    scores = 4 * logits.flip(0)
    converted = scores.softmax(1) if scores_kind == "probabilities" else scores.log_softmax(1)
    rtol, atol = TOLERANCES["float32"]
    torch.testing.assert_close(
        paper_kd_loss(logits, converted, scores_kind),
        paper_kd_loss(logits, scores),
        rtol=rtol,
        atol=atol,
    )
    one_hot = torch.eye(3)
    assert torch.isfinite(paper_kd_loss(torch.zeros(3, 3), one_hot, "probabilities"))
