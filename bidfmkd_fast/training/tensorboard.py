"""Define the callback that writes the records of a run for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.extras import not_installed
from bidfmkd_fast.files.atomic import check_writable
from bidfmkd_fast.training.callbacks import Callback, RunInfo

if TYPE_CHECKING:
    from bidfmkd_fast.training.run import Run


class TensorBoardCallback(Callback):
    """Writes the loss, the accuracy and the queries of every record as scalars for TensorBoard.

    The scalars `survey/loss`, `survey/accuracy` and `survey/queries` stand over the epochs of the
    survey; `distillation/...` and `replay/...` over the outer steps of the meta-model; and
    `recovery/support ...` and `recovery/query ...` over the number of sets that were kept so far.
    Queries are those of all APIs so far. Every record is on the disk before the run goes on. A
    continued run adds a file of its new records, which TensorBoard shows as one curve.

    Args:
        log_dir: the folder for the event files; made if it is missing. `tensorboard --logdir` of
            the folder above shows several runs side by side.

    Raises:
        InputError: the package tensorboard is not installed; when the run starts, the folder cannot
            be written to.
    """

    def __init__(self, log_dir: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            module = error.name or "tensorboard"
            raise not_installed("TensorBoardCallback", module, "tensorboard") from None
        self.log_dir, self._writer_class = Path(log_dir), SummaryWriter
        self._writer: Any = None

    def on_start(self, info: RunInfo) -> None:
        """Make a new event file."""
        try:
            check_writable(self.log_dir / "events")
        except InputError as error:
            raise InputError(f"TensorBoardCallback: {error}") from None
        self._writer = self._writer_class(str(self.log_dir))

    def on_record(self, record: dict[str, Any]) -> None:
        """Write the scalars of the record."""
        stage = record["stage"]
        prefix = f"recovery/{record['set']} " if stage == "recovery" else f"{stage}/"
        position = record.get("epoch", record.get("sets", record["step"]))
        for name in ("loss", "accuracy", "queries"):
            self._writer.add_scalar(prefix + name, record[name], position)
        self._writer.flush()

    def on_end(self, run: Run | None) -> None:
        """Close the event file."""
        self._writer.close()
