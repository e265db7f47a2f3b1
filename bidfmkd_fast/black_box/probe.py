"""What an API can give, from about two hundred queries, before more money is spent on it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bidfmkd_fast.black_box.base import BlackBox
from bidfmkd_fast.black_box.resolution import QUERIES, StepChoice, log_probabilities, measure_steps
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, BudgetExhausted
from bidfmkd_fast.seeds import torch_generator

BATCHES = (1, 8, 32)  # images per call whose speed is measured
PROBE_QUERIES = 1 + sum(BATCHES) + 3 * 4 + QUERIES  # of one probe
_MOST_DECIMALS = 6  # float32 holds no more of a probability
_SHIFT = 0.3  # of a level of 8 bits: lost in 8 bits, kept in float32


@dataclass(frozen=True)
class ProbeReport:
    """What the API answered. Where it did not, `problem` says why and the rest is as little as was found.

    Attributes:
        name: of the API.
        problem: why it cannot be used; None when it can.
        scores_kind: what its scores look like: "logits", "probabilities", "log_probabilities" or "labels".
        stated_kind: what its spec says.
        decimals: to which the scores are rounded; None when they are not.
        deterministic: whether the same images got the same scores twice, alone and in a batch.
        input_bits: 8, or 32 for finer; None when the scores are too coarse to tell.
        latency: seconds for one image.
        images_per_second: by the number of images in a call.
        steps: what steps of several lengths tell; None when nothing did.
        queries, requests: what the probe cost.
    """

    name: str
    problem: str | None
    scores_kind: str = "?"
    stated_kind: str = "?"
    n_classes: int = 0
    decimals: int | None = None
    deterministic: bool | None = None
    input_bits: int | None = None
    latency: float | None = None
    images_per_second: dict[int, float] | None = None
    steps: StepChoice | None = None
    queries: int = 0
    requests: int = 0

    def rows(self) -> list[list[str]]:
        """What was found, as a table of two columns with a header."""
        spent = ["spent", f"{self.queries:,} queries, {self.requests:,} requests"]
        if self.problem is not None and self.latency is None:
            return [[self.name, ""], ["usable", f"no: {self.problem}"], spent]
        kind = (
            self.scores_kind if self.scores_kind == self.stated_kind else f"{self.scores_kind}, not {self.stated_kind}"
        )
        bits = {8: "8 bits", 32: "finer than 8 bits", None: "the scores are too coarse to tell"}[self.input_bits]
        rows = [
            [self.name, ""],
            ["usable", "yes" if self.problem is None else f"no: {self.problem}"],
            ["classes", str(self.n_classes)],
            ["scores", kind],
            ["decimals", "all" if self.decimals is None else str(self.decimals)],
            ["same answer twice", "yes" if self.deterministic else "no"],
            ["input", bits],
            ["latency", f"{1000 * (self.latency or 0):.1f} ms"],
        ]
        rows += [[f"images/s, {n} a call", f"{rate:,.0f}"] for n, rate in (self.images_per_second or {}).items()]
        if self.steps is not None:
            smallest = "none found" if self.steps.smallest is None else f"{self.steps.smallest:.3g}"
            rows += [["smallest usable mu", smallest], ["suggested mu", f"{self.steps.suggested:.3g}"]]
        return [*rows, spent]


def probe(api: BlackBox, *, seed: int = 0) -> ProbeReport:
    """Ask an API a few questions and tell what its answers can be used for.

    Raises:
        BudgetExhausted: its budget does not pay the probe; nothing was asked then, unless requests run out.
        InputError: its spec does not fit it.
    """
    if api.budget is not None and not api.budget.affords(PROBE_QUERIES, 0, api._price(PROBE_QUERIES)):
        raise BudgetExhausted(f"probe: it asks {api.name} {PROBE_QUERIES} queries, more than is left of {api.budget}")
    queries, requests = api.ledger.queries, api.ledger.requests
    found: dict[str, object] = {}
    problem = None
    try:
        problem = _ask(api, seed, found)
    except (APIUnavailable, BadAnswer) as error:
        problem = str(error)
    spent = {"queries": api.ledger.queries - queries, "requests": api.ledger.requests - requests}
    return ProbeReport(api.name, problem, stated_kind=api.spec.scores_kind, **found, **spent)  # type: ignore[arg-type]


def _ask(api: BlackBox, seed: int, found: dict[str, object]) -> str | None:
    """Fill `found`; what speaks against the API, or None."""
    spec, n_most = api.spec, BATCHES[-1]
    images = sample_images(api, n_most, seed)
    api(images[:1])  # connections, metadata, warm-up
    rates, first = {}, torch.empty(0)
    for n_images in BATCHES:
        started = time.perf_counter()
        scores = api(images[:n_images])
        seconds = time.perf_counter() - started
        rates[n_images] = n_images / seconds
        first = scores if n_images == BATCHES[0] else first
    found |= {"n_classes": scores.shape[1], "latency": 1 / rates[1], "images_per_second": rates}
    found["scores_kind"] = spec.scores_kind if spec.scores_kind == "top_k" else kind_of(scores)
    found["decimals"] = spec.decimals if spec.scores_kind == "top_k" else decimals_of(scores)
    found["deterministic"] = torch.allclose(first, scores[:1], rtol=1e-5, atol=1e-6)
    found["input_bits"] = _input_bits(api, images[:4])
    if found["scores_kind"] == "labels":
        return "it answers labels without scores; a label alone gives no gradient"
    steps = measure_steps(api, images[:4], seed=seed)
    found["steps"] = steps
    if found["scores_kind"] not in (spec.scores_kind, "?"):
        return f"its scores look like {found['scores_kind']}; set scores_kind in its spec"
    return None


def sample_images(api: BlackBox, n_images: int, seed: int) -> Tensor:
    """Soft random patterns `[n_images, C, H, W]` in the API's input range, on the grid of 8-bit values."""
    channels, height, width = api.spec.image_shape
    generator = torch_generator(seed, "probe", "images")
    coarse = torch.rand(n_images, channels, min(5, height), min(5, width), generator=generator)
    soft = interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return api.spec.from_unit((soft * 255).round() / 255)


def kind_of(scores: Tensor) -> str:
    """What scores `[N, n_classes]` look like."""
    zero_or_one = ((scores == 0) | (scores == 1)).all() and bool((scores.sum(1) == 1).all())
    if zero_or_one:
        return "labels"
    if (scores >= 0).all() and (scores.sum(1) - 1).abs().max() < 0.05:
        return "probabilities"
    if (scores <= 1e-6).all() and scores.double().logsumexp(1).abs().max() < 0.05:
        return "log_probabilities"
    return "logits"


def decimals_of(scores: Tensor) -> int | None:
    """The fewest decimals that hold all of the scores; None when float32 is needed."""
    values = scores.double()
    for decimals in range(1, _MOST_DECIMALS + 1):
        rounded = values.round(decimals=decimals)
        # A rounded number is off by float32's own rounding at most; half a unit of the last place is our floor for 0.
        at_floor = (values - 0.5 * 10.0**-decimals).abs() < 1e-9
        if (((values - rounded).abs() <= 1e-7 * values.abs().clamp(min=1e-3)) | at_floor).all():
            return decimals
    return None


def _input_bits(api: BlackBox, images: Tensor) -> int | None:
    """Shift images on the grid of 8-bit values by less than half a level, and by two levels."""
    low, high = api.spec.input_range
    level = (high - low) / 255
    inside = images * 0.9 + 0.05 * (low + high)  # off the ends of the range, where a shift would be cut
    inside = ((inside - low) / level).round() * level + low
    answers = [log_probabilities(api(inside + shift * level), api.spec) for shift in (0.0, _SHIFT, 2.0)]
    if torch.allclose(answers[0], answers[2], rtol=1e-5, atol=1e-5):
        return None
    return 8 if torch.allclose(answers[0], answers[1], rtol=1e-5, atol=1e-5) else 32
