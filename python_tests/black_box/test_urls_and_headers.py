"""Check that bad URLs, headers and tokens give one clear error before any request.

No error shows a secret.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bidfmkd_fast.black_box import APISpec, JSONBlackBox, JSONMapping, RemoteBlackBox
from bidfmkd_fast.errors import APIUnavailable, InputError

SPEC = APISpec(3, (1, 4, 4), name="cats")
IMAGES = torch.zeros(1, 1, 4, 4)


@pytest.mark.parametrize(
    "url",
    [
        "htp://me:PASSWORD@host/x",
        "http//me:PASSWORD@host",
        "http:/me:PASSWORD@host",
        "me:PASSWORD@host",
        "http://me:PASSWORD@host",
        "https://PASSWORD@host",
        "http://me:PASSWORD@[::1",
        "http://[::1?key=PASSWORD",
        "http://host:PASSWORD",
        "http://:80?key=PASSWORD",
        "ftp://host/x?key=PASSWORD",
        "http://host:99999/x?key=PASSWORD",
        {"http": "PASSWORD"},
        None,
        3,
    ],
)
def test_a_url_that_cannot_be_used(url: Any) -> None:
    for make in (
        lambda: JSONBlackBox(url, SPEC, "tf_serving"),
        lambda: RemoteBlackBox(url, "m", SPEC),
    ):
        with pytest.raises(InputError, match="cats: url must ") as raised:
            make()
        text = str(raised.value)
        assert "\n" not in text and "PASSWORD" not in text


def test_a_key_in_the_query_string_is_never_echoed(
    monkeypatch: pytest.MonkeyPatch, server: Any
) -> None:
    server.post = lambda sent: (404, {}, f"no such page: {sent.path}".encode())
    with pytest.raises(APIUnavailable, match="no such page: /score[?]code=<secret>") as raised:
        JSONBlackBox(f"{server.url}/score?code=KEY%2F1234", SPEC, "tf_serving")(IMAGES)
    assert "KEY" not in str(raised.value)
    monkeypatch.setenv("CATS_TOKEN", "s3cret-token")
    with pytest.raises(InputError, match="a token is sent encrypted only") as raised_too:
        JSONBlackBox(
            "http://host/score?code=KEY%2F1234", SPEC, "tf_serving", token_variable="CATS_TOKEN"
        )
    assert "KEY" not in str(raised_too.value)
    with pytest.raises(APIUnavailable) as unreachable:
        JSONBlackBox("http://127.0.0.1:9/score?code=KEY%2F1234", SPEC, "tf_serving", retries=0)(
            IMAGES
        )
    assert "KEY" not in str(unreachable.value)


def test_header_values_are_never_echoed(server: Any) -> None:
    server.post = lambda sent: (403, {}, str(sent.headers).encode())
    api = JSONBlackBox(
        server.url, SPEC, "tf_serving", headers={"X-Key": "KEY/1234", "Accept": "text/plain"}
    )
    with pytest.raises(APIUnavailable, match="'X-Key': '<secret>'.*") as raised:
        api(IMAGES)
    assert "KEY" not in str(raised.value) and server.posts[0].headers["X-Key"] == "KEY/1234"


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Key": "KEY1234\nX-Other: 1"},
        {"X-Key": "KEY1234\r"},
        {"X-Key": "KEY1234€"},
        {"X-Key": ["KEY1234"]},
        {"X-Key": 12341234},
        {"X Key": "KEY1234"},
        {"X-Key: KEY1234": "1"},
        {3: "KEY1234"},
        ["X-Key: KEY1234"],
        "X-Key: KEY1234",
    ],
)
def test_headers_that_cannot_be_sent(headers: Any) -> None:
    with pytest.raises(InputError, match="cats: .*header") as raised:
        JSONBlackBox("http://127.0.0.1:9", SPEC, "tf_serving", headers=headers)
    assert "1234" not in str(raised.value)


@pytest.mark.parametrize(
    "token", ["s3cret\ns3cret", "s3cret€", "s3cret\x00", "s3cret\x85x", "\ud83d\ude00s3cret"]
)
def test_a_token_that_no_header_can_carry(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setattr("os.environ", {"CATS_TOKEN": token})
    with pytest.raises(
        InputError, match="the token in the environment variable CATS_TOKEN holds a char"
    ) as raised:
        JSONBlackBox("http://127.0.0.1:9", SPEC, "tf_serving", token_variable="CATS_TOKEN")
    assert "s3cret" not in str(raised.value) and "\n" not in str(raised.value)


def test_a_token_of_latin_1_is_sent(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATS_TOKEN", " tökén ")
    server.post = lambda sent: (200, {}, b'{"predictions": [[1, 2, 3]]}')
    JSONBlackBox(server.url, SPEC, "tf_serving", token_variable="CATS_TOKEN")(IMAGES)
    assert server.posts[0].headers["Authorization"] == "Bearer tökén"


def test_a_token_in_the_place_of_its_variable_is_not_shown() -> None:
    with pytest.raises(
        InputError, match="the environment variable that token_variable names"
    ) as raised:
        JSONBlackBox("https://host", SPEC, "tf_serving", token_variable="hf_AbCd1234")
    assert "hf_AbCd1234" not in str(raised.value)
    with pytest.raises(
        InputError, match="token_variable must name an environment variable; got a dict"
    ):
        JSONBlackBox("https://host", SPEC, "tf_serving", token_variable={"hf": "AbCd1234"})  # type: ignore[arg-type]


def test_a_key_in_the_body_is_not_shown() -> None:
    with pytest.raises(InputError, match="body must hold either .* once; it holds 0") as raised:
        JSONMapping({"key": "KEY1234"}, "scores")
    assert "KEY1234" not in str(raised.value)
