"""Serve an ONNX file as a black box, run by onnxruntime (extra `onnx`)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bidfmkd_fast.black_box.answers import as_answered
from bidfmkd_fast.black_box.base import BlackBox
from bidfmkd_fast.black_box.budget import Budget
from bidfmkd_fast.black_box.remote.v2 import check_fields, class_numbers, place_labels
from bidfmkd_fast.black_box.remote.v2_messages import V2Model
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.black_box.wire import wire_array
from bidfmkd_fast.errors import BadAnswer, InputError, ServiceWarning
from bidfmkd_fast.extras import not_installed

Array = np.ndarray[Any, Any]
Run = Callable[[Array], list[Array]]

_DATATYPES = {
    "tensor(float)": "FP32",
    "tensor(uint8)": "UINT8",
    "tensor(float16)": "FP16",
    "tensor(double)": "FP64",
}
_BATCH = 256  # images run at once, so that their activations fit into memory
# Batch sizes tried if a file runs with neither one image nor two.
_BAKED = (4, 8, 16, 32, 64, 128, 256)
_FATAL = 4  # level of onnxruntime's log; its errors are raised as exceptions as well
# What onnxruntime says if the file of the weights is not there: today, and in 1.23 (Python 3.10).
_WEIGHTS_MISSING = re.compile(
    r'External data path does not exist: "([^"]*)"'
    r"|cannot get file size: No such file or directory \[([^\]]*)\]"
)


class OnnxBlackBox(BlackBox):
    """An ONNX model served as an API.

    A call costs one request, or one per `spec.max_batch` images. If the file takes a fixed number
    of images, which it states or hides in one of its nodes, it gets that many at once, and the last
    batch is filled up. Scores are rounded to `decimals` and cut to `top_k`, as by any black box in
    this process.

    Args:
        path: the `.onnx` file, with one input of images and one output of scores. External weights
            must lie beside it.
        spec: what is known of the API: an `APISpec`, or some of its fields; the others are read
            from the file. A file does not state `scores_kind`, which is logits unless given. Images
            are converted to what the file wants (size, layout, normalisation, uint8) as for a
            service.
        budget: cap on what it may cost; None for no cap.
        providers: onnxruntime's execution providers, best first; None for the CPU.

    Raises:
        InputError: onnxruntime is not installed, the file is no such model or fails, its weights
            are missing, or it wants other images than the spec sends.

    Warns:
        ServiceWarning: the file says that it takes any number of images, but it runs with one
            number only.
    """

    def __init__(
        self,
        path: str | Path,
        spec: APISpec | Mapping[str, Any] | None = None,
        *,
        budget: Budget | None = None,
        providers: Sequence[str] | None = None,
    ) -> None:
        path = Path(path)
        session = _session(path, providers)
        model = _describe(path, session)
        if not isinstance(spec, APISpec):
            known = {} if spec is None else spec
            check_fields(path.stem, known)
            values = {"name": path.stem, **model.fields(), **known}
            if missing := [field for field in ("n_classes", "image_shape") if field not in values]:
                raise InputError(
                    f"{path}: the file does not state {' and '.join(missing)}; set it in the spec"
                )
            spec = APISpec(**values)
        if spec.encoding != "raw":
            raise InputError(
                f"{path}: an ONNX model takes raw arrays; got encoding {spec.encoding!r}"
            )
        super().__init__(spec, budget=budget)
        model.check(spec)
        outputs = model.wanted_outputs(spec)

        def run(array: Array) -> list[Array]:
            try:
                answers: list[Array] = session.run(list(outputs), {model.input_name: array})
            except Exception as error:  # onnxruntime's errors share no base class
                raise BadAnswer(
                    f"{spec.name}: onnxruntime failed on {len(array)} images: {_reason(error)}"
                ) from None
            return answers

        fixed = _fixed_batch(path, spec, session, run)
        batch = fixed or _BATCH

        # The closure is the only way to the session: no attribute holds it.
        def answer(images: Tensor) -> Tensor:
            answers = []
            for part in images.split(batch):
                array = wire_array(part, spec)
                if fixed is not None:
                    array = np.resize(array, (batch, *array.shape[1:]))
                array_of_scores, *labels = (output[: len(part)] for output in run(array))
                if spec.labels_only and array_of_scores.dtype.kind != "f":
                    answers.append(class_numbers(spec.name, spec, array_of_scores))
                    continue
                scores = torch.from_numpy(array_of_scores)
                if labels:
                    scores = place_labels(spec.name, spec, scores, labels[0])
                answers.append(scores)
            return torch.cat(answers)

        self._answer = answer

    def _ask(self, images: Tensor, n_requests: int) -> Tensor:
        return as_answered(super()._ask(images, n_requests), self._spec)

    def score(self, images: Tensor) -> Tensor:
        """Run the file on the images, in batches of the size that it takes."""
        return self._answer(images)


def _session(path: Path, providers: Sequence[str] | None) -> Any:
    """Load the file; raise InputError if that fails."""
    try:
        import onnxruntime
    except ImportError:
        raise not_installed("OnnxBlackBox", "onnxruntime", "onnx") from None
    if not path.is_file():
        raise InputError(f"OnnxBlackBox: there is no file {path}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = _FATAL
    try:
        return onnxruntime.InferenceSession(
            path, options, providers=list(providers or ["CPUExecutionProvider"])
        )
    except Exception as error:  # onnxruntime's errors share no base class
        reason = _reason(error)
        if missing := _WEIGHTS_MISSING.search(reason):
            raise InputError(
                f"OnnxBlackBox: {path} keeps its weights in {missing[1] or missing[2]}, which is "
                "not there; "
                "copy both into one folder"
            ) from None
        raise InputError(f"OnnxBlackBox: {path} cannot be loaded: {reason}") from None


def _describe(path: Path, session: Any) -> V2Model:
    """Describe the file in the terms of the v2 protocol; a dimension without a size is -1."""

    def described(value: Any) -> dict[str, Any]:
        shape = [size if isinstance(size, int) else -1 for size in value.shape]
        return {
            "name": value.name,
            "datatype": _DATATYPES.get(value.type, value.type),
            "shape": shape,
        }

    inputs, outputs = map(described, session.get_inputs()), map(described, session.get_outputs())
    model = V2Model.read(path.stem, {"inputs": list(inputs), "outputs": list(outputs)}, None)
    if len(model.shape) != 4:
        raise InputError(
            f"OnnxBlackBox: {path} must take images of four dimensions; "
            f"it takes {list(model.shape)}"
        )
    return model


def _fixed_batch(path: Path, spec: APISpec, session: Any, run: Run) -> int | None:
    """Return the only number of images that the file takes at once; None if it takes any number.

    A file may state that the number is free while a node, such as a Reshape, fixes it to the batch
    that the file was exported with. So the file is run with one image and with two; if neither
    works, with the number that an output states, and with a few others.
    """
    stated = session.get_inputs()[0].shape[0]
    image = wire_array(spec.from_unit(torch.full((1, *spec.image_shape), 0.5)), spec)
    failures: dict[int, str] = {}

    def works(n_images: int) -> bool:
        try:
            scores = run(np.repeat(image, n_images, axis=0))[0]
        except BadAnswer as error:
            failures[n_images] = str(error)
            return False
        wanted = [n_images, spec.n_classes if spec.top_k is None else scores.shape[-1]]
        if spec.labels_only and scores.shape in ((n_images,), (n_images, 1)):
            wanted = list(scores.shape)
        if list(scores.shape) != wanted:
            failures[n_images] = (
                f"{spec.name}: the file must answer scores {wanted}; "
                f"it answered {list(scores.shape)}"
            )
        return n_images not in failures

    if isinstance(stated, int) and stated > 0:
        tried = [stated]
    else:
        alone, together = works(1), works(2)
        if alone and together:
            return None
        hidden = [output.shape[0] for output in session.get_outputs() if output.shape]
        tried = (
            [1]
            if alone
            else [2]
            if together
            else [n for n in (*hidden, *_BAKED) if isinstance(n, int) and n > 2]
        )
    fixed = next((n for n in dict.fromkeys(tried) if n not in failures and works(n)), None)
    if fixed is None:
        raise InputError(f"OnnxBlackBox: {path} does not run: {next(iter(failures.values()))}")
    if spec.max_batch is not None and spec.max_batch < fixed:
        raise InputError(
            f"OnnxBlackBox: {path} takes exactly {fixed} images at once; "
            f"got max_batch={spec.max_batch}; leave it out or raise it"
        )
    if fixed != stated:
        message = (
            f"{spec.name}: {path} says that it takes any number of images, but it takes exactly "
            f"{fixed} at once"
        )
        warnings.warn(message, ServiceWarning, stacklevel=3)
    return fixed


def _reason(error: Exception) -> str:
    """Return an error of onnxruntime on one line, without its prefix and the paths of sources."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    return re.sub(r"/onnxruntime_src/\S+ ", "", text)[:400]
