"""Ask a server of the Open Inference Protocol v2 (Triton, MLServer, KServe, OpenVINO) over HTTP."""

from __future__ import annotations

import threading
import uuid
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from bidfmkd_fast.black_box.budget import Budget
from bidfmkd_fast.black_box.remote.connection_options import ConnectionOptions
from bidfmkd_fast.black_box.remote.http_client import HTTPClient
from bidfmkd_fast.black_box.remote.reading import words_of
from bidfmkd_fast.black_box.remote.service import Attempt, BatchTooLarge
from bidfmkd_fast.black_box.remote.v2 import V2BlackBox
from bidfmkd_fast.black_box.remote.v2_messages import V2Model, infer_request, infer_response
from bidfmkd_fast.black_box.remote.v2_server import model_path, read_model
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.black_box.wire import wire_array, wire_files
from bidfmkd_fast.errors import APIUnavailable, InputError, ServiceWarning

TRANSPORTS = ("auto", "binary", "json")
# Statuses with which servers without the extension answer a binary request; MLServer answers 500.
_NO_BINARY = (400, 415, 422, 500, 501)


class _Refused(APIUnavailable):
    """The server refused binary tensors, perhaps since it does not have the binary extension."""


class RemoteBlackBox(V2BlackBox):
    """A black box: a model of a v2 server, asked over HTTP.

    Tensors are sent as binary, or as JSON if the server does not have the binary extension.

    Args:
        url: URL of the server, `http://host:port`.
        model: name of the model on the server.
        spec: what is known of the API: an `APISpec`, with which nothing is sent before the first
            call, or some of its fields; the others are read from the server. Servers do not state
            `scores_kind`, which is logits unless given.
        version: version of the model; empty for the server's choice.
        transport: `"binary"`, `"json"`, or `"auto"`. Auto sends binary tensors, and JSON with a
            warning if the server lists no extension at all, or does not list this extension and
            refuses the first binary request.
        budget, in_flight, images_per_second, requests_per_second: as for `ServiceBlackBox`.
        connection: further options, those of `ConnectionOptions`: `token_variable`, `headers`,
            `timeout`, `retries`, `backoff`, `longest_wait`, `ca_file`.

    Raises:
        InputError: an argument is wrong, or the server wants other images than the spec sends.
        APIUnavailable: a field of the spec has to be read from a server that does not answer.
    """

    def __init__(
        self,
        url: str,
        model: str,
        spec: APISpec | Mapping[str, Any] | None = None,
        *,
        version: str = "",
        transport: str = "auto",
        budget: Budget | None = None,
        in_flight: int = 4,
        images_per_second: float | None = None,
        requests_per_second: float | None = None,
        **connection: Any,
    ) -> None:
        if transport not in TRANSPORTS:
            raise InputError(
                f"{model}: transport must be one of {', '.join(TRANSPORTS)}; got {transport!r}"
            )
        name = spec.name if isinstance(spec, APISpec) else model
        self._client = HTTPClient(name, url, in_flight, ConnectionOptions(**connection))
        self._path = model_path(model, version)
        self._transport_lock = threading.Lock()
        self._binary = {"binary": True, "json": False, "auto": None}[transport]
        self._start(
            model,
            spec,
            budget=budget,
            in_flight=in_flight,
            images_per_second=images_per_second,
            requests_per_second=requests_per_second,
        )

    def _read_model(self) -> V2Model:
        if self._binary is None:
            server = self._client.get_json("/v2")
            extensions = server.get("extensions") if isinstance(server, dict) else None
            if isinstance(extensions, list) and "binary_tensor_data" in extensions:
                self._binary = True
            elif extensions == []:
                # MLServer lists none. It may close the connection on a large binary request
                # instead of answering.
                self._use_json(f"{self._client.name}: the server lists no extension")
        model = read_model(self._client, self._path, self._client.name)
        if model is None:
            raise APIUnavailable(
                f"{self._client.name}: the server at {self._client.url} has no model at "
                f"{self._path}"
            )
        return model

    def release(self) -> None:
        """Close idle connections."""
        self._client.release()

    def _request(self, images: Tensor, attempt: Attempt) -> Tensor:
        model = self._served()
        if self._binary is not None:
            return self._infer(model, images, attempt, self._binary)
        with self._transport_lock:  # the first request finds the transport for all
            if self._binary is None:
                return self._find_transport(model, images, attempt)
        return self._infer(model, images, attempt, self._binary)

    def _find_transport(self, model: V2Model, images: Tensor, attempt: Attempt) -> Tensor:
        """Send a first request as binary tensors, or as JSON if only binary is refused."""
        try:
            scores = self._infer(model, images, attempt, binary=True, final=_NO_BINARY)
            self._binary = True
        except _Refused as refusal:
            scores = self._infer(model, images, attempt, binary=False)
            self._use_json(str(refusal))
        return scores

    def _use_json(self, reason: str) -> None:
        """Send JSON from now on, and warn of it."""
        self._binary = False
        warnings.warn(
            f"{reason}; JSON is used, which is slower than binary tensors",
            ServiceWarning,
            stacklevel=3,
        )

    def _infer(
        self,
        model: V2Model,
        images: Tensor,
        attempt: Attempt,
        binary: bool,
        final: Collection[int] = (),
    ) -> Tensor:
        spec, identity, outputs = self._spec, uuid.uuid4().hex, model.wanted_outputs(self._spec)
        content = wire_files(images, spec) if spec.encoding != "raw" else wire_array(images, spec)
        body, headers = infer_request(identity, model, content, outputs, binary)
        response = self._client.post(
            f"{self._path}/infer",
            body,
            headers,
            attempt,
            final=final,
            most_bytes=self._most_bytes(len(images)),
        )
        if response.status in final:
            message = words_of(response.data)
            raise _Refused(
                f"{self.name}: the server answered {response.status} to binary tensors: {message}"
            )
        if response.status in (400, 413) and model.max_batch is None:
            # The server may have a batch limit that it does not state.
            message = words_of(response.data)
            raise BatchTooLarge(f"{self.name}: the server answered {response.status}: {message}")
        self._client.check_status(response)
        return self._scores(
            infer_response(self.name, identity, response.headers, response.data), outputs
        )
