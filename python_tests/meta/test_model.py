"""Check the inner loop's gradients, adaptation, and saving of the meta-model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tolerances import TOLERANCES
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.meta import InnerLoop, MetaModel, adapt_parameters
from bidfmkd_fast.models import build_model
from bidfmkd_fast.seeds import seeded

# A central difference with step 1e-6 in float64 has a rounding error of 1e-16 / 1e-6 = 1e-10 and a
# truncation error of 1e-12, for values near 1. The gradients that are compared are near 0.1.
FINITE_DIFFERENCE = (1e-6, 1e-8)
N_CLASSES = 3


def smooth_network(seed: int) -> nn.Module:
    """Make a network of convolution, batch norm and tanh, which all have second derivatives."""
    with seeded(seed, "network"):
        module = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(4 * 16, N_CLASSES),
        )
    return module.double()


def conv4(seed: int) -> nn.Module:
    with seeded(seed, "network"):
        return build_model(
            "conv4", in_channels=1, n_classes=N_CLASSES, image_size=(16, 16), width=4
        )


def task(
    seed: int, size: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with seeded(seed, "task"):
        labels = torch.arange(N_CLASSES).repeat(2)
        return (
            torch.rand(6, 1, size, size, dtype=dtype),
            labels,
            torch.rand(9, 1, size, size, dtype=dtype),
            labels.repeat(2)[:9],
        )


def outer_loss(
    module: nn.Module, parameters: dict[str, Tensor], data: tuple[Tensor, ...], inner: InnerLoop
) -> Tensor:
    support, support_labels, query, query_labels = data
    adapted = adapt_parameters(
        module,
        parameters,
        lambda logits: functional.cross_entropy(logits, support_labels),
        support,
        inner,
    )
    return functional.cross_entropy(functional_call(module, adapted, (query,)), query_labels)


def test_second_order_gradient_is_the_finite_difference_of_the_whole_unrolled_loss(
    seed: int,
) -> None:
    module, data = smooth_network(seed), task(seed)
    parameters = dict(module.named_parameters())
    inner = InnerLoop(3, 0.5)
    gradients = torch.autograd.grad(
        outer_loss(module, parameters, data, inner), list(parameters.values())
    )
    step = 1e-6
    for draw in range(3):
        with seeded(seed, "direction", draw):
            direction = {name: torch.randn_like(value) for name, value in parameters.items()}

        ends = []
        for by in (step, -step):
            there = {
                name: (value + by * direction[name]).detach() for name, value in parameters.items()
            }
            there = {name: value.requires_grad_() for name, value in there.items()}
            ends.append(outer_loss(module, there, data, inner).detach())
        expected = (ends[0] - ends[1]) / (2 * step)
        actual = sum(
            (g * direction[name]).sum() for name, g in zip(parameters, gradients, strict=True)
        )
        torch.testing.assert_close(
            actual, expected, rtol=FINITE_DIFFERENCE[0], atol=FINITE_DIFFERENCE[1]
        )


def softmax_regression_outer_loss(
    weight: Tensor, data: tuple[Tensor, ...], steps: int, rate: float
) -> Tensor:
    """Compute the outer loss for logits `x W^T`.

    The inner gradient `(softmax - onehot)^T x / N` is written out by hand.
    """
    support, support_labels, query, query_labels = data
    x, onehot = support.flatten(1), functional.one_hot(support_labels, N_CLASSES).double()
    for _ in range(steps):
        weight = weight - rate * ((x @ weight.T).softmax(dim=1) - onehot).T @ x / len(x)
    return functional.cross_entropy(query.flatten(1) @ weight.T, query_labels)


def test_second_order_gradient_is_that_of_a_hand_written_unrolled_loop(seed: int) -> None:
    data = task(seed)
    with seeded(seed, "network"):
        module = nn.Sequential(nn.Flatten(), nn.Linear(16, N_CLASSES, bias=False)).double()
    loss = outer_loss(module, dict(module.named_parameters()), data, InnerLoop(5, 0.7))
    weight = module[1].weight.detach().clone().requires_grad_()
    expected = softmax_regression_outer_loss(weight, data, 5, 0.7)
    rtol, atol = 1e-12, 1e-14  # float64 rounding over a few dozen operations
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(
        torch.autograd.grad(loss, module[1].weight)[0],
        torch.autograd.grad(expected, weight)[0],
        rtol=rtol,
        atol=atol,
    )


def test_first_order_gradient_is_the_query_gradient_at_the_adapted_parameters(seed: int) -> None:
    module, data = smooth_network(seed), task(seed)
    parameters = dict(module.named_parameters())
    inner = InnerLoop(3, 0.5)
    first = torch.autograd.grad(
        outer_loss(module, parameters, data, inner._replace(first_order=True)),
        list(parameters.values()),
    )
    second = torch.autograd.grad(
        outer_loss(module, parameters, data, inner), list(parameters.values())
    )
    # The definition: adapt with plain SGD, then differentiate the query loss at the result.
    module.zero_grad()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    support, support_labels, query, query_labels = data
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(module(support), support_labels).backward()
        optimizer.step()
    expected = torch.autograd.grad(
        functional.cross_entropy(module(query), query_labels),
        list(module.parameters()),
        allow_unused=True,
    )
    for actual, wanted in zip(first, expected, strict=True):
        # The tolerance allows for float64 rounding through three steps.
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)
    assert max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True)) > 1e-3


def test_cut_off_adaptation_gives_the_same_values_without_a_graph_or_shared_memory(
    seed: int,
) -> None:
    module, data = smooth_network(seed), task(seed)
    parameters = dict(module.named_parameters())
    loss = lambda logits: functional.cross_entropy(logits, data[1])  # noqa: E731
    kept = adapt_parameters(module, parameters, loss, data[0], InnerLoop(2, 0.1))
    with torch.no_grad():  # an outer no_grad must not stop the inner loop
        cut = adapt_parameters(
            module, parameters, loss, data[0], InnerLoop(2, 0.1), create_graph=False
        )
    for name in parameters:
        assert torch.equal(kept[name], cut[name])
        assert kept[name].grad_fn is not None
        assert cut[name].is_leaf
    untouched = adapt_parameters(
        module, parameters, loss, data[0], InnerLoop(0, 0.1), create_graph=False
    )
    for name, value in parameters.items():
        assert torch.equal(untouched[name], value)
        assert untouched[name].data_ptr() != value.data_ptr()


def test_running_statistics_of_the_module_survive_the_inner_loop(seed: int) -> None:
    module = conv4(seed)  # keeps running statistics, and is in train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    support, labels, _, _ = task(seed, 16, torch.float32)
    adapted = adapt_parameters(
        module,
        dict(module.named_parameters()),
        lambda logits: functional.cross_entropy(logits, labels),
        support,
        InnerLoop(2, 0.1),
    )
    torch.stack([value.square().sum() for value in adapted.values()]).sum().backward()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    MetaModel(module).adapt(support, labels, transductive=False).predict(support)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_frozen_and_unused_parameters_stay(seed: int) -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.frozen, self.unused = nn.Linear(16, 3), nn.Linear(3, 3), nn.Linear(2, 2)
            self.frozen.requires_grad_(False)

        def forward(self, images: Tensor) -> Tensor:
            return self.frozen(self.used(images.flatten(1)))

    support, labels, _, _ = task(seed, dtype=torch.float32)
    module = Partly()
    for create_graph in (True, False):
        adapted = adapt_parameters(
            module,
            dict(module.named_parameters()),
            lambda logits: functional.cross_entropy(logits, labels),
            support,
            InnerLoop(1, 0.1),
            create_graph=create_graph,
        )
        for name, value in module.named_parameters():
            assert torch.equal(adapted[name], value) == (not name.startswith("used")), name
    module.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter that requires a gradient"):
        MetaModel(module).adapt(support, labels)


def test_adapt_is_plain_gradient_descent_and_its_classifier_is_independent(seed: int) -> None:
    module = conv4(seed)
    support, labels, query, _ = task(seed, 16, torch.float32)
    meta_model = MetaModel(module, adapt_steps=3, adapt_learning_rate=0.05)
    classifier = meta_model.adapt(support, labels, transductive=True)
    scores = classifier.scores(query)
    assert scores.shape == (9, N_CLASSES)
    assert not scores.requires_grad
    assert torch.equal(classifier.predict(query), scores.argmax(dim=1))
    again = meta_model.adapt(support, labels, 3, 0.05, transductive=True)
    assert torch.equal(again.scores(query), scores)
    fewer = meta_model.adapt(support, labels, steps=1, transductive=True)
    assert not torch.equal(fewer.scores(query), scores)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(module(support), labels).backward()
        optimizer.step()
    rtol, atol = TOLERANCES["float32"]
    torch.testing.assert_close(scores, module(query), rtol=rtol, atol=atol)
    # The classifier has a copy of the module, which the optimiser has changed in the meantime.
    assert torch.equal(classifier.scores(query), scores)


def test_without_transduction_each_image_is_classified_by_itself(seed: int) -> None:
    support, labels, query, _ = task(seed, 16, torch.float32)
    with seeded(seed, "network"):
        module = build_model(
            "conv4",
            in_channels=1,
            n_classes=N_CLASSES,
            image_size=(16, 16),
            width=4,
            batch_statistics=True,
        )
    meta_model = MetaModel(module)
    rtol, atol = TOLERANCES["float32"]
    alone = meta_model.adapt(support, labels)
    singly = torch.cat([alone.scores(image[None]) for image in query])
    torch.testing.assert_close(singly, alone.scores(query), rtol=rtol, atol=atol)
    together = meta_model.adapt(support, labels, transductive=True)
    assert not torch.allclose(
        together.scores(query[:1]), together.scores(query)[:1], rtol=rtol, atol=atol
    )
    # On the support set both use the same mean. Their variances differ by the factor n / (n - 1),
    # here by at most 4 %.
    torch.testing.assert_close(alone.scores(support), together.scores(support), rtol=0.1, atol=0.1)


def test_images_and_labels_of_the_wrong_kind_are_refused(seed: int) -> None:
    support, labels, _, _ = task(seed, 16, torch.float32)
    meta_model = MetaModel(conv4(seed))
    with_nan = support.clone()
    with_nan[0, 0, 0, 0] = torch.nan
    for images, bad_labels, error, message in (
        (
            (support * 255).long(),
            labels,
            InputTypeError,
            "images must be a torch.float32 tensor .* got torch.int64",
        ),
        ({"images": support}, labels, InputTypeError, "a NumPy array, a list .* got dict"),
        (support[0], labels, InputError, r"must be \[N, C, H, W\]"),
        (support[:0], labels[:0], InputError, "N >= 1"),
        (
            support.expand(-1, 4, -1, -1),
            labels,
            InputError,
            r"\[N, 1, H, W\].*got \[6, 4, 16, 16\]",
        ),
        (with_nan, labels, InputError, "NaN"),
        (support, labels.float(), InputTypeError, "int64"),
        (support, None, InputError, "labels are missing"),
        (support, labels[:-1], InputError, r"N = 6.*got \[5\]"),
        (support, labels * 0 + 7, InputError, r"2 to 1,000 classes; got 1, 7"),
        (support.to("meta"), labels, InputError, "on the module's device, cpu; got meta"),
        (support, labels.to("meta"), InputError, "on the images' device, cpu; got meta"),
    ):
        with pytest.raises(error, match=message):
            meta_model.adapt(images, bad_labels)
    with pytest.raises(InputError, match="scores: images must be"):
        meta_model.adapt(support, labels).predict(support[0])
    with pytest.raises(InputError, match="no parameters"):
        MetaModel(nn.Flatten()).adapt(support, labels)


def test_settings_out_of_range_are_refused(seed: int) -> None:
    support, labels, _, _ = task(seed, 16, torch.float32)
    module = conv4(seed)
    with pytest.raises(InputTypeError, match=r"module must be a torch\.nn\.Module; got str"):
        MetaModel("conv4")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="adapt_steps"):
        MetaModel(module, adapt_steps=-1)
    with pytest.raises(InputError, match="adapt_learning_rate"):
        MetaModel(module, adapt_learning_rate=float("nan"))
    with pytest.raises(InputError, match="steps must be 0 or more"):
        MetaModel(module).adapt(support, labels, steps=-1)
    with pytest.raises(InputError, match="learning_rate must be finite"):
        MetaModel(module).adapt(support, labels, learning_rate=float("inf"))


def test_a_saved_meta_model_comes_back(seed: int, tmp_path: Path) -> None:
    support, labels, query, _ = task(seed, 16, torch.float32)
    meta_model = MetaModel(conv4(seed), adapt_steps=2, adapt_learning_rate=0.1)
    path = tmp_path / "new folder" / "meta.safetensors"
    meta_model.save(path)
    loaded = MetaModel.load(path)
    assert (loaded.adapt_steps, loaded.adapt_learning_rate) == (2, 0.1)
    assert torch.equal(
        loaded.adapt(support, labels).scores(query), meta_model.adapt(support, labels).scores(query)
    )

    own = nn.Sequential(nn.Flatten(), nn.Linear(256, N_CLASSES))
    MetaModel(own).save(path)
    with pytest.raises(InputError, match="pass the module as module="):
        MetaModel.load(path)
    other = nn.Sequential(nn.Flatten(), nn.Linear(256, N_CLASSES))
    assert torch.equal(MetaModel.load(path, other).module[1].weight, own[1].weight)  # type: ignore[index]
    with pytest.raises(InputError, match="does not fit the module"):
        MetaModel.load(path, nn.Linear(2, 2))


def test_files_that_are_no_meta_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match="not a saved meta-model"):
        MetaModel.load(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(InputError, match="not a saved meta-model"):
        MetaModel.load(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="not a saved meta-model"):
        MetaModel.load(path)


@pytest.mark.parametrize(
    ("change", "came"),
    [
        (lambda images: images * 255, "got 0 to 255"),
        (lambda images: (images - 0.5) / 0.2, "got -2.5 to 2.5"),
        (lambda images: images - 0.6, "got -0.6 to 0.4"),
        (lambda images: images + 0.6, "got 0.6 to 1.6"),
    ],
)
def test_images_in_another_range_are_refused_with_the_likely_causes(
    change: Callable[[Tensor], Tensor], came: str, seed: int
) -> None:
    _, labels, _, _ = task(seed, 16, torch.float32)
    images = torch.linspace(0, 1, len(labels) * 256).view(-1, 1, 16, 16)
    meta_model = MetaModel(conv4(seed))
    # Values a little outside of the unit range, as augmented images have them, are accepted.
    classifier = meta_model.adapt(images * 1.9 - 0.45, labels)
    wrong = change(images)
    for operation, call in (
        ("adapt", lambda: meta_model.adapt(wrong, labels)),
        ("scores", lambda: classifier.scores(wrong)),
        ("scores", lambda: classifier.predict(wrong)),
    ):
        message = (
            f"^{operation}: .*images must be in unit range, 0 to 1; {came}; "
            "divide by 255 .* normalised"
        )
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 20, 20), (1, 15, 16)])
def test_a_module_that_cannot_take_the_images_is_reported_in_our_words(
    shape: tuple[int, int, int], seed: int
) -> None:
    _, labels, _, _ = task(seed, 16, torch.float32)
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 14 * 14, N_CLASSES))
    meta_model = MetaModel(module)
    with pytest.raises(InputError, match=r"^adapt: the module fails on images \[") as caught:
        meta_model.adapt(torch.rand(len(labels), *shape), labels)
    assert "\n" not in str(caught.value)
    classifier = meta_model.adapt(torch.rand(len(labels), 1, 16, 16), labels)
    with pytest.raises(InputError, match=r"^scores: the module fails on images \[2, "):
        classifier.predict(torch.rand(2, *shape))


@pytest.mark.parametrize("classes", [(0, 2), (1, 4), (0, 1, 2, 3, 4)])
def test_predictions_are_labels_of_the_support_set(classes: tuple[int, ...], seed: int) -> None:
    """Predict none of the outputs that no support label uses, however high they are."""
    with seeded(seed, "linear"):
        module = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
        support, query = torch.rand(len(classes) * 2, 1, 4, 4), torch.rand(40, 1, 4, 4)
    with torch.no_grad():
        for label in set(range(5)) - set(classes):
            module[1].bias[label] += 100.0
    labels = torch.tensor(classes).repeat(2)
    classifier = MetaModel(module, adapt_steps=2).adapt(support, labels)
    scores, predicted = classifier.scores(query), classifier.predict(query)
    assert scores.shape == (40, 5) and predicted.dtype == torch.int64
    expected = [max(classes, key=lambda label: row[label]) for row in scores.tolist()]
    assert predicted.tolist() == expected
