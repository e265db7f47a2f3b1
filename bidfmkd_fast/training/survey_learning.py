"""Learn from the answers to the survey: what to ask in its second round, and the backbone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import count

from torch import Tensor, nn

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.seeds import derive_seed
from bidfmkd_fast.survey.answers import Answers
from bidfmkd_fast.survey.choice import CANDIDATES, choose_scenes, read_choice, write_choice
from bidfmkd_fast.survey.joint_distillation import Epoch, Surveyed, distil_jointly, new_heads
from bidfmkd_fast.survey.pictures import SharedPictures
from bidfmkd_fast.training.default_model import task_shape
from bidfmkd_fast.training.position import SECOND_ROUND
from bidfmkd_fast.training.run_checkpoint import write_checkpoint
from bidfmkd_fast.training.run_state import RunState
from bidfmkd_fast.training.shared_folder import wait_until_seen


def choose(run: RunState, pictures: SharedPictures, answers: Sequence[Answers]) -> None:
    """Choose the pictures of the second round, or read which were chosen before a cut."""
    config, seed = run.config.survey, derive_seed(run.config.seed, "survey", "first round")
    n_chosen = config.n_images - config.n_first
    if take_choice(run, pictures, answers):
        with run.whole():
            end_choice(run)
        return
    surveyed = _surveyed(run, answers, config.n_first)
    module = copy.deepcopy(run.module)
    shape = shape_of_pictures(run)
    with (
        run.timed("survey"),
        Bar(f"{run.label}: first distillation", config.epochs, "epochs", run.progress) as bar,
    ):
        shared = pictures.as_bytes(config.n_first, shape).to(run.device)
        heads = new_heads(module, shared, surveyed, seed)
        for epoch in bar.over(_distilling(run, bar, module, shared, surveyed, seed, heads)):
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
    with run.whole():
        if run.folder is not None:
            write_choice(run.folder.choice_file, scenes, pictures.seed, config.n_first)
        end_choice(run)
    write_checkpoint(run)
    pictures.choose(config.n_first, scenes)
    run.log(f"chose {n_chosen:,} pictures")


def end_choice(run: RunState) -> None:
    """Go on to the second round."""
    run.position.survey, run.survey_state, run.survey_tensors = SECOND_ROUND, None, {}


def take_choice(run: RunState, pictures: SharedPictures, answers: Sequence[Answers]) -> bool:
    """Take the pictures that an earlier process chose; return whether there are any.

    A choice that nothing was asked about is dropped before the second round has begun, since it may
    lack APIs that have answered since.

    Raises InputError if pictures were chosen and the file that names them is missing or damaged.
    """
    config = run.config.survey
    asked = any(kept.answered[config.n_first :].any() for kept in answers)
    if run.folder is None or not (asked or run.position.survey == SECOND_ROUND):
        return False
    file = run.folder.choice_file
    if not run.ranks.first:
        wait_until_seen(file)
    if not file.exists():
        raise InputError(
            f"survey: {file} is missing, which says what pictures some of the answers kept are to; "
            "restore it, or remove its folder to ask all APIs anew"
        )
    n_chosen = config.n_images - config.n_first
    pictures.choose(config.n_first, read_choice(file, n_chosen, pictures.seed, config.n_first))
    return True


def _distilling(
    run: RunState,
    bar: Bar,
    module: nn.Module,
    shared: Tensor,
    surveyed: Sequence[Surveyed],
    seed: int,
    heads: nn.ModuleList | None = None,
) -> Iterator[Epoch]:
    """Distil as `distil_jointly` does, from where a process that was cut off had come."""
    if begun := run.survey_tensors:
        bar.skip(int(begun["at"][0]))
    return distil_jointly(
        module, shared, surveyed, run.config.survey, seed, heads, begun, run.survey_step
    )


def shape_of_pictures(run: RunState) -> tuple[int, int, int]:
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
    n_recorded = sum(record["stage"] == "survey" for record in run.records.history)
    n_before = int(run.survey_tensors["at"][0]) if run.survey_tensors else 0
    with Bar(f"{run.label}: joint distillation", config.epochs, "epochs", run.progress) as bar:
        with run.timed("survey"):
            shared = pictures.as_bytes(config.n_images, shape_of_pictures(run)).to(run.device)
        epochs = bar.over(_distilling(run, bar, run.module, shared, surveyed, run.config.seed))
        for number in count(n_before + 1):
            with run.timed("survey"):  # each epoch by itself, so that its record has its seconds
                epoch = next(epochs, None)
            if epoch is None:
                break
            bar.show(loss=epoch.loss)
            if number <= n_recorded:  # cut off after the record
                continue
            with run.whole():
                run.record(
                    "survey",
                    epoch=number,
                    loss=epoch.loss,
                    accuracy=epoch.agreement,
                    accuracy_by_api=dict(zip(names, epoch.by_api)),
                )
    loss = run.records.history[-1]["loss"]
    run.log(f"the survey has ended with a loss of {loss:.4g} after {config.epochs} epochs")
