"""Read the entries of `pool.yaml` that are ONNX files or services, and make them black boxes."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.secrets import register_headers, register_url
from bidfmkd_fast.settings import closest, fits, types_of

if TYPE_CHECKING:
    from bidfmkd_fast.black_box.base import BlackBox

_NEEDED = {
    "remote": ("url", "model"),
    "grpc": ("url", "model"),
    "json": ("url", "mapping"),
    "onnx": ("file",),
}
_KEYS = ("kind", "spec", "inverted")  # keys of an entry; all others are options of its black box


@dataclass(frozen=True)
class SourceEntry:
    """An API of a pool that is an ONNX file or a service.

    `kind` is "remote", "grpc", "json" or "onnx". `spec` holds fields of `APISpec`; fields that are
    left out are asked of a v2 server or read from the ONNX file. `options` are the arguments of the
    black box.
    """

    kind: str
    spec: Mapping[str, Any]
    options: Mapping[str, Any]
    inverted: bool = False

    @property
    def name(self) -> str:
        """Return the name of the API in reports."""
        return str(self.spec["name"])

    @property
    def data_set(self) -> str:
        """Return the name of the data set that the classes are from; empty if unknown."""
        return str(self.spec.get("data_set", ""))

    @property
    def is_described(self) -> bool:
        """Return True if `spec` is complete: nothing must be asked before the API can be used."""
        return {"n_classes", "image_shape"} <= set(self.spec)

    def build(self, folder: Path) -> BlackBox:
        """Return the black box; `folder` is the pool's, in which its files lie.

        Raises:
            InputError: the options or the spec do not fit.
            APIUnavailable: a service must be asked for its spec and does not answer.
        """
        from bidfmkd_fast import black_box

        spec = black_box.APISpec(**self.spec) if self.is_described else self.spec
        options = dict(self.options)
        make: Callable[..., BlackBox]
        if self.kind == "onnx":
            make, options = black_box.OnnxBlackBox, {**options, "path": folder / options["file"]}
            del options["file"]
        else:
            make = {
                "remote": black_box.RemoteBlackBox,
                "grpc": black_box.GrpcBlackBox,
                "json": black_box.JSONBlackBox,
            }[self.kind]
        return make(spec=spec, **options)


def source_entry(item: Mapping[str, Any], where: str, number: int) -> SourceEntry:
    """Return the entry in `item`, a mapping with a `kind`.

    `where` and `number` are its place in the list. Raises InputError if a key is missing, unknown
    or of the wrong type.
    """
    kind = item["kind"]
    register_url(item.get("url"))
    register_headers(item.get("headers"))
    if not isinstance(kind, str) or kind not in _NEEDED:
        raise InputError(
            f"load_pool: {where}: kind must be one of {', '.join(_NEEDED)} (or absent); "
            f"got {kind!r}"
        )
    if unreadable := [key for key in item if not isinstance(key, str)]:
        raise InputError(f"load_pool: {where}: keys must be text; got {unreadable[0]!r}")
    if missing := [key for key in _NEEDED[kind] if key not in item]:
        raise InputError(
            f"load_pool: {where}: an API of kind {kind!r} needs {' and '.join(missing)}"
        )
    spec, inverted = item.get("spec", {}), item.get("inverted", False)
    if not isinstance(spec, dict) or not all(isinstance(key, str) for key in spec):
        raise InputError(f"load_pool: {where}: spec must map fields of APISpec; got {spec!r}")
    if not isinstance(inverted, bool):
        raise InputError(f"load_pool: {where}: inverted must be of type bool; got {inverted!r}")
    known = [field.name for field in fields(APISpec)]
    for key in spec:
        if key not in known:
            raise InputError(
                f"load_pool: {where}: unknown key 'spec.{key}'; {closest(key, known, 'spec.')}"
            )
    spec = {"name": str(item.get("model", f"api_{number:03d}")), **spec}
    options = {key: value for key, value in item.items() if key not in _KEYS}
    _check_options(kind, options, where)
    entry = SourceEntry(kind, spec, options, inverted)
    if kind == "json" and not entry.is_described:
        raise InputError(
            f"load_pool: {where}: an API of kind 'json' needs n_classes and image_shape in its spec"
        )
    return entry


def _check_options(kind: str, options: Mapping[str, Any], where: str) -> None:
    """Raise InputError for an unknown option or one of the wrong type.

    The error does not show the value, because it may be a secret such as a header.
    """
    hints = _options_of(kind)
    for key, value in options.items():
        if key not in hints:
            raise InputError(
                f"load_pool: {where}: unknown option {key!r}; {closest(str(key), list(hints))}"
            )
        if not fits(value, hints[key]):
            hint = hints[key]
            wanted = str(hint) if isinstance(hint, types.UnionType) else hint.__name__
            raise InputError(
                f"load_pool: {where}: {key} must be of type {wanted}; got {type(value).__name__}"
            )
    if kind == "onnx":
        file = PurePath(options["file"])
        if file.is_absolute() or ".." in file.parts:
            raise InputError(
                f"load_pool: {where}: file must lie in the pool's folder; got {options['file']!r}"
            )


def _options_of(kind: str) -> dict[str, Any]:
    """Return the options of a kind of black box that a pool list may set, with their types."""
    from bidfmkd_fast import black_box
    from bidfmkd_fast.black_box.remote.connection_options import ConnectionOptions

    if kind == "onnx":
        return {"file": str, "providers": Sequence[str] | None}
    makers = {
        "remote": black_box.RemoteBlackBox.__init__,
        "grpc": black_box.GrpcBlackBox.__init__,
        "json": black_box.JSONBlackBox.__init__,
    }
    hints = dict(types_of(makers[kind]))
    if hints.pop("connection", None):  # further options of the client
        hints |= types_of(ConnectionOptions)
    return {key: hint for key, hint in hints.items() if key not in ("return", "spec", "budget")}


def build_source(entry: SourceEntry, folder: Path, where: str) -> BlackBox:
    """Return `entry.build(folder)`; put `where`, the place in the list, in front of its errors."""
    try:
        return entry.build(folder)
    except InputError as error:
        raise InputError(f"load_pool: {where}: {error}") from None
    except (TypeError, ValueError, OSError) as error:  # of a library, on options that fit by type
        raise InputError(f"load_pool: {where}: {' '.join(str(error).split())}") from None
