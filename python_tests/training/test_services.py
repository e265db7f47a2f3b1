"""Run through services that fail: the results match local APIs, and everything is counted."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from bidfmkd_fast.black_box import (
    APISpec,
    BlackBox,
    Budget,
    FunctionBlackBox,
    JSONBlackBox,
    RemoteBlackBox,
)
from bidfmkd_fast.black_box.remote.service import ServiceBlackBox
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, BudgetExhausted, ServiceWarning
from bidfmkd_fast.recovery import RecoveryConfig
from bidfmkd_fast.runtime.interrupt import check
from bidfmkd_fast.survey import SurveyConfig
from bidfmkd_fast.training import (
    BiDfMKD,
    DistillationConfig,
    ReplayConfig,
    Run,
    TrainConfig,
    replay,
    services,
)
from bidfmkd_fast.training.outcome import Outcome
from bidfmkd_fast.training.report import write_report
from bidfmkd_fast.training.run_folder import LEDGER, RunFolder

N_CLASSES, SHAPE, B = 3, (1, 16, 16), 9
STEP = 3 * B
TINY = TrainConfig(
    survey=SurveyConfig(n_images=0),
    n_per_class=3,
    meta_batch_size=2,
    meta_model_width=4,
    recovery=RecoveryConfig(steps=2, num_directions=2, generator_width=4, latent_dim=8),
    distillation=DistillationConfig(inner_steps=2),
    replay=ReplayConfig(final_steps=2, n_query=2, inner_steps=1),
)


def answers_of(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
    weight = torch.randn(256, N_CLASSES, generator=torch.Generator().manual_seed(number)).double()
    # In float64, so that the answers do not depend on the size of the batch.
    return lambda images: (images.flatten(1).double() @ weight).float()


def spec_of(number: int, **fields: Any) -> APISpec:
    names = tuple(f"class {number + k}" for k in range(N_CLASSES))
    return APISpec(
        N_CLASSES, SHAPE, class_names=names, data_set="made up", name=f"api_{number}", **fields
    )


def local(number: int) -> BlackBox:
    return FunctionBlackBox(answers_of(number), spec_of(number))


class Scripted(ServiceBlackBox):
    """A service in this process.

    `before` is called with the number of each request; it may raise or wait.
    """

    def __init__(
        self, number: int, before: Callable[[int], None] = lambda call: None, **spec: Any
    ) -> None:
        super().__init__(spec_of(number, **spec))
        self.answer, self.before, self.calls = answers_of(number), before, 0

    def _request(self, images: torch.Tensor, attempt: Callable[[], None]) -> torch.Tensor:
        attempt()
        self.calls += 1
        self.before(self.calls)
        return self.answer(images)


@contextmanager
def answering(status: int, headers: dict[str, str], body: str) -> Iterator[str]:
    """Give the URL of a loopback server that answers every request the same."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_POST

        def log_message(self, *arguments: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(
        target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()


def same(a: Run, b: Run) -> bool:
    """Return True if the meta-models of two runs are equal bit for bit."""
    states = a.meta_model.module.state_dict(), b.meta_model.module.state_dict()
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_services_recovered_at_once_give_what_local_apis_give_one_by_one() -> None:
    wanted = BiDfMKD([local(number) for number in range(5)], config=TINY).fit()
    config = replace(TINY, meta_batch_size=2)
    for _ in range(2):
        mixed = [Scripted(number) if number != 1 else local(number) for number in range(5)]
        run = BiDfMKD(mixed, config=config).fit()
        assert same(run, wanted)
        assert [(found.api_index, found.part) for found in run.recovered] == [
            (found.api_index, found.part) for found in wanted.recovered
        ]


def test_services_of_a_group_are_asked_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=60)
    BiDfMKD(
        [Scripted(n, lambda call: both.wait() and None if call == 1 else None) for n in range(2)],
        config=TINY,
    ).fit()


def fails_until(call_number: int) -> Callable[[int], None]:
    """Return a `before` that fails in all calls up to number `call_number`."""

    def before(call: int) -> None:
        if call <= call_number:
            raise APIUnavailable(f"no answer to call {call}")

    return before


@pytest.mark.filterwarnings("error")
def test_a_service_that_is_back_later_is_recovered_at_the_end(tmp_path: Path) -> None:
    apis = [local(0), Scripted(1, fails_until(1)), local(2), local(3)]
    with pytest.warns(
        ServiceWarning, match="api_1: it is skipped and asked again at the end: no answer to call 1"
    ):
        run = BiDfMKD(apis, config=TINY).fit(tmp_path / "run")
    assert run.complete and not run.skipped
    assert [found.api_index for found in run.recovered] == [0, 0, 2, 2, 3, 3, 1, 1]
    row = run.ledger[1]
    # The failed call counts, too.
    assert (row.queries, row.answered_queries) == (5 * STEP, 4 * STEP)
    assert run.queries == 17 * STEP


def test_a_set_that_was_recovered_before_the_failure_is_not_asked_for_again() -> None:
    fails_once = iter([True])

    def before(call: int) -> None:
        if call == 3 and next(fails_once, False):  # the first step of the second set
            raise APIUnavailable("down")

    api = Scripted(1, before)
    with pytest.warns(ServiceWarning, match="down"):
        run = BiDfMKD([local(0), api], config=TINY).fit()
    assert [(found.api_index, found.part) for found in run.recovered] == [
        (0, "support"), (0, "query"), (1, "support"), (1, "query"),
    ]  # fmt: skip
    assert api.calls == 5 and run.complete


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("failing", [2, 5])
def test_a_set_that_failed_midway_is_not_asked_for_from_the_start(
    failing: int, kept: bool, tmp_path: Path
) -> None:
    """Fail in the second step of the support set or the query set, with and without a folder."""
    fails_once = iter([True])

    def before(call: int) -> None:
        if call == failing and next(fails_once, False):
            raise APIUnavailable("down")

    config = replace(TINY, meta_batch_size=2, recovery=replace(TINY.recovery, steps=3))
    api = Scripted(1, before)
    with pytest.warns(ServiceWarning, match="down"):
        run = BiDfMKD([local(0), api, local(2)], config=config).fit(
            tmp_path / "run" if kept else None
        )
    assert run.complete and api.calls == 6 + 1
    assert all(
        [record["step"] for record in found.recovered.history] == [0, 1, 2]
        for found in run.recovered
    )
    if failing == 2:  # no boundary query set was under way yet
        assert torch.equal(
            run.recovered[-2].images,
            BiDfMKD([local(0), local(1)], config=config).fit().recovered[2].images,
        )
    assert not list(tmp_path.rglob("*.journal"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (APIUnavailable("api_1: no answer"), "api_1: no answer"),
        (BadAnswer("api_1: it answered NaN"), "it answered NaN"),
    ],
)
def test_a_service_that_never_answers_is_left_out_and_named(
    tmp_path: Path, error: Exception, message: str
) -> None:
    def before(call: int) -> None:
        raise error

    with pytest.warns(ServiceWarning) as caught:
        run = BiDfMKD([local(0), Scripted(1, before), local(2)], config=TINY).fit(tmp_path / "run")
    assert [str(warning.message).split(": ")[1] for warning in caught] == [
        "it is skipped and asked again at the end", "it is left out",
    ]  # fmt: skip
    assert not run.complete and not run.budget_ended
    assert list(run.skipped) == ["api_1"] and message in run.skipped["api_1"]
    report = write_report(RunFolder.open(tmp_path / "run")).read_text()
    assert "api_1" in report and message in report and "budget ended" not in report


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "must answer JSON"),
        ('{"predictions": [[1, 2, 1' + "0" * 400 + "]]}", "must lead to lists of numbers"),
        ('{"error": "quota used up"}', "quota used up"),
    ],
)
def test_a_service_that_answers_nonsense_is_skipped(body: str, message: str) -> None:
    with answering(200, {}, body) as url, pytest.warns(ServiceWarning):
        apis = [local(0), JSONBlackBox(url, spec_of(1), "tf_serving"), local(2)]
        run = BiDfMKD(apis, config=TINY).fit()
    assert list(run.skipped) == ["api_1"] and message in run.skipped["api_1"]
    assert {found.api_index for found in run.recovered} == {0, 2}


@pytest.mark.parametrize("wait", ["Fri, 01 Jan 2099 00:00:00 GMT", "1e300"])
def test_a_service_that_asks_for_an_endless_wait_is_skipped(wait: str) -> None:
    with answering(429, {"Retry-After": wait}, "") as url, pytest.warns(ServiceWarning):
        run = BiDfMKD([local(0), JSONBlackBox(url, spec_of(1), "tf_serving")], config=TINY).fit()
    assert list(run.skipped) == ["api_1"] and "Retry-After" in run.skipped["api_1"]


def test_a_server_with_another_model_than_it_had_is_skipped() -> None:
    model = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3, 99, 99]}], "outputs": []}
    with answering(200, {}, json.dumps(model)) as url, pytest.warns(ServiceWarning):
        apis = [local(0), RemoteBlackBox(url, "m", spec_of(1), transport="binary")]
        run = BiDfMKD(apis, config=TINY).fit()
    assert "the server takes images [3, 99, 99]" in run.skipped["api_1"]


def test_ctrl_c_ends_a_run_that_waits_for_a_silent_service() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=16) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        apis = [
            local(0),
            *(JSONBlackBox(url, spec_of(number), "tf_serving", timeout=300) for number in (1, 2)),
        ]
        timer = threading.Timer(
            1.0, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]
        )
        at = time.monotonic()
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            BiDfMKD(apis, config=TINY).fit()
        assert time.monotonic() - at < 1 + 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("recovery")]


def test_no_service_answers(tmp_path: Path) -> None:
    apis = [Scripted(number, fails_until(10**9)) for number in range(2)]
    with pytest.warns(ServiceWarning), pytest.raises(APIUnavailable, match="no answer"):
        BiDfMKD(apis, config=TINY).fit(tmp_path / "run")
    assert (tmp_path / "run" / LEDGER).exists()  # it holds the queries that failed
    again = BiDfMKD([Scripted(number) for number in range(2)], config=TINY).fit(tmp_path / "run")
    assert again.complete and again.queries == 8 * STEP + 2 * 2 * STEP


def test_a_slow_service_does_not_hold_up_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first API wait until the last one, in a later group, is asked.

    A run that waited for the first API would never end.
    """
    monkeypatch.setattr(services, "_PATIENCE", 0.0)
    monkeypatch.setattr(services, "_LEAST_SECONDS", 0.01)
    last = threading.Event()
    slow = Scripted(
        0, lambda call: None if call > 1 or last.wait(120) else pytest.fail("it held up the rest")
    )
    apis = [slow, Scripted(1), local(2), local(3), Scripted(4, lambda call: last.set())]
    run = BiDfMKD(apis, config=TINY).fit()
    assert run.complete
    order = list(dict.fromkeys(found.api_index for found in run.recovered))
    assert sorted(order) == [0, 1, 2, 3, 4] and order.index(0) > order.index(3)


def test_services_that_all_went_away_are_asked_again_by_the_next_call(tmp_path: Path) -> None:
    def gone(call: int) -> None:
        if call > 1:
            raise APIUnavailable("it is away")

    with (
        pytest.warns(ServiceWarning, match="api_0: it is left out: it is away"),
        pytest.raises(APIUnavailable, match="it is away"),
    ):
        BiDfMKD([Scripted(n, gone) for n in range(2)], config=TINY).fit(tmp_path, progress=False)
    run = BiDfMKD([Scripted(n) for n in range(2)], config=TINY).fit(tmp_path, progress=False)
    assert run.complete and len(run.recovered) == 4


def test_a_straggler_goes_on_with_the_model_of_its_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupt a run two rounds after the round of a service that it did not wait for."""
    monkeypatch.setattr(services, "_PATIENCE", 0.0)
    monkeypatch.setattr(services, "_LEAST_SECONDS", 0.01)
    config = replace(TINY, meta_batch_size=1, replay=replace(TINY.replay, steps_per_round=2))
    late, step = services.Services.late, replay.outer_replay_step
    taken: list[int] = []

    def interrupted(*arguments: Any) -> dict[str, float]:
        metrics = step(*arguments)
        taken.append(len(taken))
        if len(taken) == n_steps:
            signal.raise_signal(signal.SIGINT)
        return metrics

    def run_of(folder: Path) -> Run:
        release = threading.Event()

        def wait(call: int) -> None:
            while not release.wait(0.02):
                check()

        def released(self: services.Services) -> list[Outcome]:
            release.set()
            return late(self)

        monkeypatch.setattr(services.Services, "late", released)
        apis = [Scripted(0), Scripted(1, wait), *map(local, (2, 3, 4))]
        return BiDfMKD(apis, config=config).fit(folder, progress=False)

    n_steps = 0  # never
    monkeypatch.setattr(replay, "outer_replay_step", interrupted)
    whole = run_of(tmp_path / "whole")
    assert [found.api_index for found in whole.recovered][-2:] == [1, 1]
    n_steps, taken[:] = 7, []  # the first round has nothing to replay, so this is in the fifth
    with pytest.raises(KeyboardInterrupt):
        run_of(tmp_path / "run")
    run = run_of(tmp_path / "run")
    assert len(taken) == 10
    for name, value in whole.meta_model.module.state_dict().items():
        assert torch.equal(value, run.meta_model.module.state_dict()[name])


def test_a_run_that_fails_stops_its_services() -> None:
    started = threading.Event()

    def before(call: int) -> None:
        started.set()
        assert call < 1000, "it was not stopped"

    def fail(images: torch.Tensor) -> torch.Tensor:
        started.wait(60)
        return torch.full((len(images), N_CLASSES), torch.nan)

    broken = FunctionBlackBox(fail, spec_of(0))
    config = replace(TINY, recovery=replace(TINY.recovery, steps=100000))
    with pytest.raises(BadAnswer, match="api_0"):
        BiDfMKD([broken, Scripted(1, before)], config=config).fit()


def test_a_budget_of_money_ends_a_run_and_keeps_what_there_is(tmp_path: Path) -> None:
    apis = [Scripted(number, price_per_1000=1000.0) for number in range(3)]
    config, budget = replace(TINY, meta_batch_size=1), Budget(max_cost=5 * STEP)
    run = BiDfMKD(apis, config=config, budget=budget).fit(tmp_path / "run")
    assert run.budget_ended and not run.complete and not run.skipped
    assert [found.api_index for found in run.recovered] == [0, 0, 1]
    assert sum(row.cost for row in run.ledger) == run.queries == 5 * STEP
    report = write_report(RunFolder.open(tmp_path / "run")).read_text()
    assert "budget ended" in report and "135" in report


def test_no_budget_for_a_single_step() -> None:
    with pytest.raises(BudgetExhausted, match="one step"):
        BiDfMKD([Scripted(0), Scripted(1)], config=TINY, budget=Budget(max_queries=STEP - 1)).fit()


def test_eight_services_under_faults(tmp_path: Path, seed: int) -> None:
    """Lose and miscount nothing, whatever fails.

    The faults are status 5xx and 429, dropped connections, a dead server and answers of NaN.
    """
    pytest.importorskip("uvicorn")
    from bidfmkd_fast.serving.behaviour import Behaviour
    from bidfmkd_fast.serving.server import Service, running

    names = [f"api_{number}" for number in range(8)]
    faults = Behaviour(failed=0.1, max_batch=5, storm_every=20, storm_length=2, retry_after=0)
    behaviours = {
        name: replace(faults, dropped=0.05 if name in names[:4] else 0.0) for name in names
    }
    behaviours["api_7"] = Behaviour(nan=1.0)
    service = Service([local(number) for number in range(8)], behaviours, seed)
    with running(service) as url:
        dead = "http://127.0.0.1:9"
        apis = [
            RemoteBlackBox(
                dead if number == 6 else url,
                name,
                spec_of(number),
                backoff=0.0,
                retries=2 if number == 6 else 12,
            )
            for number, name in enumerate(names)
        ]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ServiceWarning)
            run = BiDfMKD(apis, config=replace(TINY, meta_batch_size=4)).fit(tmp_path / "run")
        received = {counts["name"]: counts for counts in service.statistics()["model_stats"]}
    assert list(run.skipped) == ["api_6", "api_7"]
    assert "no answer in 3 attempts" in run.skipped["api_6"] and "NaN" in run.skipped["api_7"]
    assert {str(warning.message).split(":")[0] for warning in caught} == {"api_6", "api_7"}
    assert {found.api_index for found in run.recovered} == set(range(6))
    for row in run.ledger:
        if row.name == "api_6":
            continue
        got = received[row.name]
        assert row.requests >= got["received"]["requests"] >= row.answered_requests
        if row.name not in names[:4]:  # without dropped connections the counts agree
            assert row.requests == got["received"]["requests"]
        if row.name != "api_7":
            assert row.answered_queries == 4 * STEP == got["inference_count"]
            assert row.answered_requests == got["execution_count"]
    assert sum(row.requests - row.answered_requests for row in run.ledger[:6]) > 0, "no faults"
