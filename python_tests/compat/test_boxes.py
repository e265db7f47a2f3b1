"""Check the wrappers of other libraries, with the real library where it is installed.

scikit-learn, ART and Foolbox are real where they are installed. Keras, Hugging Face and timm are
stubs with the documented signatures.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import bidfmkd_fast as bf
from bidfmkd_fast.compat.boxes import (
    from_art,
    from_foolbox,
    from_hugging_face,
    from_keras,
    from_sklearn,
    from_torch,
)
from bidfmkd_fast.errors import BadAnswer, InputError, InputTypeError, ServiceWarning

Array = np.ndarray[Any, Any]
SHAPE, N_CLASSES = (1, 8, 8), 3
CONFIG = bf.RecoveryConfig(steps=40, num_directions=8, latent_dim=8, generator_width=8)


def blobs(n: int, seed: int, n_classes: int = N_CLASSES) -> tuple[Tensor, Tensor]:
    """Draw images with a bright block, whose place is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % n_classes
    images = torch.rand(n, *SHAPE, generator=generator) * 0.3
    for image, label in zip(images, labels.tolist()):
        row, column = divmod(label, 2)
        image[:, row * 3 : row * 3 + 3, column * 4 : column * 4 + 4] += 0.6
    return images, labels


def network(
    seed: int, n_classes: int = N_CLASSES, low: float = 0.0, high: float = 1.0
) -> nn.Module:
    """Train a small network on blobs whose pixels are mapped to `low` to `high`."""

    class Unit(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return (images - low) / (high - low)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(
            Unit(), nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, n_classes)
        )
        images, labels = blobs(300, seed, n_classes)
        optimiser = torch.optim.Adam(module.parameters(), lr=0.02)
        for _ in range(60):
            loss = nn.functional.cross_entropy(module(images * (high - low) + low), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return module.eval()


@pytest.fixture
def caught() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def texts(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(each.message) for each in caught if issubclass(each.category, ServiceWarning)]


def reached(api: bf.BlackBox, seed: int) -> float:
    """Return the share of recovered images to which the API gives the wanted label."""
    recovered = bf.recover(api, 4, config=CONFIG, seed=seed)
    return (api(recovered.images).argmax(1) == recovered.labels).float().mean().item()


# --- scikit-learn -----------------------------------------------------------------------------


def regression(seed: int, n_classes: int = N_CLASSES, **options: Any) -> Any:
    linear = pytest.importorskip("sklearn.linear_model")
    images, labels = blobs(300, seed, n_classes)
    names = np.array(["ant", "bee", "cat", "dog", "elk"])[labels.numpy()]
    return linear.LogisticRegression(**options).fit(images.flatten(1).numpy(), names)


def test_sklearn_probabilities_and_recovery(
    seed: int, caught: list[warnings.WarningMessage]
) -> None:
    estimator = regression(seed)
    api = from_sklearn(
        estimator, SHAPE, budget=bf.Budget(max_queries=10**6), name="ours", data_set="blobs"
    )
    assert api.spec.class_names == ("ant", "bee", "cat")
    assert (api.spec.scores_kind, api.name, api.spec.data_set) == ("probabilities", "ours", "blobs")
    images, _ = blobs(20, seed + 1)
    np.testing.assert_allclose(
        api(images), estimator.predict_proba(images.flatten(1).numpy()), rtol=1e-5, atol=1e-6
    )
    assert reached(api, seed) >= 0.9
    assert texts(caught) == []


def test_sklearn_decisions_labels_and_layout(seed: int) -> None:
    svm = pytest.importorskip("sklearn.svm")
    images, labels = blobs(90, seed)
    rows = images.flatten(1).numpy()
    machine = svm.LinearSVC().fit(rows, labels)
    api = from_sklearn(machine, SHAPE)
    assert api.spec.scores_kind == "logits" and api.spec.class_names == ("0", "1", "2")
    np.testing.assert_allclose(api(images), machine.decision_function(rows), rtol=1e-4, atol=1e-5)
    named = from_sklearn(machine, SHAPE, scores_kind="labels")(images)
    assert named.argmax(1).tolist() == machine.predict(rows).tolist()

    two = regression(seed, 2)
    logits = from_sklearn(two, SHAPE, scores_kind="logits")(images).softmax(1)
    torch.testing.assert_close(logits, from_sklearn(two, SHAPE)(images), rtol=1e-4, atol=1e-5)
    logarithms = from_sklearn(two, SHAPE, scores_kind="log_probabilities")(images)
    torch.testing.assert_close(logarithms.exp(), logits, rtol=1e-4, atol=1e-5)

    seen: list[Array] = []

    class Noting:
        classes_ = np.array([0, 1])

        def predict_proba(self, rows: Array) -> Array:
            seen.append(rows)
            return np.full((len(rows), 2), 0.5)

    colour = torch.rand(2, 3, 4, 4)
    for layout, order in (("NCHW", (0, 1, 2, 3)), ("NHWC", (0, 2, 3, 1))):
        from_sklearn(Noting(), (3, 4, 4), layout=layout)(colour)
        assert seen[-1].dtype == np.float32
        assert np.array_equal(seen[-1], colour.permute(order).flatten(1).numpy())


def test_sklearn_errors(seed: int) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    svm = pytest.importorskip("sklearn.svm")
    images, labels = blobs(60, seed)
    rows = images.flatten(1).numpy()
    with pytest.raises(InputError, match="LogisticRegression without classes_; fit it first"):
        from_sklearn(linear.LogisticRegression(), SHAPE)
    with pytest.raises(InputError, match="wanted a fitted classifier"):
        from_sklearn(3, SHAPE)
    with pytest.raises(InputError, match="takes 64 features; images .1, 4, 4. have 16"):
        from_sklearn(regression(seed), (1, 4, 4))
    with pytest.raises(InputError, match="one for each pair; set 'ovr'"):
        from_sklearn(svm.SVC(decision_function_shape="ovo").fit(rows, labels), SHAPE)
    with pytest.raises(InputError, match="LinearSVC has no predict_proba, which gives prob"):
        from_sklearn(svm.LinearSVC().fit(rows, labels), SHAPE, scores_kind="probabilities")
    with pytest.raises(InputError, match="with scores_kind='labels' it is asked by predict"):
        from_sklearn(SimpleNamespace(classes_=[0, 1], predict=len), SHAPE)
    with pytest.raises(InputError, match="from_sklearn: spec has no field colour"):
        from_sklearn(regression(seed), SHAPE, colour=3)
    with pytest.raises(InputError, match="scores_kind must be one of"):
        from_sklearn(regression(seed), SHAPE, scores_kind="odds")


# --- the Adversarial Robustness Toolbox ---


def art_classifier(module: nn.Module, n_classes: int = N_CLASSES, **options: Any) -> Any:
    classification = pytest.importorskip("art.estimators.classification")
    values = {
        "loss": nn.CrossEntropyLoss(),
        "input_shape": SHAPE,
        "nb_classes": n_classes,
        "clip_values": (0.0, 1.0),
        "device_type": "cpu",
        **options,
    }
    return classification.PyTorchClassifier(module, **values)


def test_art_logits_and_recovery(seed: int, caught: list[warnings.WarningMessage]) -> None:
    module = network(seed, low=-1.0, high=1.0)
    api = from_art(art_classifier(module, clip_values=(-1.0, 1.0)))
    assert (api.spec.image_shape, api.spec.n_classes) == (SHAPE, N_CLASSES)
    assert (api.spec.input_range, api.spec.layout) == ((-1.0, 1.0), "NCHW")
    images = api.spec.from_unit(blobs(20, seed + 1)[0])
    torch.testing.assert_close(api(images), module(images).detach(), rtol=1e-4, atol=1e-5)
    assert reached(api, seed) >= 0.9
    assert texts(caught) == []


def test_art_channels_last_and_sklearn(seed: int) -> None:
    class Last(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((1, 2))

    api = from_art(
        art_classifier(Last(), 3, input_shape=(8, 8, 3), channels_first=False), data_set="colours"
    )
    assert (api.spec.layout, api.spec.image_shape) == ("NHWC", (3, 8, 8))
    images = torch.rand(5, 3, 8, 8)
    torch.testing.assert_close(api(images), images.mean((2, 3)), rtol=1e-4, atol=1e-5)

    classification = pytest.importorskip("art.estimators.classification")
    estimator = regression(seed)
    wrapped = classification.SklearnClassifier(estimator, clip_values=(0.0, 1.0))
    with pytest.raises(InputError, match=r"input_shape is \(64,\), not an image's; give image"):
        from_art(wrapped)
    api = from_art(wrapped, SHAPE, scores_kind="probabilities")
    images, _ = blobs(9, seed)
    torch.testing.assert_close(
        api(images), from_sklearn(estimator, SHAPE)(images), rtol=1e-4, atol=1e-5
    )


def test_art_errors(seed: int) -> None:
    module = network(seed)
    with pytest.raises(InputError, match="has no clip_values; give input_range"):
        from_art(art_classifier(module, clip_values=None))
    api = from_art(art_classifier(module, clip_values=None), input_range=(0.0, 1.0))
    assert api.spec.input_range == (0.0, 1.0)
    with pytest.raises(
        InputError,
        match="from_art: wanted an ART classifier, which has predict, input_shape, nb_classes; "
        "got a Sequential without predict, input_shape, nb_classes",
    ):
        from_art(module)
    with pytest.raises(InputError, match="got image_shape=.1, 4, 4.; .* server_shape"):
        from_art(art_classifier(module), (1, 4, 4))


# --- Foolbox ---


def foolbox_model(module: nn.Module, bounds: tuple[float, float] = (0, 1)) -> Any:
    foolbox = pytest.importorskip("foolbox")
    return foolbox.PyTorchModel(module, bounds=bounds, device="cpu")


def test_foolbox_logits_and_recovery(seed: int, caught: list[warnings.WarningMessage]) -> None:
    module = network(seed, low=0.0, high=255.0)
    api = from_foolbox(foolbox_model(module, (0, 255)), SHAPE, N_CLASSES)
    assert (api.spec.input_range, api.spec.scores_kind) == ((0.0, 255.0), "logits")
    images = api.spec.from_unit(blobs(20, seed + 1)[0])
    torch.testing.assert_close(api(images), module(images).detach(), rtol=1e-4, atol=1e-5)
    assert reached(api, seed) >= 0.9
    assert texts(caught) == []


def test_foolbox_transformed_bounds_and_eagerpy(seed: int) -> None:
    module, eagerpy = network(seed), pytest.importorskip("eagerpy")
    images, _ = blobs(6, seed)
    turned = foolbox_model(module).transform_bounds((-1, 1), wrapper=True)
    api = from_foolbox(turned, SHAPE, N_CLASSES)
    assert api.spec.input_range == (-1.0, 1.0)
    torch.testing.assert_close(api(images * 2 - 1), module(images).detach(), rtol=1e-4, atol=1e-5)

    class Eager:
        bounds = (0, 1)

        def __call__(self, images: Tensor) -> Any:
            return eagerpy.astensor(module(images))

    torch.testing.assert_close(
        from_foolbox(Eager(), SHAPE, N_CLASSES)(images), module(images).detach()
    )
    with pytest.raises(InputError, match="wanted a Foolbox model, which has bounds, __call__"):
        from_foolbox(3, SHAPE, N_CLASSES)


# --- Keras (a stub of its documented interface) ---


class Rescaling:
    def __init__(self, scale: float) -> None:
        self.scale = scale


class Softmax:
    pass


def keras_model(activation: Any, *layers: Any, takes: Any = (None, 8, 8, 1)) -> Any:
    def predict(images: Array, verbose: Any = "auto") -> Array:
        assert verbose == 0 and images.shape[1:] == takes[1:] and images.dtype == np.float32
        scores = images.reshape(len(images), -1)[:, :3].astype(np.float64)
        return scores if activation is None else torch.from_numpy(scores).softmax(1).numpy()

    last = SimpleNamespace(activation=activation)
    return SimpleNamespace(
        predict=predict, input_shape=takes, output_shape=(None, 3), layers=[*layers, last]
    )


def softmax() -> None:
    pass


def linear() -> None:
    pass


def relu() -> None:
    pass


def test_keras_states_its_shapes_and_its_last_activation(seed: int) -> None:
    images = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(seed))
    api = from_keras(keras_model(softmax), class_names=("a", "b", "c"))
    assert (api.spec.image_shape, api.spec.layout, api.spec.n_classes) == (SHAPE, "NHWC", 3)
    assert api.spec.scores_kind == "probabilities" and api.spec.input_range == (0.0, 1.0)
    torch.testing.assert_close(api(images), images.flatten(1)[:, :3].softmax(1))
    assert from_keras(keras_model(linear)).spec.scores_kind == "logits"
    assert from_keras(keras_model(linear), scores_kind="labels").spec.labels_only
    wide = from_keras(keras_model(softmax, Rescaling(1 / 127.5)))
    assert wide.spec.input_range == (0.0, 255.0)
    base = SimpleNamespace(layers=[Rescaling(1 / 255)])  # a model as a layer of another
    assert from_keras(keras_model(softmax, base)).spec.input_range == (0.0, 255.0)
    last = keras_model(relu)
    last.layers.append(Softmax())
    assert from_keras(last).spec.scores_kind == "probabilities"
    first = from_keras(keras_model(softmax, takes=(None, 1, 8, 8)))
    assert (first.spec.image_shape, first.spec.layout) == (SHAPE, "NCHW")
    free = keras_model(softmax, takes=(None, None, None, 3))
    assert from_keras(free, image_shape=(3, 8, 8)).spec.image_shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (keras_model(relu), "does not show which scores it gives; give scores_kind"),
        (keras_model(softmax, takes=(None, 64)), "must map one input .None, H, W, C."),
        (keras_model(softmax, takes=(None, None, None, 3)), "does not state image_shape"),
        (SimpleNamespace(predict=len), "a Keras model.* without input_shape, output_shape"),
    ],
)
def test_keras_errors(model: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^from_keras: .*{message}"):
        from_keras(model)


# --- Hugging Face (a stub of its documented interface) ---


class Pipeline:
    """Scores PIL images by their mean colour, as a pipeline of image classification answers."""

    def __init__(self, id2label: Any) -> None:
        self.model = SimpleNamespace(config=SimpleNamespace(id2label=id2label))
        self.asked: list[int] = []

    def __call__(self, images: list[Any], top_k: int = 5) -> list[list[dict[str, Any]]]:
        assert all(isinstance(image, Image.Image) for image in images)
        self.asked.append(top_k)
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        scores = torch.from_numpy(pixels.mean((1, 2)) / 50).softmax(1)
        best = scores.argsort(1, descending=True)[:, :top_k].tolist()
        labels = self.model.config.id2label
        return [
            [{"label": labels[i], "score": row[i].item()} for i in order]
            for row, order in zip(scores, best)
        ]


def test_hugging_face_labels_are_placed(seed: int) -> None:
    pipeline = Pipeline({2: "blue", 0: "red", 1: "green"})
    api = from_hugging_face(pipeline, (3, 8, 8), name="hf")
    assert api.spec.class_names == ("red", "green", "blue")
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    wanted = ((images * 255).round().double().mean((2, 3)) / 50).softmax(1).float()
    torch.testing.assert_close(api(images), wanted, rtol=1e-4, atol=1e-5)
    some = from_hugging_face(pipeline, (3, 8, 8), scores_kind="top_k", top_k=2)
    best = some(images)
    assert pipeline.asked == [3, 2] and torch.equal(best.argmax(1), wanted.argmax(1))
    grey = from_hugging_face(pipeline, (1, 8, 8))(images[:, :1])
    torch.testing.assert_close(grey, torch.full((6, 3), 1 / 3), rtol=1e-4, atol=1e-5)
    files = from_hugging_face(pipeline, (3, 8, 8), encoding="jpeg")
    assert files(images).shape == (6, 3)


def test_hugging_face_errors() -> None:
    with pytest.raises(InputError, match="from_hugging_face: pipeline must be .* got a function"):
        from_hugging_face(softmax, (3, 8, 8))
    pipeline = Pipeline({0: "a", 1: "b"})
    with pytest.raises(InputError, match="gets PIL images; leave layout out"):
        from_hugging_face(pipeline, (3, 8, 8), layout="NHWC")
    with pytest.raises(InputError, match="1 or 3 channels; got 2"):
        from_hugging_face(pipeline, (2, 8, 8))
    with pytest.raises(InputError, match=r"classes are called \['crane'\]; give each a name"):
        from_hugging_face(Pipeline({0: "crane", 1: "cat", 2: "crane"}), (3, 8, 8))
    with pytest.raises(InputError, match=r"class numbers as its keys; got \['a', 'b'\]"):
        from_hugging_face(Pipeline({"a": "x", "b": "y"}), (3, 8, 8))


# --- torch ---


def test_torch_normalises_in_front_of_a_plain_module(seed: int) -> None:
    module = network(seed).train()
    images, _ = blobs(10, seed)
    api = from_torch(module, SHAPE, mean=(0.2,), std=(0.5,), class_names=("a", "b", "c"))
    assert isinstance(api, bf.TorchBlackBox) and api.spec.n_classes == N_CLASSES
    assert not api.spec.mean and module.training
    wanted = module((images - 0.2) / 0.5).detach()
    torch.testing.assert_close(api(images), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        from_torch(module, SHAPE, n_classes=3)(images),
        module(images).detach(),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("as_object", [True, False])
def test_torch_reads_the_configuration_of_timm(as_object: bool, seed: int) -> None:
    module = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    config = {
        "input_size": (3, 16, 16),
        "mean": (0.4, 0.5, 0.6),
        "std": (0.1, 0.2, 0.3),
        "num_classes": 1000,  # the head has been replaced since
    }
    name = "pretrained_cfg" if as_object else "default_cfg"
    setattr(module, name, SimpleNamespace(**config) if as_object else config)
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    wanted = module((images - mean) / std).detach()
    api = from_torch(module)  # type: ignore[arg-type]
    assert (api.spec.image_shape, api.spec.n_classes) == ((3, 16, 16), 4)
    torch.testing.assert_close(api(images), wanted, rtol=1e-4, atol=1e-5)
    wide = from_torch(module, input_range=(0.0, 255.0))
    torch.testing.assert_close(wide(images * 255), wanted, rtol=1e-3, atol=1e-4)
    small = from_torch(module, (3, 12, 12))
    assert small.spec.image_shape == (3, 12, 12)


def test_torch_errors() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(InputTypeError, match="from_torch: module must be a torch.nn.Module; got"):
        from_torch(softmax)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="give image_shape="):
        from_torch(module)
    with pytest.raises(InputError, match="mean and std go together"):
        from_torch(module, SHAPE, mean=(0.5,))
    with pytest.raises(InputError, match="mean must be 1 finite numbers"):
        from_torch(module, SHAPE, mean=(0.5, 0.5), std=(1.0, 1.0))
    with pytest.raises(InputError, match=r"fails on images \[1, 1, 4, 4\].*check image_shape"):
        from_torch(module, (1, 4, 4))
    with pytest.raises(InputError, match=r"answer scores \[1, n_classes\]; it answered \[1, 1, 8"):
        from_torch(nn.Identity(), SHAPE)
    with pytest.raises(InputError, match="use FunctionBlackBox"):
        from_torch(module, SHAPE, layout="NHWC")


# --- the mistakes that were silent speak through the wrappers ---


def test_probabilities_where_logits_are_stated_are_warned_of(
    seed: int, caught: list[warnings.WarningMessage]
) -> None:
    module = nn.Sequential(network(seed), nn.Softmax(1))
    images, _ = blobs(12, seed)
    for api in (
        from_art(art_classifier(module)),
        from_foolbox(foolbox_model(module), SHAPE, N_CLASSES),
        from_torch(module, SHAPE),
    ):
        caught.clear()
        api(images)
        (text,) = texts(caught)
        assert "its spec says logits" in text and "scores_kind='probabilities'" in text
    wrong = from_art(art_classifier(network(seed)), scores_kind="probabilities")
    with pytest.raises(BadAnswer, match="does it give logits?"):
        wrong(images)


def test_sorted_scores_are_warned_of(seed: int, caught: list[warnings.WarningMessage]) -> None:
    class Sorting:
        def __init__(self, estimator: Any) -> None:
            self.inside, self.classes_ = estimator, estimator.classes_

        def predict_proba(self, rows: Array) -> Array:
            return -np.sort(-self.inside.predict_proba(rows))

    class Sorted(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return scores.sort(1, descending=True).values

    module = nn.Sequential(network(seed, 5), Sorted()).eval()
    images, _ = blobs(20, seed, 5)
    for api in (
        from_sklearn(Sorting(regression(seed, 5)), SHAPE),
        from_art(art_classifier(module, 5)),
        from_foolbox(foolbox_model(module), SHAPE, 5),
    ):
        caught.clear()
        api(images)
        (text,) = texts(caught)
        assert "the scores of every image are sorted" in text


def test_images_of_another_range_are_warned_of(
    seed: int, caught: list[warnings.WarningMessage]
) -> None:
    images, _ = blobs(20, seed)
    images = images / images.max()
    for low, high in ((0.0, 255.0), (-1.0, 1.0)):
        module = network(seed, low=low, high=high)
        for make in (
            lambda module=module, ends=(low, high): from_art(
                art_classifier(module, clip_values=ends)
            ),
            lambda module=module, ends=(low, high): from_foolbox(
                foolbox_model(module, ends), SHAPE, N_CLASSES
            ),
        ):
            api: bf.BlackBox = make()
            caught.clear()
            api(images)
            assert any("are they 0 to 1? spec.from_unit(images)" in text for text in texts(caught))
            api = make()
            caught.clear()
            api(images * 255 * 4)
            assert any("far outside of its input_range" in text for text in texts(caught))
    caught.clear()
    api = from_sklearn(regression(seed), SHAPE)
    api(images * 255)
    assert any("far outside of its input_range, 0 to 1" in text for text in texts(caught))


def test_no_more_than_max_batch_images_are_asked_and_missing_rows_are_told(seed: int) -> None:
    inside = network(seed)

    class Small(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            if len(images) > 8:
                raise MemoryError(f"{len(images)} images")
            return inside(images)

    class Short(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return inside(images[:8])

    images, _ = blobs(30, seed)
    wanted = inside(images).detach()
    for api in (
        from_foolbox(foolbox_model(Small().eval()), SHAPE, N_CLASSES, max_batch=8),
        from_foolbox(foolbox_model(Short().eval()), SHAPE, N_CLASSES, max_batch=8),
        from_art(art_classifier(Small()), max_batch=8),
    ):
        torch.testing.assert_close(api(images), wanted, rtol=1e-4, atol=1e-5)
        assert api.ledger.requests == 4
    with pytest.raises(MemoryError):
        from_foolbox(foolbox_model(Small().eval()), SHAPE, N_CLASSES)(images)
    with pytest.raises(BadAnswer, match=r"answered shape \[8, 3\]; .* set max_batch=8"):
        from_foolbox(foolbox_model(Short().eval()), SHAPE, N_CLASSES)(images)


@pytest.mark.parametrize("shape", [8, None, "188", (1, 8.5, 8), (8, 8), (0, 8, 8)])
def test_a_wrong_image_shape_is_told(shape: Any, seed: int) -> None:
    makers: list[Callable[[], object]] = [
        lambda: from_sklearn(SimpleNamespace(classes_=[0, 1], predict_proba=len), shape),
        lambda: from_foolbox(SimpleNamespace(bounds=(0, 1), __call__=len), shape, 3),
        lambda: from_hugging_face(Pipeline({0: "a", 1: "b"}), shape),
        lambda: from_torch(nn.Flatten(), shape),
    ]
    for make in makers:
        with pytest.raises(InputError, match="image_shape"):
            make()


def test_bytes_come_in_the_range_of_the_model() -> None:
    """Check that an 8-bit spec gives a model of floats its own range, not 0 to 255."""

    class Labels:
        classes_ = np.arange(2)
        seen: np.ndarray[Any, Any]

        def predict(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            self.seen = rows
            return np.zeros(len(rows), np.int64)

    model = Labels()
    box = from_sklearn(model, (1, 4, 4), scores_kind="labels", dtype="uint8")
    images = torch.rand(3, 1, 4, 4)
    assert box(images).argmax(1).tolist() == [0, 0, 0]
    np.testing.assert_allclose(model.seen, images.flatten(1).numpy(), atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize(("layers", "high"), [((), 1.0), ((Rescaling(1 / 255),), 255.0)])
def test_keras_gets_floats_of_bytes(layers: Any, high: float) -> None:
    """Check that an 8-bit spec gives a Keras model floats of its own range."""
    box = from_keras(keras_model(None, *layers), dtype="uint8", scores_kind="logits")
    images = torch.rand(2, *SHAPE) * high
    wanted = images.flatten(1)[:, :3]
    torch.testing.assert_close(box(images), wanted, rtol=0, atol=high * 0.51 / 255)


def test_a_module_in_half_precision_is_told_what_to_do() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).bfloat16()
    advice = r"images are float32, so give module.float\(\) for torch.bfloat16"
    with pytest.raises(InputError, match=f"^from_torch: .*{advice}"):
        from_torch(module, SHAPE)
    with pytest.raises(InputError, match=f"module failed on images .*{advice}"):
        bf.TorchBlackBox(module, bf.APISpec(3, SHAPE))


def test_scores_of_pairs_inside_a_pipeline_are_refused() -> None:
    """Check that three classes, whose pairs are three too, do not hide scores of pairs."""
    pytest.importorskip("sklearn")
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    rows = np.random.default_rng(0).random((30, 16), dtype=np.float32)
    model = make_pipeline(StandardScaler(), SVC(decision_function_shape="ovo"))
    model.fit(rows, np.arange(30) % 3)
    with pytest.raises(InputError, match="'ovo' it gives one for each pair; set 'ovr'"):
        from_sklearn(model, (1, 4, 4))


def test_statistics_may_be_arrays() -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    images, numbers = torch.rand(2, 3, 4, 4), (0.5, 0.4, 0.3)
    wanted = from_torch(module, (3, 4, 4), mean=numbers, std=numbers)(images)
    for kind in (np.array, torch.tensor):
        given = from_torch(module, (3, 4, 4), mean=kind(numbers), std=kind(numbers))
        torch.testing.assert_close(given(images), wanted)
