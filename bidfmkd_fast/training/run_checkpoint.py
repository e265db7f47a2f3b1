"""Write the state of a run as a checkpoint, and go on from the newest one.

Random numbers are functions of the seed and the position, so only positions are kept. Recovered
sets and answers to the survey are files of the run already; a checkpoint names the sets that the
run holds, in their order.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.runtime.training_state import restore_tensors, tensors_of, under
from bidfmkd_fast.secrets import scrubbed
from bidfmkd_fast.training.position import N_PASSES, Position
from bidfmkd_fast.training.run_folder import META_MODEL, RunFolder
from bidfmkd_fast.training.shortfalls import Shortfalls

if TYPE_CHECKING:
    from bidfmkd_fast.training.run_state import RunState

_SURVEY = "survey"


def write_checkpoint(run: RunState) -> None:
    """Write what the run needs to go on from where it is. Nothing happens without a folder.

    Of several ranks the first writes for all.

    Raises:
        InputError: it cannot be written; earlier checkpoints stay.
    """
    if run.folder is None or not run.ranks.first:
        return
    starts = {f"straggler {index}": start.module for index, start in run.stragglers.items()}
    tensors = tensors_of({**_trained(run), **starts})
    if run.survey_state is not None:
        tensors |= {f"{_SURVEY}/{name}": value for name, value in run.survey_state().items()}
    state = {
        "begun_with": _digest(run.initial_module),
        "n_apis": len(run.apis),
        "position": run.position.to_state(),
        "shortfalls": scrubbed(run.shortfalls.to_state()),
        "outer_step": run.outer_step,
        "replay_step": run.replay_step,
        "surveyed": run.surveyed,
        "seconds": run.seconds,
        "sets": [[known.api_index, known.part] for known in run.recovered],
        "stragglers": {str(index): start.outer_step for index, start in run.stragglers.items()},
        "records": scrubbed(run.records.history),
    }
    run.checkpoints.write(tensors, state)


@contextmanager
def checkpointed(run: RunState) -> Iterator[None]:
    """Write a checkpoint if the block ends early, unless an error left a step half done."""
    try:
        yield
    except BaseException:
        finished = run.folder is None or (run.folder.path / META_MODEL).exists()
        if run.consistent and not finished:
            with suppress(Exception):  # what ended the run is raised; an earlier checkpoint stays
                write_checkpoint(run)
        raise


def restore(run: RunState) -> None:
    """Bring a run that has just been made to where its newest checkpoint was written.

    Nothing happens without one.

    Raises:
        InputError: the run began with another meta-model or other APIs, or a set that it held is
            missing.

    Warns:
        UserWarning: something was left out for good.
    """
    if run.ranks.first:
        found = run.checkpoints.newest()  # removes a damaged one
        run.ranks.exchange()
    else:
        run.ranks.exchange()
        found = run.checkpoints.newest()
    if found is not None and run.folder is not None:
        _restore(run, run.folder, *found)
    run.ranks.exchange()  # all have read it, so that rank 0 may remove it for a newer one


def _restore(
    run: RunState, folder: RunFolder, tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Do what `restore` says, with a checkpoint."""
    if state["n_apis"] != len(run.apis):
        raise InputError(
            f"run folder: the run in {folder.path} began with {state['n_apis']} APIs; got "
            f"{len(run.apis)}; give the same ones, or remove {run.checkpoints.folder} to train on "
            "these from the start"
        )
    if state["begun_with"] != _digest(run.initial_module):
        raise InputError(
            f"run folder: the run in {folder.path} began with another meta-model; give the "
            f"same one, or remove {run.checkpoints.folder} to train this one from the start"
        )
    restore_tensors(_trained(run), tensors)
    run.survey_tensors = under(_SURVEY, tensors)
    if run.survey_tensors:  # it stays the state until a step is taken
        run.survey_state = run.survey_tensors.copy
    run.position = Position.from_state(state["position"])
    run.shortfalls = Shortfalls.from_state(state["shortfalls"])
    run.outer_step, run.replay_step = state["outer_step"], state["replay_step"]
    run.surveyed, run.seconds = state["surveyed"], state["seconds"]
    for index, part in state["sets"]:
        held = folder.load_recovered(index, part, run.apis[index])
        if held is None:
            raise InputError(
                f"run folder: {folder.recovered_file(index, part)} is missing, from which the "
                f"run has learned; restore it, or remove {run.checkpoints.folder} to recover the "
                "set again and train from the start"
            )
        run.hold_set(held)
    for name, outer_step in state["stragglers"].items():
        start = run.round_start()._replace(outer_step=outer_step)
        start.module.load_state_dict(under(f"straggler {name}", tensors))
        run.stragglers[int(name)] = start
    run.records.restore(state["records"])
    run.log(f"goes on from a checkpoint, after outer step {run.outer_step}")
    if run.position.passes == N_PASSES and not run.shortfalls.complete and run.ranks.first:
        warnings.warn(
            f"run folder: all APIs of {folder.path} have had their turn, so what a budget or a "
            f"failure left out is not asked again; remove {run.checkpoints.folder} to ask for it "
            "and to train from the start",
            stacklevel=2,
        )


def _trained(run: RunState) -> dict[str, nn.Module | torch.optim.Optimizer]:
    """Name what the run trains."""
    return {
        "meta_model": run.module,
        "distillation": run.distillation_optimizer,
        "replay": run.replay_optimizer,
    }


def _digest(module: nn.Module) -> str:
    """Return a checksum of the names and values of a module's state."""
    digest = hashlib.blake2b(digest_size=16)
    value: Tensor
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
