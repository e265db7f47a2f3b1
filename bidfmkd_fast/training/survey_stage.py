"""Run the survey: ask all APIs about shared pictures, distil the answers into the meta-model."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, BudgetExhausted
from bidfmkd_fast.runtime.interrupt import Stop, current
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.survey.answers import Answers
from bidfmkd_fast.survey.ask import ask
from bidfmkd_fast.survey.pictures import SharedPictures
from bidfmkd_fast.training.outcome import Outcome
from bidfmkd_fast.training.position import (
    CHOICE,
    DISTILLATION,
    FIRST_ROUND,
    OVER,
    SECOND_ROUND,
)
from bidfmkd_fast.training.run_checkpoint import write_checkpoint
from bidfmkd_fast.training.run_state import RunState
from bidfmkd_fast.training.services import Services
from bidfmkd_fast.training.sharing import in_turn, of_all
from bidfmkd_fast.training.survey_learning import (
    choose,
    distil_survey,
    end_choice,
    shape_of_pictures,
    take_choice,
)

_log = logging.getLogger("bidfmkd_fast")  # the logger whose filter removes secrets


def survey(run: RunState) -> None:
    """Ask every API once about the shared pictures; train the meta-model's features on all scores.

    The pictures are asked about in two rounds: those of the second are chosen by what the answers
    of the first taught.

    Of several ranks each asks some of the APIs; the first chooses and distils for all.

    Answers of processes that were killed count. Nothing happens if the settings leave the survey
    out. An API that fails is left out of the distillation, beyond what it has answered.

    Raises what a local API raises, since asking it again would not help.
    """
    config, at = run.config.survey, run.position
    if not config.n_images or at.survey == OVER:
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
        run.ranks.exchange()  # all have read what there is, before anything is asked
        failed: dict[int, Exception] = {}
        no_budget: dict[int, Exception] = {}
        if at.survey == FIRST_ROUND:
            failed = _ask_all(run, pictures, answers, config.n_first)
            no_budget = {i: e for i, e in failed.items() if isinstance(e, BudgetExhausted)}
            if (
                config.n_first < config.n_images
                and any(kept.queries for kept in answers)
                and len(no_budget) < len(run.apis)
            ):
                at.survey = CHOICE
        if at.survey == CHOICE:
            run.ranks.first_alone(lambda: choose(run, pictures, answers))
            if not run.ranks.first:
                end_choice(run)
                take_choice(run, pictures, answers)
        else:  # they may have been chosen before the run was cut off
            take_choice(run, pictures, answers)
        if at.survey == SECOND_ROUND:
            failed = no_budget | _ask_all(run, pictures, answers, config.n_images, no_budget)
    if at.survey != DISTILLATION:
        with run.whole():
            for index, error in sorted(failed.items()):
                run.shortfalls.note_unsurveyed(run.apis[index].name, error, again=True)
            run.surveyed = sum(kept.queries > 0 for kept in answers)
            at.survey = DISTILLATION
    run.ranks.first_alone(lambda: distil_survey(run, pictures, answers))
    run.ranks.send(run.module)
    with run.whole():
        at.survey, run.survey_state, run.survey_tensors = OVER, None, {}
    write_checkpoint(run)


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
            pictures.as_bytes(n_images, shape_of_pictures(run))
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
                for index in run.ranks.share([i for i in waiting if run.apis[i].is_service])
            )
            outcomes = [
                ask_one(index, run.apis[index], pictures, answers[index])
                for index in in_turn(run, [i for i in waiting if not run.apis[i].is_service])
            ]
            outcomes += services.gather() + services.late()
            outcomes = _of_all(run, outcomes, answers)
            waiting = []
            for outcome in sorted(outcomes, key=lambda outcome: outcome.index):
                failed.pop(outcome.index, None)
                if outcome.error is not None:
                    failed[outcome.index] = outcome.error
                    if not again:
                        name = run.apis[outcome.index].name
                        run.shortfalls.note_unsurveyed(name, outcome.error, again=False)
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
    finally:
        answers.close()  # so that no more files are open than APIs are asked
        api.release()
    return outcome


def _of_all(
    run: RunState, outcomes: Sequence[Outcome], answers: Sequence[Answers]
) -> list[Outcome]:
    """Return the outcomes of all ranks, and take the answers that others have got."""
    own = {outcome.index for outcome in outcomes}
    gathered = of_all(run, outcomes)
    for outcome in gathered:
        if outcome.index not in own:
            answers[outcome.index].read()
    return gathered
