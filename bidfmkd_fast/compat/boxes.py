"""Make a black box of another library's classifier in one line.

None of these libraries is imported: their objects are used by documented attributes. Every function
takes `budget` and, as further keywords, any field of `APISpec` (`name`, `class_names`, `decimals`,
`max_batch`, `price_per_1000`, `data_set`, ...). A field that is given replaces the one that is read
from the object. The boxes check and count every call as any `BlackBox` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from bidfmkd_fast.black_box import Budget, FunctionBlackBox
from bidfmkd_fast.compat.box_spec import as_floats, look_for, shape_of, spec_of
from bidfmkd_fast.compat.sklearn_box import from_sklearn
from bidfmkd_fast.compat.torch_box import from_torch
from bidfmkd_fast.errors import InputError

__all__ = [
    "from_art",
    "from_foolbox",
    "from_hugging_face",
    "from_keras",
    "from_sklearn",
    "from_torch",
]

Array = np.ndarray[Any, Any]
Shape = Sequence[int]


def from_art(
    classifier: Any,
    image_shape: Shape | None = None,
    *,
    scores_kind: str = "logits",
    budget: Budget | None = None,
    **spec: Any,
) -> FunctionBlackBox:
    """Return a box that asks a classifier of the Adversarial Robustness Toolbox.

    ART does not say whether `predict` gives logits or probabilities. If `scores_kind` is wrong, the
    first answers are refused or warned of.

    Args:
        classifier: has `predict(x)` for float32 arrays, `input_shape`, `nb_classes`, `clip_values`
            (which become `input_range`) and `channels_first`.
        image_shape: `(C, H, W)`; only for a classifier whose `input_shape` has a single axis, as
            those of scikit-learn have. It gets flattened images.
        scores_kind: what `predict` gives.
        budget: cap on what the box may cost.
        **spec: fields of `APISpec`.

    Raises:
        InputError: `classifier` lacks one of these, or a field is wrong.
    """
    op = "from_art"
    look_for(op, "an ART classifier", classifier, "predict", "input_shape", "nb_classes")
    given = tuple(int(size) for size in classifier.input_shape)
    derived: dict[str, Any] = {"n_classes": int(classifier.nb_classes)}
    if len(given) == 3:
        derived["layout"] = "NCHW" if getattr(classifier, "channels_first", True) else "NHWC"
        derived["image_shape"] = given if derived["layout"] == "NCHW" else (given[2], *given[:2])
        if image_shape is not None and shape_of(op, image_shape) != derived["image_shape"]:
            raise InputError(
                f"{op}: the classifier takes images {derived['image_shape']}; got "
                f"image_shape={shape_of(op, image_shape)}; for another size give server_shape"
            )
    elif image_shape is None:
        raise InputError(
            f"{op}: the classifier's input_shape is {given}, not an image's; give image_shape"
        )
    else:
        derived["image_shape"] = shape_of(op, image_shape)
    clip = getattr(classifier, "clip_values", None)
    if clip is not None:
        derived["input_range"] = (float(np.min(clip[0])), float(np.max(clip[1])))
    elif "input_range" not in spec:
        raise InputError(
            f"{op}: the classifier has no clip_values; give input_range=(low, high) of its images"
        )

    def function(images: Array) -> Any:
        rows = images if len(given) == 3 else images.reshape(len(images), -1)
        return classifier.predict(as_floats(rows, whole))

    whole = spec_of(op, classifier, {**derived, "scores_kind": scores_kind}, spec)
    return FunctionBlackBox(function, whole, budget=budget, as_numpy=True)


def from_foolbox(
    model: Any,
    image_shape: Shape,
    n_classes: int,
    *,
    budget: Budget | None = None,
    **spec: Any,
) -> FunctionBlackBox:
    """Return a box that asks a Foolbox model of torch (`PyTorchModel`).

    Args:
        model: callable for torch tensors, with `bounds`, which become `input_range`. Images go to
            `model.device` if it has one. It gives logits, or say otherwise with `scores_kind`.
        image_shape: `(C, H, W)` of its images.
        n_classes: number of its scores.
        budget: cap on what the box may cost.
        **spec: fields of `APISpec`.

    Raises:
        InputError: `model` lacks one of these, or a field is wrong.
    """
    op = "from_foolbox"
    look_for(op, "a Foolbox model", model, "bounds", "__call__")
    low, high = (float(end) for end in model.bounds)
    derived = {
        "n_classes": n_classes,
        "image_shape": shape_of(op, image_shape),
        "input_range": (low, high),
        "layout": "NHWC" if getattr(model, "data_format", "") == "channels_last" else "NCHW",
    }
    device = getattr(model, "device", None)

    def function(images: Tensor) -> Any:
        answer = model(images if device is None else images.to(device))
        return getattr(answer, "raw", answer)  # an eagerpy tensor holds its own as `raw`

    return FunctionBlackBox(function, spec_of(op, model, derived, spec), budget=budget)


def from_keras(model: Any, *, budget: Budget | None = None, **spec: Any) -> FunctionBlackBox:
    """Return a box that asks a Keras model by `predict(array, verbose=0)`.

    Args:
        model: has `predict`, `input_shape` `(None, H, W, C)` and `output_shape` `(None, n)`. Scores
            are probabilities if the last layer is a softmax, logits if it is linear; otherwise give
            `scores_kind`. Images are 0 to 255 if a `Rescaling` layer divides them, 0 to 1 if none
            does; otherwise give `input_range`.
        budget: cap on what the box may cost.
        **spec: fields of `APISpec`.

    Raises:
        InputError: `model` lacks one of these, has several inputs, or a field is wrong or missing.
    """
    op = "from_keras"
    look_for(op, "a Keras model", model, "predict", "input_shape", "output_shape")
    takes, gives = model.input_shape, model.output_shape
    if len(takes) != 4 or len(gives) != 2 or not isinstance(takes[-1], (int, type(None))):
        raise InputError(
            f"{op}: the model must map one input (None, H, W, C) to one output (None, n_classes); "
            f"it maps {takes} to {gives}"
        )
    first = takes[1] in (1, 3) and takes[3] not in (1, 3)
    shape = takes[1:] if first else (takes[3], takes[1], takes[2])
    derived = {"layout": "NCHW" if first else "NHWC", "image_shape": shape, "n_classes": gives[1]}
    derived = {key: value for key, value in derived.items() if value is not None}
    if None in shape:
        del derived["image_shape"]
    layers = list(getattr(model, "layers", ()))
    if any(
        type(layer).__name__ == "Rescaling" and np.max(np.abs(getattr(layer, "scale", 1))) < 0.1
        for layer in _with_inner(layers)
    ):
        derived["input_range"] = (0.0, 255.0)
    kind = _keras_kind(layers[-1]) if layers else None
    if kind is not None:
        derived["scores_kind"] = kind
    elif "scores_kind" not in spec:
        raise InputError(
            f"{op}: the model's last layer does not show which scores it gives; give scores_kind, "
            "such as 'logits' or 'probabilities'"
        )
    whole = spec_of(op, model, derived, spec)
    return FunctionBlackBox(
        lambda images: model.predict(as_floats(images, whole), verbose=0),
        whole,
        budget=budget,
        as_numpy=True,
    )


def _with_inner(layers: Sequence[Any]) -> Iterator[Any]:
    """Yield layers and the layers inside of them: a whole model may be a layer of another."""
    for layer in layers:
        yield layer
        yield from _with_inner(getattr(layer, "layers", ()))


def _keras_kind(layer: Any) -> str | None:
    """Return the kind of scores that the last layer of a Keras model gives; None if unknown."""
    activation = getattr(getattr(layer, "activation", None), "__name__", type(layer).__name__)
    return {"softmax": "probabilities", "linear": "logits"}.get(activation.lower())


def from_hugging_face(
    pipeline: Any, image_shape: Shape, *, budget: Budget | None = None, **spec: Any
) -> FunctionBlackBox:
    """Return a box that asks a Hugging Face pipeline of image classification.

    The pipeline gets PIL images, so images lose what 8 bits lose.

    Args:
        pipeline: called as `pipeline(list of images, top_k=n)`, gives one list of `{"label",
            "score"}` per image. The classes are those of `pipeline.model.config.id2label`. With
            `scores_kind="top_k", top_k=k` it is asked for k classes.
        image_shape: `(C, H, W)` of the images that the box gets, C 1 or 3. The pipeline resizes.
        budget: cap on what the box may cost.
        **spec: fields of `APISpec`, except `dtype` and `layout`.

    Raises:
        InputError: `pipeline` lacks one of these, or a field is wrong.
    """
    from PIL import Image

    op = "from_hugging_face"
    id2label = getattr(getattr(getattr(pipeline, "model", None), "config", None), "id2label", None)
    if not callable(pipeline) or not isinstance(id2label, Mapping) or not id2label:
        raise InputError(
            f"{op}: pipeline must be a pipeline of image classification, which can be called and "
            f"has model.config.id2label; got a {type(pipeline).__name__} without them"
        )
    for field in ("dtype", "layout"):
        if field in spec:
            raise InputError(f"{op}: the pipeline gets PIL images; leave {field} out")
    try:
        names = tuple(str(id2label[key]) for key in sorted(id2label, key=int))
    except (TypeError, ValueError):
        raise InputError(
            f"{op}: model.config.id2label must have class numbers as its keys; got "
            f"{list(id2label)[:5]}"
        ) from None
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"{op}: the pipeline answers by name, and several classes are called {twice[:5]}; give "
            "each a name of its own in pipeline.model.config.id2label"
        )
    derived = {
        "n_classes": len(names),
        "image_shape": shape_of(op, image_shape),
        "class_names": names,
        "scores_kind": "probabilities",
        "dtype": "uint8",
    }
    whole = spec_of(op, pipeline, derived, spec)
    if whole.wire_shape[0] not in (1, 3):
        raise InputError(f"{op}: images must have 1 or 3 channels; got {whole.wire_shape[0]}")
    n_asked = whole.n_classes if whole.top_k is None else whole.top_k

    def function(images: Array) -> Any:
        pixels = images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)
        pictures = [Image.fromarray(np.ascontiguousarray(each)) for each in pixels]
        return pipeline(pictures, top_k=n_asked)

    return FunctionBlackBox(function, whole, budget=budget, as_numpy=True)
