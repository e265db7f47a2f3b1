"""Compare the first answers of an API with its spec: refuse the impossible, warn of the odd."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from bidfmkd_fast.black_box.answers import log_probabilities, usable
from bidfmkd_fast.black_box.signature import (
    SUM_TOLERANCE,
    are_probabilities,
    are_sorted,
    decimals_of,
    is_one_hot,
)
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import BadAnswer, PrecisionWarning, ServiceWarning

Suspicion = tuple[type[UserWarning], str]

LEAST_IMAGES = 4  # answers to fewer images say too little
# Steps of a recovery after which the user is warned if all images still get the same class. A good
# API may give one class to all of the first images, too: 4 of 6 Conv4 on glyphs did, and had a
# second class after 1 to 7 steps.
WATCHED_STEPS = 20
# How far rounding may carry a single probability or log-probability out of its range.
_BEYOND = 1e-2
_SORTED_CLASSES = 5  # with fewer classes, rows that are sorted by chance are not rare
_COMPARED = 64  # most images whose scores are compared
# Images are compared on a grid of this many cells a side, so that noise of single pixels, which
# many APIs average away, does not count as a difference.
_CELLS = 8
# Contrast from which images differ visibly: the standard deviation between images, root mean square
# over the cells, in unit range.
_DIFFERENT = 0.02
# The scores follow the images if the log-probabilities change by at least this many times the
# change of the cells. Measured on pools of Conv4 and ResNets (glyphs, CIFAR-FS), at images of
# untrained generators and of the probe: 1.5 to 24 times, and 0.08 to 0.35 after only four epochs of
# training. Most of the same models reach 0.001 to 0.06 (a single one 0.13) when they get 1/255 of
# the pixel values that they want.
_MOVES = 0.06

ONE_HOT = (
    "its answers are one-hot, a label without scores; a label does not change when an image moves "
    "a little, so they give no gradient, however long the steps; ask the service for probabilities "
    "or logits, unrounded, or set scores_kind='labels', from which the survey alone can learn"
)
SORTED = (
    "the scores of every image are sorted; a service that sorts them loses which class is which; "
    "have them in the order of class_names, or with their labels"
)


class FirstAnswers:
    """Looks at the first answers of an API, at each aspect once, without further queries.

    Safe under threads.

    Args:
        spec: the spec of the API.
        silent: keep the texts in `warned` only, instead of also warning.

    Attributes:
        warned: the texts of all warnings so far.
    """

    def __init__(self, spec: APISpec, silent: bool = False) -> None:
        self._spec, self._lock = spec, threading.Lock()
        self._silent, self.warned = silent, list[str]()
        self._kind_fits = self._looked = self._moves = self._varies = False

    @property
    def done(self) -> bool:
        """Return True if nothing is left to look at."""
        return self._kind_fits and self._looked and self._moves

    def check(self, answer: Tensor) -> None:
        """Raise BadAnswer if the first scores `[N, n_classes]` cannot be of the spec's kind."""
        if not self._kind_fits:
            if (reason := impossible(answer, self._spec)) is not None:
                raise BadAnswer(f"{self._spec.name}: {reason}")
            self._kind_fits = True

    def look(self, images: Tensor, answer: Tensor) -> list[Suspicion]:
        """Return what looks wrong in the scores `[N, n_classes]` of images `[N, C, H, W]`.

        Nothing looks wrong in labels: that they hardly change is their nature.
        """
        if self._spec.labels_only:
            return []
        if (self._looked and self._moves) or len(images) < LEAST_IMAGES:
            return []
        with self._lock:
            looked, self._looked = self._looked, True
            found = [] if looked else suspicions(answer, self._spec)
            if found and found[0][1] == ONE_HOT:
                self._moves = True  # one-hot answers explain why the scores do not move
            if not self._moves:
                verdict = hardly_moves(images, answer, self._spec)
                self._moves = verdict is not True
                found += [(ServiceWarning, verdict)] if isinstance(verdict, str) else []
        return found

    def warn(self, images: Tensor, answer: Tensor, stacklevel: int) -> None:
        """Warn once about each thing that looks wrong."""
        for category, text in self.look(images, answer):
            self.warned.append(text)
            if not self._silent:
                warnings.warn(f"{self._spec.name}: {text}", category, stacklevel=stacklevel + 1)

    def warn_of_one_class(self, matched: Sequence[float], stacklevel: int) -> None:
        """Warn, once, if all images of the first `WATCHED_STEPS` steps got the same class.

        Args:
            matched: per step of a recovery, the share of images that got their wanted class. As
                many images are wanted of each of the n classes, so a single class for all of them
                makes a share of exactly 1/n.
            stacklevel: stack level of the warning, as for `warnings.warn`.
        """
        if self._varies or len(matched) < WATCHED_STEPS:
            return
        self._varies = True
        if all(abs(share * self._spec.n_classes - 1) < 1e-4 for share in matched[:WATCHED_STEPS]):
            message = (
                f"{self._spec.name}: in the first {WATCHED_STEPS} steps it gave all images the "
                "same class; check its input_range, mean and std, and whether its scores are in "
                "the order of its classes"
            )
            warnings.warn(message, ServiceWarning, stacklevel=stacklevel + 1)


def check_range(spec: APISpec, low: float, high: float) -> None:
    """Raise BadAnswer if scores from `low` to `high` cannot be of the spec's kind."""
    kind = spec.returned_kind
    if kind == "probabilities" and (low < -_BEYOND or high > 1 + _BEYOND):
        wanted = "they must be from 0 to 1"
    elif kind == "log_probabilities" and high > _BEYOND:
        wanted = "none may be above 0"
    else:
        return
    raise BadAnswer(
        f"{spec.name}: its scores_kind is {spec.scores_kind!r}, so {wanted}; it answered "
        f"{low:.4g} to {high:.4g}; does it give logits?"
    )


def impossible(answer: Tensor, spec: APISpec) -> str | None:
    """Return why the sums of scores `[N, n_classes]` rule out the spec's kind; None if they do not.

    A sum may be off by what rounding to the spec's decimals, or to the decimals that the scores
    show, or half precision can change.
    """
    kind = spec.returned_kind
    if kind == "logits":
        return None
    scores = answer.detach().double()
    # Rounding changes a score by at most half a unit of its last decimal.
    decimals = spec.decimals if spec.decimals is not None else decimals_of(answer)
    half = 0.0 if decimals is None else 0.5 * 10.0**-decimals
    if kind == "log_probabilities":
        total = scores.logsumexp(1)
        worst = total[total.abs().argmax()].exp().item()
        if total.abs().max() > SUM_TOLERANCE + half:
            return (
                "its scores_kind is 'log_probabilities', whose exponentials sum to 1; those of an "
                f"answer sum to {worst:.4g}; does it give logits, or logarithms to another base?"
            )
        return None
    # The k highest of n probabilities hold at least k/n of their sum. Rounding may have lowered any
    # score, but only a score that is not 0 can have been raised.
    n_given = spec.n_classes if spec.top_k is None else spec.top_k
    total = scores.sum(1)
    too_low = total < n_given / spec.n_classes * (1 - SUM_TOLERANCE) - n_given * half
    too_high = total > 1 + SUM_TOLERANCE + half * (scores != 0).sum(1)
    if (too_low | too_high).any() or not total.any():
        worst = total[(too_low | too_high | (total == 0)).nonzero()[0, 0]].item()
        wanted = "1" if spec.top_k is None else f"{n_given / spec.n_classes:.3g} to 1"
        return (
            f"its scores_kind is {spec.scores_kind!r}, so the scores of an image must sum to "
            f"{wanted}; they sum to {worst:.4g}; does it score each class by itself (sigmoid), or "
            "give logits?"
        )
    return None


def suspicions(answer: Tensor, spec: APISpec) -> list[Suspicion]:
    """Return what looks wrong in scores `[N, n_classes]`: for each, a warning's class and text.

    The scores are those that the API gave, before `answers.usable`.
    """
    if is_one_hot(answer, spec):
        return [(PrecisionWarning, ONE_HOT)]  # explains everything else that would be found
    found: list[Suspicion] = []
    if spec.scores_kind == "logits" and are_probabilities(answer):
        found.append(
            (
                ServiceWarning,
                "its spec says logits, but its scores are not negative and sum to 1, as "
                "probabilities do; set scores_kind='probabilities'",
            )
        )
    if spec.top_k is not None and (most := int((answer != 0).sum(1).max())) > spec.top_k:
        found.append(
            (
                ServiceWarning,
                f"its spec says that it gives the scores of top_k={spec.top_k} classes, but it "
                f"gives {most}; set scores_kind='probabilities' if it gives all",
            )
        )
    if spec.decimals is not None:
        scores, unit = answer.detach().double(), 10.0**-spec.decimals
        if ((scores - scores.round(decimals=spec.decimals)).abs() > 0.1 * unit).any():
            found.append(
                (
                    ServiceWarning,
                    f"its spec says that its scores are rounded to decimals={spec.decimals}, but "
                    "they are finer; leave decimals out, or the digits beyond are lost",
                )
            )
    # In a top-k answer only k scores carry information; the others are all 0.
    n_given = min(spec.n_classes, spec.top_k or spec.n_classes)
    if n_given >= _SORTED_CLASSES and are_sorted(answer):
        found.append((ServiceWarning, SORTED))
    return found


def hardly_moves(images: Tensor, answer: Tensor, spec: APISpec) -> str | bool:
    """Compare how much scores `[N, n_classes]` and images `[N, C, H, W]` differ between images.

    Returns:
        the text of a warning if the images differ and the scores hardly do; False if the scores
        differ too; True if the images are too much alike to say.
    """
    rows = torch.linspace(0, len(images) - 1, min(_COMPARED, len(images))).long()
    pixels = spec.to_unit(images.detach()[rows.to(images.device)])
    cells = adaptive_avg_pool2d(
        pixels, (min(_CELLS, pixels.shape[-2]), min(_CELLS, pixels.shape[-1]))
    )
    contrast = cells.std(0).square().mean().sqrt().item()
    if not contrast >= _DIFFERENT:
        return True
    scores = usable(answer.detach()[rows.to(answer.device)].float(), spec)
    spread = log_probabilities(scores, spec).std(0).max().item()
    if spread >= _MOVES * contrast:
        return False
    low, high = spec.input_range
    other = "0 to 255" if high <= 8 else "0 to 1"
    return (
        f"its scores hardly change between images that differ (log-probabilities by {spread:.2g}, "
        f"pixels by {100 * contrast:.2g} % of the range); does it want other pixel values than "
        f"{low:g} to {high:g}, such as {other}? If so, set input_range"
    )
