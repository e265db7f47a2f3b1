from __future__ import annotations

from pathlib import Path

import pytest

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.json_files import parse_json, read_json


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' comes twice"),
        ('{"a": ', "Expecting value"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "integer string conversion"),
        (b"\xff", "byte 0 is not UTF-8 text"),
    ],
)
def test_what_is_refused_is_one_line(text: str | bytes, says: str) -> None:
    with pytest.raises(InputError, match="^split.json cannot be read as JSON: ") as caught:
        parse_json(text, "split.json")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "split.json"
    file.write_text('{"a": [1]}', encoding="utf-8-sig")
    assert read_json(file, "convert_dataset") == {"a": [1]}
    with pytest.raises(
        InputError, match="convert_dataset: cannot read .*nowhere.json: No such file"
    ):
        read_json(tmp_path / "nowhere.json", "convert_dataset")
