"""Label-conditional data from a black box's answers alone (Hu et al., ICML 2023, arXiv 2305.18413, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from bidfmkd_fast.black_box import BlackBox, OpenBox
from bidfmkd_fast.errors import BudgetExhausted, InputTypeError
from bidfmkd_fast.recovery.config import RecoveryConfig, check_integer
from bidfmkd_fast.recovery.cost import check_budget, first_step_cost, step_cost, takes_directions
from bidfmkd_fast.recovery.image_maker import ImageMaker
from bidfmkd_fast.recovery.journal import Journal, settings_of
from bidfmkd_fast.recovery.objective import Objective, Student
from bidfmkd_fast.recovery.on_device import DeviceRecovery, run_side_by_side, serves
from bidfmkd_fast.recovery.paper_compat import directions_left, surrogate
from bidfmkd_fast.recovery.picture_grid import grid_html
from bidfmkd_fast.recovery.step_length import AUTO, choose_mu, warn_if_unmoved
from bidfmkd_fast.runtime.allocator import keep_freed_memory
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.seeds import derive_seed
from bidfmkd_fast.zeroth_order import ZerothOrder

Record = dict[str, float]


@dataclass(frozen=True, repr=False)
class Recovered:
    """A set of recovered images, N = n_classes * n_per_class, sorted by wanted label.

    Attributes:
        images: float32 `[N, C, H, W]` in the API's input range; per slot the best of all steps, by
            the true objective.
        labels: the wanted labels, int64 `[N]`.
        scores: what the API answered for exactly these images, float32 `[N, n_classes]`.
        losses: the objective of these images, float32 `[N]`.
        history: one record per step: `step`, `loss` (mean objective), `best_loss` (mean over slots
            so far), `matched` (share of images the API gives their wanted label), `queries` (spent
            by this recovery so far).
        complete: False when the budget ended before the last step.
        mu: length of the steps taken; None where none were.
    """

    images: torch.Tensor
    labels: torch.Tensor
    scores: torch.Tensor
    losses: torch.Tensor
    history: list[Record]
    complete: bool
    mu: float | None = None

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        told = f"{len(self.images)} images {shape} of {self.scores.shape[1]} classes"
        if len(self.images):
            matched = (self.scores.argmax(1) == self.labels).float().mean().item()
            told += f": {100 * matched:.0f} % as wanted, loss {self.losses.mean().item():.3g}"
        steps = f"{len(self.history)} steps" + ("" if self.mu is None else f" of mu={self.mu:.3g}")
        return f"Recovered({told}, {steps}{'' if self.complete else ', cut off'})"

    def _repr_html_(self) -> str:
        """Return the images as a grid, for notebooks."""
        return grid_html(repr(self), self.images, self.labels)


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
    """Recovers `n_per_class` images for every class of `api`, from its answers alone.

    Minimises the objective of `bidfmkd_fast.recovery.objective.Objective` over a generator and one
    latent per image, with zeroth-order gradients. A pure function of its arguments, as far as the
    API is one.

    Args:
        api: the black box; with an `OpenBox` the true gradient takes the place of the estimate, at
            one query an image.
        n_per_class: images per class, at least 1.
        student: the task model, images `[B, C, H, W]` in the API's input range -> logits `[B,
            n_classes]`; with it a boundary query set is recovered, without it a support set.
        config: the settings; `RecoveryConfig()` when None.
        generator: latents `[N, latent_dim]` -> images `[N, C, H, W]` in [0, 1]. A copy of it is
            initialised anew (every submodule with `reset_parameters`) and trained; the default is
            `Generator` of `config.generator_width`.
        seed: of every random draw.
        device: where generator and points live; the CPU when None.
        paper_compat: with the slips of the authors' code (`bidfmkd_fast.recovery.paper_compat`).
        progress: a bar in a terminal or a notebook, one line a minute on stderr elsewhere.
        callback: called after every step with its record.
        journal: keeps what the API answers as it comes. With the journal of a recovery that ended
            midway, however it did, the same arguments go on from there: what was answered is not
                asked for again, and the result is the
            same bit for bit (on a CPU with the same number of threads). With an open box, without
            steps, and where the whole recovery stays on a GPU, nothing is kept.

    Raises:
        InputError: bad arguments, a generator or student of the wrong shape, a journal of another
            recovery; nothing has been asked of the API then.
        BudgetExhausted: the budget cannot pay the first step; nothing has been asked. When it ends
            later, the images so far are returned with `complete=False`.
        BadAnswer: the API answered something that is no set of scores.
        APIUnavailable: a service did not answer, whatever was tried.

    Warns:
        PrecisionWarning: steps of this `mu` are lost in what the API's input or scores resolve.
    """
    config = RecoveryConfig() if config is None else config
    started = _start(
        api, n_per_class, student, config, generator, seed, device, paper_compat, journal
    )
    if not progress:
        return started.run(callback)
    n_queries = (
        max(1, config.steps)
        * step_cost(api, config, len(started.objective.labels), paper_compat).queries
    )
    return _run_with_bar(started, n_queries, journal, callback)


def _run_with_bar(
    started: DeviceRecovery | _LoopedRecovery,
    n_queries: int,
    journal: Journal | None,
    callback: Callable[[Record], None] | None,
) -> Recovered:
    """Run it with a bar of the queries that are answered, which shows the loss of the last step."""
    api, answered = started.api, started.api.ledger.answered_queries

    def after_step(record: Record) -> None:
        bar.show(loss=record["loss"], matched=record["matched"])
        if callback is not None:
            callback(record)

    with Bar(
        f"recover {api.name}",
        n_queries,
        "queries",
        progress=True,
        position=lambda: api.ledger.answered_queries - answered,
    ) as bar:
        bar.skip(0 if journal is None else journal.queries)
        return started.run(after_step)


def recover_side_by_side(
    apis: Sequence[BlackBox],
    n_per_class: int,
    students: Sequence[Student | None],
    config: RecoveryConfig,
    *,
    seeds: Sequence[int],
    device: torch.device | str | None = None,
    journals: Sequence[Journal | None] | None = None,
) -> Iterator[tuple[int, Recovered | Exception]]:
    """`recover` for several APIs at once; those whose recovery stays on one CUDA device share it
    step by step.

    Gives the number of an API and its set as soon as that is there. It is what `recover` gives for
    each alone, up to rounding. An API whose recovery fails has the error in its place, and the
    others are none the worse for it.
    """
    together: dict[int, DeviceRecovery] = {}
    kept = [None for _ in apis] if journals is None else journals
    for i, (api, student, seed, journal) in enumerate(
        zip(apis, students, seeds, kept, strict=True)
    ):
        try:
            started = _start(api, n_per_class, student, config, None, seed, device, False, journal)
            if isinstance(started, DeviceRecovery):
                together[i] = started
                continue
            result: Recovered | Exception = started.run()
        except Exception as error:
            result = error
        yield i, result
    yield from zip(together, run_side_by_side(list(together.values())))


def _start(
    api: BlackBox,
    n_per_class: int,
    student: Student | None,
    config: RecoveryConfig,
    generator: nn.Module | None,
    seed: int,
    device: torch.device | str | None,
    paper_compat: bool,
    journal: Journal | None,
) -> DeviceRecovery | _LoopedRecovery:
    """The arguments of `recover`, checked and ready to run."""
    if not isinstance(api, BlackBox):
        raise InputTypeError(
            f"recover: api must be a black box such as TorchBlackBox; got {type(api).__name__}"
        )
    if not isinstance(config, RecoveryConfig):
        raise InputTypeError(
            f"recover: config must be a RecoveryConfig; got {type(config).__name__}"
        )
    if student is not None and not callable(student):
        raise InputTypeError(
            f"recover: student must be callable on images; got {type(student).__name__}"
        )
    check_integer("recover: n_per_class", n_per_class, 1)
    if paper_compat:
        directions_left(config.num_directions)
    spec = api.spec
    labels = torch.arange(spec.n_classes).repeat_interleave(n_per_class).to(device)  # [B]
    maker = ImageMaker(api, len(labels), config, generator, seed, device)
    objective = Objective(
        labels, spec.returned_kind, student, config.boundary_weight, config.divergence
    )
    takes_steps = takes_directions(api, config)
    if not takes_steps:
        journal = None  # there is one answer only, or one with a graph
    if journal is not None:
        journal.begin(settings_of(api, n_per_class, config, generator, seed, paper_compat))
    if (
        journal is None or not journal.steps
    ):  # what is held counts, even where the budget pays no further step
        cost = first_step_cost if journal is None or journal.mu is None else step_cost
        check_budget(api, cost(api, config, len(labels), paper_compat))
    keep_freed_memory()
    warn = takes_steps and config.mu != AUTO
    if takes_steps:
        config = replace(
            config, mu=choose_mu(api, config.mu, lambda: maker.images(0).detach(), seed, journal)
        )
        begun = journal is not None and journal.steps > 0  # which only the loop can go on with
        if generator is None and not paper_compat and not begun and serves(api, config, labels):
            return DeviceRecovery(api, maker, objective, config, seed, warn)
    return _LoopedRecovery(api, maker, objective, config, seed, paper_compat, warn, journal)


@dataclass
class _LoopedRecovery:
    """A recovery that looks at every answer; `config.mu` is a number, and `warn` where the caller
    gave it.
    """

    api: BlackBox
    maker: ImageMaker
    objective: Objective
    config: RecoveryConfig
    seed: int
    paper_compat: bool
    warn: bool
    journal: Journal | None

    def run(self, callback: Callable[[Record], None] | None = None) -> Recovered:
        if self.config.steps == 0:
            images = self.maker.images(0).detach()
            student_scores = self.objective.student_scores(images, self.api.spec.n_classes)
            scores = self.api(images)
            losses = self.objective.losses(scores, student_scores)
            return Recovered(images, self.objective.labels, scores, losses, [], complete=True)
        options = (callback, self.warn, self.journal)
        return _optimise(
            self.api,
            self.maker,
            self.objective,
            self.config,
            self.seed,
            self.paper_compat,
            *options,
        )


def _optimise(
    api: BlackBox,
    maker: ImageMaker,
    objective: Objective,
    config: RecoveryConfig,
    seed: int,
    paper_compat: bool,
    callback: Callable[[Record], None] | None,
    warn: bool,
    journal: Journal | None,
) -> Recovered:
    """The steps of one set; `warn` where `config.mu`, a number by now, was the caller's.

    Steps up to the journal's snapshot are taken from there, those after it are made again from
    recorded answers.
    """
    labels = objective.labels
    num_directions = (
        directions_left(config.num_directions) if paper_compat else config.num_directions
    )
    zeroth_order = None
    if not isinstance(api, OpenBox):
        zeroth_order = ZerothOrder(
            num_directions=num_directions,
            mu=float(config.mu),
            directions=config.directions,
            grid=config.grid,
            seed=derive_seed(seed, "recovery", "directions"),
        )
    best: list[torch.Tensor] = []  # images, scores, losses, and what the choice goes by
    history: list[Record] = []
    if journal is not None and journal.state and zeroth_order is not None:
        maker.restore(journal.state)
        best, history = [tensor.to(labels.device) for tensor in journal.best], list(journal.history)
        zeroth_order.load_state_dict({"seed": zeroth_order.seed, "step": len(history)})
    queries_of_step = step_cost(api, config, len(labels), paper_compat).queries
    complete = True
    for step in range(len(history), config.steps):
        # The student's scores, and those of each call, [some directions, B, n_classes].
        student_scores, answers = (
            (None, []) if journal is None else journal.answers(step, labels.device)
        )
        x, n_held = maker.images(step), len(answers)
        try:
            check_budget(
                api,
                step_cost(api, config, len(labels), paper_compat, rows_held=sum(map(len, answers))),
            )
            if not n_held:
                student_scores = objective.student_scores(x.detach(), api.spec.n_classes)
            asked = (
                [x[None]]
                if zeroth_order is None
                else zeroth_order.ask_chunks(x, max_images=config.max_images)
            )
            for number, points in enumerate(asked):
                if number < n_held:
                    continue
                answers.append(api(points.flatten(0, 1)).unflatten(0, points.shape[:2]))
                if journal is not None:
                    journal.add_answers(step, answers[-1], student_scores)
        except BudgetExhausted:
            # The images themselves are asked first: what was paid for them still counts.
            if answers and not (paper_compat and best):
                scores = answers[0][0]
                losses = objective.losses(scores, student_scores)
                best = _better(best, [x.detach(), scores, losses, losses])
            if not best:
                raise
            complete = False
            break
        scores = torch.cat(answers)  # [1+q, B, n_classes]
        if warn and step == 0 and zeroth_order is not None:
            warn_if_unmoved(scores, labels, api.spec, zeroth_order.mu)
        if zeroth_order is None:
            losses = objective.losses(scores[0], student_scores)
            loss, losses, scores = losses.mean(), losses.detach(), scores.detach()
        else:
            loss, losses = objective.tell(zeroth_order, scores, student_scores)
        if paper_compat:
            loss = loss * (num_directions / config.num_directions)
        best = _better(
            best, [x.detach(), scores[0], losses, surrogate(loss, x) if paper_compat else losses]
        )
        maker.step(loss)
        matched = (scores[0].argmax(1) == labels).float().mean()
        mean, best_mean, share = torch.stack([losses.mean(), best[2].mean(), matched]).tolist()
        queries = (step + 1) * queries_of_step
        history.append(
            {
                "step": step,
                "loss": mean,
                "best_loss": best_mean,
                "matched": share,
                "queries": queries,
            }
        )
        api.first_answers.warn_of_one_class([record["matched"] for record in history], stacklevel=4)
        if journal is not None and maker.can_restore:
            journal.keep_state(maker.state, best, history)
        if callback is not None:
            callback(history[-1])
    images, best_scores, best_losses, _ = best
    mu = None if zeroth_order is None else zeroth_order.mu
    return Recovered(images, labels, best_scores, best_losses, history, complete, mu)


def _better(old: list[torch.Tensor], new: list[torch.Tensor]) -> list[torch.Tensor]:
    """Slot by slot the candidate with the lower loss (the last of the tensors)."""
    if not old:
        return new
    wins = new[-1] < old[-1]  # [B]
    return [
        torch.where(wins.view(-1, *[1] * (b.ndim - 1)), b, a) for a, b in zip(old, new, strict=True)
    ]
