"""Write the file of a recovered set, and check it when it is read."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from bidfmkd_fast.black_box import APISpec, BlackBox
    from bidfmkd_fast.recovery import Recovered
    from bidfmkd_fast.training.run import RecoveredSet

SUPPORT, QUERY = PARTS = ("support", "query")
_RECORD = ("step", "loss", "best_loss", "matched", "queries")
_TENSORS = ("images", "labels", "scores", "losses", "history", "state")
_HEADER = 4096  # bytes, more than tensor names, shapes and the checksum take


def save_recovered(recovered_set: RecoveredSet, file: Path) -> None:
    """Write a recovered set as safetensors: `images` (unit range), `labels`, `scores`, `losses`,
    `history` and `state`.

    `history` float64 `[steps, 5]` has the columns `step`, `loss`, `best_loss`, `matched` and
    `queries`. `state` is `[complete, mu]`, with mu (the step length) NaN if no step was taken.
    Raises InputError if the file cannot be written.
    """
    recovered = recovered_set.recovered
    history = [[record[name] for name in _RECORD] for record in recovered.history]
    mu = math.nan if recovered.mu is None else recovered.mu
    tensors = {
        "images": recovered.images,
        "labels": recovered.labels,
        "scores": recovered.scores,
        "losses": recovered.losses,
        "history": torch.tensor(history, dtype=torch.float64).reshape(-1, len(_RECORD)),
        "state": torch.tensor([recovered.complete, mu], dtype=torch.float64),
    }
    write_tensors(
        file,
        tensors,
        {
            "api": recovered_set.api_name,
            "set": recovered_set.part,
            "class_names": json.dumps(recovered_set.class_names),
        },
    )


def read_recovered(
    file: Path, index: int, part: str, api: BlackBox, n_per_class: int
) -> RecoveredSet:
    """Read what `save_recovered` wrote.

    Raises:
        InputError: the file is damaged, does not hold a set of `n_per_class` images for each class
            of `api`, or is the set of another API. The message names the file.
    """
    from bidfmkd_fast.training.run import RecoveredSet

    spec = api.spec
    tensors, about = _read(file)
    names = json.dumps(list(spec.names))
    if (about.get("api"), about.get("set"), about.get("class_names")) != (api.name, part, names):
        held = f"the {about.get('set')} set of {about.get('api')!r}"
        raise InputError(
            f"run folder: {file} is {held}, not the {part} set of {api.name!r}; is this another "
            "pool?"
        )
    if (problem := _problem(tensors, spec, n_per_class)) is not None:
        raise _damaged(file, problem)
    return RecoveredSet(index, api.name, spec.names, part, _recovered(tensors))


def read_set(file: Path) -> RecoveredSet:
    """Read what `save_recovered` wrote without knowing the API; nothing is compared with its spec.

    Raises:
        InputError: the file is damaged, or its name is not that of a set of a run.
    """
    from bidfmkd_fast.training.run import RecoveredSet

    tensors, about = _read(file)
    named = re.fullmatch(r"api_(\d+)_(support|query)\.safetensors", file.name)
    try:
        names = tuple(map(str, json.loads(about["class_names"])))
        whole = (
            named is not None
            and tensors["images"].ndim == 4
            and tensors["scores"].shape == (len(tensors["images"]), len(names))
            and tensors["labels"].shape == tensors["losses"].shape == tensors["scores"].shape[:1]
            and len(tensors["labels"]) > 0
            and 0 <= int(tensors["labels"].min()) <= int(tensors["labels"].max()) < len(names)
        )
    except (KeyError, TypeError, ValueError):
        whole = False
    if named is None or not whole:
        raise _damaged(file, "its images, labels, scores and class names do not fit together")
    api_name = about.get("api", named[1])
    return RecoveredSet(int(named[1]), api_name, names, named[2], _recovered(tensors))


def read_images_and_scores(file: Path) -> tuple[Tensor, Tensor]:
    """Read only the images (unit range) and the scores of a recovered set.

    Raises InputError if the file is damaged.
    """
    tensors, _ = _read(file)
    for name in ("images", "scores"):
        if not tensors[name].isfinite().all():
            raise _damaged(file, f"its {name} are not finite")
    return tensors["images"], tensors["scores"]


def least_queries(recovered_set: RecoveredSet, measuring: int) -> int:
    """Count the queries that a set has cost at least; requests that failed are not known.

    `measuring` is what measuring its step length cost, which counts only if steps were taken.
    """
    recovered = recovered_set.recovered
    history = recovered.history
    if not history:
        return len(recovered.images)
    return int(history[-1]["queries"]) + (measuring if recovered.mu is not None else 0)


def bytes_of_set(spec: APISpec, n_per_class: int, steps: int) -> int:
    """Return the largest size that the file of a set can have."""
    n_floats = math.prod(spec.image_shape) + spec.n_classes + 1  # an image, its scores, its loss
    per_image = 4 * n_floats + 8  # float32, and an int64 label
    # Names are JSON inside JSON, where a quote or a backslash takes up to four bytes.
    names = 4 * len(json.dumps([spec.name, *spec.names]))
    return per_image * n_per_class * spec.n_classes + 8 * len(_RECORD) * steps + names + _HEADER


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a set's file; raise InputError if any are missing."""
    try:
        tensors, about = read_tensors(file)
    except InputError as error:
        # The message without its advice, since `_damaged` gives advice of its own.
        reason = str(error).replace(str(file), "it", 1).split(";")[0]
        raise _damaged(file, reason) from None
    if missing := [name for name in _TENSORS if name not in tensors]:
        raise _damaged(file, f"it lacks {', '.join(missing)}")
    if tensors["history"].shape[1:] != (len(_RECORD),) or tensors["state"].shape != (2,):
        raise _damaged(file, "its history is not a table of steps")
    return tensors, about


def _recovered(tensors: dict[str, Tensor]) -> Recovered:
    """Return what the checked tensors of a set's file hold."""
    from bidfmkd_fast.recovery import Recovered

    complete, mu = tensors["state"].tolist()
    return Recovered(
        tensors["images"],
        tensors["labels"],
        tensors["scores"],
        tensors["losses"],
        history=[dict(zip(_RECORD, row)) for row in tensors["history"].tolist()],
        complete=bool(complete),
        mu=None if math.isnan(mu) else mu,
    )


def _problem(tensors: dict[str, Tensor], spec: APISpec, n_per_class: int) -> str | None:
    """Return why the tensors are no set of `n_per_class` images per class of an API with this spec.

    Returns None if they are.
    """
    labels = torch.arange(spec.n_classes).repeat_interleave(n_per_class)
    wanted = {
        "images": [len(labels), *spec.image_shape],
        "labels": [len(labels)],
        "scores": [len(labels), spec.n_classes],
        "losses": [len(labels)],
    }
    for name, shape in wanted.items():
        if list(tensors[name].shape) != shape:
            return f"its {name} must be {shape}; got {list(tensors[name].shape)}"
        kind = torch.int64 if name == "labels" else torch.float32
        if tensors[name].dtype != kind:
            return f"its {name} must be {kind}; got {tensors[name].dtype}"
        if name != "losses" and not tensors[name].isfinite().all():
            return f"its {name} must be finite; got NaN or infinity"
    if not torch.equal(tensors["labels"], labels):
        low, high = tensors["labels"].aminmax()
        return (
            f"its labels must be 0..{spec.n_classes - 1} in order, {n_per_class} of each; got "
            f"{low}..{high}"
        )
    return None


def _damaged(file: Path, reason: str) -> InputError:
    """Return the error about a file that is no usable set."""
    return InputError(
        f"run folder: {file} is damaged ({reason}); remove it to have it asked for again"
    )
