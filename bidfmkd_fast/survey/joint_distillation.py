"""Distil the answers of all APIs into one backbone with a head per API."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bidfmkd_fast import ops
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta.stacked import can_stack
from bidfmkd_fast.models.head import zero_head
from bidfmkd_fast.runtime.captured_step import RepeatedStep
from bidfmkd_fast.runtime.training_state import Trained, restore_tensors, tensors_of
from bidfmkd_fast.seeds import seeded, torch_generator
from bidfmkd_fast.survey.backbone import features_of
from bidfmkd_fast.survey.config import SurveyConfig
from bidfmkd_fast.survey.jitter import N_DRAWS, jittered

# The probability that a label stands for. A label says nothing of the other classes, and heads that
# are driven to probability 1 stop learning from the pictures that they know.
LABEL_SHARE = 0.92


# Makes the context in which a step is taken. Its argument returns the state of the distillation
# as it is between two steps.
Whole = Callable[[Callable[[], dict[str, Tensor]]], AbstractContextManager[None]]


class Surveyed(NamedTuple):
    """The answers of one API.

    Attributes:
        scores: `[n_images, n_classes]`.
        answered: bool `[n_images]`, which rows hold an answer.
        kind: kind of the scores, one of `ops.scores.SCORES_KINDS`, or "labels" for one-hot scores.
    """

    scores: Tensor
    answered: Tensor
    kind: str


class Epoch(NamedTuple):
    """What one pass over the pictures has given: means over its steps and the APIs.

    Agreement is the share of pictures to which head and API give the same class. `by_api` has it
    for each API, in the order of the APIs.
    """

    loss: float
    agreement: float
    by_api: tuple[float, ...]


def distil_jointly(
    module: nn.Module,
    pictures: Tensor,
    surveyed: Sequence[Surveyed],
    config: SurveyConfig,
    seed: int,
    heads: nn.ModuleList | None = None,
    begun: Mapping[str, Tensor] | None = None,
    whole: Whole = lambda state: nullcontext(),
) -> Iterator[Epoch]:
    """Train the features of `module` in place so that linear heads on them answer as the APIs do.

    The loss of a step is the mean over the APIs of `ops.kd_loss` (KL at temperature T) on the
    pictures of the batch that the API has answered. For an API that gives labels only it is the
    cross entropy, at temperature 1, to `LABEL_SHARE` on the label and the rest spread evenly over
    the other classes. Afterwards the module's last linear layer is 0. The same arguments give the
    same bits on one CPU type.

    Args:
        module: the meta-model, as `backbone.check_backbone` wants it.
        pictures: uint8 `[n_images, C, H, W]`, on the device of `module`.
        surveyed: the answers of the APIs, scores on the device of `module`; the APIs may differ in
            their number of classes.
        config: the settings.
        seed: seed of heads, order and jitter.
        heads: the heads to train, from `new_heads`; without them they are made and dropped.
        begun: the state of an earlier call with the same arguments, which is continued; heads and
            module are brought to it.
        whole: makes the context in which a step is taken. It is given a function that returns the
            state after the last step that was finished.

    Yields:
        The means of each epoch, as it ends. An epoch that had ended in `begun` may come again.

    Raises:
        InputError: the loss or a parameter is no longer finite.
    """
    device = next(module.parameters()).device
    useful = torch.stack([asked.answered for asked in surveyed]).any(0).nonzero()[:, 0]
    some = pictures[useful[:2]] / 255
    features = features_of(module, some)
    if heads is None:
        heads = new_heads(module, pictures, surveyed, seed)
    trained = [p for p in (*module.parameters(), *heads.parameters()) if p.requires_grad]
    on_gpu = device.type == "cuda"
    # A captured step reads the rate from the device.
    rate = torch.tensor(config.learning_rate, device=device) if on_gpu else config.learning_rate
    optimizer = torch.optim.Adam(trained, lr=rate, capturable=on_gpu)
    parts: Trained = {"module": module, "heads": heads, "optimizer": optimizer}
    # A batch of one picture has no statistics, so what is left over joins the batch before it.
    n_batches = max(1, len(useful) // config.batch_size)
    n_steps = config.epochs * n_batches
    draws, jitters = (torch_generator(seed, "survey", name) for name in ("order", "jitter"))
    counts = torch.stack([asked.answered.sum() for asked in surveyed])
    n_answered = counts.clamp_min(1).to(device)
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    agreed = torch.zeros(len(surveyed), dtype=torch.float64, device=device)
    epoch, n_done = 0, 0  # batches of the epoch that are done
    drawn = draws.get_state(), jitters.get_state()  # before the epoch
    if begun:
        if not torch.equal(begun["answers"], counts):
            raise InputError(
                f"survey: there are {counts.tolist()} answers of the APIs, and the distillation "
                f"that was cut off learned from {begun['answers'].tolist()}; restore them, or "
                "remove the run's folder of checkpoints to distil from the start"
            )
        restore_tensors(parts, begun)
        (epoch, n_done), drawn = begun["at"].tolist(), (begun["draws"], begun["jitters"])
        for generator, value in zip((draws, jitters), drawn, strict=True):
            generator.set_state(value)
        totals.copy_(begun["totals"])
        agreed.copy_(begun["agreed"])

    def state() -> dict[str, Tensor]:
        """Return what a later call needs to go on after the last step."""
        sums = {"totals": totals, "agreed": agreed, "answers": counts}
        at = {"at": torch.tensor([epoch, n_done]), "draws": drawn[0], "jitters": drawn[1]}
        return {**tensors_of(parts), **sums, **at}

    def step(rows: Tensor, jitter: Tensor) -> None:
        """Learn from the pictures in `rows`, jittered; add to `totals` and `agreed`."""
        images = pictures[rows].float() / 255
        out = features(jittered(images, jitter, config.jitter) if config.jitter else images)
        loss, agreement, equal = _loss(out, rows, surveyed, heads, config.temperature)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        totals.add_(torch.stack([loss.detach(), agreement]))
        agreed.add_(equal)

    # No graph can hold the choice of the rows that an API has answered, or the draws of dropout.
    in_graphs = on_gpu and can_stack(module) and all(a.answered.all() for a in surveyed)
    graphs = _Graphs(step, device) if in_graphs else None
    while epoch < config.epochs:
        if not n_done:
            totals.zero_()
            agreed.zero_()
        order = useful[torch.randperm(len(useful), generator=draws)]
        jitter = torch.rand(len(useful), N_DRAWS, generator=jitters).to(device)
        batches = zip(
            (order if graphs is None else order.to(device)).tensor_split(n_batches),
            jitter.tensor_split(n_batches),
            strict=True,
        )
        for rows, own in itertools.islice(batches, n_done, None):
            with whole(state):
                number = epoch * n_batches + n_done
                _set_rate(optimizer, config.learning_rate, number / n_steps)
                if graphs is not None:
                    graphs.step(rows, own)
                else:
                    with seeded(seed, "survey", "step", number):  # for dropout
                        step(rows, own)
                n_done += 1
        loss_mean, agreement_mean = (totals / n_batches).tolist()
        # The loss does not show what the last step of all has done to the parameters.
        if not (math.isfinite(loss_mean) and all(p.isfinite().all() for p in trained)):
            raise InputError(
                f"survey: the joint distillation has diverged in epoch {epoch + 1}, with a loss of "
                f"{loss_mean}; lower survey.learning_rate ({config.learning_rate:g})"
            )
        yield Epoch(loss_mean, agreement_mean, tuple((agreed / n_answered).tolist()))
        states = draws.get_state(), jitters.get_state()
        epoch, n_done, drawn = epoch + 1, 0, states
    zero_head(module, some)


def _set_rate(optimizer: torch.optim.Optimizer, first: float, done: float) -> None:
    """Set the learning rate of a cosine from `first` to 0, of which the share `done` is over."""
    rate = first * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def new_heads(
    module: nn.Module, pictures: Tensor, surveyed: Sequence[Surveyed], seed: int
) -> nn.ModuleList:
    """Return a head per API on the features of `module`; for the rest see `distil_jointly`."""
    some = pictures[:2] / 255
    features = features_of(module, some)
    with torch.no_grad(), seeded(seed, "survey", "features"):
        n_features = features(some).shape[1]
    with seeded(seed, "survey", "heads"):
        heads = [nn.Linear(n_features, asked.scores.shape[1]) for asked in surveyed]
    return nn.ModuleList(heads).to(some.device)


class _Graphs:
    """Repeats a step on rows and their jitter, with a graph for each number of rows."""

    def __init__(self, step: Callable[[Tensor, Tensor], None], device: torch.device) -> None:
        self._step, self._device = step, device
        self._held: dict[int, tuple[Tensor, Tensor, RepeatedStep]] = {}

    def step(self, rows: Tensor, jitter: Tensor) -> None:
        """Take a step on `rows`, int64 `[N]` on the device, and their jitter `[N, 4]`."""
        if len(rows) not in self._held:
            held = torch.empty_like(rows), torch.empty_like(jitter), RepeatedStep(self._device)
            self._held[len(rows)] = held
        own_rows, own_jitter, repeated = self._held[len(rows)]
        own_rows.copy_(rows)
        own_jitter.copy_(jitter)
        repeated(partial(self._step, own_rows, own_jitter))


def _loss(
    features: Tensor,
    rows: Tensor,
    surveyed: Sequence[Surveyed],
    heads: nn.ModuleList,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean loss over the APIs and the share of equal classes, both scalars, and the
    number of pictures with equal classes for each API, `[n_apis]`.
    """
    losses, agreements = [], []
    n_equal = torch.zeros(len(surveyed), device=features.device)
    for number, (asked, head) in enumerate(zip(surveyed, heads, strict=True)):
        scores, own = asked.scores[rows], features
        if not rows.is_cuda:  # else all rows are answered
            answered = asked.answered[rows]
            if not answered.any():
                continue
            scores = asked.scores[rows[answered]]
            own = features[answered.to(features.device)]
        logits = head(own)
        losses.append(
            _label_loss(logits, scores)
            if asked.kind == "labels"
            else ops.kd_loss(logits, scores, temperature, scores_kind=asked.kind)
        )
        equal = (logits.argmax(1) == scores.argmax(1)).float()
        agreements.append(equal.mean())
        n_equal[number] = equal.sum()
    return torch.stack(losses).mean(), torch.stack(agreements).mean(), n_equal


def _label_loss(logits: Tensor, one_hot: Tensor) -> Tensor:
    """Return the mean cross entropy to labels, smoothed to `LABEL_SHARE` for the label."""
    n_classes = one_hot.shape[1]
    # torch spreads the smoothing over all classes, the label too.
    smoothing = (1 - LABEL_SHARE) * n_classes / (n_classes - 1)
    return cross_entropy(logits, one_hot.argmax(1), label_smoothing=smoothing)
