"""What the first answers of an API say of its spec: a kind of scores that is impossible, or one that looks wrong."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from bidfmkd_fast.black_box.answers import log_probabilities, usable
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import BadAnswer, PrecisionWarning, ServiceWarning

Suspicion = tuple[type[UserWarning], str]

LEAST_IMAGES = 4  # fewer answers tell too little
# Steps of a recovery after which an API that still gives one class is told of. At the first images even good APIs do so
# (4 of 6 Conv4 on glyphs); those had a second class after 1 to 7 steps.
WATCHED_STEPS = 20
_MOST_DECIMALS = 6  # float32 holds no more of a probability
_OFF = 0.05  # how far probabilities may be from a sum of 1, besides what rounding takes
_BEYOND = 1e-2  # how far rounding may carry a single probability or log-probability out of its range
_SORTED_CLASSES = 5  # with fewer, rows that are sorted by chance are not rare
_COMPARED = 64  # images whose scores are held against each other
# Images are held against each other on a grid of so many cells a side: pixel noise, which many APIs average away, is
# no difference.
_CELLS = 8
# Standard deviation between images, root mean square over cells in unit range, from which on they differ visibly.
_DIFFERENT = 0.02
# Change of the log-probabilities by change of the cells, from which on scores move. Measured on pools of Conv4 and
# ResNets (glyphs, CIFAR-FS), at images of untrained generators and the probe's: 1.5 to 24, and 0.08 to 0.35 after four
# epochs of training; 0.001 to 0.06 for most of the same models given 1/255 of what they want, 0.13 for one.
_MOVES = 0.06


class FirstAnswers:
    """Looks at the first answers of one API, once each, at no further query. Safe under threads.

    Args:
        spec: of the API.
        silent: keep in `told` what would be warned of.
    """

    def __init__(self, spec: APISpec, silent: bool = False) -> None:
        self._spec, self._lock = spec, threading.Lock()
        self._silent, self.told = silent, list[str]()
        self._kind_fits = self._looked = self._moves = self._varies = False

    @property
    def done(self) -> bool:
        """Whether nothing is left to look at."""
        return self._kind_fits and self._looked and self._moves

    def check(self, answer: Tensor) -> None:
        """Raise BadAnswer unless scores `[N, n_classes]`, the first, can be of the kind that the spec states."""
        if not self._kind_fits:
            if (reason := impossible(answer, self._spec)) is not None:
                raise BadAnswer(f"{self._spec.name}: {reason}")
            self._kind_fits = True

    def look(self, images: Tensor, answer: Tensor) -> list[Suspicion]:
        """Return what looks wrong in what the API told, scores `[N, n_classes]` of images `[N, C, H, W]`."""
        if (self._looked and self._moves) or len(images) < LEAST_IMAGES:
            return []
        with self._lock:
            looked, self._looked = self._looked, True
            found = [] if looked else suspicions(answer, self._spec)
            if found and found[0][1] == ONE_HOT:
                self._moves = True  # said already
            if not self._moves and (said := hardly_moves(images, answer, self._spec)) is not True:
                self._moves = True
                found += [(ServiceWarning, said)] if isinstance(said, str) else []
        return found

    def warn(self, images: Tensor, answer: Tensor, stacklevel: int) -> None:
        """Warn of what looks wrong, each once."""
        for category, text in self.look(images, answer):
            self.told.append(text)
            if not self._silent:
                warnings.warn(f"{self._spec.name}: {text}", category, stacklevel=stacklevel + 1)

    def warn_of_one_class(self, matched: Sequence[float], stacklevel: int) -> None:
        """Warn, once, where each of the first `WATCHED_STEPS` steps gave exactly 1/n of the images its wanted class.

        As many images are wanted of each of the n classes, so this is what one class for all of them comes to.
        """
        if self._varies or len(matched) < WATCHED_STEPS:
            return
        self._varies = True
        if all(abs(share * self._spec.n_classes - 1) < 1e-4 for share in matched[:WATCHED_STEPS]):
            message = (
                f"{self._spec.name}: in the first {WATCHED_STEPS} steps it gave all images the same class; check its "
                "input_range, mean and std, and whether its scores are in the order of its classes"
            )
            warnings.warn(message, ServiceWarning, stacklevel=stacklevel + 1)


def check_range(spec: APISpec, low: float, high: float) -> None:
    """Raise BadAnswer unless scores from `low` to `high` can be of the kind that the spec states."""
    kind = spec.returned_kind
    if kind == "probabilities" and (low < -_BEYOND or high > 1 + _BEYOND):
        wanted = "they must be from 0 to 1"
    elif kind == "log_probabilities" and high > _BEYOND:
        wanted = "none may be above 0"
    else:
        return
    raise BadAnswer(
        f"{spec.name}: its scores_kind is {spec.scores_kind!r}, so {wanted}; it answered {low:.4g} to {high:.4g}; "
        "does it give logits?"
    )


def impossible(answer: Tensor, spec: APISpec) -> str | None:
    """Return why scores `[N, n_classes]` cannot be of the kind that the spec states, by their sums; None if they can.

    Rounding to the last place that the spec states or the scores show may move a sum, and so may half precision.
    """
    kind = spec.returned_kind
    if kind == "logits":
        return None
    scores = answer.detach().double()
    # Half a unit of the last place, which rounding takes from a score at most.
    decimals = spec.decimals if spec.decimals is not None else decimals_of(answer)
    half = 0.0 if decimals is None else 0.5 * 10.0**-decimals
    if kind == "log_probabilities":
        total = scores.logsumexp(1)
        worst = total[total.abs().argmax()].exp().item()
        if total.abs().max() > _OFF + half:
            return (
                f"its scores_kind is 'log_probabilities', whose exponentials sum to 1; those of an answer sum to "
                f"{worst:.4g}; does it give logits, or logarithms to another base?"
            )
        return None
    # The k highest of n probabilities hold k/n of their sum at least. Any score may have been rounded down, but only
    # one that is not 0 up.
    told = spec.n_classes if spec.top_k is None else spec.top_k
    total = scores.sum(1)
    too_low = total < told / spec.n_classes * (1 - _OFF) - told * half
    too_high = total > 1 + _OFF + half * (scores != 0).sum(1)
    if (too_low | too_high).any() or not total.any():
        worst = total[(too_low | too_high | (total == 0)).nonzero()[0, 0]].item()
        wanted = "1" if spec.top_k is None else f"{told / spec.n_classes:.3g} to 1"
        return (
            f"its scores_kind is {spec.scores_kind!r}, so the scores of an image must sum to {wanted}; they sum to "
            f"{worst:.4g}; does it score each class by itself (sigmoid), or give logits?"
        )
    return None


def suspicions(answer: Tensor, spec: APISpec) -> list[Suspicion]:
    """Return what looks wrong in scores `[N, n_classes]` as an API told them: the warning's class and its text."""
    if is_one_hot(answer, spec):
        return [(PrecisionWarning, ONE_HOT)]  # which explains whatever else would be found
    found: list[Suspicion] = []
    if spec.scores_kind == "logits" and _are_probabilities(answer):
        told = "its spec says logits, but its scores are not negative and sum to 1, as probabilities do"
        found.append((ServiceWarning, f"{told}; set scores_kind='probabilities'"))
    if spec.top_k is not None and (most := int((answer != 0).sum(1).max())) > spec.top_k:
        told = f"its spec says that it tells top_k={spec.top_k} classes, but it tells {most}"
        found.append((ServiceWarning, f"{told}; set scores_kind='probabilities' if it tells all"))
    if spec.decimals is not None:
        scores, unit = answer.detach().double(), 10.0**-spec.decimals
        if ((scores - scores.round(decimals=spec.decimals)).abs() > 0.1 * unit).any():
            told = f"its spec says that its scores are rounded to decimals={spec.decimals}, but they are finer"
            found.append((ServiceWarning, f"{told}; leave decimals out, or the digits beyond are lost"))
    # Of a top-k answer only k scores say something; the others are equal, which no sorting made.
    told_classes = min(spec.n_classes, spec.top_k or spec.n_classes)
    if told_classes >= _SORTED_CLASSES and are_sorted(answer):
        found.append((ServiceWarning, SORTED))
    return found


ONE_HOT = (
    "its answers are one-hot, a label without scores; a label does not change when an image moves a little, so they "
    "give no gradient, however long the steps; ask the service for probabilities or logits, unrounded"
)
SORTED = (
    "the scores of every image are sorted; a service that sorts them loses which class is which; have them in the "
    "order of class_names, or with their labels"
)


def hardly_moves(images: Tensor, answer: Tensor, spec: APISpec) -> str | bool:
    """Return what to say where scores `[N, n_classes]` hardly differ between images `[N, C, H, W]` that do.

    False where the scores differ too, and True where the images are too much alike to tell.
    """
    rows = torch.linspace(0, len(images) - 1, min(_COMPARED, len(images))).long()
    pixels = spec.to_unit(images.detach()[rows.to(images.device)])
    cells = adaptive_avg_pool2d(pixels, (min(_CELLS, pixels.shape[-2]), min(_CELLS, pixels.shape[-1])))
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
        f"its scores hardly change between images that differ (log-probabilities by {spread:.2g}, pixels by "
        f"{100 * contrast:.2g} % of the range); does it want other pixel values than {low:g} to {high:g}, such as "
        f"{other}? If so, set input_range"
    )


def is_one_hot(scores: Tensor, spec: APISpec) -> bool:
    """Return whether each row of `[N, n_classes]` tells one class, and of all others nothing or the floor of 0."""
    if spec.returned_kind == "log_probabilities":
        scores = scores.exp()
    floor = 0.0 if spec.decimals is None else 0.5 * 10.0**-spec.decimals
    top = scores == 1
    return bool((top.sum(1) == 1).all() and (top | (scores == 0) | ((scores - floor).abs() < 1e-9)).all())


def _are_probabilities(answer: Tensor) -> bool:
    """Return whether no score is negative and rows sum to 1, as closely as rounding lets them."""
    scores = answer.detach().double()
    decimals = decimals_of(answer)
    rounding = 0.0 if decimals is None else 0.5 * 10.0**-decimals * scores.shape[1]
    return bool((scores >= 0).all() and (scores.sum(1) - 1).abs().max() < min(_OFF, 2e-3 + rounding))


def are_sorted(scores: Tensor) -> bool:
    """Return whether all rows of `[N, n_classes]` fall, or all rise, from the first class to the last."""
    steps = scores.diff(dim=1)
    moving = bool((scores.amax(1) > scores.amin(1)).all())
    return moving and bool((steps <= 0).all() or (steps >= 0).all())


def kind_of(scores: Tensor) -> str:
    """What scores `[N, n_classes]` look like."""
    zero_or_one = ((scores == 0) | (scores == 1)).all() and bool((scores.sum(1) == 1).all())
    if zero_or_one:
        return "labels"
    if (scores >= 0).all() and (scores.sum(1) - 1).abs().max() < _OFF:
        return "probabilities"
    if (scores <= 1e-6).all() and scores.double().logsumexp(1).abs().max() < _OFF:
        return "log_probabilities"
    return "logits"


def decimals_of(scores: Tensor) -> int | None:
    """The fewest decimals that hold all of the scores; None when float32 is needed."""
    values = scores.detach().double()
    for decimals in range(1, _MOST_DECIMALS + 1):
        rounded = values.round(decimals=decimals)
        # A rounded number is off by float32's own rounding at most; half a unit of the last place is our floor for 0.
        at_floor = (values - 0.5 * 10.0**-decimals).abs() < 1e-9
        if (((values - rounded).abs() <= 1e-7 * values.abs().clamp(min=1e-3)) | at_floor).all():
            return decimals
    return None
