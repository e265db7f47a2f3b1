"""Export a classifier to a file that runs without this package: ONNX, or torch.export's pt2.

Every file is loaded again and compared with the classifier before it gets its name, so that a file
that answers otherwise is never left behind.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.extras import not_installed
from bidfmkd_fast.files.atomic import check_writable, written_whole
from bidfmkd_fast.meta.deployed import INPUT, OUTPUT, about, check_steady, description
from bidfmkd_fast.seeds import torch_generator

if TYPE_CHECKING:
    from bidfmkd_fast.meta.classifier import Classifier

ABOUT = "bidfmkd_classifier.json"  # name of the JSON in both kinds of files
DESCRIPTION = "description.txt"
TOLERANCE = 1e-4  # by how much a probability of the file may differ from the classifier's
_BATCHES = (1, 7)  # sizes that are compared
_OPSET, _IR_VERSION = 18, 8  # ONNX 1.13: runtimes of 2023 and later read it
_FATAL = 4  # level of onnxruntime's log; its errors are raised as exceptions as well

Answer = Callable[[Tensor], Tensor]


def export_onnx(classifier: Classifier, path: Path, seed: int = 0) -> None:
    """Write the ONNX file `path`; see `Classifier.export_onnx`."""
    operation = "Classifier.export_onnx"
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise not_installed(operation, error.name, "export") from None

    program = _program(operation, classifier, path)
    with _explained(operation, "torch.onnx.export fails"):
        exported = torch.onnx.export(
            program,
            dynamo=True,
            dynamic_shapes=({0: "N"},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=_OPSET,
            verbose=False,
        )
        assert exported is not None
        model = exported.model_proto
    # Drop torch's notes on every node; they need a newer version of the format.
    graph = model.graph
    for part in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
        for item in part:
            item.ClearField("metadata_props")
    model.ir_version = _IR_VERSION
    model.doc_string = description(classifier)
    onnx.helper.set_model_props(
        model, {ABOUT: json.dumps(about(classifier)), DESCRIPTION: description(classifier)}
    )

    def load(name: str) -> Answer:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = _FATAL
        session = onnxruntime.InferenceSession(name, options, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    content = model.SerializeToString(deterministic=True)
    _write(operation, classifier, path, content, load, seed)


def export_torch(classifier: Classifier, path: Path, seed: int = 0) -> None:
    """Write the file `path` of torch.export; see `Classifier.export_torch`."""
    operation = "Classifier.export_torch"
    program = _program(operation, classifier, path)
    buffer = io.BytesIO()
    with _explained(operation, "torch.export.save fails"):
        extra = {ABOUT: json.dumps(about(classifier)), DESCRIPTION: description(classifier)}
        torch.export.save(program, buffer, extra_files=extra)

    def load(name: str) -> Answer:
        return torch.export.load(io.BytesIO(Path(name).read_bytes())).module()

    _write(operation, classifier, path, buffer.getvalue(), load, seed)


def _program(operation: str, classifier: Classifier, path: Path) -> torch.export.ExportedProgram:
    """Return the classifier as torch.export traces it, on the CPU, for any number of images.

    Raises:
        InputError: the classifier is transductive, its module cannot be traced, or `path` exists
            or cannot be written.
    """
    check_steady(operation, classifier)
    if path.exists():
        raise InputError(f"{operation}: {path} exists already; give another file or remove it")
    check_writable(path)
    module = copy.deepcopy(classifier.as_module()).cpu().float().requires_grad_(False)
    example = torch.zeros(2, *classifier.image_shape)
    sizes = ({0: torch.export.Dim("N", min=1)},)
    with _explained(operation, f"torch.export cannot trace {type(classifier.module).__name__}"):
        program = torch.export.export(module.eval(), (example,), dynamic_shapes=sizes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names files of this machine
    return program


def _write(
    operation: str,
    classifier: Classifier,
    path: Path,
    content: bytes,
    load: Callable[[str], Answer],
    seed: int,
) -> None:
    """Write `content` to the file `path`, unless what `load` makes of it answers otherwise."""
    with written_whole(path) as file:
        file.write(content)
        file.truncate()
        file.flush()
        with _explained(operation, "the exported file cannot be loaded, so none is left"):
            answer = load(str(file.name))
        for size in _BATCHES:
            _compare(operation, classifier, answer, size, seed)


@torch.no_grad()
def _compare(operation: str, classifier: Classifier, answer: Answer, size: int, seed: int) -> None:
    """Raise an InputError unless probabilities and labels for random images are the classifier's.

    A label may differ only where its probability is within the tolerance of the best.
    """
    generator = torch_generator(seed, "export", size)
    shape = classifier.image_shape
    brightness = torch.rand(size, shape[0], 1, 1, generator=generator)
    images = torch.rand(size, *shape, generator=generator) * brightness
    like = next(classifier.module.parameters())
    wanted = classifier.predict_proba(images.to(like)).float().cpu()
    with _explained(operation, f"the exported file fails on a batch of {size}, so none is left"):
        got = answer(images)
    if got.shape != wanted.shape:
        problem = f"it answers {list(got.shape)} instead of {list(wanted.shape)}"
    else:
        worst = (got - wanted).abs().max().item()
        chosen = wanted.gather(1, got.argmax(1, keepdim=True)).squeeze(1)
        if worst <= TOLERANCE and bool((wanted.amax(1) - chosen <= TOLERANCE).all()):
            return
        problem = f"a probability differs by {worst:.2g}, more than {TOLERANCE:g}"
    raise InputError(
        f"{operation}: the exported file answers a batch of {size} random images otherwise than "
        f"the classifier: {problem}; no file is left; try other versions of torch, onnxscript and "
        "onnxruntime, or the other kind of file"
    )


@contextmanager
def _explained(operation: str, problem: str) -> Iterator[None]:
    """Turn any failure of an exporter into an InputError of one line; silence its notes."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # torch, onnxscript and onnxruntime share no base class
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{operation}: {problem}: {reason}") from error
    finally:
        log.setLevel(level)
