"""Test that `scrub` finds a registered secret in every spelling.

Nothing that leaves the process holds a secret.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import warnings
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidfmkd_fast import errors, secrets
from bidfmkd_fast.files.atomic import write_json, write_text

NASTY = "s3cr/et+\"to'k<e>n\\&%é!"
LETTERS = st.characters(min_codepoint=0x20, max_codepoint=0x7E)


def spellings(secret: str) -> list[str]:
    escaped = json.dumps(secret)[1:-1]
    every = "".join(f"%{byte:02x}" for byte in secret.encode())
    return [
        secret,
        quote(secret, safe=""),
        quote(secret),
        quote(secret, encoding="latin-1"),
        quote_plus(secret),
        quote(quote(secret, safe=""), safe=""),
        every,
        every.upper(),
        escaped,
        escaped.replace("/", "\\/"),
        json.dumps(secret, ensure_ascii=False)[1:-1],
        json.dumps(escaped)[1:-1],
        "".join(f"\\u{ord(letter):04X}" for letter in secret),
        repr(secret)[1:-1],
        repr(repr(secret)[1:-1])[1:-1],
        repr(secret.encode())[2:-1],
        repr(secret.encode("latin-1"))[2:-1],
        html.escape(secret),
        "".join(f"&#{ord(letter)};" for letter in secret),
        "".join(f"&#x{ord(letter):X};" for letter in secret),
        secret.encode("latin-1").decode("utf-8", "replace"),
        secret.encode().decode("latin-1"),
    ]


def coded(secret: str) -> list[str]:
    """Return the secret in base64, alone and inside other text, in both alphabets."""
    texts = [
        f"{before}{secret}{after}"
        for before in ("", "u", "me:", "user:", "Bearer ")
        for after in ("", "x", "@h")
    ]
    plain = [
        base64.b64encode(text.encode(encoding)).decode()
        for text in texts
        for encoding in ("utf-8", "latin-1")
    ]
    other = [base64.urlsafe_b64encode(text.encode()).decode() for text in texts]
    return [
        *plain,
        *other,
        *(quote(text, safe="") for text in plain),
        *(json.dumps(text)[1:-1] for text in plain),
    ]


@pytest.mark.parametrize("secret", [NASTY, "plain-token", "0123", "a b c d"])
def test_every_spelling_is_found(secret: str) -> None:
    secrets.register(secret, "token")
    for text in spellings(secret):
        assert secrets.scrub(f"before {text} after") == "before <token> after", text
    assert secrets.scrub("before") == "before"


@settings(max_examples=25, deadline=None)
@given(st.text(LETTERS, min_size=8, max_size=40).filter(lambda text: text.strip() == text))
def test_any_secret_is_found(secret: str) -> None:
    with pytest.MonkeyPatch.context() as patch:  # each example starts without secrets
        patch.setattr(secrets, "_labels", {})
        secrets.register(secret)
    for text in spellings(secret):
        assert secrets.scrub(text) == "<secret>"
    for text in coded(secret):
        # What may be left are the neighbours' own characters, four of which hold the three that are
        # next to it.
        left = secrets.scrub(text)
        assert "<secret>" in left and text not in left


def test_base64_leaves_no_part_of_the_secret() -> None:
    secrets.register("0123456789abcdef")
    for text in coded("0123456789abcdef"):
        left = secrets.scrub(text).partition("<secret>")
        assert len(left[0]) <= 12 and len(left[2]) <= 12  # of "Bearer " and "@h"


def test_what_was_scrubbed_may_be_scrubbed_again() -> None:
    for secret in ("secret", "token", "<tok"):
        secrets.register(secret)
    secrets.register("s3cr3t", "token")
    once = secrets.scrub("secret token s3cr3t")
    assert once == "<secret> <secret> <token>" and secrets.scrub(once) == once


def test_numbers_and_short_words_of_urls_and_headers_stay(tmp_path: Path) -> None:
    secrets.register_url("https://host/score?version=2024&format=json")
    secrets.register_headers({"X-Version": "2024", "X-Format": "json"})
    assert secrets.scrub("2024 queries, json") == "2024 queries, json"
    secrets.register("2024")
    assert secrets.scrubbed({"a": [2024, "2024", ("b", None)]}) == {
        "a": [2024, "<secret>", ["b", None]]
    }
    write_json(tmp_path / "file", {"queries": 202400, "2024": "it said 2024"})
    assert json.loads((tmp_path / "file").read_text()) == {
        "queries": 202400,
        "<secret>": "it said <secret>",
    }


def test_a_secret_inside_another_one_and_one_that_is_too_short() -> None:
    for secret in ("abcd", "abcd-efgh", "abc"):
        secrets.register(secret)
    assert secrets.scrub("abcd-efgh abcd abc") == "<secret> <secret> abc"


@pytest.mark.parametrize(
    ("url", "hidden"),
    [
        ("htp://me:PASSWORD@host/x", ["PASSWORD", "me:PASSWORD"]),
        ("http://me:PASS%40WORD@host", ["PASS@WORD", "PASS%40WORD"]),
        ("me:PASSWORD@host:80", ["PASSWORD"]),
        ("http:/me:PASSWORD@host", ["PASSWORD"]),
        ("http://me:PASS@WORD@host", ["PASS@WORD"]),
        ("http://TOKEN-AS-USER@host", ["TOKEN-AS-USER"]),
        ("https://host/score?code=KEY%2F1234&v=2", ["KEY/1234", "KEY%2F1234"]),
        ("https://host/score?KEY12345", ["KEY12345"]),
        ("https://host/score?v=2024&key=KEY1", ["KEY1"]),
        ("http://[::1?key=KEY1234", ["KEY1234"]),
    ],
)
def test_urls(url: str, hidden: list[str]) -> None:
    assert not any(secret in secrets.shown_url(url) for secret in hidden)
    assert "host" in secrets.shown_url(url) or "::1" in secrets.shown_url(url)
    secrets.register_url(url)
    for secret in hidden:
        assert secret not in secrets.scrub(f"{url} and {secret}")
    # What a client sends for it.
    if "me:" in url and "@" in hidden[0]:
        assert secrets.scrub(base64.b64encode(f"me:{hidden[0]}".encode()).decode()) == "<secret>"


def test_headers() -> None:
    basic = base64.b64encode(b"me:PASSWORD").decode()
    secrets.register_headers(
        {"X-Key": "KEY1234", "authorization": f"Basic {basic}", "Accept": "application/json"}
    )
    text = secrets.scrub(f"KEY1234 Basic {basic} {basic} PASSWORD application/json")
    assert text == "<secret> <secret> <secret> <secret> application/json"
    secrets.register_headers({"Authorization": "Bearer TOKEN123"})
    assert secrets.scrub("TOKEN123") == "<secret>"
    for nothing in (None, 3, ["a"]):
        secrets.register_headers(nothing)
        secrets.register_url(nothing)


def test_errors_warnings_logs_and_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secrets.register("s3cret-token")
    for name in ("InputError", "InputTypeError", "BudgetExhausted", "BadAnswer", "APIUnavailable"):
        error = getattr(errors, name)("it said s3cret-token")
        assert str(error) == "it said <secret>" and "s3cret" not in repr(error)
    for warning in (errors.ServiceWarning, errors.PrecisionWarning):
        with pytest.warns(warning) as warned:
            warnings.warn("it said s3cret-token", warning, stacklevel=1)
        assert str(warned[0].message) == "it said <secret>"
    try:
        raise KeyError("s3cret-token")
    except KeyError:
        with caplog.at_level(logging.INFO, "bidfmkd_fast"):
            logging.getLogger("bidfmkd_fast").info("it said %s", "s3cret-token", exc_info=True)
    assert "it said <secret>" in caplog.text and "s3cret" not in caplog.text
    write_text(tmp_path / "file", "it said s3cret-token")
    assert (tmp_path / "file").read_text() == "it said <secret>"


def test_a_long_text_takes_no_long_time() -> None:
    """Check that scrubbing takes linear time, since a service may answer with any text."""
    secrets.register("a" * 40)
    secrets.register("s3cret-token")
    text = ("a" * 39 + "b") * 2000 + "%25" * 10000 + "\\" * 10000
    assert secrets.scrub(text) == text
