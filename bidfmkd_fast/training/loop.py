"""Show the whole algorithm on one page, in the order of the paper (Hu et al., arXiv 2305.18413).

In every round the loop takes a group of black-box APIs and

1. recovers a support set from each API by zeroth-order gradients,
2. inner level: distils the API's answers to its support set into a task model,
3. recovers a boundary query set, on which the API and its task model disagree,
4. outer level: moves the meta-model so that task models agree with their APIs on the query sets,
5. replays all images recovered so far as tasks across APIs.

Before the first round, a survey asks all APIs about the same procedural pictures and distils their
answers into the meta-model. APIs that give labels only are part of the survey alone.

Services that fail are asked once more after all others. The final replay ends the run.

Several processes share the APIs out, and take every outer step together (`runtime.ranks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from bidfmkd_fast.errors import APIUnavailable, BadAnswer, BudgetExhausted
from bidfmkd_fast.meta import DistillationTask, outer_distillation_step
from bidfmkd_fast.recovery.recover import recover
from bidfmkd_fast.seeds import seeded
from bidfmkd_fast.training.inner_level import task_model
from bidfmkd_fast.training.local_at_once import apis_at_once, recover_at_once
from bidfmkd_fast.training.outcome import Outcome
from bidfmkd_fast.training.position import N_PASSES
from bidfmkd_fast.training.recovered_set import PARTS, QUERY
from bidfmkd_fast.training.recoveries import Recoveries
from bidfmkd_fast.training.replay import replay
from bidfmkd_fast.training.round_start import RoundStart
from bidfmkd_fast.training.run import Run
from bidfmkd_fast.training.run_state import RunState
from bidfmkd_fast.training.sharing import in_turn, of_all
from bidfmkd_fast.training.survey_stage import survey


def run_loop(run: RunState) -> Run:
    """Run all rounds and the final replay.

    Raises what a local API raises, since asking it again would not help, and the last error if no
    API gave a set.
    """
    apis, size, settings = run.apis, run.config.meta_batch_size, run.config.replay
    n_services, at = sum(apis[i].is_service for i in run.recoverable), run.position
    survey(run)
    run.note_labels_only()
    with Recoveries(run) as recoveries, recoveries.services(n_services) as services:
        recover_one = partial(recover_api, run, recoveries)
        # Those of earlier rounds, in a run that was cut off.
        late = run.ranks.share(sorted(run.stragglers.items()))
        services.start_late(partial(recover_one, i, start.copy()) for i, start in late)
        while at.passes < N_PASSES:
            if at.waiting is None:
                with run.whole():
                    at.waiting = run.shortfalls.take_failed() if at.passes else run.recoverable
            while group := at.group(size):
                replay(run, settings.steps_per_round, settings.patience)
                with run.timed("recovery"):
                    start = run.round_start()
                    remote = [i for i in group if apis[i].is_service]
                    # Running a module swaps its parameters, so each thread gets a copy.
                    own = run.ranks.share(remote)
                    services.start(partial(recover_one, i, start.copy()) for i in own)
                    at_once = apis_at_once(run, group)
                    outcomes = recover_at_once(run, recoveries, run.ranks.share(at_once))
                    for i in in_turn(run, [i for i in group if i not in (*remote, *at_once)]):
                        outcomes.append(recover_one(i, start))
                    outcomes = of_all(run, outcomes + services.gather())
                with run.whole():
                    run.note_stragglers(remote, outcomes, start)
                    distil(run, run.keep(outcomes))
                    at.end_round(size)
            with run.timed("recovery"):
                outcomes = of_all(run, services.late())
            with run.whole():
                run.stragglers.clear()
                distil(run, run.keep(outcomes))
                at.end_pass()
    if not run.recovered and not run.surveyed and run.shortfalls.last_error is not None:
        run.start_again()
        raise run.shortfalls.last_error
    replay(run, settings.final_steps)
    return run.finish()


def recover_api(run: RunState, recoveries: Recoveries, index: int, start: RoundStart) -> Outcome:
    """Recover the support set of one API, adapt a task model to it, recover its boundary query set.

    `start` is the meta-model when the round began; a straggler keeps it.
    Budgets that end and services that fail are part of the outcome; other errors are raised.
    """
    api, config, outcome = run.apis[index], run.config, Outcome(index)
    # A callback reads values in every step, which on a GPU makes the host wait for the device.
    callback = recoveries.after_step if api.is_service or run.device.type != "cuda" else None
    try:
        for part in PARTS:
            if recoveries.find(outcome, part):
                continue
            with recoveries.under_way(outcome, part) as journal:
                student = None
                if part == QUERY:
                    student = task_model(run, start, outcome.sets[0], journal.steps)
                recovered = recover(
                    api,
                    config.n_per_class,
                    student,
                    config.recovery,
                    generator=run.generator,
                    seed=recoveries.seed(index, part),
                    device=run.device,
                    paper_compat=config.paper_compat,
                    callback=callback,
                    journal=journal,
                )
                recoveries.keep(outcome, part, recovered, journal)
    except (BudgetExhausted, APIUnavailable, BadAnswer) as error:
        if not (api.is_service or isinstance(error, BudgetExhausted)):
            raise
        outcome.error = error
    finally:
        api.release()
    return outcome


def distil(run: RunState, tasks: Sequence[DistillationTask]) -> None:
    """Take the outer step of a round: one step of the meta-model on all `tasks` together.

    Nothing happens without tasks, or if the settings leave the distillation out.
    """
    config = run.config.distillation
    if not tasks or not run.config.bilevel_distillation:
        return
    with run.timed("distillation"), seeded(run.config.seed, "distillation", run.outer_step):
        metrics = outer_distillation_step(
            run.module,
            run.distillation_optimizer,
            tasks,
            config.inner,
            paper_compat=run.config.paper_compat,
            ranks=run.ranks,
        )
    run.outer_step += 1
    run.log(f"distillation, outer step {run.outer_step}: loss {metrics['loss']:.4g}")
    run.record("distillation", loss=metrics["loss"], accuracy=metrics["agreement"])
