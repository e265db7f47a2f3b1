"""Find the models of services and describe them as a pool; what cannot be used asks no query."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bidfmkd_fast.black_box import APISpec, Budget, FunctionBlackBox, RemoteBlackBox
from bidfmkd_fast.black_box.remote.v2_server import V2Server
from bidfmkd_fast.black_box.scores_kind import KIND_QUERIES
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, BudgetExhausted, InputError
from bidfmkd_fast.pools import Services, find_services, load_pool, pool_from_services, read_pool
from bidfmkd_fast.pools.services_of_run import listed_in
from bidfmkd_fast.serving import Behaviour

served = pytest.importorskip("bidfmkd_fast.serving.server", reason="the extra serve is missing")


def box(name: str, n_classes: int = 3, shape: tuple[int, int, int] = (1, 8, 8)) -> Any:
    weights = torch.randn(torch.Size(shape).numel(), n_classes, generator=torch.Generator())
    return FunctionBlackBox(lambda x: x.flatten(1) @ weights, APISpec(n_classes, shape, name=name))


@contextmanager
def serving(*boxes: Any, **behaviours: Behaviour) -> Iterator[tuple[str, Any]]:
    service = served.Service(list(boxes), behaviours)
    with served.running(service) as url:
        yield url, service


def images_scored(service: Any) -> int:
    return sum(model["received"]["images"] for model in service.statistics()["model_stats"])


def test_models_become_entries_and_the_others_are_named(tmp_path: Path) -> None:
    rounded = Behaviour(scores_kind="probabilities", decimals=4, dtype="uint8", max_batch=5)
    boxes = box("a"), box("b", 4, (3, 8, 12)), box("deep", 3, (2, 8, 8)), box("top", 4)
    with serving(*boxes, b=rounded, top=Behaviour(top_k=2)) as (url, service):
        found = pool_from_services(Services([f"{url}/v2/"]), tmp_path / "p ü")
        assert images_scored(service) == found.queries == 2 * KIND_QUERIES
        for api, local in zip(load_pool(tmp_path / "p ü"), boxes[:2], strict=True):
            images = torch.rand(6, *local.spec.image_shape).mul(255).round() / 255
            wanted = local(images) if local.name == "a" else local(images).softmax(1)
            torch.testing.assert_close(api(images), wanted, rtol=1e-4, atol=1e-4)
    assert [line.partition(":")[0] for line in found.left_out] == [
        f"deep at {url[:4]}",
        "top at http",
    ]
    assert "2 channels" not in found.text and "# left out: deep at http" in found.text
    first, second = read_pool(tmp_path / "p ü").entries
    assert first.options == {"url": url, "model": "a"}
    assert first.spec == {
        "name": "a",
        "n_classes": 3,
        "image_shape": [1, 8, 8],
        "input_range": [0.0, 1.0],
        "scores_kind": "logits",
        "class_names": [],
        "data_set": "",
        "price_per_1000": 0.0,
    }
    stated = {key: second.spec[key] for key in ("dtype", "scores_kind", "decimals", "max_batch")}
    assert stated == {
        "dtype": "uint8",
        "scores_kind": "probabilities",
        "decimals": 4,
        "max_batch": 5,
    }
    lines = found.text.splitlines()
    checked = ("scores_kind", "class_names", "price_per_1000", "input_range")
    for key in checked:
        assert all("# check" in line for line in lines if line.strip().startswith(f"{key}:"))


def test_models_of_one_name_on_two_servers_get_names_of_their_own() -> None:
    with serving(box("a"), box("b")) as (one, _), serving(box("a", 5)) as (two, _):
        found = find_services(Services([one, two]))
        ports = [url.rpartition(":")[2] for url in (one, two)]
        names = [f"a@127.0.0.1:{ports[0]}", "b", f"a@127.0.0.1:{ports[1]}"]
        assert [model.spec.name for model in found.models] == names
        assert [entry.name for entry in found.pool(Path()).entries] == names
        assert [model.spec.n_classes for model in found.models] == [3, 3, 5]
        only = find_services(Services([one, two], ["a"]))
        assert [model.model for model in only.models] == ["a", "a"]


def test_a_stated_kind_asks_nothing() -> None:
    with serving(box("a")) as (url, service):
        found = find_services(Services([url], scores_kind="labels"))
        assert found.models[0].spec.scores_kind == "labels" and found.queries == 0
        assert images_scored(service) == 0
    assert "scores_kind: labels  # check: as given" in found.text


def test_a_server_without_an_index_is_asked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_index(server: V2Server) -> Any:
        raise InputError(f"{server.url}: the server does not list its models")

    monkeypatch.setattr(V2Server, "models", no_index)
    with serving(box("a"), box("b")) as (url, _), serving(box("c")) as (other, _):
        with pytest.raises(InputError, match=f"{url}: the server does not list its models"):
            find_services(Services([url]))
        found = find_services(Services([url, other], ["a", "c"]))
        assert [model.spec.name for model in found.models] == ["a", "c"]
        with pytest.raises(InputError, match="no server has a model 'd'; there are a"):
            find_services(Services([url, other], ["a", "d"]))


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"models": ["d"]}, InputError, "no server has a model 'd'; there are a, deep"),
        ({"models": ["deep"]}, InputError, "services: deep at http.*pictures have 1 or 3 channels"),
        ({"models": ["a", "a"]}, InputError, "the model a is given twice"),
        ({"scores_kind": "sigmoid"}, InputError, "scores_kind must be one of .*; got 'sigmoid'"),
        ({"token_variables": ["A", "B"]}, InputError, "wants one name, or 1, one per URL; got 2"),
        ({"token_variables": ["NO_SUCH"]}, InputError, "NO_SUCH must hold the token"),
        ({}, BudgetExhausted, f"1 models would be asked {KIND_QUERIES} queries"),
    ],
)
def test_bad_input_asks_and_writes_nothing(
    fields: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with serving(box("a"), box("deep", 3, (2, 8, 8))) as (url, service):
        with pytest.raises(kind, match=message) as raised:
            pool_from_services(
                Services([url], **fields), tmp_path / "a" / "p", Budget(KIND_QUERIES - 1)
            )
        assert images_scored(service) == 0
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_an_address_twice_and_no_usable_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the URL http://127.0.0.1:9 is given twice"):
        Services(["http://127.0.0.1:9", "http://127.0.0.1:9/v2"])
    with (
        serving(box("deep", 3, (2, 8, 8))) as (url, _),
        pytest.raises(InputError, match="no model takes images and gives scores: deep at"),
    ):
        find_services(Services([url]))


def test_a_server_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bidfmkd_fast.black_box.remote.v2_server._RETRIES", 0)
    with pytest.raises(APIUnavailable, match=r"http://127.0.0.1:9: no answer in 1 attempts"):
        pool_from_services(Services(["http://127.0.0.1:9"]), tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_a_model_whose_answers_are_no_scores_ends_the_search(tmp_path: Path) -> None:
    with serving(box("a"), box("b"), b=Behaviour(nan=1.0)) as (url, _):
        with pytest.raises(BadAnswer, match="b at http.* does not answer as it should: .*NaN"):
            pool_from_services(Services([url]), tmp_path / "p")
        assert not list(tmp_path.iterdir())
        assert len(find_services(Services([url], ["a"])).models) == 1


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InputError, match="exists already; give another folder"):
            pool_from_services(Services(["http://127.0.0.1:9"]), place)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_no_token_gets_into_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATS_TOKEN", "s3cret-name")
    with serving(box("s3cret-name")) as (url, _):
        services = Services([url], token_variables=["CATS_TOKEN"])
        with pytest.raises(InputError, match="the name of a model holds a secret"):
            pool_from_services(services, tmp_path / "p")
    with serving(box("a")) as (url, _):
        found = pool_from_services(Services([url], token_variables=["CATS_TOKEN"]), tmp_path / "p")
        (api,) = load_pool(tmp_path / "p")
        assert isinstance(api, RemoteBlackBox) and "token_variable: CATS_TOKEN" in found.text


def test_the_list_of_a_run_is_kept_continued_and_withdrawn(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    with serving(box("a"), box("b")) as (url, service):
        with pytest.raises(ZeroDivisionError), listed_in(folder, Services([url])):
            assert len(read_pool(folder).entries) == 2
            (folder / "grids").mkdir()
            _ = 1 / 0
        assert not list(tmp_path.iterdir())
        with pytest.raises(ZeroDivisionError), listed_in(folder, Services([url])):
            (folder / "ledger.sqlite").write_text("asked")
            _ = 1 / 0
        before = images_scored(service)
        with listed_in(folder, Services([f"{url}/v2"], ["b", "a"], "logits")) as found:
            assert found is None
        assert images_scored(service) == before == 4 * KIND_QUERIES
        for fields, difference in (
            ({"models": ["a"]}, "model is a, b there; got a"),
            ({"scores_kind": "labels"}, "scores_kind is logits there; got labels"),
        ):
            with (
                pytest.raises(InputError, match=f"holds other services .{difference}"),
                listed_in(folder, Services([url], **fields)),
            ):
                pass
        other = Services(["http://127.0.0.1:9"])
        with pytest.raises(InputError, match="url is http.* there; got"), listed_in(folder, other):
            pass
        (folder / "pool.yaml").unlink()
        with (
            pytest.raises(InputError, match="no run of services was begun there"),
            listed_in(folder, Services([url])),
        ):
            pass
        assert images_scored(service) == before


def test_another_token_is_another_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", "tokentoken")
    with serving(box("a")) as (url, _):
        with listed_in(tmp_path / "a", Services([url])):
            pass
        with (
            pytest.raises(InputError, match="token_variable is None for http.*; got A for http"),
            listed_in(tmp_path / "a", Services([url], token_variables=["A"])),
        ):
            pass
