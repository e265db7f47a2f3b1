"""Answer the URLs of the protocol with models and their faults: an ASGI application.

Everything that is asked and answered is counted.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bidfmkd_fast.black_box.base import BlackBox
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.seeds import derive_seed
from bidfmkd_fast.serving.behaviour import SERVED, Behaviour
from bidfmkd_fast.serving.protocol import (
    HEADER_LENGTH,
    Refused,
    Request,
    TensorInfo,
    read_request,
    write_answer,
)

ABORT = "bidfmkd.abort"  # key of the ASGI scope for the function that cuts the connection
_FAILURES = (500, 502, 503, 504)


class Service:
    """Black boxes served as models of a server. `service.app` is an ASGI application.

    Args:
        apis: the models, served under their names.
        behaviours: how each model behaves, by name; a model without an entry behaves well.
        seed: seed of the faults and of the drift.

    Raises:
        InputError: two APIs have the same name, or a behaviour names no API or does not fit it.
    """

    def __init__(
        self,
        apis: Sequence[BlackBox],
        behaviours: Mapping[str, Behaviour] | None = None,
        seed: int = 0,
    ) -> None:
        behaviours = {} if behaviours is None else behaviours
        self.models = {
            api.name: _Model(api, behaviours.get(api.name, Behaviour()), seed) for api in apis
        }
        if len(self.models) != len(apis):
            raise InputError(
                f"serve: the APIs must have different names; got {[api.name for api in apis]}"
            )
        if unknown := sorted(set(behaviours) - set(self.models)):
            raise InputError(
                f"serve: no API is called {unknown[0]!r}; there are {', '.join(self.models)}"
            )
        # Models take turns on the processor: competing threads of torch slow all of them down.
        self._turn = CapacityLimiter(1)
        self.app = Starlette(routes=self._routes(), exception_handlers={Refused: _refusal})

    def statistics(self, name: str | None = None) -> dict[str, Any]:
        """Return what a model, or each model, has served.

        The form is that of Triton's statistics extension, with more counts: `inference_count` are
        images scored, `execution_count` requests whose images were scored, `received` all requests
        and the images of the well-formed ones, and `fates` what became of the requests.
        """
        models = self.models.values() if name is None else [self._model(name)]
        return {"model_stats": [model.statistics() for model in models]}

    def rows(self) -> list[list[str]]:
        """Return the statistics as a table, the first row the header."""
        models = self.statistics()["model_stats"]
        fates = sorted({fate for model in models for fate in model["fates"]})
        rows = [["model", "requests", "images scored", *(fate.replace("_", " ") for fate in fates)]]
        for model in models:
            counts = [model["received"]["requests"], model["inference_count"]]
            counts += [model["fates"].get(fate, 0) for fate in fates]
            rows.append([model["name"], *(f"{count:,}" for count in counts)])
        return rows

    def index(self) -> list[dict[str, str]]:
        """Return the list of all models, in the form of Triton's model repository extension."""
        return [{"name": name, "version": "1", "state": "READY"} for name in self.models]

    def _routes(self) -> list[Route]:
        async def alive(request: HTTPRequest) -> Response:
            return Response()

        async def server(request: HTTPRequest) -> Response:
            from bidfmkd_fast import __version__

            extensions = ["binary_tensor_data", "model_configuration", "statistics"]
            return JSONResponse(
                {"name": "bidfmkd_fast", "version": __version__, "extensions": extensions}
            )

        async def index(request: HTTPRequest) -> Response:
            return JSONResponse(self.index())

        async def ready(request: HTTPRequest) -> Response:
            self._model(request.path_params["name"])
            return Response()

        async def metadata(request: HTTPRequest) -> Response:
            return JSONResponse(self._model(request.path_params["name"]).metadata())

        async def config(request: HTTPRequest) -> Response:
            return JSONResponse(self._model(request.path_params["name"]).config())

        async def statistics(request: HTTPRequest) -> Response:
            return JSONResponse(self.statistics(request.path_params.get("name")))

        async def infer(request: HTTPRequest) -> Response:
            return await self._model(request.path_params["name"]).infer(request, self._turn)

        routes = [
            Route("/v2", server),
            Route("/v2/health/live", alive),
            Route("/v2/health/ready", alive),
            Route("/v2/repository/index", index, methods=["POST"]),
            Route("/v2/models/stats", statistics),
        ]
        for model in ("/v2/models/{name}", "/v2/models/{name}/versions/1"):
            routes += [
                Route(model, metadata),
                Route(f"{model}/ready", ready),
                Route(f"{model}/config", config),
                Route(f"{model}/stats", statistics),
                Route(f"{model}/infer", infer, methods=["POST"]),
            ]
        return routes

    def _model(self, name: str) -> _Model:
        if name not in self.models:
            raise Refused(404, f"there is no model {name!r}; there are {', '.join(self.models)}")
        return self.models[name]


class _Model:
    """An API, its behaviour, and its counts, which only the event loop changes."""

    def __init__(self, api: BlackBox, behaviour: Behaviour, seed: int) -> None:
        spec = api.spec
        if behaviour.top_k is not None and behaviour.top_k > spec.n_classes:
            raise InputError(
                f"serve: {api.name} has {spec.n_classes} classes; got top_k={behaviour.top_k}"
            )
        self._api, self._behaviour, self._seed = api, behaviour, seed
        datatype = "UINT8" if behaviour.dtype == "uint8" else "FP32"
        self._input = TensorInfo("images", datatype, (-1, *spec.image_shape))
        n_scores = behaviour.top_k or spec.n_classes
        self._outputs = [TensorInfo("scores", "FP32", (-1, n_scores))]
        if behaviour.top_k is not None:
            self._outputs.append(TensorInfo("labels", "INT64", (-1, n_scores)))
        self._requests = self._images = self._scored_requests = self._scored_images = 0
        self._fates: Counter[str] = Counter()

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of the model, in the form of the protocol."""
        return {
            "name": self._api.name,
            "versions": ["1"],
            "platform": "bidfmkd_fast",
            "inputs": [self._input.metadata()],
            "outputs": [output.metadata() for output in self._outputs],
        }

    def config(self) -> dict[str, Any]:
        """Return the configuration of the model, in the form of Triton's extension."""
        most = self._behaviour.max_batch or 0
        return {
            "name": self._api.name,
            "platform": "bidfmkd_fast",
            "max_batch_size": most,
            "input": [self._input.config(batched=most > 0)],
            "output": [output.config(batched=most > 0) for output in self._outputs],
            "parameters": {name: {"string_value": text} for name, text in self._about().items()},
        }

    def _about(self) -> dict[str, str]:
        """Return what the protocol has no place for, as parameters of Triton's configuration."""
        spec = self._api.spec
        about = {"class_names": json.dumps(spec.class_names)} if spec.class_names else {}
        if self._behaviour.top_k is None:
            about["scores_kind"] = self._behaviour.scores_kind or spec.returned_kind
        return about

    def statistics(self) -> dict[str, Any]:
        """Return the counts of the model, as `Service.statistics` describes them."""
        answered = sum(self._fates[fate] for fate in (SERVED, "nan", "wrong_shape"))
        failed = sum(self._fates.values()) - answered
        return {
            "name": self._api.name,
            "version": "1",
            "inference_count": self._scored_images,
            "execution_count": self._scored_requests,
            "inference_stats": {"success": {"count": answered}, "fail": {"count": failed}},
            "received": {"requests": self._requests, "images": self._images},
            "fates": dict(self._fates),
        }

    async def infer(self, http: HTTPRequest, turn: CapacityLimiter) -> Response:
        """Answer an inference request, or let it meet the fate that the behaviour draws."""
        try:
            body = await http.body()
        except ClientDisconnect:  # the client ended while it sent, so nothing was asked
            return Response()
        number = self._requests
        self._requests += 1
        await asyncio.sleep(self._behaviour.latency)
        try:
            request = await to_thread.run_sync(
                self._read, body, http.headers.get(HEADER_LENGTH), limiter=turn
            )
            self._images += len(request.images)
            fate, response = await self._meet_fate(request, number, turn)
        except Refused as error:
            fate, response = "refused", _refusal(http, error)
        self._fates[fate] += 1
        if fate in ("dropped", "lost"):
            http.scope[ABORT]()
            while (await http.receive())["type"] != "http.disconnect":
                pass
        return response

    async def _meet_fate(
        self, request: Request, number: int, turn: CapacityLimiter
    ) -> tuple[str, Response]:
        fate = self._behaviour.fate(self._seed, self._api.name, number)
        if fate == "dropped":
            return fate, Response()
        if fate == "throttled":
            return fate, _error(
                429, "too many requests", {"Retry-After": str(self._behaviour.retry_after)}
            )
        if fate == "failed":
            draw = derive_seed(self._seed, "serving", self._api.name, "status", number)
            return fate, _error(_FAILURES[draw % len(_FAILURES)], "the service has a problem")
        try:
            outputs = await to_thread.run_sync(self._answer, request, number, limiter=turn)
        except InputError as error:  # images that are not finite
            raise Refused(400, str(error)) from None
        except Exception as error:  # for instance, the API is itself remote and does not answer
            return "broken", _error(500, str(error))
        self._scored_images += len(request.images)
        self._scored_requests += 1
        body, headers = write_answer(self._api.name, request, _spoiled(outputs, fate))
        return fate, Response(body, headers=headers)

    def _read(self, body: bytes, header_length: str | None) -> Request:
        request = read_request(
            body, header_length, self._input, [output.name for output in self._outputs]
        )
        most = self._behaviour.max_batch
        if most is not None and len(request.images) > most:
            raise Refused(
                400,
                f"{self._api.name} takes at most {most} images a request; "
                f"got {len(request.images)}",
            )
        return request

    def _answer(self, request: Request, number: int) -> dict[str, np.ndarray[Any, Any]]:
        images = torch.tensor(request.images)
        if self._behaviour.dtype == "uint8":
            images = self._api.spec.from_unit(images.float() / 255)
        scores = self._api(images)
        return self._behaviour.outputs(
            scores, self._api.spec.returned_kind, self._seed, self._api.name, number
        )


def _spoiled(
    outputs: dict[str, np.ndarray[Any, Any]], fate: str
) -> dict[str, np.ndarray[Any, Any]]:
    scores = outputs["scores"]
    if fate == "nan":
        scores = scores.copy()
        scores[0, 0] = np.nan
    elif fate == "wrong_shape":
        scores = scores[:, :-1]
    return {**outputs, "scores": scores}


def _error(status: int, reason: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": reason}, status, headers)


def _refusal(http: HTTPRequest, error: Exception) -> Response:
    return _error(getattr(error, "status", 500), str(error))
