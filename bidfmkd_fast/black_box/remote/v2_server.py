"""List the models of a server of the v2 protocol over HTTP, and read what it says of each.

The protocol itself has no list of models. Triton, MLServer and `bidfmkd serve` have the repository
index of Triton's model repository extension.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from bidfmkd_fast import secrets
from bidfmkd_fast.black_box.remote.connection_options import ConnectionOptions, split_url
from bidfmkd_fast.black_box.remote.http_client import HTTPClient
from bidfmkd_fast.black_box.remote.reading import parse_json, reading, short
from bidfmkd_fast.black_box.remote.v2_messages import ServerMismatch, V2Model
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import InputError

# Statuses of servers that have no index, or keep it from this client.
_NO_INDEX = (401, 403, 404, 405, 501)
_RETRIES = 2  # enough for a dropped connection; a wrong address is reported within seconds
_LEAST_SIDE = 4  # pixels of the smallest image that can be drawn


class V2Server:
    """A server whose models are not known yet. No method asks it for scores.

    Args:
        url: `http://` or `https://`, without user, password and query; a slash or `/v2` at the end
            is dropped.
        token_variable: environment variable that holds a bearer token; None for no token.

    Attributes:
        url: the address that `RemoteBlackBox` takes.

    Raises:
        InputError: the URL or the token cannot be used.
    """

    def __init__(self, url: str, token_variable: str | None = None) -> None:
        self.url = server_address(url)
        options = ConnectionOptions(token_variable, retries=_RETRIES)
        self._client = HTTPClient(self.url, self.url, 1, options)

    def models(self) -> dict[str, str]:
        """Return the models by name, each with "" if it is ready, else with its state.

        Raises:
            InputError: the server does not list its models.
            APIUnavailable: the server does not answer.
            BadAnswer: the answer is no list of models.
        """
        answer = self._client.post(
            "/v2/repository/index", b"{}", {"Content-Type": "application/json"}, lambda: None
        )
        if answer.status in _NO_INDEX:
            token = ""
            if answer.status in (401, 403):
                token = ", or the environment variable that holds the right token (token_variable)"
            raise InputError(
                f"{self.url}: the server does not list its models (POST /v2/repository/index: "
                f"{answer.status}); name them (model){token}"
            )
        self._client.check_status(answer)
        listed = parse_json(self.url, answer.data)
        with reading(self.url, "the server must list its models by name", answer.data):
            states: dict[str, str] = {}
            for item in listed:
                name, state = item["name"], str(item.get("state") or "not loaded")
                if not isinstance(name, str):
                    raise TypeError("a name that is no text")
                # A model is listed once for each version, and one version that is ready suffices.
                if state == "READY":
                    states[name] = ""
                else:
                    states.setdefault(name, state)
        return states

    def read(self, model: str) -> V2Model | None:
        """Return what the server says of a model; None if it has no such model.

        Raises:
            APIUnavailable: the server does not answer.
            BadAnswer: the answer does not describe a model.
            ServerMismatch: the model takes more than one input.
        """
        return read_model(self._client, model_path(model), f"{short(model)} at {self.url}")


def server_address(url: str) -> str:
    """Return the URL of a server without a slash or `/v2` at its end.

    Raises InputError for a URL of another scheme, or one with user, password, query or fragment.
    """
    secrets.register_url(url)
    parts = split_url("services", url, ("http", "https"), "http://host:port or https://host")
    if parts.query or parts.fragment:
        raise InputError(
            f"services: url must end with its path; got {secrets.shown_url(url)!r} with more "
            "behind it; put a token into the environment"
        )
    path = parts.path.rstrip("/").removesuffix("/v2").rstrip("/")
    return f"{parts.scheme}://{parts.netloc.lower()}{path}"


def model_path(model: str, version: str = "") -> str:
    """Return the path of a model below the URL of its server."""
    path = f"/v2/models/{quote(model, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


def read_model(client: HTTPClient, path: str, name: str) -> V2Model | None:
    """Read metadata and configuration of the model at `path`; None if there is no such model.

    `name` stands in errors.
    """
    metadata = client.get_json(path)
    if metadata is None:
        return None
    return V2Model.read(name, metadata, client.get_json(f"{path}/config"))


def image_spec(name: str, model: V2Model) -> APISpec:
    """Return the spec of a model that takes images and gives a score for each class.

    Fields that metadata do not state keep their defaults, `scores_kind` among them. `name` is the
    name of the API.

    Raises:
        ServerMismatch: the model takes something else, or its metadata leave open what must be
            known.
        InputError: a field does not fit, such as a name of several lines.
    """
    fields = _image_fields(name, model)
    if "n_classes" not in fields:
        outputs = ", ".join(f"{datatype} {list(shape)}" for _, datatype, shape in model.outputs)
        raise ServerMismatch(
            f"{name}: it gives {short(outputs)}, where one output of scores [N, n_classes] is "
            "wanted; if it gives labels or its best classes only, write its entry by hand"
        )
    spec = APISpec(name=name, **fields)
    model.check(spec)
    model.wanted_outputs(spec)
    return spec


def _image_fields(name: str, model: V2Model) -> dict[str, Any]:
    """Return the fields of the spec that follow from the metadata of a model of images."""
    takes = f"{name}: it takes " + short(f"{model.datatype} {list(model.shape)}")
    if len(model.shape) != 4:
        hint = ""
        if model.datatype == "BYTES":
            hint = "; if these are picture files, write its entry by hand"
        raise ServerMismatch(f"{takes}, and images are [N, C, H, W] or [N, H, W, C]{hint}")
    fields = model.fields()
    if "image_shape" not in fields:
        raise ServerMismatch(f"{takes}, which leaves their size open; write its entry by hand")
    channels, height, width = fields["image_shape"]
    if channels not in (1, 3) or min(height, width) < _LEAST_SIDE:
        raise ServerMismatch(
            f"{takes}, and pictures have 1 or 3 channels and sides of at least {_LEAST_SIDE}"
        )
    n_images = model.shape[0]
    if n_images == 1:
        fields["max_batch"] = 1
    elif n_images >= 0:
        raise ServerMismatch(f"{takes}: exactly {n_images} images a request, not fewer")
    return fields
