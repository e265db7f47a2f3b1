"""Ask a server of the Open Inference Protocol v2 over gRPC, with NVIDIA's client.

Needs the extra `grpc`.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from urllib3.exceptions import MaxRetryError, ProtocolError

from bidfmkd_fast import secrets
from bidfmkd_fast.black_box.budget import Budget
from bidfmkd_fast.black_box.remote.connection_options import (
    bearer,
    check_token,
    checked_timeout,
    split_url,
)
from bidfmkd_fast.black_box.remote.proxies import is_loopback
from bidfmkd_fast.black_box.remote.reading import reading, short
from bidfmkd_fast.black_box.remote.retries import retry_policy
from bidfmkd_fast.black_box.remote.service import Attempt, BatchTooLarge
from bidfmkd_fast.black_box.remote.v2 import V2BlackBox
from bidfmkd_fast.black_box.remote.v2_messages import V2Model
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.black_box.wire import wire_array, wire_files
from bidfmkd_fast.errors import APIUnavailable, InputError
from bidfmkd_fast.extras import not_installed
from bidfmkd_fast.runtime.interrupt import DeadlinePassed, wait_for

_AGAIN = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "ABORTED", "INTERNAL")
_GRACE = 1.0  # seconds that the client may take to report its own time-out
_LIMITS = ("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", 2**28)  # bytes


class GrpcBlackBox(V2BlackBox):
    """A black box: a model of a v2 server, asked over gRPC.

    Args:
        url: `grpc://host:port`, or `grpcs://host:port` for TLS, whose certificates are verified.
        model, spec, version, budget, in_flight, images_per_second, requests_per_second: as for
            `RemoteBlackBox`.
        token_variable, timeout, retries, backoff, ca_file: as for `ConnectionOptions`; a request is
            repeated after the statuses unavailable, resource exhausted, deadline exceeded, aborted
            and internal.

    Raises:
        InputError: tritonclient is not installed, or as `RemoteBlackBox`.
        APIUnavailable: as `RemoteBlackBox`.
    """

    def __init__(
        self,
        url: str,
        model: str,
        spec: APISpec | Mapping[str, Any] | None = None,
        *,
        version: str = "",
        budget: Budget | None = None,
        in_flight: int = 4,
        images_per_second: float | None = None,
        requests_per_second: float | None = None,
        token_variable: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 0.5,
        ca_file: str | None = None,
    ) -> None:
        try:
            import tritonclient.grpc as triton
        except ImportError as error:
            raise not_installed("GrpcBlackBox", error.name, "grpc") from None
        name = spec.name if isinstance(spec, APISpec) else model
        secrets.register_url(url)
        wanted = "grpc://host:port or grpcs://host:port"
        parts = split_url(name, url, ("grpc", "grpcs"), wanted)
        checked_timeout(name, timeout)
        if not parts.port:
            raise InputError(f"{name}: url must be {wanted}; got {secrets.shown_url(url)!r}")
        check_token(name, url, parts.scheme == "grpcs", token_variable, "ASCII")
        # The channel must not repeat requests by itself: nobody would count the repetitions.
        channel = [*_LIMITS, ("grpc.enable_retries", 0)]
        if is_loopback(parts.hostname):  # else gRPC would use the environment's proxy
            channel.append(("grpc.enable_http_proxy", 0))
        self._triton, self._label, self._model_name, self._version = triton, name, model, version
        self._client = triton.InferenceServerClient(
            parts.netloc,
            ssl=parts.scheme == "grpcs",
            root_certificates=ca_file,
            channel_args=channel,
        )
        self._token_variable, self._timeout = token_variable, checked_timeout(name, timeout)
        self._retry = retry_policy(name, retries, backoff, 60.0)
        self._start(
            model,
            spec,
            budget=budget,
            in_flight=in_flight,
            images_per_second=images_per_second,
            requests_per_second=requests_per_second,
        )

    def _read_model(self) -> V2Model:
        def ask(method: Any) -> Any:
            return self._call(
                lambda options: method(self._model_name, self._version, as_json=True, **options)
            )

        metadata = ask(self._client.get_model_metadata)
        try:
            answer = ask(self._client.get_model_config)
            config = answer.get("config") if isinstance(answer, dict) else None
        except _Unimplemented:
            config = None
        return V2Model.read(self._label, metadata, config)

    def _request(self, images: Tensor, attempt: Attempt) -> Tensor:
        model, spec, triton = self._served(), self._spec, self._triton
        outputs = model.wanted_outputs(spec)
        if spec.encoding == "raw":
            array = wire_array(images, spec)
        else:
            files = np.array(wire_files(images, spec), dtype=np.object_)
            array = files[:, None] if len(model.shape) > 1 else files
        tensor = triton.InferInput(model.input_name, list(array.shape), model.datatype)
        tensor.set_data_from_numpy(array)
        wanted = [triton.InferRequestedOutput(name) for name in outputs]

        def infer(options: dict[str, Any]) -> Any:
            identity = uuid.uuid4().hex
            return self._client.infer(
                self._model_name,
                [tensor],
                self._version,
                outputs=wanted,
                request_id=identity,
                **options,
            )

        answer = self._call(infer, attempt, limit_known=model.max_batch is not None)
        with reading(self.name, "the server's answer does not follow the v2 protocol"):
            arrays = {name: answer.as_numpy(name) for name in outputs}
            found = {name: _text(array) for name, array in arrays.items() if array is not None}
        return self._scores(found, outputs)

    def _call(self, call: Any, attempt: Attempt = lambda: None, limit_known: bool = True) -> Any:
        """Make a call and repeat it as `HTTPClient` does, with urllib3's counts and pauses."""
        retry = self._retry
        while True:
            attempt()
            headers = {
                key.lower(): value
                for key, value in bearer(self._label, self._token_variable, "ASCII").items()
            }
            options = {"headers": headers or None, "client_timeout": self._timeout}
            try:
                return wait_for(partial(call, options), self._timeout + _GRACE)
            except DeadlinePassed:
                status, words = "DEADLINE_EXCEEDED", f"no whole answer within {self._timeout:g} s"
            except self._triton.InferenceServerException as error:
                status = str(error.status()).removeprefix("StatusCode.")
                words = short(str(error.message()))
            message = f"{self._label}: the server answered {status}: {words}"
            if status == "UNIMPLEMENTED":
                raise _Unimplemented(message)
            if status == "INVALID_ARGUMENT" and not limit_known:
                raise BatchTooLarge(message)
            if status not in _AGAIN:
                raise APIUnavailable(message)
            try:
                retry = retry.after(ProtocolError(status))
            except MaxRetryError:
                tried = 1 + int(self._retry.total or 0)
                raise APIUnavailable(f"{message} (the last of {tried} attempts)") from None
            retry.wait()


class _Unimplemented(APIUnavailable):
    """The server does not have this call."""


def _text(array: Any) -> Any:
    """Return an array of BYTES as strings, and any other array as it is."""
    return np.vectorize(bytes.decode, otypes=[str])(array) if array.dtype == np.object_ else array
