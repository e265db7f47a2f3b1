"""Check that a local function may take images and give scores in any usual format."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bidfmkd_fast.black_box import APISpec, FunctionBlackBox
from bidfmkd_fast.black_box.probe import probe
from bidfmkd_fast.black_box.wire import through_wire, wire_array
from bidfmkd_fast.errors import BadAnswer, InputError, InputTypeError, ServiceWarning
from bidfmkd_fast.recovery import RecoveryConfig, recover

Array = np.ndarray[Any, Any]
NAMES = ("ant", "bee", "cat", "dog", "elk")
SHAPE = (3, 8, 8)


def images_of(n: int, seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def scores_of(images: Any, seed: int = 0) -> Array:
    """Compute probabilities of five classes from images in any format."""
    pixels = np.asarray(images, dtype=np.float64).reshape(len(images), -1)
    weights = np.random.default_rng(seed).normal(size=(pixels.shape[1], 5))
    pixels /= max(1.0, np.abs(pixels).max())
    exponentials = np.exp(pixels @ weights / 16)
    return np.asarray(exponentials / exponentials.sum(1, keepdims=True))


def pipeline(scores: Array, k: int = 5) -> list[list[dict[str, Any]]]:
    """Return scores as a pipeline does: labels with scores, sorted by confidence."""
    rows = [np.argsort(-row)[:k] for row in scores]
    return [
        [{"label": NAMES[i], "score": float(row[i])} for i in best]
        for row, best in zip(scores, rows)
    ]


def box(function: Callable[[Any], Any], as_numpy: bool = False, **fields: Any) -> FunctionBlackBox:
    values = {"scores_kind": "probabilities", "name": "asked", **fields}
    return FunctionBlackBox(function, APISpec(5, SHAPE, **values), as_numpy=as_numpy)


def seen_by(spec: APISpec, images: Tensor, as_numpy: bool) -> Any:
    """Return what the function of a box gets."""
    seen = []

    def function(given: Any) -> Any:
        seen.append(given)
        return scores_of(given)

    FunctionBlackBox(function, spec, as_numpy=as_numpy)(images)
    return seen[0]


# --- images ---

WIRE: list[dict[str, Any]] = [
    {},
    {"layout": "NHWC"},
    {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)},
    {"mean": (0.4,), "std": (0.1,), "server_shape": (1, 8, 8), "layout": "NHWC"},
    {"server_shape": (3, 12, 5)},
    {"server_shape": (1, 8, 8)},
    {"dtype": "uint8"},
    {"dtype": "uint8", "layout": "NHWC", "server_shape": (3, 4, 4)},
    {"encoding": "png"},
    {"input_range": (-1.0, 1.0), "dtype": "uint8"},
]


@pytest.mark.parametrize("fields", WIRE, ids=str)
def test_an_array_is_that_of_the_wire_and_a_tensor_is_it_as_float(
    fields: dict[str, Any], seed: int
) -> None:
    spec = APISpec(5, SHAPE, scores_kind="probabilities", **fields)
    images = spec.from_unit(images_of(4, seed))
    array = seen_by(spec, images, as_numpy=True)
    wanted = wire_array(images, spec)
    assert array.dtype == wanted.dtype and np.array_equal(array, wanted)
    assert array.flags["C_CONTIGUOUS"] and array.flags["WRITEABLE"]
    assert not np.shares_memory(array, images.numpy())
    tensor = seen_by(spec, images, as_numpy=False)
    assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor.data_ptr() != images.data_ptr()
    low, high = spec.input_range
    levels = (tensor.numpy() - low) * 255 / (high - low) if spec.is_8_bit else tensor.numpy()
    np.testing.assert_allclose(levels, wanted, atol=1e-4, rtol=1e-5)


def test_grey_images_become_three_channels(seed: int) -> None:
    spec = APISpec(5, (1, 8, 8), scores_kind="probabilities", server_shape=SHAPE, layout="NHWC")
    images = images_of(2, seed, (1, 8, 8))
    for as_numpy in (True, False):
        seen = np.asarray(seen_by(spec, images, as_numpy))
        assert seen.shape == (2, 8, 8, 3)
        assert all(np.array_equal(seen[..., i], images[:, 0].numpy()) for i in range(3))


def test_jpeg_loses_as_much_in_an_array_as_in_a_tensor(seed: int) -> None:
    spec = APISpec(5, SHAPE, scores_kind="probabilities", encoding="jpeg")
    images = images_of(2, seed)
    array, tensor = seen_by(spec, images, True), seen_by(spec, images, False)
    assert array.dtype == np.uint8 and not np.array_equal(array, wire_array(images, spec))
    torch.testing.assert_close(tensor, through_wire(images, spec))
    np.testing.assert_allclose(tensor.numpy() * 255, array, atol=1e-4)


@pytest.mark.parametrize("as_numpy", [True, False])
def test_a_function_may_work_in_place(as_numpy: bool, seed: int) -> None:
    images = images_of(3, seed)
    before = images.clone()

    def function(given: Any) -> Any:
        given *= 0
        return np.full((len(given), 5), 0.2)

    for fields in WIRE:
        spec = APISpec(5, SHAPE, scores_kind="probabilities", **fields)
        FunctionBlackBox(function, spec, as_numpy=as_numpy)(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("as_numpy", [True, False])
def test_a_function_gets_no_more_than_max_batch(as_numpy: bool, seed: int) -> None:
    sizes = []

    def function(given: Any) -> Any:
        sizes.append(len(given))
        if len(given) > 8:
            raise MemoryError(len(given))
        return scores_of(given * 0 + given)

    api = box(function, as_numpy, max_batch=8)
    assert api(images_of(20, seed)).shape == (20, 5)
    assert sizes == [8, 8, 4] and api.ledger.requests == 3


# --- answers ---

FORMATS: dict[str, Callable[[Array], Any]] = {
    "float64": lambda scores: scores,
    "float32": lambda scores: scores.astype(np.float32),
    "big-endian": lambda scores: scores.astype(">f8"),
    "fortran": np.asfortranarray,
    "reversed": lambda scores: scores[:, ::-1].copy()[:, ::-1],
    "tensor": torch.from_numpy,
    "lists": lambda scores: scores.tolist(),
    "tuples": lambda scores: tuple(map(tuple, scores)),
    "list of arrays": list,
    "list of tensors": lambda scores: list(torch.from_numpy(scores)),
    "labels": pipeline,
    "numbered labels": lambda scores: [
        [{"label": i, "score": row[i]} for i in np.argsort(-row)] for row in scores
    ],
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n", [1, 7])
def test_scores_are_the_same_in_every_format(name: str, n: int, seed: int) -> None:
    images = images_of(n, seed)
    api = box(lambda given: FORMATS[name](scores_of(given)), True, class_names=NAMES)
    scores = api(images)
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), scores_of(images), rtol=1e-6)


def test_an_array_that_cannot_be_written_to_is_read_without_a_warning(seed: int) -> None:
    def function(given: Array) -> Array:
        scores = scores_of(given)
        scores.flags.writeable = False
        return scores

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        box(function, True)(images_of(3, seed))


def test_half_precision_and_integers_are_numbers(seed: int) -> None:
    images = images_of(5, seed)
    half = box(lambda given: scores_of(given).astype(np.float16), True)(images)
    np.testing.assert_allclose(half.numpy(), scores_of(images), atol=1e-3)
    logits = box(lambda given: np.arange(25).reshape(5, 5) % 7, True, scores_kind="logits")
    assert logits(images)[1].tolist() == [5, 6, 0, 1, 2]


def test_a_single_image_may_come_without_the_outer_list(seed: int) -> None:
    images = images_of(1, seed)
    api = box(lambda given: pipeline(scores_of(given))[0], True, class_names=NAMES)
    np.testing.assert_allclose(api(images).numpy(), scores_of(images), rtol=1e-6)


def test_decimals_round_what_a_function_answers(seed: int) -> None:
    images = images_of(6, seed)
    api = box(lambda given: pipeline(scores_of(given)), True, class_names=NAMES, decimals=2)
    wanted = np.maximum(np.round(scores_of(images), 2), 0.005)
    np.testing.assert_allclose(api(images).numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize("k", [3, 4, 5])
def test_the_top_labels_are_placed_and_the_rest_is_spread(k: int, seed: int) -> None:
    images = images_of(6, seed)
    api = box(
        lambda given: pipeline(scores_of(given), k),
        True,
        class_names=NAMES,
        scores_kind="top_k",
        top_k=3,
    )
    scores = scores_of(images)
    best = np.sort(scores, axis=1)[:, -3:]
    spread = np.where(scores >= best[:, :1], scores, (1 - best.sum(1, keepdims=True)) / 2)
    np.testing.assert_allclose(api(images).numpy(), spread, rtol=1e-5)


LABELS: dict[str, Callable[[Array], Any]] = {
    "names": lambda scores: [NAMES[i] for i in scores.argmax(1)],
    "array of names": lambda scores: np.array(NAMES)[scores.argmax(1)],
    "objects": lambda scores: np.array(NAMES, dtype=object)[scores.argmax(1)],
    "numbers": lambda scores: scores.argmax(1).tolist(),
    "int32": lambda scores: scores.argmax(1).astype(np.int32),
    "scores": lambda scores: scores,
    "labels with scores": lambda scores: [row[::-1] for row in pipeline(scores, 3)],
    "one label with its score": lambda scores: [row[0] for row in pipeline(scores)],
    "one label": lambda scores: [[{"label": row[0]["label"]}] for row in pipeline(scores)],
}


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("n", [1, 6])
def test_labels_in_every_format(name: str, n: int, seed: int) -> None:
    images = images_of(n, seed)
    api = box(
        lambda given: LABELS[name](scores_of(given)), True, class_names=NAMES, scores_kind="labels"
    )
    assert api(images).argmax(1).tolist() == scores_of(images).argmax(1).tolist()


BAD: list[tuple[Callable[[Array], Any], dict[str, Any], str]] = [
    (lambda s: "cat", {}, "it answered a str"),
    (lambda s: None, {}, "it answered a NoneType"),
    (lambda s: [], {}, r"it answered shape \[0\]"),
    (lambda s: [[0.5, 0.5], [1.0]] * 3, {}, "it answered a list that is no array of numbers"),
    (lambda s: s[:, :, None].tolist(), {}, r"it answered a list of shape \[6, 5, 1\]"),
    (lambda s: s + 1j, {}, "real numbers; it answered a ndarray of dtype complex128"),
    (lambda s: s > 0, {}, "it answered a ndarray of dtype bool"),
    (lambda s: [["a"] * 5] * 6, {}, "it answered a list of dtype <U1"),
    (lambda s: s[:4], {}, r"shape \[4, 5\]; .*at most 4 images at once, set max_batch=4"),
    (lambda s: s[:4].tolist(), {}, "set max_batch=4"),
    (lambda s: torch.from_numpy(s[:1]), {}, "set max_batch=1"),
    (lambda s: pipeline(s)[:2], {}, "set max_batch=2"),
    (lambda s: s.argmax(1)[:3], {"scores_kind": "labels"}, r"torch.int64 \[3\].*set max_batch=3"),
    (lambda s: np.concatenate([s, s]), {}, r"shape \[12, 5\]$"),
    (lambda s: np.full_like(s, np.nan), {}, "NaN or infinity"),
    (lambda s: pipeline(s), {"class_names": ()}, "such as '...', but its spec has no class_names"),
    (
        lambda s: [NAMES[0]] * 6,
        {"class_names": (), "scores_kind": "labels"},
        "its spec has no class_names",
    ),
    (
        lambda s: pipeline(s),
        {"class_names": ("ant", "bee", "cow", "dog", "elk")},
        "among the spec's class_names; got cat",
    ),
    (lambda s: pipeline(s, 3), {}, "5 labels for each image; it answered 3; .*top_k=3 in the spec"),
    (
        lambda s: pipeline(s, 2),
        {"scores_kind": "top_k", "top_k": 3},
        "3 labels for each image; it answered 2",
    ),
    (lambda s: [pipeline(s)[0], *pipeline(s, 3)[1:]], {}, "as many labels .* answered 3 to 5"),
    (lambda s: [*pipeline(s)[:5], []], {}, "as many labels .* answered 0 to 5"),
    (lambda s: [*pipeline(s)[:5], [1.0] * 5], {}, r"one of its answers is \[1.0"),
    (lambda s: pipeline(s)[0], {}, "for each of 6 images; it answered a single list of 5"),
    (lambda s: [[{"label": "ant", "score": 0.2}] * 5] * 6, {}, "a label came twice"),
    (lambda s: [[{"name": "ant", "score": 0.2}] * 5] * 6, {}, "'label' and 'score'.*KeyError"),
    (lambda s: [[{"label": "ant"}] * 5] * 6, {}, "'label' and 'score'.*KeyError: 'score'"),
    (lambda s: [[{"label": "ant", "score": "x"}] * 5] * 6, {}, "ValueError"),
    (lambda s: [[{"label": 0.5, "score": 0.2}] * 5] * 6, {}, "class names or numbers; got 0.5"),
    (
        lambda s: [[{"label": i, "score": 0.2} for i in range(1, 6)]] * 6,
        {},
        "labels must be from 0 to 4; got 1 to 5",
    ),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_what_cannot_be_read_is_told(number: int, seed: int) -> None:
    function, fields, message = BAD[number]
    api = box(lambda given: function(scores_of(given)), True, **{"class_names": NAMES, **fields})
    with pytest.raises(BadAnswer, match=f"^asked: .*{message}") as raised:
        api(images_of(6, seed))
    assert "\n" not in str(raised.value)
    assert (api.ledger.queries, api.ledger.answered_queries) == (6, 0)


def test_bad_arguments() -> None:
    with pytest.raises(InputTypeError, match="asked: as_numpy must be True or False; got 1"):
        box(scores_of, 1)  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="function must be callable; got int"):
        box(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="mean and std need raw float32"):
        box(scores_of, mean=(0.0,) * 3, std=(1.0,) * 3, dtype="uint8")


# --- mistakes that were silent ---


@pytest.fixture
def caught() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def texts(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(each.message) for each in caught if issubclass(each.category, ServiceWarning)]


def test_scores_sorted_without_labels_are_warned_of(
    caught: list[warnings.WarningMessage], seed: int
) -> None:
    box(lambda given: -np.sort(-scores_of(given)), True)(images_of(8, seed))
    (text,) = texts(caught)
    assert "sorted" in text and "with their labels" in text


@pytest.mark.parametrize("input_range", [(0.0, 255.0), (-1.0, 1.0), (-2.1, 2.6)])
def test_images_of_0_to_1_in_a_wider_range_are_warned_of_once(
    input_range: tuple[float, float], caught: list[warnings.WarningMessage], seed: int
) -> None:
    low, high = input_range
    api = box(lambda given: scores_of((given - low) / (high - low)), True, input_range=input_range)
    images = images_of(8, seed)
    api(torch.full((8, *SHAPE), 0.5))
    api(api.spec.from_unit(images))
    assert texts(caught) == []
    for _ in range(2):
        api(images)
    (text,) = texts(caught)
    assert "are they 0 to 1? spec.from_unit(images) maps them" in text
    assert f"{input_range[0]:g} to {input_range[1]:g}" in text
    assert [each.filename for each in caught if issubclass(each.category, ServiceWarning)] == [
        __file__
    ]


@pytest.mark.parametrize("input_range", [(0.0, 1.0), (-0.1, 1.1)])
def test_no_such_warning_where_0_to_1_is_about_the_range(
    input_range: tuple[float, float], caught: list[warnings.WarningMessage], seed: int
) -> None:
    box(scores_of, True, input_range=input_range)(images_of(8, seed))
    assert texts(caught) == []


@pytest.mark.parametrize("input_range", [(0.0, 255.0), (-1.0, 1.0), (-2.1, 2.6)])
def test_recovery_and_probe_give_no_warning_of_the_range(
    input_range: tuple[float, float], caught: list[warnings.WarningMessage], seed: int
) -> None:
    low, high = input_range
    spec = APISpec(5, SHAPE, input_range, scores_kind="probabilities")

    def function(given: Array) -> Array:
        unit = torch.from_numpy((given - low) / (high - low)).flatten(1)
        weights = torch.randn(192, 5, generator=torch.Generator().manual_seed(1))
        return (unit @ weights).softmax(1).numpy()

    api = FunctionBlackBox(function, spec, as_numpy=True)
    config = RecoveryConfig(steps=3, num_directions=2, latent_dim=8, generator_width=4)
    for n in (1, 4):
        recover(api, n, config=config, seed=seed + n)
    probe(api, seed=seed)
    assert [text for text in texts(caught) if "input_range" in text] == []


def test_a_box_takes_and_gives_arrays() -> None:
    """Check that a NumPy array of images gets a NumPy array of scores, with the same checks."""
    api = FunctionBlackBox(lambda x: x.flatten(1)[:, :3], APISpec(3, (1, 4, 4)))
    images = np.random.default_rng(0).random((6, 1, 4, 4), dtype=np.float32)[::2]
    scores = api(images)
    assert isinstance(scores, np.ndarray) and api.ledger.queries == 3
    np.testing.assert_array_equal(scores, api(torch.from_numpy(images.copy())).numpy())
    with pytest.raises(InputTypeError, match="images must be float32; got torch.float64"):
        api(images.astype(np.float64))
