"""Read a finished run back from its folder, as `fit` gave it."""

from __future__ import annotations

from bidfmkd_fast.training.recovered_set import PARTS
from bidfmkd_fast.training.run import Run
from bidfmkd_fast.training.run_state import RunState


def finished_run(state: RunState) -> Run:
    """Return the complete run in the folder of `state`, its models on the device of `state`.

    The recovered sets come in the order of the APIs. Raises InputError for a file that is missing
    or damaged.
    """
    folder, ledger = state.folder, state.ledger
    assert folder is not None and ledger is not None
    summary, rows = folder.summary(), ledger.rows()
    meta_model, initial_model = folder.meta_model(), folder.initial_model()
    for model in (meta_model, initial_model):
        model.module.to(state.device)
    sets = [
        folder.load_recovered(number, part, api)
        for number, api in enumerate(state.apis)
        for part in PARTS
    ]
    return Run(
        meta_model=meta_model,
        initial_model=initial_model,
        memory=folder.memory(),
        recovered=[found for found in sets if found is not None],
        history=folder.metrics(),
        queries=sum(row.queries for row in rows),
        requests=sum(row.requests for row in rows),
        seconds=dict(summary["seconds"]),
        complete=True,
        config=folder.config(),
        ledger=rows,
        labels_only=tuple(summary.get("labels_only", ())),  # older versions know no such APIs
    )
