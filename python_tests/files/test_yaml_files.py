"""Test the reader of all YAML files.

It reads the scalars of YAML 1.2, refuses repeated keys and huge files, and reports faults with
their line.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import yaml

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.experiments.sweep_file import read_sweep
from bidfmkd_fast.files import yaml_files
from bidfmkd_fast.files.yaml_files import dump_yaml, parse_yaml, read_mapping, read_yaml
from bidfmkd_fast.pools import read_pool
from bidfmkd_fast.serving import Behaviour, behaviours_of
from bidfmkd_fast.training import TrainConfig

LEVELS = [f"l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 9)}]" for level in range(1, 20)]
BOMB = "\n".join(["l0: &l0 [x, x]", *LEVELS])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("-7", -7), ("0o17", 15), ("0x1F", 31), ("0b1", "0b1"), ("1_000", "1_000"),
        ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("2020-01-01", "2020-01-01"),
        ("yes", "yes"), ("No", "No"), ("on", "on"), ("off", "off"), ("true", True),
        ("FALSE", False), ("1e-3", 0.001), ("+1E3", 1000.0), (".5", 0.5), ("1.", 1.0),
        (".inf", math.inf), ("-.INF", -math.inf), ("null", None), ("~", None), ("", None),
        ("'010'", "010"), ("=", "="), ("{<<: {a: 1}}", {"<<": {"a": 1}}),
    ],
)  # fmt: skip
def test_scalars_are_those_of_the_core_schema(text: str, value: object) -> None:
    got = parse_yaml(text, "x")
    assert got == value and type(got) is type(value)
    assert math.isnan(parse_yaml(".nan", "x"))


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1, -2.5e3, true, null, "é\\n\\u00e9"], "b": {"c": {}}}',
        '{"a": NaN, "b": [Infinity]}',
        "{a: 1, b: [x, 010]}",
        '\n {"a": 1e400, "b": 0x10}',
        '{"a": "010", "b": 1.0}',
    ],
)
@pytest.mark.parametrize("encoding", [None, "utf-8", "utf-16"])
def test_json_has_the_values_that_yaml_reads(text: str, encoding: str | None) -> None:
    """Values must not depend on the reader, which is another one for JSON."""
    got = parse_yaml(text if encoding is None else text.encode(encoding), "x")
    assert repr(got) == repr(yaml.load(text, yaml_files._Loader))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' comes twice"),
        ("a: {b: 1, b: 2}", "the key 'b' comes twice"),
        ('{"a": {"b": 1, "b": 2}}', "line 1, column 16: the key 'b' comes twice"),
        ("1: a\n0x1: b", "the key 1 comes twice"),
        ("a:\n\tb: 1", "line 2, column 1: a tab where YAML wants spaces"),
        ("a: [1", "line 1, column 6"),
        ("? [1]\n: 2", "unhashable key"),
        ("&a [*a]", "refers to itself"),
        ("[" * 5000, "nested too deeply"),
        ("9" * 5000, "not readable as int"),
        ("a: !!bool maybe", "'maybe' is not readable as bool"),
        ("!!timestamp x", "tag:yaml.org,2002:timestamp"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: 1\n---\na: 2", "expected a single document"),
        ("a\0b", "save it as UTF-8 text"),
        (BOMB, "aliases"),
    ],
)
def test_what_is_refused_is_one_line_with_its_place(text: str, says: str) -> None:
    with pytest.raises(InputError, match="^run.yaml is not readable YAML: ") as caught:
        parse_yaml(text, "run.yaml")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_aliases_that_stay_small_are_read() -> None:
    assert parse_yaml("a: &one [1, 2]\nb: *one", "x") == {"a": [1, 2], "b": [1, 2]}


def test_a_file_may_be_utf_16_or_hold_nothing(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3", encoding="utf-16")
    assert TrainConfig.from_yaml(file).seed == 3
    file.write_text("")
    assert read_mapping(file, "train") == {}
    file.write_bytes(b"seed: \xff")
    with pytest.raises(
        InputError, match="train: .*run.yaml is not readable YAML: .*save it as UTF-8 text"
    ):
        read_yaml(file, "train")
    file.write_bytes(b"#" * ((1 << 23) + 1))
    with pytest.raises(InputError, match="holds more than 8,388,608 bytes"):
        read_yaml(file, "train")
    with pytest.raises(InputError, match="train: cannot read .*: Is a directory"):
        read_yaml(tmp_path, "train")
    for text in ("- 1", "3", "1: a"):
        file.write_text(text)
        with pytest.raises(
            InputTypeError, match="train: .*run.yaml must hold settings by name; got"
        ):
            read_mapping(file, "train")


def test_every_reader_of_yaml_bounds_aliases_and_refuses_a_key_twice(tmp_path: Path) -> None:
    readers = (
        TrainConfig.from_yaml,
        read_pool,
        read_sweep,
        lambda file: behaviours_of(["a"], Behaviour(), file),
    )
    for text, says in ((BOMB, "aliases"), ("seed: 1\nseed: 2", "the key 'seed' comes twice")):
        (tmp_path / "file.yaml").write_text(text)
        for reader in readers:
            started = time.perf_counter()
            with pytest.raises(InputError, match=says):
                reader(tmp_path / "file.yaml")
            assert time.perf_counter() - started < 5


def test_what_is_written_reads_alike_as_yaml_1_1_and_1_2() -> None:
    texts = ["1e3", "0o10", "010", "yes", "1:30", "null", "", "~", ".inf", "2020-01-01", "x", "="]
    values = {
        "texts": texts,
        "numbers": [1e-5, 1e22, 1 / 3, -0.0, 7, math.inf],
        "rest": [None, True, {"a": []}],
    }
    written = dump_yaml(values)
    assert parse_yaml(written, "x") == values
    assert yaml.safe_load(written) == values
