"""Test the joint distillation against a plain reference, and that it learns what APIs know."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from survey.test_jitter import plain_jitter
from torch import Tensor, nn

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.models import build_model
from bidfmkd_fast.ops.scores import as_scores
from bidfmkd_fast.seeds import seeded, torch_generator
from bidfmkd_fast.survey.config import SurveyConfig
from bidfmkd_fast.survey.joint_distillation import Epoch, Surveyed, _label_loss, distil_jointly
from bidfmkd_fast.survey.pictures import SharedPictures

SHAPE = (1, 16, 16)


def small_module(seed: int) -> nn.Module:
    with seeded(seed, "module"):
        return nn.Sequential(
            nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)
        )


def surveyed_by(pictures: Tensor, seed: int, n_classes: int, kind: str = "logits") -> Surveyed:
    draws = torch.Generator().manual_seed(seed)
    weight = torch.randn(256, n_classes, generator=draws)
    logits = (pictures.float() / 255).flatten(1) @ weight / 4
    if kind == "labels":
        one_hot = nn.functional.one_hot(logits.argmax(1), n_classes).float()
        return Surveyed(one_hot, torch.ones(len(pictures), dtype=torch.bool), kind)
    return Surveyed(as_scores(logits, kind), torch.ones(len(pictures), dtype=torch.bool), kind)


def reference(
    module: nn.Module, pictures: Tensor, surveyed: list[Surveyed], config: SurveyConfig, seed: int
) -> None:
    """Train as the docstring says, in float64, with one plain loop, KL and cross entropy written
    out.
    """
    body = nn.Sequential(*list(module)[:-1])  # type: ignore[arg-type]
    with seeded(seed, "survey", "heads"):
        heads = [nn.Linear(8, one.scores.shape[1]) for one in surveyed]
    for part in (module, *heads):
        part.double()
    optimizer = torch.optim.Adam(
        [*module.parameters(), *(p for head in heads for p in head.parameters())]
    )
    draws, jitters = (torch_generator(seed, "survey", name) for name in ("order", "jitter"))
    n = len(pictures)
    n_batches, step = n // config.batch_size, 0
    for _ in range(config.epochs):
        order, jitter = torch.randperm(n, generator=draws), torch.rand(n, 4, generator=jitters)
        for rows, own in zip(order.tensor_split(n_batches), jitter.tensor_split(n_batches)):
            images = pictures[rows].double() / 255
            if config.jitter:
                seen = zip(images, own.double().tolist())
                images = torch.stack([plain_jitter(i, d, config.jitter) for i, d in seen])
            features = body(images)
            loss = torch.zeros((), dtype=torch.float64)
            for one, head in zip(surveyed, heads, strict=True):
                use = one.answered[rows]
                if not use.any():
                    continue
                if one.kind == "labels":
                    given = one.scores[rows[use]].double()
                    others = 0.08 / (given.shape[1] - 1)
                    p = torch.where(given == 1, 0.92, others)
                    ce = -(p * head(features[use]).log_softmax(1)).sum(1).mean()
                    loss = loss + ce / len(surveyed)
                    continue
                log_q = (head(features[use]) / config.temperature).log_softmax(1)
                teacher = one.scores[rows[use]].double()
                if one.kind == "probabilities":
                    teacher = teacher.log()
                log_p = (teacher / config.temperature).log_softmax(1)
                kl = (log_p.exp() * (log_p - log_q)).sum(1).mean()
                loss = loss + config.temperature**2 * kl / len(surveyed)
            for group in optimizer.param_groups:
                total = config.epochs * n_batches
                group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    nn.init.zeros_(module[-1].weight)  # type: ignore[index, arg-type]
    nn.init.zeros_(module[-1].bias)  # type: ignore[index, arg-type]


@pytest.mark.parametrize(
    "kind", ["logits", "probabilities", "log_probabilities", "labels", "mixed"]
)
def test_it_trains_as_a_plain_loop_does(kind: str, seed: int) -> None:
    jitter = 0.1 if kind == "mixed" else 0.0  # the plain jitter takes its time
    pictures = SharedPictures(seed).as_bytes(43, SHAPE)
    kinds = ("logits", "labels", "probabilities") if kind == "mixed" else (kind,) * 3
    surveyed = [surveyed_by(pictures, seed + i, n, kinds[i]) for i, n in enumerate((3, 5, 8))]
    config = SurveyConfig(n_images=43, epochs=3, batch_size=10, temperature=2.0, jitter=jitter)
    ours, theirs = small_module(seed), small_module(seed)
    assert len(list(distil_jointly(ours, pictures, surveyed, config, seed))) == 3
    reference(theirs, pictures, surveyed, config, seed)
    for value, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n_classes", [2, 3, 8])
def test_a_label_stands_for_a_probability_of_092(n_classes: int, seed: int) -> None:
    """Compare the loss and its gradient, softmax less target, with both written out in float64."""
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, n_classes, generator=draws, dtype=torch.float64).requires_grad_()
    one_hot = torch.eye(n_classes)[torch.randint(n_classes, (6,), generator=draws)]
    target = torch.where(one_hot == 1, 0.92, 0.08 / (n_classes - 1)).double()
    p = logits.detach().exp() / logits.detach().exp().sum(1, keepdim=True)
    loss = _label_loss(logits, one_hot)
    torch.testing.assert_close(loss.detach(), -(target * p.log()).sum(1).mean(), rtol=1e-6, atol=0)
    loss.backward()
    torch.testing.assert_close(logits.grad, (p - target) / 6, rtol=1e-6, atol=1e-8)


def test_pictures_without_an_answer_teach_nothing(seed: int) -> None:
    """What one API has not answered changes nothing, whatever stands in its row."""
    pictures = SharedPictures(seed).as_bytes(40, SHAPE)
    whole, part = surveyed_by(pictures, seed, 3), surveyed_by(pictures, seed + 1, 4)
    part.answered[17:] = False
    config = SurveyConfig(n_images=40, epochs=2, batch_size=8)
    trained = []
    for filler in (0.0, 1e6):
        part.scores[17:] = filler
        module = small_module(seed)
        list(distil_jointly(module, pictures, [whole, part], config, seed))
        trained.append(module.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_pictures_that_nobody_answered_are_left_out(seed: int) -> None:
    pictures = SharedPictures(seed).as_bytes(40, SHAPE)
    one = surveyed_by(pictures, seed, 3)
    one.answered[20:] = False
    config = SurveyConfig(n_images=40, epochs=2, batch_size=10)
    short = Surveyed(one.scores[:20], one.answered[:20], one.kind)
    modules = [small_module(seed), small_module(seed)]
    list(distil_jointly(modules[0], pictures, [one], config, seed))
    list(distil_jointly(modules[1], pictures[:20], [short], config, seed))
    for name, value in modules[0].state_dict().items():
        assert torch.equal(value, modules[1].state_dict()[name])


def test_the_same_arguments_give_the_same_bits(seed: int) -> None:
    pictures = SharedPictures(seed).as_bytes(64, SHAPE)
    surveyed = [surveyed_by(pictures, seed + i, 3) for i in range(2)]
    config = SurveyConfig(n_images=64, epochs=2, batch_size=16)
    made = build_model(
        "conv4", in_channels=1, n_classes=3, image_size=(16, 16), width=4, batch_statistics=True
    )
    torch.manual_seed(seed)
    states, epochs = [], []
    for _ in range(2):
        module = copy.deepcopy(made)
        epochs.append(list(distil_jointly(module, pictures, surveyed, config, seed)))
        states.append(module.state_dict())
        torch.rand(3)  # the position of torch's own generator must not matter
    assert epochs[0] == epochs[1]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_conv4_learns_what_apis_answer() -> None:
    """Heads come to agree with APIs on most pictures, which they do at a third by chance."""
    pictures = SharedPictures(0).as_bytes(300, SHAPE)
    surveyed = [surveyed_by(pictures, i, 3) for i in range(3)]
    with seeded(0, "module"):
        module = build_model(
            "conv4", in_channels=1, n_classes=3, image_size=(16, 16), width=16,
            batch_statistics=True,
        )  # fmt: skip
    config = SurveyConfig(n_images=300, epochs=12, batch_size=30)
    epochs: list[Epoch] = list(distil_jointly(module, pictures, surveyed, config, 0))
    assert epochs[-1].agreement > 0.8 > epochs[0].agreement
    assert epochs[-1].loss < 0.5 * epochs[0].loss
    shares = epochs[-1].by_api  # the batches are of one size, so the mean of means is the mean
    assert len(set(shares)) == 3 and sum(shares) / 3 == pytest.approx(epochs[-1].agreement)
    assert not module.classifier.weight.any()


def test_dropout_draws_from_the_seed(seed: int) -> None:
    pictures = SharedPictures(seed).as_bytes(20, SHAPE)
    surveyed = [surveyed_by(pictures, seed, 3)]
    config = SurveyConfig(n_images=20, epochs=2, batch_size=10)
    made = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    states = []
    for _ in range(2):
        module = copy.deepcopy(made)
        list(distil_jointly(module, pictures, surveyed, config, seed))
        states.append(module.state_dict())
        torch.rand(3)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_distillation_that_diverges_is_an_error(seed: int) -> None:
    pictures = SharedPictures(seed).as_bytes(20, SHAPE)
    surveyed = [surveyed_by(pictures, seed, 3)]
    config = SurveyConfig(n_images=20, epochs=2, batch_size=10, learning_rate=1e30)
    module = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Linear(8, 3))
    with pytest.raises(InputError, match=r"diverged in epoch 1, .* lower survey.learning_rate"):
        list(distil_jointly(module, pictures, surveyed, config, seed))
