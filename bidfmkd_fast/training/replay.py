"""Replay: train the meta-model on tasks drawn from the images of all APIs recovered so far."""

from __future__ import annotations

from collections.abc import Callable

from bidfmkd_fast.meta import outer_replay_step
from bidfmkd_fast.meta.replay_on_device import DeviceReplay
from bidfmkd_fast.meta.stacked import can_stack
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.seeds import derive_seed, seeded
from bidfmkd_fast.training.run_state import RunState
from bidfmkd_fast.training.step_records import STEPS

Metrics = dict[str, float]
# Takes at least one step and at most as many as its argument says; returns the metrics of each.
TakeSteps = Callable[[int], list[Metrics]]


def replay(run: RunState, steps: int, patience: int = 0) -> None:
    """Take `steps` outer steps on tasks from the memory.

    With a `patience` above 0 it ends early, once the accuracy has not improved for that many steps.
    Nothing happens while the memory is empty, or if the settings leave replay out.
    """
    if not run.recovered or not run.config.task_replay:
        return
    at = run.position.replay
    if at.over or at.steps >= steps:
        return
    take_steps = step_taker(run)
    with Bar(f"{run.label}: replay", steps, "steps", run.progress, keep=False) as bar:
        bar.skip(at.steps)
        while not at.over:
            with run.whole():
                measured = take_steps(min(steps - at.steps, patience or STEPS, STEPS))
                for metrics in measured:
                    at.unrecorded.append(metrics)
                    if metrics["accuracy"] > at.best:
                        at.best, at.best_step = metrics["accuracy"], at.steps
                    at.steps += 1
                impatient = patience > 0 and at.steps - 1 - at.best_step >= patience
                at.over = at.steps == steps or impatient
                if at.over or len(at.unrecorded) >= STEPS:
                    means = {
                        name: sum(metrics[name] for metrics in at.unrecorded) / len(at.unrecorded)
                        for name in ("loss", "accuracy")
                    }
                    run.record("replay", **means)
                    bar.show(**means)
                    at.unrecorded = []
            bar.advance(len(measured))
        run.log(f"replay until outer step {run.outer_step}: loss {means['loss']:.4g}")


def step_taker(run: RunState) -> TakeSteps:
    """Return a function that takes replay steps, on the GPU if the module allows it.

    On a GPU it takes all that it is asked for, and the metrics are read once, so that the host need
    not wait for each step. On a CPU it takes one. Several ranks take one as well, since a captured
    step holds all its tasks and no exchange of gradients.
    """
    if run.device.type == "cuda" and run.ranks.size == 1 and can_stack(run.module, run.n_way):
        return _on_device(run)
    return lambda most: [_step_on_host(run)]


def _on_device(run: RunState) -> TakeSteps:
    """Return a function that takes steps on the GPU."""
    n_tasks, config = run.config.meta_batch_size, run.config.replay
    device_replay = DeviceReplay(
        run.module,
        run.replay_optimizer,
        run.memory,
        _task_size(run),
        n_tasks,
        config.inner,
        rotations=config.rotations,
    )
    seed = derive_seed(run.config.seed, "replay")

    def take_steps(most: int) -> list[Metrics]:
        with run.timed("replay"):
            for _ in range(most):
                device_replay.step(seed, run.replay_step * n_tasks)
                run.replay_step += 1
                run.outer_step += 1
            return device_replay.records()

    return take_steps


def _step_on_host(run: RunState) -> Metrics:
    """Take one replay step and return its metrics."""
    n_tasks, config = run.config.meta_batch_size, run.config.replay
    with run.timed("replay"), seeded(run.config.seed, "replay", run.replay_step):
        n_way, n_shot, n_query = _task_size(run)
        episodes = [
            run.memory.sample_episode(
                n_way,
                n_shot,
                n_query,
                seed=derive_seed(run.config.seed, "replay"),
                index=run.replay_step * n_tasks + task,
                rotations=config.rotations,
            )
            for task in range(n_tasks)
        ]
        metrics = outer_replay_step(
            run.module, run.replay_optimizer, episodes, config.inner, run.ranks
        )
    run.replay_step += 1
    run.outer_step += 1
    return metrics


def _task_size(run: RunState) -> tuple[int, int, int]:
    """Return n_way, n_shot and n_query of the tasks.

    There are fewer query images than the settings ask for when a budget ended after the support
    sets, so that no class holds as many.
    """
    config, memory = run.config.replay, run.memory
    sizes = sorted(memory.counts, reverse=True)
    most = sizes[run.n_way - 1]  # images per class that at least n_way classes hold
    return run.n_way, config.n_shot, min(config.n_query, most - config.n_shot)
