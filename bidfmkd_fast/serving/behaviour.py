"""What a served model tells, and what goes wrong with it: a pure function of seed, model and request number."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.yaml_files import read_yaml
from bidfmkd_fast.seeds import derive_seed, torch_generator

SERVED = "served"
SCORES_KINDS = ("logits", "probabilities", "log_probabilities")
FATES = ("throttled", "failed", "dropped", "lost", "nan", "wrong_shape", SERVED)
_DRIFT_UNIT = 1000  # requests


@dataclass(frozen=True)
class Behaviour:
    """How one model answers. The default is a well-behaved service of what the API answers.

    Args:
        scores_kind: logits, probabilities or log_probabilities; None for what the API answers.
        decimals: decimals that its scores are rounded to; None for all of them.
        top_k: tell only the k likeliest classes, as probabilities and their `labels`; None for all
            classes.
        dtype: of the images it takes: float32 in the API's input range, or uint8.
        max_batch: images that one request may hold; a larger one is refused with 400. None for no
            limit.
        latency: seconds before each answer.
        throttled: share of requests answered with 429.
        storm_every: length of a cycle of requests that ends with a storm of 429; 0 for none.
        storm_length: requests in a storm.
        retry_after: seconds that a 429 asks to wait.
        failed: share of requests answered with 500, 502, 503 or 504.
        dropped: share of requests whose connection is closed unanswered; their images are not
            scored.
        lost: share of requests whose connection is closed once their images are scored.
        nan: share of answers with a NaN.
        wrong_shape: share of answers that lack a class.
        drift: how far a logit has moved after 1000 requests (standard deviation over classes).

    Raises:
        InputError: a value is out of range, or two of them do not go together.
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
        if self.scores_kind is not None and self.scores_kind not in SCORES_KINDS:
            raise InputError(
                f"serve: scores_kind must be one of {', '.join(SCORES_KINDS)}; got {self.scores_kind!r}"
            )
        if self.top_k is not None and self.scores_kind not in (None, "probabilities"):
            raise InputError(
                f"serve: top_k tells probabilities; got scores_kind {self.scores_kind!r} with it"
            )
        if self.dtype not in ("float32", "uint8"):
            raise InputError(f"serve: dtype must be float32 or uint8; got {self.dtype!r}")
        counts = (
            ("decimals", 0),
            ("top_k", 1),
            ("max_batch", 1),
            ("storm_every", 0),
            ("storm_length", 0),
        )
        for name, least in (*counts, ("retry_after", 0)):
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or value < least
            ):
                raise InputError(f"serve: {name} must be an int of at least {least}; got {value!r}")
        if self.storm_length > self.storm_every:
            raise InputError(
                f"serve: storm_length {self.storm_length} is more than storm_every {self.storm_every}"
            )
        for name in ("latency", "drift", *FATES[:-1]):
            value = getattr(self, name)
            if (
                not isinstance(value, (int, float))
                or isinstance(value, bool)
                or not 0 <= value < math.inf
            ):
                raise InputError(
                    f"serve: {name} must be a finite number of at least 0; got {value!r}"
                )
        shares = sum(getattr(self, name) for name in FATES[:-1])
        if shares > 1 + 1e-9:
            raise InputError(
                f"serve: the shares {', '.join(FATES[:-1])} must sum to at most 1; got {shares:g}"
            )

    def fate(self, seed: int, model: str, number: int) -> str:
        """What becomes of request `number` (from 0) of a model: one of `FATES`."""
        if self.storm_every and number % self.storm_every >= self.storm_every - self.storm_length:
            return "throttled"
        draw = derive_seed(seed, "serving", model, "fate", number) / 2**63
        for name in FATES[:-1]:
            draw -= getattr(self, name)
            if draw < 0:
                return name
        return SERVED

    def tell(
        self, scores: Tensor, kind: str, seed: int, model: str, number: int
    ) -> dict[str, np.ndarray[Any, Any]]:
        """The named outputs for an API's scores `[N, n_classes]` of that kind, before anything goes
        wrong with them.

        `scores` `[N, n_classes]` float32; with `top_k` they are `[N, k]`, highest first, with
        `labels` int64 `[N, k]`.
        """
        wanted = "probabilities" if self.top_k is not None else self.scores_kind or kind
        if wanted != kind or self.drift:
            logits = scores.log() if kind == "probabilities" else scores
            if self.drift:
                direction = torch.randn(
                    scores.shape[1], generator=torch_generator(seed, "serving", model, "drift")
                )
                logits = logits + self.drift * number / _DRIFT_UNIT * direction
            scores = {"logits": logits, "probabilities": logits.softmax(1)}.get(
                wanted, logits.log_softmax(1)
            )
        if self.top_k is None:
            return {"scores": self._rounded(scores)}
        best = scores.topk(self.top_k, dim=1)  # of the exact scores: rounding makes ties
        return {"scores": self._rounded(best.values), "labels": best.indices.numpy()}

    def _rounded(self, scores: Tensor) -> np.ndarray[Any, Any]:
        if self.decimals is not None:
            scores = scores.double().round(decimals=self.decimals).float()
        return scores.numpy()


def behaviours_of(
    names: list[str], common: Behaviour, file: str | Path | None
) -> dict[str, Behaviour]:
    """The behaviour of each model: `common`, with what the YAML `file` says for its name (`api_003:
    {nan: 1.0}`).

    Raises `InputError` when the file cannot be read, or names another model or an unknown setting.
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
                f"serve: {file}, {name}: unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
    try:
        return {name: replace(common, **content.get(name, {})) for name in names}
    except InputError as error:
        raise InputError(f"serve: {file}: {str(error).removeprefix('serve: ')}") from None
