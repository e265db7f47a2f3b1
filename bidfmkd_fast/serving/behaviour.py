"""Define how a served model answers and fails, by seed, model and number of the request."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bidfmkd_fast.black_box.spec import MOST_DECIMALS
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.yaml_files import read_yaml
from bidfmkd_fast.ops.scores import SCORES_KINDS, as_scores
from bidfmkd_fast.seeds import derive_seed, torch_generator
from bidfmkd_fast.settings import check_least, check_most, check_types, named

SERVED = "served"
FATES = ("throttled", "failed", "dropped", "lost", "nan", "wrong_shape", SERVED)
_DRIFT_UNIT = 1000  # requests


@dataclass(frozen=True)
class Behaviour:
    """How a model answers and fails. By default it answers what the API answers, without faults.

    Args:
        scores_kind: logits, probabilities or log_probabilities; None for what the API answers.
        decimals: decimals to which scores are rounded, at most 20; None for all of them.
        top_k: answer the probabilities of the k likeliest classes only, with their `labels`; None
            for all classes.
        dtype: dtype of the images: float32 in the API's input range, or uint8.
        max_batch: most images of a request; a larger request is refused with 400. None for no
            limit.
        latency: seconds before each answer.
        throttled: share of requests answered with 429.
        storm_every: requests in a cycle that ends with a storm of 429; 0 for no storms.
        storm_length: requests in a storm.
        retry_after: seconds to wait that a 429 asks for.
        failed: share of requests answered with 500, 502, 503 or 504.
        dropped: share of requests whose connection is closed unanswered; their images are not
            scored.
        lost: share of requests whose connection is closed once their images are scored.
        nan: share of answers with a NaN.
        wrong_shape: share of answers that lack a class.
        drift: how far a logit has moved after 1000 requests (standard deviation over classes).

    Raises:
        InputError: a value is out of range, or two values contradict each other.
    """

    scores_kind: str | None = None
    decimals: int | None = None
    top_k: int | None = None
    dtype: str = "float32"
    max_batch: int | None = None
    latency: float = 0.0
    throttled: float = 0.0
    storm_every: int = 0
    storm_length: int = 0
    retry_after: int = 1
    failed: float = 0.0
    dropped: float = 0.0
    lost: float = 0.0
    nan: float = 0.0
    wrong_shape: float = 0.0
    drift: float = 0.0

    def __post_init__(self) -> None:
        least = {"decimals": 0, "top_k": 1, "max_batch": 1}
        least |= {"storm_every": 0, "storm_length": 0, "retry_after": 0}
        with named("serve"):
            check_types(self)
            check_least(
                self, **{k: low for k, low in least.items() if getattr(self, k) is not None}
            )
            if self.decimals is not None:
                check_most(self, decimals=MOST_DECIMALS)
        if self.scores_kind is not None and self.scores_kind not in SCORES_KINDS:
            raise InputError(
                f"serve: scores_kind must be one of {', '.join(SCORES_KINDS)}; "
                f"got {self.scores_kind!r}"
            )
        if self.top_k is not None and self.scores_kind not in (None, "probabilities"):
            raise InputError(
                f"serve: top_k answers probabilities; got scores_kind {self.scores_kind!r} with it"
            )
        if self.dtype not in ("float32", "uint8"):
            raise InputError(f"serve: dtype must be float32 or uint8; got {self.dtype!r}")
        if self.storm_length > self.storm_every:
            raise InputError(
                f"serve: storm_length must be at most storm_every={self.storm_every}; "
                f"got {self.storm_length}"
            )
        for name in ("latency", "drift", *FATES[:-1]):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(
                    f"serve: {name} must be finite and at least 0; got {getattr(self, name)!r}"
                )
        shares = sum(getattr(self, name) for name in FATES[:-1])
        if shares > 1 + 1e-9:
            raise InputError(
                f"serve: the shares {', '.join(FATES[:-1])} must sum to at most 1; got {shares:g}"
            )

    def fate(self, seed: int, model: str, number: int) -> str:
        """Return what becomes of request `number` (from 0) of a model: one of `FATES`."""
        if self.storm_every and number % self.storm_every >= self.storm_every - self.storm_length:
            return "throttled"
        draw = derive_seed(seed, "serving", model, "fate", number) / 2**63
        for name in FATES[:-1]:
            draw -= getattr(self, name)
            if draw < 0:
                return name
        return SERVED

    def outputs(
        self, scores: Tensor, kind: str, seed: int, model: str, number: int
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return the outputs by name for an API's scores `[N, n_classes]` of kind `kind`.

        Faults come later. The outputs are `scores` float32 `[N, n_classes]`; with `top_k` they are
        `scores` `[N, k]`, highest first, and `labels` int64 `[N, k]`.
        """
        wanted = "probabilities" if self.top_k is not None else self.scores_kind or kind
        if wanted != kind or self.drift:
            logits = scores.log() if kind == "probabilities" else scores
            if self.drift:
                direction = torch.randn(
                    scores.shape[1], generator=torch_generator(seed, "serving", model, "drift")
                )
                logits = logits + self.drift * number / _DRIFT_UNIT * direction
            scores = as_scores(logits, wanted)
        if self.top_k is None:
            return {"scores": self._rounded(scores)}
        best = scores.topk(self.top_k, dim=1)  # before rounding, which makes ties
        return {"scores": self._rounded(best.values), "labels": best.indices.numpy()}

    def _rounded(self, scores: Tensor) -> np.ndarray[Any, Any]:
        if self.decimals is not None:
            scores = scores.double().round(decimals=self.decimals).float()
        return scores.numpy()


def behaviours_of(
    names: list[str], common: Behaviour, file: str | Path | None
) -> dict[str, Behaviour]:
    """Return the behaviour of each model: `common`, changed by what a YAML file says for its name.

    An entry of the file looks like `api_003: {nan: 1.0}`.

    Raises:
        InputError: the file cannot be read, or names another model or an unknown setting.
    """
    if file is None:
        return dict.fromkeys(names, common)
    content = read_yaml(file, "serve")
    if not isinstance(content, dict) or not all(
        isinstance(settings, dict) for settings in content.values()
    ):
        raise InputError(
            f"serve: {file} must map model names to settings, such as `{names[0]}: {{nan: 1.0}}`"
        )
    known = {field.name for field in fields(Behaviour)}
    for name, settings in content.items():
        if name not in names:
            raise InputError(
                f"serve: {file} names the model {name!r}; the pool has {', '.join(names)}"
            )
        if unknown := sorted(map(str, set(settings) - known)):
            raise InputError(
                f"serve: {file}, {name}: unknown setting {unknown[0]!r}; "
                f"known: {', '.join(sorted(known))}"
            )
    try:
        return {name: replace(common, **content.get(name, {})) for name in names}
    except InputError as error:
        raise InputError(f"serve: {file}: {str(error).removeprefix('serve: ')}") from None
