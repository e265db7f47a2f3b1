"""Write the `pool.yaml` of models that were found on servers, with comments on what to check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bidfmkd_fast.black_box.scores_kind import KIND_QUERIES
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.files.yaml_files import dump_yaml

_HEAD = """\
# Models found on prediction services. Look at the lines that say "check": no server states these
# values, and a wrong one makes a run worse without an error. `bidfmkd probe --pool FOLDER --api 0`
# tests an entry.
format: 1
apis:
"""
_LINE = 1 << 20  # characters of a value, which stays on one line so that a comment fits behind it


class FoundModel(NamedTuple):
    """A model on a server.

    Attributes:
        url, model: where it is.
        spec: what is known of it; its name is the name of the API in the pool.
        token_variable: environment variable with the token of the server; None for no token.
        notes: what looks wrong in its answers.
        asked: whether it was asked for its kind of scores.
    """

    url: str
    model: str
    spec: APISpec
    token_variable: str | None
    notes: tuple[str, ...] = ()
    asked: bool = False


def list_text(found: Sequence[FoundModel], left_out: Sequence[str]) -> str:
    """Return the text of a `pool.yaml`; `left_out` are lines about models that are not in it."""
    lines = [line for model in found for line in _entry(model)]
    lines += [f"# left out: {reason}" for reason in left_out]
    return _HEAD + "\n".join(lines) + "\n"


def _entry(model: FoundModel) -> Iterator[str]:
    """Yield the lines of an entry."""
    spec = model.spec
    yield f"- {_pair('kind', 'remote')}"
    yield f"  {_pair('url', model.url)}"
    yield f"  {_pair('model', model.model)}"
    if model.token_variable is not None:
        yield f"  {_pair('token_variable', model.token_variable)}"
    yield "  spec:"
    for note in model.notes:
        yield f"    # check: {note}"
    for key, value, comment in _spec_lines(model):
        yield f"    {_pair(key, value)}" + (f"  # {comment}" if comment else "")
    if spec.max_batch is not None:
        yield f"    {_pair('max_batch', spec.max_batch)}"


def _spec_lines(model: FoundModel) -> Iterator[tuple[str, Any, str]]:
    """Yield key, value and comment of each field of the spec that is written."""
    spec = model.spec
    yield "name", spec.name, ""
    yield "n_classes", spec.n_classes, "check that the output is one score for each class"
    yield "image_shape", list(spec.image_shape), "channels, height, width"
    if spec.layout != "NCHW":
        yield "layout", spec.layout, ""
    if spec.dtype == "uint8":
        yield "dtype", spec.dtype, ""
    else:
        yield (
            "input_range",
            [float(end) for end in spec.input_range],
            "check the pixel values that the model wants; add mean and std if it normalises",
        )
    origin = f"looks so in {KIND_QUERIES} answers" if model.asked else "as given"
    yield "scores_kind", spec.scores_kind, f"check: {origin}"
    if spec.decimals is not None:
        yield "decimals", spec.decimals, f"check: {origin}"
    yield "class_names", list(spec.class_names), f"check: {spec.n_classes} names, or [] if unknown"
    yield "data_set", spec.data_set, "check: APIs of one data set share classes of one name"
    yield "price_per_1000", spec.price_per_1000, "check: price of 1000 queries, for --max-cost"


def _pair(key: str, value: Any) -> str:
    """Return `key: value` as one line of YAML; a list as `[a, b]`."""
    flow = None if isinstance(value, list) else False
    text = dump_yaml({key: value}, default_flow_style=flow, width=_LINE, allow_unicode=True)
    return text.rstrip("\n")
