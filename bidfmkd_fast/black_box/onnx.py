"""An ONNX file as a black box, run by onnxruntime (extra `onnx`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bidfmkd_fast.black_box.base import BlackBox
from bidfmkd_fast.black_box.ledger import Budget
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.black_box.v2 import V2Model
from bidfmkd_fast.black_box.v2_service import check_fields
from bidfmkd_fast.black_box.wire import wire_array
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.extras import not_installed

_DATATYPES = {"tensor(float)": "FP32", "tensor(uint8)": "UINT8", "tensor(float16)": "FP16", "tensor(double)": "FP64"}
_BATCH = 256  # images run at once: their activations should not outgrow the memory


class OnnxBlackBox(BlackBox):
    """An ONNX model as an API. Each call costs one request.

    Args:
        path: the `.onnx` file: one input of images, one output of scores.
        spec: what is known of the API: an `APISpec`, or some of its fields, the others being read from the file. A file
            does not tell `scores_kind`: logits unless given. Images are fitted to it (size, layout, normalisation,
            uint8) as for a service.
        budget: cap on what it may cost; None for no cap.
        providers: onnxruntime's execution providers, best first; None for the CPU.

    Raises:
        InputError: onnxruntime is not installed, the file is no such model, or it wants other images than the spec
            sends.
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
                raise InputError(f"{path}: the file does not tell {' and '.join(missing)}; give them in the spec")
            spec = APISpec(**values)
        if spec.encoding != "raw":
            raise InputError(f"{path}: an ONNX model takes raw arrays; got encoding {spec.encoding!r}")
        super().__init__(spec, budget=budget)
        model.check(spec)
        (output,) = model.wanted_outputs(spec)
        batch = model.max_batch or _BATCH

        def answer(images: Tensor) -> Tensor:  # the closure is the only way to the session, as in local.py
            answers = []
            for part in images.split(batch):
                array = wire_array(part, spec)
                if model.max_batch is not None:  # the file takes exactly so many
                    array = np.resize(array, (batch, *array.shape[1:]))
                answers.append(torch.from_numpy(session.run([output], {model.input_name: array})[0])[: len(part)])
            return torch.cat(answers)

        self._answer = answer

    def _score(self, images: Tensor) -> Tensor:
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
    try:
        return onnxruntime.InferenceSession(path, options, providers=list(providers or ["CPUExecutionProvider"]))
    except Exception as error:  # onnxruntime's errors share no base class
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"OnnxBlackBox: {path} cannot be loaded: {reason}") from None


def _describe(path: Path, session: Any) -> V2Model:
    """What the file tells, in the terms of the v2 protocol; a named dimension is -1."""

    def told(value: Any) -> dict[str, Any]:
        shape = [size if isinstance(size, int) else -1 for size in value.shape]
        return {"name": value.name, "datatype": _DATATYPES.get(value.type, value.type), "shape": shape}

    inputs, outputs = map(told, session.get_inputs()), map(told, session.get_outputs())
    model = V2Model.read(path.stem, {"inputs": list(inputs), "outputs": list(outputs)}, None)
    if len(model.shape) != 4:
        raise InputError(f"OnnxBlackBox: {path} must take images of four dimensions; it takes {list(model.shape)}")
    # A model exported with a fixed batch runs exactly that many at once.
    return V2Model(model.input_name, model.datatype, model.shape, model.outputs, max(0, model.shape[0]) or None)
