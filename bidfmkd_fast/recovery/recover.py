"""Recover label-conditional images from a black box, from its answers alone.

`recover` checks the arguments, counts the cost of the first step, chooses the step length (mu), and
picks the loop that can run the recovery. Source: Hu et al., ICML 2023, arXiv 2305.18413, section
3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from bidfmkd_fast.arguments import check_integer
from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.recovery.config import RecoveryConfig
from bidfmkd_fast.recovery.cost import check_budget, first_step_cost, step_cost, takes_directions
from bidfmkd_fast.recovery.image_maker import ImageMaker
from bidfmkd_fast.recovery.journal import Journal, settings_of
from bidfmkd_fast.recovery.mu import AUTO, choose_mu
from bidfmkd_fast.recovery.objective import Objective, Student
from bidfmkd_fast.recovery.on_device import DeviceRecovery, serves
from bidfmkd_fast.recovery.paper_compat import directions_left
from bidfmkd_fast.recovery.recovered import Record, Recovered
from bidfmkd_fast.recovery.step import RecoveryStep
from bidfmkd_fast.recovery.step_memory import check_set_memory
from bidfmkd_fast.recovery.stepwise import StepwiseRecovery
from bidfmkd_fast.runtime.allocator import keep_freed_memory
from bidfmkd_fast.runtime.machine import usable_device
from bidfmkd_fast.runtime.progress import Bar


class Start(NamedTuple):
    """What the images of a recovery start from: a generator to copy, the seed, and the device."""

    generator: nn.Module | None = None
    seed: int = 0
    device: torch.device | str | None = None


def recover(
    api: BlackBox,
    n_per_class: int = 30,
    student: Student | None = None,
    config: RecoveryConfig | None = None,
    *,
    generator: nn.Module | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    paper_compat: bool = False,
    progress: bool = False,
    callback: Callable[[Record], None] | None = None,
    journal: Journal | None = None,
) -> Recovered:
    """Recover `n_per_class` images for every class of `api`, from its answers alone.

    Minimises the objective of `bidfmkd_fast.recovery.objective.Objective` over a generator and one
    latent per image, with zeroth-order gradients. The result is a pure function of the arguments,
    as far as the API's answers are.

    Args:
        api: the black box; with an `OpenBox` the true gradient takes the place of the estimate, at
            one query per image and step.
        n_per_class: images per class, at least 1.
        student: the task model, images `[B, C, H, W]` in the API's input range -> logits `[B,
            n_classes]`; with a student a boundary query set is recovered, without one a support
            set.
        config: the settings; `RecoveryConfig()` when None.
        generator: latents `[N, latent_dim]` -> images `[N, C, H, W]` in [0, 1]. A copy of the
            module is initialised anew (every submodule with `reset_parameters`) and trained; the
            default is `Generator` of `config.generator_width`.
        seed: seed of every random draw.
        device: where generator and points live; the CPU when None.
        paper_compat: reproduce the slips of the authors' code
            (`bidfmkd_fast.recovery.paper_compat`).
        progress: show a bar in a terminal or a notebook, one line a minute on stderr elsewhere.
        callback: called after every step with the record of that step.
        journal: keeps the API's answers as they come. If a recovery ended midway, the same
            arguments with its journal continue it: recorded answers are not asked for again, and
            the result is the same bit for bit (on a CPU with the same number of threads). Nothing
            is kept with an open box, without steps, and where the whole recovery stays on a GPU.

    Raises:
        InputError: bad arguments, an API that gives labels only, a generator or student of the
            wrong shape, a journal of another recovery, more images than the memory holds; nothing
            has been asked of the API then.
        BudgetExhausted: the budget cannot pay the first step; nothing has been asked. When the
            budget ends later, the images so far are returned with `complete=False`.
        BadAnswer: the API answered something that is no set of scores.
        APIUnavailable: a service did not answer, whatever was tried.

    Warns:
        PrecisionWarning: steps of length `mu` are too small for the precision of the API's input
            or scores.
    """
    config = RecoveryConfig() if config is None else config
    device = None if device is None else usable_device("recover", device)
    prepared = prepare(
        api, n_per_class, student, config, Start(generator, seed, device), paper_compat, journal
    )
    if not progress:
        return prepared.run(callback)
    n_images = n_per_class * api.spec.n_classes
    every_step = step_cost(api, config, n_images, paper_compat) * max(1, config.steps)
    before = api.ledger.answered_queries
    with Bar(
        f"recover {api.name}",
        every_step.queries,
        "queries",
        progress=True,
        position=lambda: api.ledger.answered_queries - before,
    ) as bar:
        bar.skip(0 if journal is None else journal.queries)

        def after_step(record: Record) -> None:
            bar.show(loss=record["loss"], matched=record["matched"])
            if callback is not None:
                callback(record)

        return prepared.run(after_step)


def prepare(
    api: BlackBox,
    n_per_class: int,
    student: Student | None,
    config: RecoveryConfig,
    start: Start,
    paper_compat: bool = False,
    journal: Journal | None = None,
) -> DeviceRecovery | StepwiseRecovery:
    """Check the arguments of `recover` and return the recovery, ready to run.

    With `mu="auto"` this asks the API which step length it resolves.
    """
    _check_arguments(api, n_per_class, student, config, paper_compat)
    own = start.generator is not None
    check_set_memory("recover", api, config, n_per_class, start.device, own_generator=own)
    spec, seed = api.spec, start.seed
    labels = torch.arange(spec.n_classes).repeat_interleave(n_per_class).to(start.device)  # [B]
    maker = ImageMaker(api, len(labels), config, *start)
    objective = Objective(
        labels, spec.returned_kind, student, config.boundary_weight, config.divergence
    )
    if not takes_directions(api, config):
        # The journal has nothing to keep: there is one answer only, or the answers carry a graph.
        check_budget(api, first_step_cost(api, config, len(labels), paper_compat))
        keep_freed_memory()
        step = RecoveryStep(api, maker, objective, config, paper_compat)
        return StepwiseRecovery(step, warn=False, journal=None)
    if journal is not None:
        journal.begin(settings_of(api, n_per_class, config, start.generator, seed, paper_compat))
    begun = journal is not None and journal.steps > 0
    if not begun:  # recorded answers are of use even if the budget pays no further step
        cost = first_step_cost if journal is None or journal.mu is None else step_cost
        check_budget(api, cost(api, config, len(labels), paper_compat))
    keep_freed_memory()
    warn = config.mu != AUTO
    mu = choose_mu(api, config.mu, lambda: maker.images(0).detach(), seed, journal)
    config = replace(config, mu=mu)
    step = RecoveryStep(api, maker, objective, config, paper_compat)
    # Only the stepwise loop continues a journal, trains a user's generator, and ranks images as the
    # authors' code does.
    plain = start.generator is None and not paper_compat and not begun
    if plain and serves(api, config, labels):
        return DeviceRecovery(step, warn)
    return StepwiseRecovery(step, warn, journal)


def _check_arguments(
    api: BlackBox,
    n_per_class: int,
    student: Student | None,
    config: RecoveryConfig,
    paper_compat: bool,
) -> None:
    """Raise InputError, or InputTypeError, for arguments that `recover` cannot use."""
    if not isinstance(api, BlackBox):
        raise InputTypeError(
            f"recover: api must be a black box such as TorchBlackBox; got {type(api).__name__}"
        )
    if api.spec.labels_only:
        raise InputError(
            f"recover: {api.name} gives labels only, and a label alone gives no gradient; nothing "
            "can be recovered from it; the survey of a run (survey.n_images) learns from labels"
        )
    if not isinstance(config, RecoveryConfig):
        raise InputTypeError(
            f"recover: config must be a RecoveryConfig; got {type(config).__name__}"
        )
    if student is not None and not callable(student):
        raise InputTypeError(
            f"recover: student must be callable on images; got {type(student).__name__}"
        )
    check_integer("recover", "n_per_class", n_per_class, 1)
    if paper_compat:
        directions_left(config.num_directions)  # raises if too few
