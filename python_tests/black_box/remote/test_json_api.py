"""Check JSONBlackBox with known forms, forms of a user's own, and answers that do not fit."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bidfmkd_fast.black_box import APISpec, JSONBlackBox, JSONMapping
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, InputError, InputTypeError

QUICK: dict[str, Any] = {"backoff": 0.0, "retries": 1}
SPEC = APISpec(
    3, (3, 4, 5), class_names=("cat", "dog", "owl"), scores_kind="probabilities", name="zoo"
)


def images_of(n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, 3, 4, 5, generator=torch.Generator().manual_seed(seed))


def probabilities(pixels: np.ndarray[Any, Any]) -> list[float]:
    """Return the probabilities of an image, channels last."""
    logits = (
        np.array([pixels[..., 0].mean(), pixels[..., 1].mean(), pixels[0, 0, 2]], dtype=np.float64)
        * 5
    )
    return [float(p) for p in np.exp(logits) / np.exp(logits).sum()]


def wanted(images: torch.Tensor) -> torch.Tensor:
    return torch.tensor([probabilities(image) for image in images.permute(0, 2, 3, 1).numpy()])


def test_tf_serving(server: Any, seed: int) -> None:
    def post(sent: Any) -> Any:
        instances = json.loads(sent.body)["instances"]
        return (
            200,
            {},
            json.dumps(
                {"predictions": [probabilities(np.array(entry)) for entry in instances]}
            ).encode(),
        )

    server.post = post
    spec = APISpec(3, (3, 4, 5), scores_kind="probabilities", layout="NHWC", max_batch=4)
    api = JSONBlackBox(f"{server.url}/v1/models/zoo:predict", spec, "tf_serving", **QUICK)
    images = images_of(6, seed)
    torch.testing.assert_close(api(images), wanted(images))
    assert [sent.path for sent in server.posts] == ["/v1/models/zoo:predict"] * 2
    assert (api.ledger.requests, api.ledger.answered_requests) == (2, 2)


def opened(text: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) / 255


def test_tf_serving_with_files(server: Any, seed: int) -> None:
    def post(sent: Any) -> Any:
        instances = json.loads(sent.body)["instances"]
        return (
            200,
            {},
            json.dumps(
                {"predictions": [probabilities(opened(entry["b64"])) for entry in instances]}
            ).encode(),
        )

    server.post = post
    api = JSONBlackBox(
        server.url,
        APISpec(3, (3, 4, 5), scores_kind="probabilities", encoding="png"),
        "tf_serving_files",
        **QUICK,
    )
    images = images_of(3, seed)
    torch.testing.assert_close(
        api(images), wanted((images * 255).round() / 255), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("top_k", [None, 2])
def test_hugging_face(server: Any, seed: int, top_k: int | None) -> None:
    """Answer with labels in the order of their scores; with top_k only the first labels."""

    def post(sent: Any) -> Any:
        scores = probabilities(opened(json.loads(sent.body)["inputs"]))
        labelled = [{"label": name, "score": p} for name, p in zip(SPEC.class_names, scores)]
        return (
            200,
            {},
            json.dumps(sorted(labelled, key=lambda entry: -entry["score"])[:top_k]).encode(),
        )

    server.post = post
    spec = APISpec(
        3,
        (3, 4, 5),
        class_names=SPEC.class_names,
        scores_kind="probabilities" if top_k is None else "top_k",
        top_k=top_k,
        encoding="png",
    )
    api = JSONBlackBox(server.url, spec, "huggingface", **QUICK)
    images = images_of(3, seed)
    # Two of three classes are answered. The probability that is missing belongs to the third.
    torch.testing.assert_close(
        api(images), wanted((images * 255).round() / 255), atol=1e-5, rtol=1e-4
    )
    assert api.ledger.requests == 3


def test_a_mapping_of_ones_own(server: Any, seed: int) -> None:
    def post(sent: Any) -> Any:
        body = json.loads(sent.body)
        assert body["model"] == "zoo-1" and body["options"] == {"all": True}
        answers = [
            {"out": [{"v": p} for p in probabilities(np.moveaxis(np.array(entry["px"]), 0, 2))]}
            for entry in body["batch"]
        ]
        return 200, {}, json.dumps({"result": [{"meta": 1}, answers]}).encode()

    server.post = post
    mapping = {
        "body": {"model": "zoo-1", "batch": "$images", "options": {"all": True}},
        "item": {"px": "$image"},
        "scores": "result.1.*.out.*.v",
    }
    images = images_of(4, seed)
    torch.testing.assert_close(
        JSONBlackBox(server.url, SPEC, mapping, **QUICK)(images), wanted(images)
    )


@pytest.mark.parametrize(
    ("mapping", "answer", "message"),
    [
        ("tf_serving", b"<html>", "the service must answer JSON; it answered '<html>'"),
        (
            "tf_serving",
            b'{"error": "full"}',
            "there is no 'predictions' in what the service answered: .*full",
        ),
        ("tf_serving", b'{"predictions": [[1, 2], [3]]}', "must lead to lists of numbers"),
        (
            "tf_serving",
            b'{"predictions": "none"}',
            "must lead to lists of numbers; it leads to 'none'",
        ),
        (
            "tf_serving",
            b'{"predictions": [[0.5, 0.5]]}',
            r"finite scores \[1, 3\]; it answered shape \[1, 2\]",
        ),
        ("tf_serving", b'{"predictions": [[0.5, 0.2, NaN]]}', "NaN"),
        (
            "tf_serving",
            b'{"predictions": [[4, -2, 0]]}',
            "must be from 0 to 1.*does it give logits",
        ),
        (
            "huggingface",
            b'[{"label": "cat", "score": 1}]',
            "must answer all n_classes = 3 classes; it answered 1",
        ),
        (
            "huggingface",
            b'[{"label": "cat", "score": 1}, {"label": "dog", "score": 0}, '
            b'{"label": "newt", "score": 0}]',
            "labels must be among the spec's class_names; got newt",
        ),
        (
            "huggingface",
            b'[{"label": "cat", "score": 1}, {"label": "dog", "score": 0}, '
            b'{"label": "dog", "score": 0}]',
            "a label came twice",
        ),
        ("huggingface", b'[{"label": "cat"}]', r"there is no '\*.score'"),
    ],
)
def test_bad_answers_name_the_api(server: Any, mapping: str, answer: bytes, message: str) -> None:
    server.post = lambda sent: (200, {}, answer)
    api = JSONBlackBox(server.url, SPEC, mapping, **QUICK)
    with pytest.raises(BadAnswer, match=f"zoo: .*{message}"):
        api(images_of(1, 0))
    assert (api.ledger.requests, api.ledger.answered_requests) == (1, 0)


def test_a_refusal_is_told(server: Any) -> None:
    server.post = lambda sent: (422, {}, b'{"detail": "wrong size"}')
    with pytest.raises(APIUnavailable, match="zoo: the service answered 422: .*wrong size"):
        JSONBlackBox(server.url, SPEC, "tf_serving", **QUICK)(images_of(1, 0))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: JSONMapping({"x": 1}, "y"),
            InputError,
            r"body must hold either '\$images' or '\$image', once",
        ),
        (lambda: JSONMapping(["$image", "$images"], "y"), InputError, "body must hold either"),
        (
            lambda: JSONMapping("$images", "y", item={"b64": 1}),
            InputError,
            r"item must hold '\$image' once",
        ),
        (lambda: JSONMapping("$images", 3), InputTypeError, "scores and labels must be paths"),  # type: ignore[arg-type]
        (
            lambda: JSONBlackBox("http://host", SPEC, "torchserve"),
            InputError,
            "mapping must be one of tf_serving",
        ),
        (
            lambda: JSONBlackBox("http://host", SPEC, {"body": "$images", "path": "y"}),
            InputError,
            "zoo: mapping takes body, scores",
        ),
        (
            lambda: JSONBlackBox("http://host", SPEC, 3),
            InputTypeError,
            "zoo: mapping must be a JSONMapping",
        ),  # type: ignore[arg-type]
        (lambda: JSONBlackBox("host", SPEC, "tf_serving"), InputError, "zoo: url must be http"),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


TAGS = APISpec(3, (3, 4, 5), class_names=SPEC.class_names, scores_kind="labels", name="zoo")
LABELS_ONLY = {"body": "$images", "labels": "tags"}


@pytest.mark.parametrize(
    ("mapping", "answer"),
    [
        ("tf_serving", {"predictions": [2, 0]}),
        ("tf_serving", {"predictions": [[2], [0]]}),
        ("tf_serving", {"predictions": ["owl", "cat"]}),
        ("tf_serving", {"predictions": [[0, 0, 1], [1, 0, 0]]}),
        ("tf_serving", {"predictions": [[0.1, 0.2, 0.7], [0.4, 0.3, 0.3]]}),
        (LABELS_ONLY, {"tags": ["owl", "cat"]}),
        (LABELS_ONLY, {"tags": [[2], [0]]}),
        ({**LABELS_ONLY, "scores": "p"}, {"tags": ["owl", "cat"], "p": [0.8, 0.3]}),
        (
            {**LABELS_ONLY, "scores": "p"},
            {"tags": [["dog", "owl"], ["cat", "dog"]], "p": [[0.1, 0.8], [0.5, 0.4]]},
        ),
    ],
)
def test_labels_alone(server: Any, mapping: Any, answer: Any) -> None:
    server.post = lambda sent: (200, {}, json.dumps(answer).encode())
    api = JSONBlackBox(server.url, TAGS, mapping, **QUICK)
    assert torch.equal(api(images_of(2, 0)), torch.eye(3)[[2, 0]])


@pytest.mark.parametrize(
    ("mapping", "answer"),
    [
        ("huggingface", [{"label": "dog", "score": 0.9}]),
        ("huggingface", [{"label": "owl", "score": 0.1}, {"label": "dog", "score": 0.9}]),
        ({"body": "$image", "labels": "tag"}, {"tag": "dog"}),
        ({"body": "$image", "labels": ""}, 1),
        ({"body": "$image", "scores": "p"}, {"p": [0, 1, 0]}),
    ],
)
def test_the_label_of_a_single_image(server: Any, mapping: Any, answer: Any) -> None:
    server.post = lambda sent: (200, {}, json.dumps(answer).encode())
    api = JSONBlackBox(server.url, TAGS, mapping, **QUICK)
    assert torch.equal(api(images_of(2, 0)), torch.eye(3)[[1, 1]])
    assert api.ledger.requests == 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"tags": ["owl", "newt"]}, "labels must be among the spec's class_names; got newt"),
        ({"tags": [0, 3]}, "labels must be from 0 to 2; got 0 to 3"),
        ({"tags": [0]}, "must lead to one label for each of 2 images.*it leads to"),
        ({"tags": [[0, 1], [1, 2]]}, "must lead to one label for each of 2 images"),
        ({"tags": [0.5, 1.0]}, "must lead to one label for each of 2 images"),
        ({"tags": [[0], [1, 2]]}, "no scores that can be read"),
        ({"tags": [None, {}]}, "must lead to one label for each of 2 images"),
        ({"tags": [0, 10**30]}, "must lead to one label for each of 2 images"),
        ({}, "there is no 'tags'"),
    ],
)
def test_bad_labels_name_the_api(server: Any, answer: Any, said: str) -> None:
    server.post = lambda sent: (200, {}, json.dumps(answer).encode())
    with pytest.raises(BadAnswer, match=f"zoo: .*{said}"):
        JSONBlackBox(server.url, TAGS, LABELS_ONLY, **QUICK)(images_of(2, 0))


def test_a_mapping_without_scores_needs_a_spec_of_labels(server: Any) -> None:
    with pytest.raises(InputError, match="zoo: the mapping has a path to labels only"):
        JSONBlackBox(server.url, SPEC, LABELS_ONLY, **QUICK)
    with pytest.raises(InputError, match="give the path to the scores, to the labels, or to both"):
        JSONMapping("$images")
