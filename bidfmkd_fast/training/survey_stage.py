"""Run the survey: ask all APIs about shared pictures, distil the answers into the meta-model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, BudgetExhausted, InputError
from bidfmkd_fast.runtime.interrupt import Stop, current
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.seeds import derive_seed
from bidfmkd_fast.survey.answers import Answers
from bidfmkd_fast.survey.ask import ask
from bidfmkd_fast.survey.choice import CANDIDATES, choose_scenes, read_choice, write_choice
from bidfmkd_fast.survey.joint_distillation import Surveyed, distil_jointly, new_heads
from bidfmkd_fast.survey.pictures import SharedPictures
from bidfmkd_fast.training.default_model import task_shape
from bidfmkd_fast.training.outcome import Outcome
from bidfmkd_fast.training.run_state import RunState
from bidfmkd_fast.training.services import Services

_log = logging.getLogger("bidfmkd_fast")  # the logger whose filter removes secrets


def survey(run: RunState) -> None:
    """Ask every API once about the shared pictures; train the meta-model's features on all scores.

    The pictures are asked about in two rounds: those of the second are chosen by what the answers
    of the first taught.

    Answers of processes that were killed count. Nothing happens if the settings leave the survey
    out. An API that fails is left out of the distillation, beyond what it has answered.

    Raises what a local API raises, since asking it again would not help.
    """
    config = run.config.survey
    if not config.n_images:
        return
    pictures = SharedPictures(run.config.seed)
    run.log(f"the survey of {config.n_images:,} pictures begins")
    with ExitStack() as files:
        answers = [
            files.enter_context(
                Answers(
                    None if run.folder is None else run.folder.survey_file(index),
                    api.spec,
                    pictures.seed,
                    config.n_images,
                    config.n_first,
                )
            )
            for index, api in enumerate(run.apis)
        ]
        failed = _ask_all(run, pictures, answers, config.n_first)
        no_budget = {i: e for i, e in failed.items() if isinstance(e, BudgetExhausted)}
        if (
            config.n_first < config.n_images
            and any(kept.queries for kept in answers)
            and len(no_budget) < len(run.apis)
        ):
            _choose(run, pictures, answers)
            failed = no_budget | _ask_all(run, pictures, answers, config.n_images, no_budget)
    for index, error in sorted(failed.items()):
        run.note_unsurveyed(index, error, again=True)
    run.surveyed = sum(kept.queries > 0 for kept in answers)
    distil_survey(run, pictures, answers)


def _ask_all(
    run: RunState,
    pictures: SharedPictures,
    answers: Sequence[Answers],
    n_images: int,
    left_out: Collection[int] = (),
) -> dict[int, Exception]:
    """Ask about the first `n_images` pictures: services side by side and local APIs in turn.

    Failed services are asked once more. Returns the errors of the APIs that failed then too, or
    that ran out of their budget, by number. APIs in `left_out` are not asked.
    """

    def n_answered() -> int:
        return sum(int(kept.answered[:n_images].sum()) for kept in answers)

    n_services = sum(api.is_service for api in run.apis)
    waiting = [
        index
        for index, kept in enumerate(answers)
        if index not in left_out and not kept.answered[:n_images].all()
    ]
    ask_one = partial(_ask_one, n_images=n_images, n_first=run.config.survey.n_first)
    failed: dict[int, Exception] = {}
    if waiting:
        with run.timed("survey"):  # of the usual shape no API's pictures are drawn again
            pictures.as_bytes(n_images, _shape(run))
    with (
        run.timed("survey"),
        Bar(
            f"{run.label}: survey",
            n_images * len(answers),
            "queries",
            run.progress,
            position=n_answered,
        ) as bar,
        Services(n_services, Stop(current())) as services,
    ):
        bar.skip(n_answered())
        for again in (False, True):
            services.start(
                partial(ask_one, index, run.apis[index], pictures, answers[index])
                for index in waiting
                if run.apis[index].is_service
            )
            outcomes = [
                ask_one(index, run.apis[index], pictures, answers[index])
                for index in waiting
                if not run.apis[index].is_service
            ]
            outcomes += services.gather() + services.late()
            waiting = []
            for outcome in sorted(outcomes, key=lambda outcome: outcome.index):
                failed.pop(outcome.index, None)
                if outcome.error is not None:
                    failed[outcome.index] = outcome.error
                    if not again:
                        run.note_unsurveyed(outcome.index, outcome.error, again=False)
                    waiting += [outcome.index] if run.apis[outcome.index].is_service else []
    return failed


def _ask_one(
    index: int,
    api: BlackBox,
    pictures: SharedPictures,
    answers: Answers,
    *,
    n_images: int,
    n_first: int,
) -> Outcome:
    """Ask one API about those of the first `n_images` pictures that it has not answered.

    Each round is asked in requests of its own. An error of a service is returned.
    """
    outcome = Outcome(index, asked=True)
    answered = answers.answered[:n_images]
    _log.info("%s: asking about %s pictures", api.name, f"{int((~answered).sum()):,}")
    try:
        for numbers in (range(min(n_first, n_images)), range(n_first, n_images)):
            ask(api, pictures, answers, numbers)
    except (BudgetExhausted, APIUnavailable, BadAnswer) as error:
        if not (api.is_service or isinstance(error, BudgetExhausted)):
            raise
        outcome.error = error
    return outcome


def _choose(run: RunState, pictures: SharedPictures, answers: Sequence[Answers]) -> None:
    """Choose the pictures of the second round, or read which were chosen before a cut."""
    config, seed = run.config.survey, derive_seed(run.config.seed, "survey", "first round")
    n_chosen = config.n_images - config.n_first
    file = None if run.folder is None else run.folder.choice_file
    # A choice that nothing was asked about may lack APIs that have answered since.
    asked = any(kept.answered[config.n_first :].any() for kept in answers)
    if asked and file is not None and file.exists():
        scenes = read_choice(file, n_chosen, pictures.seed, config.n_first)
        pictures.choose(config.n_first, scenes)
        return
    if asked:
        raise InputError(
            f"survey: {file} is missing, which says what pictures some of the answers kept are to; "
            "restore it, or remove its folder to ask all APIs anew"
        )
    surveyed = _surveyed(run, answers, config.n_first)
    module = copy.deepcopy(run.module)
    shape = _shape(run)
    with (
        run.timed("survey"),
        Bar(f"{run.label}: first distillation", config.epochs, "epochs", run.progress) as bar,
    ):
        shared = pictures.as_bytes(config.n_first, shape).to(run.device)
        heads = new_heads(module, shared, surveyed, seed)
        for epoch in bar.over(distil_jointly(module, shared, surveyed, config, seed, heads)):
            bar.show(loss=epoch.loss)
    n_candidates = CANDIDATES * n_chosen
    with (
        run.timed("survey"),
        Bar(f"{run.label}: choose pictures", n_candidates, "pictures", run.progress) as bar,
    ):
        scenes = choose_scenes(
            module,
            heads,
            pictures.seed,
            shape,
            config.n_first,
            n_chosen,
            config.batch_size,
            seed,
            bar.advance,
        )
    if file is not None:
        write_choice(file, scenes, pictures.seed, config.n_first)
    pictures.choose(config.n_first, scenes)
    run.log(f"chose {n_chosen:,} pictures after a loss of {epoch.loss:.4g}")


def _shape(run: RunState) -> tuple[int, int, int]:
    """Return the shape of the images that the meta-model learns from."""
    specs = [api.spec for api in run.apis]
    return task_shape(specs, run.config) or specs[0].image_shape


def _surveyed(run: RunState, answers: Sequence[Answers], n_images: int) -> list[Surveyed]:
    """Return the answers to the first `n_images` pictures of the APIs that answered any."""
    return [
        Surveyed(
            kept.scores[:n_images].to(run.device),
            kept.answered[:n_images],
            "labels" if kept.spec.labels_only else kept.spec.returned_kind,
        )
        for kept in answers
        if kept.answered[:n_images].any()
    ]


def distil_survey(run: RunState, pictures: SharedPictures, answers: Sequence[Answers]) -> None:
    """Train the meta-model's features on all answers; nothing happens without any."""
    config = run.config.survey
    surveyed = _surveyed(run, answers, config.n_images)
    if not surveyed:
        return
    names = [kept.spec.name for kept in answers if kept.queries]
    with Bar(f"{run.label}: joint distillation", config.epochs, "epochs", run.progress) as bar:
        with run.timed("survey"):
            shared = pictures.as_bytes(config.n_images, _shape(run)).to(run.device)
        epochs = bar.over(distil_jointly(run.module, shared, surveyed, config, run.config.seed))
        for number in count(1):
            with run.timed("survey"):  # each epoch by itself, so that its record has its seconds
                epoch = next(epochs, None)
            if epoch is None:
                break
            bar.show(loss=epoch.loss)
            run.record(
                "survey",
                epoch=number,
                loss=epoch.loss,
                accuracy=epoch.agreement,
                accuracy_by_api=dict(zip(names, epoch.by_api)),
            )
            last_loss = epoch.loss
    run.log(f"the survey has ended with a loss of {last_loss:.4g} after {config.epochs} epochs")
