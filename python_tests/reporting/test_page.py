"""Check what the page of a run says, and that sections without data are left out."""

from __future__ import annotations

import builtins
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from training.test_grids import recovered_set

from bidfmkd_fast.cli.main import main
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.recovery.record_file import RecordFile
from bidfmkd_fast.reporting import read_facts, write_page
from bidfmkd_fast.training.recovered_set import read_set, save_recovered

OLD = Path(__file__).parents[1] / "old_folders" / "run"
VOID = {"meta", "img", "br"}
ADDRESSES = {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}


class Page(HTMLParser):
    """What a page holds: ids, headings, texts of tables, alternatives of images, addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.unnamed = 0
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "elements that are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = dict(attrs)
        self.tags.append(tag)
        self.open += [] if tag in VOID else [tag]
        self.ids += [held["id"]] if held.get("id") else []
        self.addresses += [value or "" for key, value in attrs if key in ADDRESSES]
        self.unnamed += tag == "img" and not held.get("alt")
        self.unnamed += tag == "svg" and not held.get("aria-label")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def page_of(folder: Path, out: Path, following: str = "") -> tuple[str, list[str]]:
    """Write the page of `folder`; return its text and the anchors of its sections."""
    text = write_page(read_facts(folder), out, following).read_text(encoding="utf-8")
    return text, re.findall(r"<h2 id=\"([\w-]+)\"", text)


def test_the_page_of_a_run_has_every_section(made_run: Path, made_page: Path) -> None:
    text = made_page.read_text(encoding="utf-8")
    anchors = re.findall(r"<h2 id=\"([\w-]+)\"", text)
    assert anchors == [
        *("accuracy", "spending", "outcome", "curves", "agreement", "images", "memory"),
        *("settings", "environment", "glossary", "next"),
    ]
    page = Page(text)
    n_queries = read_facts(made_run).spending.total.queries
    for wanted in (
        *("35.00 ± 29.40", "+15.00 ± 9.80", f"{n_queries:,}", "10,000", "survey.n_images"),
        *(f"next: bidfmkd status '{'run ü' * 60}'", "support set: as wanted"),
    ):
        assert wanted in page.texts, wanted
    assert f"{n_queries:,} queries were asked; its 5-way 5-shot accuracy" in text
    assert "single run proves nothing" in text
    assert text.count("data:image/png;base64,") == 6  # two sets of three APIs
    for chart in ("survey-loss", "survey-accuracy", "recovery-support", "recovery-query"):
        assert f'id="{chart}-figure_1"' in text, chart
    assert {"replay-loss", "replay-accuracy"} <= {name.rsplit("-", 1)[0] for name in page.ids}


def test_the_page_needs_nothing_from_outside(made_page: Path) -> None:
    text = made_page.read_text(encoding="utf-8")
    page = Page(text)
    assert (
        text.startswith('<!DOCTYPE html>\n<html lang="en">') and "<title>Run run ü</title>" in text
    )
    assert len(set(page.ids)) == len(page.ids)
    inside = {address[1:] for address in page.addresses if address.startswith("#")}
    assert inside and inside <= set(page.ids)
    assert all(address.startswith(("#", "data:image/png;")) for address in page.addresses)
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{name}" for name in page.ids}
    assert page.unnamed == 0
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in text and "@font-face" not in text


def test_the_same_folder_gives_the_same_page(
    made_run: Path, made_page: Path, tmp_path: Path
) -> None:
    first = made_page.read_text(encoding="utf-8")
    following = f"next: bidfmkd status '{'run ü' * 60}'"
    assert page_of(made_run, tmp_path / "again.html", following)[0] == first


def test_names_are_text_and_nothing_else(made_run: Path, tmp_path: Path) -> None:
    """Put markup, formulas and control characters where names of APIs and classes stand."""
    folder = tmp_path / "<script>alert(1)</script> & 'x'"
    shutil.copytree(made_run, folder)
    evil = "<script>alert(2)</script>\"' $\\evil$ --!> \x07 \u202e ]]> {{ 7*7 }}"
    summary = json.loads((folder / "summary.json").read_text())
    summary["ledger"][0]["name"], summary["ledger"][1]["name"] = evil, "$\\evil$ \x07"
    summary["skipped"] = {evil: evil}
    summary["environment"] = {evil: evil}
    (folder / "summary.json").write_text(json.dumps(summary))
    with (folder / "metrics.jsonl").open("a") as file:
        record = {"stage": "survey", "loss": 1, "accuracy": 0.5, "accuracy_by_api": {evil: 0.5}}
        file.write(json.dumps(record) + "\n")
    kept = json.loads((folder / "accuracy.json").read_text())
    kept[0][evil] = kept[0].pop("ours")
    (folder / "accuracy.json").write_text(json.dumps(kept))
    text, _ = page_of(folder, tmp_path / "page.html", f"next: {evil}")
    page = Page(text)
    assert "script" not in page.tags and "&lt;script&gt;alert(2)" in text
    assert "{{ 7*7 }}" in text and "$\\evil$ \N{REPLACEMENT CHARACTER}" in page.texts
    assert len(set(page.ids)) == len(page.ids)


def test_sections_without_data_are_left_out(made_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made_run, folder)
    for name in ("accuracy.json", "metrics.jsonl", "memory.safetensors"):
        (folder / name).unlink()
    shutil.rmtree(folder / "recovered")
    text, anchors = page_of(folder, tmp_path / "page.html")
    assert anchors == ["spending", "outcome", "images", "settings", "environment", "glossary"]
    # Three APIs on the six pictures that were asked about before any was chosen.
    assert "Pictures that were asked" in text and len(re.findall(r"class \d, \d+ %", text)) == 18
    shutil.rmtree(folder / "survey")
    assert "images" not in page_of(folder, tmp_path / "page.html")[1]


def test_a_run_that_was_cut_off(made_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made_run, folder)
    for name in ("meta_model.safetensors", "summary.json", "accuracy.json", "memory.safetensors"):
        (folder / name).unlink()
    (folder / "recovered" / "api_002_query.safetensors").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rep')  # the process was killed while it wrote
    text, anchors = page_of(folder, tmp_path / "page.html")
    assert anchors == ["spending", "curves", "agreement", "images", "settings", "glossary"]
    assert "(cut off, the survey has 72 of 72 answers, 5 of 6 sets recovered)" in text


def test_a_run_of_version_0_1(tmp_path: Path) -> None:
    before = sorted(path.name for path in OLD.rglob("*"))
    text, anchors = page_of(OLD, tmp_path / "page.html")
    assert anchors == [
        *("spending", "outcome", "curves", "agreement", "images", "memory", "settings", "glossary")
    ]
    assert "168 queries were asked" in text  # 144 of the run, 24 of its control
    assert "survey" not in text.partition("glossary")[0].partition("settings")[0]
    assert sorted(path.name for path in OLD.rglob("*")) == before, "the old folder was changed"


def test_the_command_writes_into_the_folder(
    made_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a run"
    shutil.copytree(made_run, folder)
    assert main(["report", str(folder)]) == 0
    output = capsys.readouterr().out
    assert f"page: {folder / 'report.html'}\n" in output and "bidfmkd adapt --run" in output
    (folder / "accuracy.json").unlink()
    assert main(["report", str(folder)]) == 0  # a page that is there is replaced
    assert "evaluate --run" in capsys.readouterr().out
    (folder / "meta_model.safetensors").unlink()
    assert main(["report", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "has not finished" in output and output.endswith(f"next: bidfmkd status '{folder}'\n")
    assert "has not finished" in (folder / "report.html").read_text()


@pytest.mark.parametrize("made", ["nothing", "empty", "control", "pool"])
def test_a_folder_that_is_no_run_is_refused(
    made: str, made_run: Path, glyphs_pool: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "folder"
    if made != "nothing":
        folder.mkdir()
    if made == "control":
        shutil.copytree(made_run, folder / "control")
    folder = glyphs_pool if made == "pool" else folder
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    wanted = {"nothing": "there is no folder", "control": "only the control of a run"}
    assert wanted.get(made, "holds no run") in error and error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_another_file_is_not_replaced(made_run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<!DOCTYPE html>")
    with pytest.raises(InputError, match=r"mine\.html exists and is no page of"):
        write_page(read_facts(made_run), mine)
    with pytest.raises(InputError, match="it is a folder"):
        write_page(read_facts(made_run), tmp_path)
    assert mine.read_text() == "<!DOCTYPE html>"


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named(
    module: str, made_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == module:
            raise ImportError(name)
        return usual(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"report: .* is not installed; `pip install 'jinja2"):
        write_page(read_facts(made_run), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("line", ["{", "7", "\udcff"])
def test_damaged_metrics_are_named(line: str, made_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made_run, folder)
    content = (folder / "metrics.jsonl").read_bytes()
    bad = line.encode(errors="surrogateescape") + b"\n"
    (folder / "metrics.jsonl").write_bytes(bad + content)
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged \(line 1: "):
        read_facts(folder)


def test_damaged_answers_and_sets_are_named(made_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made_run, folder)
    answers = folder / "survey" / "api_000.answers"
    answers.unlink()
    RecordFile(answers).append(b"A" + bytes(3), first=b"S{}")
    with pytest.raises(InputError, match=r"api_000\.answers is damaged"):
        read_facts(folder)
    answers.unlink()
    made = recovered_set(torch.rand(2, 1, 8, 8), [0, 1], [0, 0])
    save_recovered(made, folder / "recovered" / "api_x_support.safetensors")
    with pytest.raises(InputError, match="do not fit together"):
        read_set(folder / "recovered" / "api_x_support.safetensors")


def test_more_than_40_apis_are_a_table(made_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made_run, folder)
    summary = json.loads((folder / "summary.json").read_text())
    row = summary["ledger"][0]
    summary["ledger"] = [{**row, "number": i, "name": f"service {i}"} for i in range(41)]
    (folder / "summary.json").write_text(json.dumps(summary))
    text, _ = page_of(folder, tmp_path / "page.html")
    assert "spending-queries-figure_1" not in text
    assert '<th scope="row">service 40</th>' in text
