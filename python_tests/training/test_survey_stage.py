"""Run with a survey: what is asked, what is kept, and how a run that was cut off continues."""

from __future__ import annotations

import errno
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import (
    SURVEYED,
    answers_of,
    asked,
    exit_code,
    fit_labels,
    fit_surveyed,
    local,
    queries,
    spec_of,
)
from torch import Tensor, nn

from bidfmkd_fast.black_box import APISpec, BlackBox, Budget, FunctionBlackBox, TorchBlackBox
from bidfmkd_fast.errors import APIUnavailable, InputError, ServiceWarning
from bidfmkd_fast.recovery import record_file
from bidfmkd_fast.survey import SurveyConfig
from bidfmkd_fast.survey.answers import Answers
from bidfmkd_fast.survey.choice import read_choice, write_choice
from bidfmkd_fast.survey.joint_distillation import Epoch, distil_jointly
from bidfmkd_fast.survey.pictures import SharedPictures
from bidfmkd_fast.training import BiDfMKD, Run, survey_learning
from bidfmkd_fast.training.grids import write_grids
from bidfmkd_fast.training.report import write_report
from bidfmkd_fast.training.run_folder import LEDGER, META_MODEL, RunFolder
from bidfmkd_fast.training.status import status_text

KILLED = -signal.SIGKILL
N, N_FIRST = SURVEYED.survey.n_images, SURVEYED.survey.n_first


class Service(BlackBox):
    """A service in this process: it answers as `answers_of`, unless `away` says that it fails."""

    is_service = True

    def __init__(self, number: int, fails: int = 0) -> None:
        super().__init__(spec_of(number))
        self._answer, self.fails, self.threads = answers_of(number), fails, set[str]()

    def score(self, images: Tensor) -> Tensor:
        self.threads.add(threading.current_thread().name)
        if self.fails:
            self.fails -= 1
            raise APIUnavailable(f"{self.name}: away")
        return self._answer(images)


def pool(n: int = 3) -> list[BlackBox]:
    return [FunctionBlackBox(answers_of(number), spec_of(number)) for number in range(n)]


def fit(apis: list[BlackBox], folder: Path | None = None) -> Run:
    return BiDfMKD(apis, config=SURVEYED).fit(folder, progress=False)


def shared_of(folder: Path) -> SharedPictures:
    """Return the pictures that the APIs of a run were asked about in both rounds."""
    shared = SharedPictures(SURVEYED.seed)
    path = RunFolder.open(folder).choice_file
    shared.choose(N_FIRST, read_choice(path, N - N_FIRST, shared.seed, N_FIRST))
    return shared


def test_every_api_is_asked_once_and_counted(tmp_path: Path) -> None:
    learner = BiDfMKD(pool(), config=SURVEYED)
    planned = learner.planned_queries()
    run = learner.fit(tmp_path / "run", progress=False)
    without = BiDfMKD(pool(), config=replace(SURVEYED, survey=SurveyConfig(n_images=0)))
    assert run.queries == planned == without.planned_queries() + 3 * N
    surveys = [record for record in run.history if record["stage"] == "survey"]
    assert len(surveys) == 2 and surveys[0]["queries"] == 3 * N
    assert run.seconds["survey"] > 0


def test_without_recovery_steps_the_run_is_the_survey_alone(tmp_path: Path) -> None:
    config = replace(SURVEYED, recovery=replace(SURVEYED.recovery, steps=0))
    learner = BiDfMKD(pool(), config=config)
    run = learner.fit(tmp_path / "run", progress=False)
    assert run.complete and not run.recovered and run.n_apis == 3
    assert run.queries == learner.planned_queries() == 3 * N
    assert {record["stage"] for record in run.history} == {"survey"}
    # The features are those of the joint distillation, and nothing has changed them since.
    idle = replace(SURVEYED, bilevel_distillation=False, task_replay=False)
    other = BiDfMKD(pool(), config=idle).fit(progress=False).meta_model.module.state_dict()
    ours = run.meta_model.module.state_dict()
    assert all(torch.equal(ours[name], other[name]) for name in other)
    assert "finished" in status_text(tmp_path / "run")
    report = write_report(RunFolder.open(tmp_path / "run")).read_text()
    assert "| APIs | 3 |" in report and "recovered as wanted" not in report


def test_settings_that_learn_from_no_api_warn() -> None:
    neither = replace(SURVEYED.control(), n_per_class=2)
    with pytest.warns(UserWarning, match=r"survey.n_images and recovery.steps are both 0"):
        BiDfMKD(pool(), config=neither).fit(progress=False)


def test_the_record_of_an_epoch_has_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: Any) -> Iterator[Epoch]:
        for epoch in distil_jointly(*arguments):
            time.sleep(0.05)
            yield epoch

    monkeypatch.setattr(survey_learning, "distil_jointly", slow)
    first, second = (r["seconds"] for r in fit(pool()).history if r["stage"] == "survey")
    assert second >= first + 0.05


def test_a_full_disk_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(FileIO):
        def write(self, data: Any) -> int:
            super().write(data[:20])
            raise OSError(errno.ENOSPC, "No space left on device")

    apis = [Service(0), Service(1)]
    with monkeypatch.context() as patched:
        patched.setattr(record_file, "FileIO", Full)
        with pytest.raises(InputError, match=r"survey: cannot write to .*answers: No space left"):
            fit(apis, tmp_path)
    before = sum(api.ledger.queries for api in apis)
    assert fit(apis, tmp_path).complete  # what could not be kept is asked again
    assert sum(api.ledger.queries for api in apis) >= before


def test_the_scores_of_the_same_pictures_are_kept(tmp_path: Path) -> None:
    apis = pool()
    fit(apis, tmp_path)
    folder, shared = RunFolder.open(tmp_path), shared_of(tmp_path)
    for index, api in enumerate(apis):
        answers = Answers(folder.survey_file(index), api.spec, shared.seed, N, N_FIRST)
        wanted = answers_of(index)(shared.for_api(0, N, api.spec))
        assert answers.answered.all() and torch.equal(answers.scores, wanted)
    # Scores and numbers are kept, not the pictures: 4 bytes a score and a few hundred more.
    assert folder.survey_file(0).stat().st_size < 4 * N * 3 + 1000


def test_the_bi_level_stages_start_from_the_surveyed_features() -> None:
    with_survey = fit(pool())
    without = BiDfMKD(pool(), config=replace(SURVEYED, survey=SurveyConfig(n_images=0)))
    plain = without.fit(progress=False)
    for name, value in with_survey.initial_model.module.state_dict().items():
        assert torch.equal(value, plain.initial_model.module.state_dict()[name])
    ours, theirs = (run.meta_model.module.state_dict() for run in (with_survey, plain))
    assert not torch.equal(ours["blocks.0.0.weight"], theirs["blocks.0.0.weight"])


def test_five_kills_in_the_survey(tmp_path: Path) -> None:
    """Nothing but the call under way is asked twice, and the weights are the same bit for bit."""
    assert exit_code(fit_surveyed, tmp_path / "whole", tmp_path / "whole log", None) == 0
    folder, log = tmp_path / "run", tmp_path / "log"
    # The third is in the round of chosen pictures.
    moments = [("call", 1), ("call", 3), ("call", 4), ("record", 2), ("record", 1)]
    for number, moment in enumerate(moments, start=1):
        assert exit_code(fit_surveyed, folder, log, moment) == KILLED, moment
        again = asked(log)
        # The call of this kill has not been repeated yet.
        assert sum(again.values()) - len(again) <= number - 1
    assert exit_code(fit_surveyed, folder, log, None) == 0
    once, again = asked(tmp_path / "whole log"), asked(log)
    assert again.keys() == once.keys()
    assert sum(again.values()) - sum(once.values()) <= len(moments)
    assert (folder / META_MODEL).read_bytes() == (tmp_path / "whole" / META_MODEL).read_bytes()


def test_a_lost_ledger_is_rebuilt_from_the_answers(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    assert exit_code(fit_surveyed, folder, log, ("call", 7)) == KILLED
    files = sorted((folder / "survey").glob("*.answers"))
    seed = SharedPictures(SURVEYED.seed).seed
    answered = [Answers(file, spec_of(i), seed, N, N_FIRST).queries for i, file in enumerate(files)]
    assert answered == [N, N_FIRST]
    (folder / LEDGER).unlink()
    with pytest.warns(UserWarning, match="52 queries were added"):
        run = BiDfMKD(local(log, None), config=SURVEYED).fit(folder, progress=False)
    assert run.queries == queries(log) - 10  # less the call that was killed


def test_a_service_that_fails_once_is_asked_again(tmp_path: Path) -> None:
    services = [Service(0), Service(1, fails=1), Service(2)]
    with pytest.warns(ServiceWarning, match="api_1: the survey asks it again at the end: .*away"):
        run = fit(services, tmp_path)
    assert run.complete
    local_run = fit(pool())
    for name, value in run.meta_model.module.state_dict().items():
        assert torch.equal(value, local_run.meta_model.module.state_dict()[name])


def test_a_service_that_is_back_in_the_second_round_answers_both() -> None:
    services = [Service(0), Service(1, fails=2), Service(2)]
    with pytest.warns(ServiceWarning, match="api_1: the survey asks it again at the end"):
        run = fit(services)
    assert run.complete and not run.skipped
    assert run.ledger[1].answered_queries == run.ledger[0].answered_queries


@pytest.mark.parametrize("lost", ["missing", "foreign"])
def test_answers_without_their_choice_are_not_learned_from(lost: str, tmp_path: Path) -> None:
    """The answers of the second round are to pictures that only the lost file names."""
    folder, log, file = (
        tmp_path / "run",
        tmp_path / "log",
        tmp_path / "run/survey/chosen.safetensors",
    )
    assert exit_code(fit_surveyed, folder, log, ("call", 8)) == KILLED
    if lost == "missing":
        file.unlink()
    else:
        write_choice(file, torch.arange(N_FIRST, N), SharedPictures(99).seed, N_FIRST)
    before = queries(log)
    said = "is missing, which says" if lost == "missing" else "does not name the 18 pictures"
    with pytest.raises(InputError, match=said):
        BiDfMKD(local(log, None)[:2], config=SURVEYED).fit(folder, progress=False)
    assert queries(log) == before


def test_a_service_that_stays_away_is_left_out() -> None:
    services = [Service(0), Service(1, fails=10**6), Service(2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(services)
    said = [str(warning.message) for warning in caught]
    assert any("api_1: the survey goes on without it" in text for text in said)
    assert not run.complete and "away" in run.skipped["api_1"]


def test_a_budget_that_ends_in_the_survey(tmp_path: Path) -> None:
    budget = Budget(max_queries=N + 10)
    run = BiDfMKD(pool(), config=SURVEYED, budget=budget).fit(tmp_path, progress=False)
    # The first round of two APIs; no call of the second is paid for.
    assert run.queries == 2 * N_FIRST
    assert run.budget_ended and not run.complete
    assert [record["stage"] for record in run.history] == ["survey", "survey"]


def test_services_are_asked_side_by_side() -> None:
    services = [Service(number) for number in range(3)]
    fit(services)
    assert all(service.threads for service in services)
    assert len(set.union(*(service.threads for service in services))) > 1


def test_an_api_whose_pictures_cannot_be_drawn_is_refused_before_anything_is_asked() -> None:
    api = FunctionBlackBox(lambda images: images.mean((2, 3)), APISpec(2, (2, 16, 16), name="odd"))
    with pytest.raises(InputError, match="odd takes images"):
        BiDfMKD([api], config=SURVEYED)
    assert api.ledger.queries == 0


def test_the_status_counts_the_survey(tmp_path: Path) -> None:
    assert exit_code(fit_surveyed, tmp_path / "run", tmp_path / "log", ("call", 7)) == KILLED
    assert "the survey has 52 of 70 answers" in status_text(tmp_path / "run")


def test_a_folder_that_cannot_hold_the_answers_is_refused_before_anything_is_asked(
    tmp_path: Path,
) -> None:
    (tmp_path / "survey").write_text("in the way")
    apis = pool()
    with pytest.raises(InputError, match="survey"):
        fit(apis, tmp_path)
    assert all(api.ledger.queries == 0 for api in apis)


def test_a_survey_beyond_the_memory_is_refused() -> None:
    config = replace(SURVEYED, survey=SurveyConfig(n_images=10**12))
    with pytest.raises(InputError, match=r"lower survey\.n_images"):
        BiDfMKD(pool(), config=config)


@pytest.mark.parametrize("surveyed", [True, False])
def test_apis_of_other_shapes_need_no_data_set(surveyed: bool) -> None:
    config = SURVEYED if surveyed else replace(SURVEYED, survey=SurveyConfig(n_images=0))
    apis = [
        FunctionBlackBox(
            lambda images: images.flatten(1)[:, :3], APISpec(3, shape, name=f"api_{number}")
        )
        for number, shape in enumerate([(1, 16, 16), (3, 20, 20)])
    ]
    assert BiDfMKD(apis, config=config).fit(progress=False).complete
    wrong = [
        FunctionBlackBox(api, replace(api.spec, data_set="mine"))  # type: ignore[arg-type]
        for api in apis
    ]
    with pytest.raises(InputError, match="data set 'mine' must take images of one shape"):
        BiDfMKD(wrong, config=config)


class Tags(Service):
    """A service that gives labels only."""

    def __init__(self, number: int, fails: int = 0) -> None:
        super().__init__(number, fails)
        BlackBox.__init__(self, labels_of(spec_of(number)))

    def score(self, images: Tensor) -> Tensor:
        return super().score(images).argmax(1)


def labels_of(spec: APISpec) -> APISpec:
    return replace(spec, scores_kind="labels")


def tags(number: int) -> BlackBox:
    return FunctionBlackBox(
        lambda images: answers_of(number)(images).argmax(1), labels_of(spec_of(number))
    )


@pytest.mark.parametrize("make", [tags, Tags])
def test_recovery_skips_apis_of_labels_and_says_so(
    make: Callable[[int], BlackBox], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    apis = [make(0), *pool()[1:]]
    with caplog.at_level("INFO", "bidfmkd_fast"), warnings.catch_warnings():
        warnings.simplefilter("error")
        run = fit(apis, tmp_path)
    said = "recovery recovers nothing from it: a label alone gives no gradient"
    assert [text for text in caplog.messages if said in text] == [f"api_0: {said}"]
    assert run.complete and run.labels_only == ("api_0",) and not run.skipped
    assert [found.api_index for found in run.recovered] == [1, 1, 2, 2]
    assert run.ledger[0].queries == N < run.ledger[1].queries
    folder = RunFolder.open(tmp_path)
    assert folder.summary()["labels_only"] == ["api_0"]
    report = write_report(folder).read_text()
    assert f"api_0 gives labels only: {said}." in report and "| APIs of labels only | 1 |" in report
    seed = SharedPictures(SURVEYED.seed).seed
    stored = Answers(folder.survey_file(0), apis[0].spec, seed, N, N_FIRST).scores
    shared = shared_of(tmp_path).for_api(0, N, apis[0].spec)
    assert torch.equal(stored.argmax(1), answers_of(0)(shared).argmax(1))


def test_a_run_of_apis_of_labels_alone(tmp_path: Path) -> None:
    apis = [tags(0), tags(1)]
    learner = BiDfMKD(apis, config=SURVEYED)
    assert learner.planned_queries() == 2 * N
    run = learner.fit(tmp_path, progress=False)
    assert run.complete and run.queries == 2 * N and not run.recovered and not len(run.memory)
    assert [record["stage"] for record in run.history] == ["survey", "survey"]
    folder = RunFolder.open(tmp_path)
    assert status_text(tmp_path).startswith(f"{tmp_path}: finished\n")
    assert write_grids(run, folder) == [tmp_path / "grids" / "survey.png"]
    assert "nothing from it" in write_report(folder).read_text()
    ours = run.meta_model.module.state_dict()
    first, last = next(iter(ours)), list(ours)[-2]
    assert not torch.equal(ours[first], run.initial_model.module.state_dict()[first])
    assert not ours[last].any()  # a head of zeros, from which any number of classes is learned
    # The module is what the joint distillation of the labels gives, whatever the boxes are.
    modules = [
        TorchBlackBox(Plain(answers_of(number)), labels_of(spec_of(number))) for number in range(2)
    ]
    again = BiDfMKD(modules, config=SURVEYED).fit(progress=False)
    for name, value in again.meta_model.module.state_dict().items():
        assert torch.equal(value, ours[name])


class Plain(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = answer


def test_a_killed_run_of_labels_counts_its_survey_alone(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    assert exit_code(fit_labels, folder, log, 6) == KILLED
    assert "the survey has 44 of 70 answers, nothing to recover" in status_text(folder)
    assert exit_code(fit_labels, folder, log, None) == 0
    assert queries(log) <= 2 * N + 10
    assert exit_code(fit_labels, tmp_path / "whole", tmp_path / "whole log", None) == 0
    assert (folder / META_MODEL).read_bytes() == (tmp_path / "whole" / META_MODEL).read_bytes()


def test_an_api_of_labels_without_a_survey_is_refused() -> None:
    api = tags(0)
    without = replace(SURVEYED, survey=SurveyConfig(n_images=0))
    with pytest.raises(
        InputError, match=r"BiDfMKD: api_0 gives labels only.* survey.n_images is 0"
    ):
        BiDfMKD([*pool()[1:], api], config=without)
    assert api.ledger.queries == 0
