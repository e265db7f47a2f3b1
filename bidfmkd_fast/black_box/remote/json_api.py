"""Ask any service that takes images in JSON and answers JSON.

A small mapping says where the images go in a request and where the scores are in an answer.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bidfmkd_fast.black_box.budget import Budget
from bidfmkd_fast.black_box.remote.connection_options import ConnectionOptions
from bidfmkd_fast.black_box.remote.http_client import HTTPClient
from bidfmkd_fast.black_box.remote.reading import (
    float32_array,
    parse_json,
    reading,
    shown,
    words_of,
)
from bidfmkd_fast.black_box.remote.service import Attempt, BatchTooLarge, ServiceBlackBox
from bidfmkd_fast.black_box.remote.v2 import class_numbers, place_labels
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.black_box.wire import wire_array, wire_files
from bidfmkd_fast.errors import BadAnswer, InputError, InputTypeError

IMAGE, IMAGES = "$image", "$images"


def _follow(value: Any, path: list[str]) -> Any:
    """Return what a path of keys and positions leads to; `*` stands for every item of a list."""
    if not path:
        return value
    step, rest = path[0], path[1:]
    if isinstance(value, list):
        return (
            [_follow(item, rest) for item in value]
            if step == "*"
            else _follow(value[int(step)], rest)
        )
    return _follow(value[step], rest)


def _count(template: Any, mark: str) -> int:
    """Count how often `mark` stands in nested JSON values."""
    if isinstance(template, Mapping):
        return sum(_count(value, mark) for value in template.values())
    if isinstance(template, (list, tuple)):
        return sum(_count(value, mark) for value in template)
    return int(template == mark)


def _put(template: Any, mark: str, value: Any) -> Any:
    """Return nested JSON values with `value` in place of `mark`."""
    if isinstance(template, Mapping):
        return {key: _put(inner, mark, value) for key, inner in template.items()}
    if isinstance(template, (list, tuple)):
        return [_put(inner, mark, value) for inner in template]
    return value if isinstance(template, str) and template == mark else template


@dataclass(frozen=True)
class JSONMapping:
    """Where the images go in a request, and where the scores are in the answer.

    Args:
        body: the request, with `"$images"` in place of the list of images, or `"$image"` in place
            of a single image. An image is nested lists of numbers, or a base64 string if the spec's
            encoding is PNG or JPEG.
        scores: path to the scores in the answer: keys and positions separated by dots, `*` for
            every item of a list, as `predictions.*` or `*.score`; empty for the answer itself. The
            path must lead to the scores of the images in order, `[N, k]`, or `[k]` for a single
            image. None if the answer holds labels only. With `scores_kind="labels"` it may also
            lead to a label for each image.
        labels: path to the labels of these scores, class names or numbers; None if the scores are
            in the order of the spec's classes.
        item: how an image stands in the list, with `"$image"` in place of the image.

    Raises:
        InputError: `body` or `item` has no place, or more than one, for the images, or there is
            neither a path to scores nor to labels (InputTypeError: a path is no string).
    """

    body: Any
    scores: str | None = None
    labels: str | None = None
    item: Any = IMAGE

    def __post_init__(self) -> None:
        for path in (self.scores, self.labels):
            if not isinstance(path, (str, type(None))):
                raise InputTypeError(
                    "JSONMapping: scores and labels must be paths; "
                    f"got {self.scores!r}, {self.labels!r}"
                )
        if self.scores is None and self.labels is None:
            raise InputError("JSONMapping: give the path to the scores, to the labels, or to both")
        single, many = _count(self.body, IMAGE), _count(self.body, IMAGES)
        if single + many != 1:
            raise InputError(
                f"JSONMapping: body must hold either {IMAGES!r} or {IMAGE!r}, once; "
                f"it holds {single + many}"
            )
        if _count(self.item, IMAGE) != 1:
            raise InputError(
                f"JSONMapping: item must hold {IMAGE!r} once; it holds {_count(self.item, IMAGE)}"
            )

    @property
    def single(self) -> bool:
        """Return True if a request holds one image."""
        return _count(self.body, IMAGE) == 1

    def request(self, images: list[Any]) -> Any:
        """Return the body of a request for images that are JSON values already."""
        items = [_put(self.item, IMAGE, image) for image in images]
        return _put(self.body, IMAGE, items[0]) if self.single else _put(self.body, IMAGES, items)


MAPPINGS = {
    # TensorFlow Serving's REST API, POST .../v1/models/NAME:predict, with images [H, W, C].
    "tf_serving": JSONMapping(body={"instances": IMAGES}, scores="predictions"),
    # The same with image files as the input.
    "tf_serving_files": JSONMapping(
        body={"instances": IMAGES}, scores="predictions", item={"b64": IMAGE}
    ),
    # A Hugging Face image-classification endpoint: a request holds one file, the answer is a list
    # of labels with their scores.
    "huggingface": JSONMapping(body={"inputs": IMAGE}, scores="*.score", labels="*.label"),
}


class JSONBlackBox(ServiceBlackBox):
    """A black box behind a service that takes images in JSON by POST and answers JSON.

    Args:
        url: URL to POST to.
        spec: what is known of the API. `layout`, `dtype` and `encoding` say how an image is
            written. If the answer holds labels, `class_names` say which class each one is.
        mapping: where images and scores are: a `JSONMapping`, the name of one of `MAPPINGS`, or a
            mapping of the fields of `JSONMapping`.
        budget, in_flight, images_per_second, requests_per_second: as for `ServiceBlackBox`.
        connection: further options, those of `ConnectionOptions`.

    Raises:
        InputError: an argument has a wrong value.
    """

    def __init__(
        self,
        url: str,
        spec: APISpec,
        mapping: JSONMapping | Mapping[str, Any] | str,
        *,
        budget: Budget | None = None,
        in_flight: int = 4,
        images_per_second: float | None = None,
        requests_per_second: float | None = None,
        **connection: Any,
    ) -> None:
        super().__init__(
            spec,
            budget=budget,
            in_flight=in_flight,
            images_per_second=images_per_second,
            requests_per_second=requests_per_second,
        )
        self._mapping = _mapping(self.name, mapping)
        if self._mapping.scores is None and not spec.labels_only:
            raise InputError(
                f"{self.name}: the mapping has a path to labels only, but the spec's scores_kind "
                f"is {spec.scores_kind!r}; give the path to the scores, or set scores_kind='labels'"
            )
        self._client = HTTPClient(self.name, url, in_flight, ConnectionOptions(**connection))
        if self._mapping.single:
            self._max_batch = 1

    def release(self) -> None:
        """Close idle connections."""
        self._client.release()

    def _request(self, images: Tensor, attempt: Attempt) -> Tensor:
        spec, client = self._spec, self._client
        if spec.encoding == "raw":
            content = wire_array(images, spec).tolist()
        else:
            content = [base64.b64encode(file).decode() for file in wire_files(images, spec)]
        body = json.dumps(self._mapping.request(content)).encode()
        response = client.post(
            "",
            body,
            {"Content-Type": "application/json"},
            attempt,
            most_bytes=self._most_bytes(len(images)),
        )
        if response.status in (400, 413):
            raise BatchTooLarge(
                f"{self.name}: the service answered {response.status}: {words_of(response.data)}"
            )
        client.check_status(response)
        answer = parse_json(self.name, response.data)
        with reading(self.name, "the answer holds no scores that can be read", response.data):
            if spec.labels_only:
                return self._labels(answer, len(images))
            assert self._mapping.scores is not None  # checked when the box was made
            scores = torch.from_numpy(self._numbers(self._find(answer, self._mapping.scores)))
            if self._mapping.labels is None:
                return scores
            labels = np.array(self._find(answer, self._mapping.labels))
            return place_labels(
                self.name, spec, scores, labels[None] if labels.ndim == 1 else labels
            )

    def _labels(self, answer: Any, n_images: int) -> Tensor:
        """Return the labels `[n_images]` in an answer, or scores in the order of the classes.

        Where the answer gives an image several labels with their scores, the label with the highest
        score counts.
        """
        mapping, spec = self._mapping, self._spec
        path = mapping.scores if mapping.labels is None else mapping.labels
        assert path is not None  # checked by the mapping
        found = self._find(answer, path)
        labels = np.array(found)
        # An answer for a single image may have no axis for the images.
        labels = labels.reshape(n_images, -1) if labels.size == n_images else labels
        labels = labels[None] if labels.ndim == 1 else labels
        if mapping.labels is None and labels.shape != (n_images, 1):
            return torch.from_numpy(self._numbers(found))
        if mapping.scores is not None and mapping.labels is not None and labels.shape[1:] != (1,):
            scores = self._numbers(self._find(answer, mapping.scores))
            if scores.shape != labels.shape:
                raise BadAnswer(
                    f"{self.name}: scores and labels must both be [N, k]; "
                    f"got {list(scores.shape)} and {list(labels.shape)}"
                )
            labels = np.take_along_axis(labels, scores.argmax(1)[:, None], 1)
        if labels.shape != (n_images, 1) or labels.dtype.kind not in "iuU":
            raise BadAnswer(
                f"{self.name}: the path {path!r} must lead to one label for each of {n_images} "
                f"images, a class name or number; it leads to {shown(found)}"
            )
        return class_numbers(self.name, spec, labels)[:, 0]

    def _numbers(self, found: Any) -> np.ndarray[Any, Any]:
        try:
            scores = float32_array(found)
        except (OverflowError, RecursionError, TypeError, ValueError):
            scores = np.empty(0, np.float32)
        if scores.ndim == 1 and scores.size:
            scores = scores[None]  # of a single image
        if scores.ndim != 2:
            where = repr(self._mapping.scores)
            raise BadAnswer(
                f"{self.name}: the path {where} must lead to lists of numbers; "
                f"it leads to {shown(found)}"
            )
        return scores

    def _find(self, answer: Any, path: str) -> Any:
        try:
            return _follow(answer, path.split(".") if path else [])
        except (KeyError, IndexError, TypeError, ValueError):
            raise BadAnswer(
                f"{self.name}: there is no {path!r} in what the service answered: {shown(answer)}"
            ) from None


def _mapping(name: str, given: JSONMapping | Mapping[str, Any] | str) -> JSONMapping:
    if isinstance(given, JSONMapping):
        return given
    if isinstance(given, str):
        if given not in MAPPINGS:
            raise InputError(
                f"{name}: mapping must be one of {', '.join(MAPPINGS)}, or the fields of a "
                f"JSONMapping; got {given!r}"
            )
        return MAPPINGS[given]
    if not isinstance(given, Mapping):
        raise InputTypeError(
            f"{name}: mapping must be a JSONMapping, a mapping of its fields or a name; "
            f"got {type(given).__name__}"
        )
    try:
        return JSONMapping(**given)
    except TypeError as error:
        raise InputError(f"{name}: mapping takes body, scores, labels and item; {error}") from None
