"""An ONNX file as a black box, run by onnxruntime (extra `onnx`)."""

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
from bidfmkd_fast.black_box.remote.v2 import check_fields, place_labels
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
_BATCH = 256  # images run at once: their activations should not outgrow the memory
_BAKED = (4, 8, 16, 32, 64, 128, 256)  # batches tried where a file takes neither one image nor two
_FATAL = 4  # the only level of onnxruntime's log: its errors come as exceptions as well


class OnnxBlackBox(BlackBox):
    """An ONNX model as an API. Each call costs one request, or one for every `spec.max_batch`
    images.

    A file whose images have a fixed number, stated or hidden in one of its nodes, is given that
    many at once, and the last ones are filled up. Scores are rounded to `decimals` and cut to
    `top_k`, as by any black box in this process.

    Args:
        path: the `.onnx` file: one input of images, one output of scores. Weights that it keeps in
            a file of their own are looked for beside it.
        spec: what is known of the API: an `APISpec`, or some of its fields, the others being read
            from the file. A file does not tell `scores_kind`: logits unless given. Images are
            fitted to it (size, layout, normalisation, uint8) as for a service.
        budget: cap on what it may cost; None for no cap.
        providers: onnxruntime's execution providers, best first; None for the CPU.

    Raises:
        InputError: onnxruntime is not installed, the file is no such model or fails, its weights
            are missing, or it wants other images than the spec sends.

    Warns:
        ServiceWarning: the file says that it takes any number of images, but takes one number only.
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
                    f"{path}: the file does not tell {' and '.join(missing)}; give them in the spec"
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

        def answer(
            images: Tensor,
        ) -> Tensor:  # the closure is the only way to the session, as in local.py
            answers = []
            for part in images.split(batch):
                array = wire_array(part, spec)
                if fixed is not None:
                    array = np.resize(array, (batch, *array.shape[1:]))
                scores, *labels = (given[: len(part)] for given in run(array))
                told = torch.from_numpy(scores)
                answers.append(place_labels(spec.name, spec, told, labels[0]) if labels else told)
            return torch.cat(answers)

        self._answer = answer

    def _ask(self, images: Tensor, n_requests: int) -> Tensor:
        return as_answered(super()._ask(images, n_requests), self._spec)

    def score(self, images: Tensor) -> Tensor:
        return self._answer(images)


def _session(path: Path, providers: Sequence[str] | None) -> Any:
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
        if missing := re.search(r'External data path does not exist: "([^"]*)"', reason):
            raise InputError(
                f"OnnxBlackBox: {path} keeps its weights in {missing[1]}, which is not there; copy both into one folder"
            ) from None
        raise InputError(f"OnnxBlackBox: {path} cannot be loaded: {reason}") from None


def _describe(path: Path, session: Any) -> V2Model:
    """What the file tells, in the terms of the v2 protocol; a named dimension is -1."""

    def told(value: Any) -> dict[str, Any]:
        shape = [size if isinstance(size, int) else -1 for size in value.shape]
        return {
            "name": value.name,
            "datatype": _DATATYPES.get(value.type, value.type),
            "shape": shape,
        }

    inputs, outputs = map(told, session.get_inputs()), map(told, session.get_outputs())
    model = V2Model.read(path.stem, {"inputs": list(inputs), "outputs": list(outputs)}, None)
    if len(model.shape) != 4:
        raise InputError(
            f"OnnxBlackBox: {path} must take images of four dimensions; it takes {list(model.shape)}"
        )
    return model


def _fixed_batch(path: Path, spec: APISpec, session: Any, run: Run) -> int | None:
    """Return the only number of images that the file takes at once; None where it takes any number.

    A file exported with one batch may say that the number is free while a node, such as a Reshape,
    holds it fixed. So it is run with one image and with two; where neither works, with the number
    that an output has, and a few others.
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
        if list(scores.shape) != wanted:
            failures[n_images] = (
                f"{spec.name}: the file must answer scores {wanted}; it answered {list(scores.shape)}"
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
            f"OnnxBlackBox: {path} takes exactly {fixed} images at once; got max_batch={spec.max_batch}"
        )
    if fixed != stated:
        message = f"{spec.name}: {path} says that it takes any number of images, but it takes exactly {fixed} at once"
        warnings.warn(message, ServiceWarning, stacklevel=3)
    return fixed


def _reason(error: Exception) -> str:
    """What onnxruntime says, on one line, without its prefix and the paths of its sources."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    return re.sub(r"/onnxruntime_src/\S+ ", "", text)[:400]
