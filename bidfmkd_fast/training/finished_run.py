"""Read a finished run back from its folder, as `fit` gave it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.training.recovered_set import PARTS
from bidfmkd_fast.training.run import Run
from bidfmkd_fast.training.run_folder import RunFolder


def finished_run(folder: RunFolder, apis: Sequence[BlackBox], device: torch.device) -> Run:
    """Return the complete run in `folder`, its models on `device`; to be called inside
    `folder.counting(apis)`.

    The recovered sets come in the order of the APIs. Raises InputError for a file that is missing
    or damaged.
    """
    summary, ledger = folder.summary(), folder.ledger.rows()
    meta_model, initial_model = folder.meta_model(), folder.initial_model()
    for model in (meta_model, initial_model):
        model.module.to(device)
    read = [
        folder.load_recovered(number, part, api)
        for number, api in enumerate(apis)
        for part in PARTS
    ]
    return Run(
        meta_model=meta_model,
        initial_model=initial_model,
        memory=folder.memory(),
        recovered=[one for one in read if one is not None],
        history=folder.metrics(),
        queries=sum(row.queries for row in ledger),
        requests=sum(row.requests for row in ledger),
        seconds=dict(summary["seconds"]),
        complete=True,
        config=folder.config(),
        ledger=ledger,
    )
