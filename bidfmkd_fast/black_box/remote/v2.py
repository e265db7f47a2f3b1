"""Share between HTTP and gRPC what the v2 protocol has in common: metadata, spec, scores."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bidfmkd_fast.black_box.answers import place
from bidfmkd_fast.black_box.remote.reading import float32_array, reading, short
from bidfmkd_fast.black_box.remote.service import ServiceBlackBox
from bidfmkd_fast.black_box.remote.v2_messages import Array, V2Model, per_image
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import BadAnswer, InputError, InputTypeError


class V2BlackBox(ServiceBlackBox):
    """A model behind a server of the v2 protocol.

    Subclasses define how metadata are read and requests are sent. With a whole `APISpec` nothing is
    sent before the first call, so the server may be down when the box is made. Otherwise the
    missing fields are read from the server at once.
    """

    def _start(self, model: str, spec: APISpec | Mapping[str, Any] | None, **options: Any) -> None:
        """Make the spec and the box; a subclass calls this as soon as it can read metadata."""
        self._model_lock = threading.Lock()
        self._model: V2Model | None = None
        if not isinstance(spec, APISpec):
            spec = self._complete(model, {} if spec is None else spec)
        super().__init__(spec, **options)

    @abstractmethod
    def _read_model(self) -> V2Model:
        """Ask the server for the model's metadata."""

    def _complete(self, model: str, known: Mapping[str, Any]) -> APISpec:
        """Return the spec with the fields `known`, the others read from the server."""
        check_fields(model, known)
        known = {"name": model, **known}
        # There is no spec yet, so this runs before super().__init__. Nobody outside ever sees a box
        # without a spec.
        self._model = self._read_model()
        found = self._model.fields()
        if (
            "image_shape" in known
            and "image_shape" in found
            and tuple(known["image_shape"]) != found["image_shape"]
        ):
            found["server_shape"] = found["image_shape"]
        values = {**found, **known}
        for field in ("n_classes", "image_shape"):
            if field not in values:
                raise InputError(f"{model}: the server does not state {field}; give it in the spec")
        return APISpec(**values)

    def _batch(self) -> int:
        self._served()  # reads the batch limit
        return super()._batch()

    def _served(self) -> V2Model:
        """Return the model's metadata, read once, after a check that the spec fits them."""
        with self._model_lock:
            if self._model is None:
                self._model = self._read_model()
            model = self._model
        model.check(self._spec)
        if model.max_batch is not None and (
            self._max_batch is None or self._max_batch > model.max_batch
        ):
            self._max_batch = model.max_batch
        return model

    def _scores(self, tensors: Mapping[str, Array], outputs: tuple[str, ...]) -> Tensor:
        """Return the scores `[N, n_classes]`, or the labels, from the tensors of an answer."""
        missing = [name for name in outputs if name not in tensors]
        if missing:
            held = short(", ".join(tensors))
            raise BadAnswer(
                f"{self.name}: the answer must hold {', '.join(outputs)}; it holds {held}"
            )
        given = per_image(tensors[outputs[0]])
        if self._spec.labels_only and given.dtype.kind != "f":
            with reading(self.name, f"{outputs[0]} must be labels [N]"):
                return class_numbers(self.name, self._spec, given)
        with reading(self.name, f"{outputs[0]} must be scores [N, n_classes]"):
            scores = torch.from_numpy(float32_array(given))
            if len(outputs) == 1:
                return scores
            return place_labels(self.name, self._spec, scores, per_image(tensors[outputs[1]]))


def check_fields(name: str, known: object) -> None:
    """Raise InputError unless `known` maps names of `APISpec` fields to values."""
    if not isinstance(known, Mapping):
        raise InputTypeError(
            f"{name}: spec must be an APISpec or a mapping of its fields; "
            f"got {type(known).__name__}"
        )
    unknown = set(known) - {field.name for field in fields(APISpec)}
    if unknown:
        raise InputError(
            f"{name}: spec has no field {', '.join(sorted(map(str, unknown)))}; see APISpec"
        )


def place_labels(name: str, spec: APISpec, scores: Tensor, labels: Any) -> Tensor:
    """Return scores `[N, n_classes]`: `scores` `[N, k]` at the classes `labels` `[N, k]`, else 0.

    Labels are class numbers or class names.

    Raises:
        BadAnswer: shapes differ, k is wrong, a label is not in the spec, or a label comes twice.
    """
    labels = np.asarray(labels)
    if scores.ndim != 2 or tuple(scores.shape) != labels.shape:
        raise BadAnswer(
            f"{name}: scores and labels must both be [N, k]; "
            f"got {list(scores.shape)} and {list(labels.shape)}"
        )
    wanted = spec.n_classes if spec.top_k is None else spec.top_k
    if scores.shape[1] != wanted:
        kind = "all n_classes" if spec.top_k is None else "top_k"
        raise BadAnswer(
            f"{name}: the API must answer {kind} = {wanted} classes; it answered {scores.shape[1]}"
        )
    numbers = class_numbers(name, spec, labels).numpy()
    if numbers.size and not (numbers.min() >= 0 and numbers.max() < spec.n_classes):
        raise BadAnswer(
            f"{name}: labels must be from 0 to {spec.n_classes - 1}; "
            f"got {numbers.min()} to {numbers.max()}"
        )
    if (np.diff(np.sort(numbers, axis=1), axis=1) == 0).any():
        raise BadAnswer(f"{name}: an image's labels must all differ; a label came twice")
    return place(scores, torch.from_numpy(numbers), spec.n_classes)


def class_numbers(name: str, spec: APISpec, labels: Array) -> Tensor:
    """Return labels, class numbers or class names, as an int64 tensor of class numbers.

    Whether numbers are in range is left to the caller.

    Raises:
        BadAnswer: a name is not in the spec.
    """
    if labels.dtype.kind in "iu":
        return torch.from_numpy(labels.astype(np.int64))
    index = {label: number for number, label in enumerate(spec.names)}
    unknown = sorted({str(label) for label in labels.ravel()} - set(index))
    if unknown:
        raise BadAnswer(
            f"{name}: labels must be among the spec's class_names; got {short(', '.join(unknown))}"
        )
    return torch.from_numpy(np.vectorize(index.__getitem__, otypes=[np.int64])(labels.astype(str)))
