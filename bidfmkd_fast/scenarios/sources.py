"""APIs of a pool that are not its own weights: ONNX files and services, as `pool.yaml` lists them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.secrets import register_headers, register_url

if TYPE_CHECKING:
    from bidfmkd_fast.black_box.base import BlackBox

_NEEDED = {"remote": ("url", "model"), "grpc": ("url", "model"), "json": ("url", "mapping"), "onnx": ("file",)}
_RESERVED = ("budget", "kind", "spec", "inverted")


@dataclass(frozen=True)
class SourceEntry:
    """One such API.

    `kind` is "remote", "grpc", "json" or "onnx"; `spec` holds fields of `APISpec`, which a v2 server or an ONNX file
    may complete; `options` are the arguments of the black box.
    """

    kind: str
    spec: Mapping[str, Any]
    options: Mapping[str, Any]
    inverted: bool = False

    @property
    def data_set(self) -> str:
        """Name of the data set its classes are from; empty when unknown."""
        return str(self.spec.get("data_set", ""))

    @property
    def is_described(self) -> bool:
        """Whether its spec tells so much that nothing has to be asked before it is used."""
        return {"n_classes", "image_shape"} <= set(self.spec)

    def build(self, folder: Path) -> BlackBox:
        """The black box; files are looked for in the pool's folder.

        Raises:
            InputError: options or spec that do not fit.
            APIUnavailable: a service that has to tell its spec is not there.
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
                "remote": black_box.RemoteBlackBox, "grpc": black_box.GrpcBlackBox, "json": black_box.JSONBlackBox,
            }[self.kind]  # fmt: skip
        return make(spec=spec, **options)


def source_entry(item: Mapping[str, Any], where: str, number: int) -> SourceEntry:
    """The entry in `item`, a mapping with a `kind`. Raises InputError where something is missing or of a wrong type."""
    kind = item["kind"]
    register_url(item.get("url"))
    register_headers(item.get("headers"))
    if kind not in _NEEDED:
        raise InputError(f"load_pool: {where}: kind must be one of {', '.join(_NEEDED)} (or absent); got {kind!r}")
    if missing := [key for key in _NEEDED[kind] if key not in item]:
        raise InputError(f"load_pool: {where}: an API of kind {kind!r} needs {' and '.join(missing)}")
    spec, inverted = item.get("spec", {}), item.get("inverted", False)
    if not isinstance(spec, dict) or not all(isinstance(key, str) for key in spec):
        raise InputError(f"load_pool: {where}: spec must map fields of APISpec; got {spec!r}")
    if not isinstance(inverted, bool):
        raise InputError(f"load_pool: {where}: inverted must be of type bool; got {inverted!r}")
    spec = {"name": str(item.get("model", f"api_{number:03d}")), **spec}
    entry = SourceEntry(kind, spec, {key: value for key, value in item.items() if key not in _RESERVED}, inverted)
    if kind == "json" and not entry.is_described:
        raise InputError(f"load_pool: {where}: an API of kind 'json' needs n_classes and image_shape in its spec")
    return entry


def build_source(entry: SourceEntry, folder: Path, where: str) -> BlackBox:
    """`entry.build(folder)`, whose errors say where in the list it stands."""
    try:
        return entry.build(folder)
    except InputError as error:
        raise InputError(f"load_pool: {where}: {error}") from None
    except TypeError as error:  # an option or a field of the spec that there is not
        raise InputError(f"load_pool: {where}: {' '.join(str(error).split())}") from None
