"""Run the survey: ask all APIs about shared pictures, distil the answers into the meta-model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, BudgetExhausted
from bidfmkd_fast.runtime.interrupt import Stop, current
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.survey.answers import Answers
from bidfmkd_fast.survey.ask import ask
from bidfmkd_fast.survey.joint_distillation import Surveyed, distil_jointly
from bidfmkd_fast.survey.pictures import SharedPictures
from bidfmkd_fast.training.default_model import task_shape
from bidfmkd_fast.training.outcome import Outcome
from bidfmkd_fast.training.run_state import RunState
from bidfmkd_fast.training.services import Services

_log = logging.getLogger("bidfmkd_fast")  # the logger whose filter removes secrets


def survey(run: RunState) -> None:
    """Ask every API once about the shared pictures; train the meta-model's features on all scores.

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
                )
            )
            for index, api in enumerate(run.apis)
        ]
        with run.timed("survey"):
            _ask_all(run, pictures, answers)
    run.surveyed = sum(kept.queries > 0 for kept in answers)
    distil_survey(run, pictures, answers)


def _ask_all(run: RunState, pictures: SharedPictures, answers: Sequence[Answers]) -> None:
    """Ask services side by side and local APIs in turn; ask failed ones once more."""
    total = sum(len(kept.answered) for kept in answers)
    n_services = sum(api.is_service for api in run.apis)
    waiting = [index for index, kept in enumerate(answers) if not kept.answered.all()]
    with (
        Bar(
            f"{run.label}: survey",
            total,
            "queries",
            run.progress,
            position=lambda: sum(kept.queries for kept in answers),
        ) as bar,
        Services(n_services, Stop(current())) as services,
    ):
        bar.skip(sum(kept.queries for kept in answers))
        for again in (False, True):
            services.start(
                partial(_ask_one, index, run.apis[index], pictures, answers[index])
                for index in waiting
                if run.apis[index].is_service
            )
            outcomes = [
                _ask_one(index, run.apis[index], pictures, answers[index])
                for index in waiting
                if not run.apis[index].is_service
            ]
            outcomes += services.gather() + services.late()
            waiting = []
            for outcome in sorted(outcomes, key=lambda outcome: outcome.index):
                if outcome.error is not None:
                    run.note_unsurveyed(outcome.index, outcome.error, again)
                    waiting += [outcome.index] if run.apis[outcome.index].is_service else []


def _ask_one(index: int, api: BlackBox, pictures: SharedPictures, answers: Answers) -> Outcome:
    """Ask one API about all pictures it has not answered; an error of a service is returned."""
    outcome = Outcome(index, asked=True)
    _log.info("%s: asking about %s pictures", api.name, f"{len(answers.answered):,}")
    try:
        ask(api, pictures, answers)
    except (BudgetExhausted, APIUnavailable, BadAnswer) as error:
        if not (api.is_service or isinstance(error, BudgetExhausted)):
            raise
        outcome.error = error
    return outcome


def distil_survey(run: RunState, pictures: SharedPictures, answers: Sequence[Answers]) -> None:
    """Train the meta-model's features on all answers; nothing happens without any."""
    config, specs = run.config.survey, [api.spec for api in run.apis]
    surveyed = [
        Surveyed(
            kept.scores.to(run.device),
            kept.answered,
            "labels" if kept.spec.labels_only else kept.spec.returned_kind,
        )
        for kept in answers
        if kept.queries
    ]
    if not surveyed:
        return
    names = [kept.spec.name for kept in answers if kept.queries]
    with Bar(f"{run.label}: joint distillation", config.epochs, "epochs", run.progress) as bar:
        with run.timed("survey"):
            shape = task_shape(specs, run.config) or specs[0].image_shape
            shared = pictures.as_bytes(config.n_images, shape).to(run.device)
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
