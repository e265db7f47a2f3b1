"""Recover a set step by step on the host, which looks at every answer as it comes.

This loop serves every black box: it checks the budget before each step, keeps the answers in a
journal and reports every step. `on_device` does the same without the host for a local module on a
GPU. Both take the step that `step` defines.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bidfmkd_fast.errors import BudgetExhausted
from bidfmkd_fast.recovery.cost import check_budget, step_cost
from bidfmkd_fast.recovery.journal import Journal
from bidfmkd_fast.recovery.mu import warn_if_unmoved
from bidfmkd_fast.recovery.recovered import Record, Recovered
from bidfmkd_fast.recovery.step import RecoveryStep


class StepwiseRecovery:
    """A recovery that looks at every answer.

    Args:
        step: the recovery to run.
        warn: warn if steps of length mu change no answer; for a mu that the user has set.
        journal: where answers are kept, and read again if an earlier process left some.
    """

    def __init__(self, step: RecoveryStep, warn: bool, journal: Journal | None) -> None:
        self._step, self._warn, self._journal = step, warn, journal
        self._history: list[Record] = []

    def run(self, callback: Callable[[Record], None] | None = None) -> Recovered:
        """Take all steps, or as many as the budget pays; `callback` gets the record of each."""
        if self._step.config.steps == 0:
            return self._untrained()
        self._restore()
        complete = True
        for number in range(len(self._history), self._step.config.steps):
            if not self._take(number):
                complete = False
                break
            if callback is not None:
                callback(self._history[-1])
        best = self._step.best
        return Recovered(
            best.images,
            self._step.labels,
            best.scores,
            best.losses,
            self._history,
            complete,
            self._step.mu,
        )

    def _untrained(self) -> Recovered:
        """Ask once for the images of the untrained generator (the no-recovery control)."""
        api, objective = self._step.api, self._step.objective
        images = self._step.maker.images(0).detach()
        student_scores = objective.student_scores(images, api.spec.n_classes)
        scores = api(images)
        losses = objective.losses(scores, student_scores)
        return Recovered(images, self._step.labels, scores, losses, [], complete=True)

    def _restore(self) -> None:
        """Go back to the snapshot of the journal, if it has one.

        The steps after the snapshot are made again from the recorded answers.
        """
        journal, zeroth_order = self._journal, self._step.zeroth_order
        if journal is not None and journal.state and zeroth_order is not None:
            self._step.maker.restore(journal.state)
            self._step.best.restore(journal.best)
            self._history = list(journal.history)
            zeroth_order.load_state_dict({"seed": zeroth_order.seed, "step": len(self._history)})

    def _take(self, number: int) -> bool:
        """Take step `number`. Return False if the budget ended in it.

        Raises:
            BudgetExhausted: no image has an answer yet, so there is nothing to return.
        """
        step, best = self._step, self._step.best
        x = step.maker.images(number)
        answers: list[Tensor] = []  # one tensor per call to the API, [rows, B, n_classes]
        student_scores = None
        if self._journal is not None:
            student_scores, answers = self._journal.answers(number, step.labels.device)
        cost = step_cost(
            step.api, step.config, len(x), step.paper_compat, rows_held=sum(map(len, answers))
        )
        try:
            check_budget(step.api, cost)
            if not answers:
                student_scores = step.objective.student_scores(x.detach(), step.api.spec.n_classes)
            self._ask(number, x, answers, student_scores)
        except BudgetExhausted:
            # The images themselves are asked first, so their answers count even if the rest of the
            # step is missing. The authors' ranking needs the whole step.
            if answers and not (step.paper_compat and self._history):
                scores = answers[0][0]
                losses = step.objective.losses(scores, student_scores)
                best.keep(x.detach(), scores, losses, losses)
            if not answers and not self._history:
                raise
            return False
        scores = torch.cat(answers)  # [1+q, B, n_classes]
        if self._warn and number == 0 and step.mu is not None:
            warn_if_unmoved(scores, step.labels, step.api.spec, step.mu)
        values = step.learn(x, scores, student_scores)
        self._record(number, values)
        return True

    def _ask(
        self, number: int, x: Tensor, answers: list[Tensor], student_scores: Tensor | None
    ) -> None:
        """Ask for the chunks of points that `answers` lacks, and add their answers to it."""
        step, n_held = self._step, len(answers)
        for chunk, points in enumerate(step.points(x)):
            if chunk < n_held:
                continue
            answers.append(step.api(points.flatten(0, 1)).unflatten(0, points.shape[:2]))
            if self._journal is not None:
                self._journal.add_answers(number, answers[-1], student_scores)

    def _record(self, number: int, values: Tensor) -> None:
        """Add step `number` to the history, and a snapshot to the journal if one is due."""
        step, history = self._step, self._history
        loss, best_loss, matched = values.tolist()
        cost = step_cost(step.api, step.config, len(step.labels), step.paper_compat)
        history.append(
            {
                "step": number,
                "loss": loss,
                "best_loss": best_loss,
                "matched": matched,
                "queries": (number + 1) * cost.queries,
            }
        )
        shares = [record["matched"] for record in history]
        step.api.first_answers.warn_of_one_class(shares, stacklevel=5)
        if self._journal is not None and step.maker.can_restore:
            self._journal.keep_state(step.maker.state, step.best.state(), history)
