"""What an API can give, from about two hundred queries, before more money is spent on it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bidfmkd_fast.black_box.base import BlackBox
from bidfmkd_fast.black_box.first_answers import FirstAnswers
from bidfmkd_fast.black_box.signature import decimals_of, is_one_hot, kind_of
from bidfmkd_fast.black_box.step_length import QUERIES, StepChoice, measure_steps
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, BudgetExhausted
from bidfmkd_fast.seeds import torch_generator

BATCHES = (1, 8, 32)  # images per call whose speed is measured
_N_SHIFTED, _SHIFTS = (
    8,
    (0.05, 0.45, 2.05),
)  # images; in levels of 8 bits: the second is the first there
PROBE_QUERIES = 1 + sum(BATCHES) + len(_SHIFTS) * _N_SHIFTED + QUERIES  # of one probe


@dataclass(frozen=True)
class ProbeReport:
    """What the API answered. Where it did not, `problem` says why and the rest is as little as was
    found.

    Attributes:
        name: of the API.
        problem: why it cannot be used; None when it can.
        scores_kind: what its scores look like: "logits", "probabilities", "log_probabilities" or
            "labels".
        stated_kind: what its spec says.
        decimals: to which the scores are rounded; None when they are not.
        deterministic: whether the same images got the same scores twice, alone and in a batch.
        input_bits: 8, or 32 for finer; None when the scores are too coarse to tell.
        latency: seconds for one image.
        images_per_second: by the number of images in a call.
        steps: what steps of several lengths tell; None when nothing did.
        notes: what looks wrong in the answers of an API that can be used; it may be right all the
            same.
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
    notes: tuple[str, ...] = ()
    queries: int = 0
    requests: int = 0

    def rows(self) -> list[list[str]]:
        """What was found, as a table of two columns with a header."""
        spent = ["spent", f"{self.queries:,} queries, {self.requests:,} requests"]
        if self.problem is not None and self.latency is None:
            return [[self.name, ""], ["usable", f"no: {self.problem}"], spent]
        kind = (
            self.scores_kind
            if self.scores_kind == self.stated_kind
            else f"{self.scores_kind}, not {self.stated_kind}"
        )
        bits = {8: "8 bits", 32: "finer than 8 bits", None: "the scores are too coarse to tell"}[
            self.input_bits
        ]
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
        rows += [
            [f"images/s, {n} a call", f"{rate:,.0f}"]
            for n, rate in (self.images_per_second or {}).items()
        ]
        if self.steps is not None:
            smallest = "none found" if self.steps.smallest is None else f"{self.steps.smallest:.3g}"
            rows += [
                ["smallest usable mu", smallest],
                ["suggested mu", f"{self.steps.suggested:.3g}"],
            ]
        return [*rows, spent]


def probe(api: BlackBox, *, seed: int = 0) -> ProbeReport:
    """Ask an API a few questions and tell what its answers can be used for.

    Raises:
        BudgetExhausted: its budget does not pay the probe; nothing was asked then, unless requests
            run out.
        InputError: its spec does not fit it.
    """
    if api.budget is not None and not api.budget.affords(
        PROBE_QUERIES, 0, api.price_of(PROBE_QUERIES)
    ):
        raise BudgetExhausted(
            f"probe: it asks {api.name} {PROBE_QUERIES} queries, more than is left of {api.budget}"
        )
    queries, requests = api.ledger.queries, api.ledger.requests
    found: dict[str, object] = {}
    problem = None
    api.first_answers, kept = (
        FirstAnswers(api.spec, silent=True),
        api.first_answers,
    )  # the report tells instead
    try:
        problem = _ask(api, seed, found)
    except (APIUnavailable, BadAnswer) as error:
        problem = str(error)
    finally:
        api.first_answers = kept
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
    noise = (first - scores[:1]).abs().max().item()
    found["input_bits"] = _input_bits(api, images[:_N_SHIFTED], decimals_of(scores), noise)
    if found["scores_kind"] == "labels" or is_one_hot(scores, spec):
        return "it answers labels without scores; a label alone gives no gradient"
    steps = measure_steps(api, images[:4], seed=seed)
    found["steps"] = steps
    if found["scores_kind"] not in (spec.scores_kind, "?"):
        return f"its scores look like {found['scores_kind']}; set scores_kind in its spec"
    notes = list(api.first_answers.warned)
    if len(set(scores.argmax(1).tolist())) == 1:
        name = spec.names[int(scores[0].argmax())]
        notes.append(
            f"all {n_most} random patterns get the same class, {name!r}; try it on real images"
        )
    found["notes"] = tuple(notes)
    return None


def sample_images(api: BlackBox, n_images: int, seed: int) -> Tensor:
    """Soft random patterns `[n_images, C, H, W]` in the API's input range, on the grid of 8-bit
    values.
    """
    channels, height, width = api.spec.image_shape
    generator = torch_generator(seed, "probe", "images")
    coarse = torch.rand(n_images, channels, min(5, height), min(5, width), generator=generator)
    soft = interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return api.spec.from_unit((soft * 255).round() / 255)


def _input_bits(api: BlackBox, images: Tensor, decimals: int | None, noise: float) -> int | None:
    """Shift images off the grid of 8-bit values, first by less than half a level, then by two
    levels and as much.

    An API of 8 bits, whether it rounds or cuts off, answers the small shifts alike. One of float32
    that is nearly flat answers them with a change that its scores do not resolve, which must not be
    taken for none: None then. What scores resolve is a unit of their last place, the rounding of
    float32, or twice the `noise` between two answers.
    """
    low, high = api.spec.input_range
    level = (high - low) / 255
    inside = images * 0.9 + 0.05 * (
        low + high
    )  # off the ends of the range, where a shift would be cut
    inside = ((inside - low) / level).round() * level + low
    first, same_byte, two_on = (api(inside + shift * level).double() for shift in _SHIFTS)
    rounding = 1e-5 * first.abs().max().item() if decimals is None else 10.0**-decimals
    resolved = max(rounding, 2 * noise)
    little, much = ((one - first).square().mean().sqrt().item() for one in (same_byte, two_on))
    if much < 0.7 * resolved:
        return None
    return 8 if little <= max(0.1 * resolved, 0.02 * much) else 32
