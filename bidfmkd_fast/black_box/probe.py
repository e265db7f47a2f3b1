"""Find out with about two hundred queries what an API can be used for, before money is spent."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bidfmkd_fast.black_box.base import BlackBox
from bidfmkd_fast.black_box.first_answers import FirstAnswers
from bidfmkd_fast.black_box.signature import decimals_of, is_one_hot, kind_of
from bidfmkd_fast.black_box.spec import NOTHING_RECOVERED
from bidfmkd_fast.black_box.step_length import QUERIES, StepChoice, measure_steps
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, BudgetExhausted
from bidfmkd_fast.seeds import torch_generator

BATCHES = (1, 8, 32)  # images per call whose speed is measured
# Images that are shifted, and by how much, in levels of 8 bits. An API that rounds to 8 bits sees
# the same image after the first and the second shift.
_N_SHIFTED, _SHIFTS = 8, (0.05, 0.45, 2.05)
_LABELS_NOTE = f"it gives labels only: the survey learns from them, and {NOTHING_RECOVERED}"
PROBE_QUERIES = 1 + sum(BATCHES) + len(_SHIFTS) * _N_SHIFTED + QUERIES  # of one probe, at most


@dataclass(frozen=True)
class ProbeReport:
    """What a probe found. If the API failed, `problem` says why, and other fields may be missing.

    Attributes:
        name: name of the API.
        problem: why the API cannot be used; None if it can.
        scores_kind: what the scores look like: "logits", "probabilities", "log_probabilities" or
            "labels".
        stated_kind: the kind that the spec states.
        n_classes: number of scores per image.
        decimals: number of decimals to which the scores are rounded; None if they are not.
        deterministic: whether an image got the same scores twice, alone and in a batch.
        input_bits: 8, or 32 for anything finer; None if the scores are too coarse to show it.
        latency: seconds for one image.
        images_per_second: measured speed, by the number of images in a call.
        steps: which step lengths are usable; None if they were not measured.
        notes: what looks wrong in the answers of an API that can be used; each note may turn out to
            be unfounded.
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
        """Return what was found as a table of two columns, the first row the header."""
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
        decimals = "all" if self.decimals is None else str(self.decimals)
        rows = [
            [self.name, ""],
            ["usable", "yes" if self.problem is None else f"no: {self.problem}"],
            ["classes", str(self.n_classes)],
            ["scores", kind],
            *([] if self.stated_kind == "labels" else [["decimals", decimals]]),
            ["same answer twice", "yes" if self.deterministic else "no"],
            *([] if self.stated_kind == "labels" else [["input", bits]]),
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
    """Ask an API a few images and report what its answers can be used for.

    Raises:
        BudgetExhausted: the API's budget does not cover the probe. Nothing was asked, except if the
            cap on requests was reached.
        InputError: the spec does not fit the API.
    """
    if api.budget is not None and not api.budget.affords(
        PROBE_QUERIES, 0, api.price_of(PROBE_QUERIES)
    ):
        raise BudgetExhausted(
            f"probe: {api.name} would be asked {PROBE_QUERIES} queries, more than is left of "
            f"{api.budget}; raise the budget"
        )
    queries, requests = api.ledger.queries, api.ledger.requests
    found: dict[str, object] = {}
    problem = None
    # The report lists what looks wrong; no warning is needed.
    api.first_answers, kept = FirstAnswers(api.spec, silent=True), api.first_answers
    try:
        problem = _ask(api, seed, found)
    except (APIUnavailable, BadAnswer) as error:
        problem = str(error)
    finally:
        api.first_answers = kept
    spent = {"queries": api.ledger.queries - queries, "requests": api.ledger.requests - requests}
    found |= spent
    return ProbeReport(api.name, problem, stated_kind=api.spec.scores_kind, **found)  # type: ignore[arg-type]


def _ask(api: BlackBox, seed: int, found: dict[str, object]) -> str | None:
    """Probe the API and fill `found`; return why the API cannot be used, or None."""
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
    if spec.labels_only:
        # No small step changes a label, so step lengths and input precision cannot be measured.
        found["decimals"], notes = None, [_LABELS_NOTE]
    else:
        noise = (first - scores[:1]).abs().max().item()
        found["input_bits"] = _input_bits(api, images[:_N_SHIFTED], decimals_of(scores), noise)
        if found["scores_kind"] == "labels" or is_one_hot(scores, spec):
            return (
                "it answers labels without scores; a label alone gives no gradient; set "
                "scores_kind='labels' in its spec, from which the survey alone can learn"
            )
        found["steps"] = measure_steps(api, images[:4], seed=seed)
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
    """Draw soft random patterns `[n_images, C, H, W]` in the API's input range.

    Their values are exact in 8 bits.
    """
    channels, height, width = api.spec.image_shape
    generator = torch_generator(seed, "probe", "images")
    coarse = torch.rand(n_images, channels, min(5, height), min(5, width), generator=generator)
    soft = interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return api.spec.from_unit((soft * 255).round() / 255)


def _input_bits(api: BlackBox, images: Tensor, decimals: int | None, noise: float) -> int | None:
    """Return 8 if the API rounds its input to 8 bits, 32 if it does not, None if unclear.

    The images are shifted by less than half a level of 8 bits, and by two levels more. An API with
    8-bit input, whether it rounds or truncates, does not notice the small shifts. An API with
    float32 input whose scores are nearly flat changes its scores too little to see, which looks the
    same; so the result is None unless the large shift changes the scores visibly. The smallest
    visible change is the largest of: a unit of the last decimal, the rounding of float32, and twice
    the `noise` between two answers to the same image.
    """
    low, high = api.spec.input_range
    level = (high - low) / 255
    # Stay clear of the ends of the range, where a shift would be clamped.
    inside = images * 0.9 + 0.05 * (low + high)
    inside = ((inside - low) / level).round() * level + low
    first, same_byte, two_on = (api(inside + shift * level).double() for shift in _SHIFTS)
    rounding = 1e-5 * first.abs().max().item() if decimals is None else 10.0**-decimals
    resolved = max(rounding, 2 * noise)
    little, much = (
        (shifted - first).square().mean().sqrt().item() for shifted in (same_byte, two_on)
    )
    if much < 0.7 * resolved:
        return None
    return 8 if little <= max(0.1 * resolved, 0.02 * much) else 32
