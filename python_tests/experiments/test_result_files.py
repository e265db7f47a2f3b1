"""Read `results.csv` and `results.tex` back, and compare them with the files they come from."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bidfmkd_fast.experiments.compare import run_comparison
from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.experiments.result_files import COLUMNS
from bidfmkd_fast.experiments.sweep import run_sweep
from bidfmkd_fast.runtime.machine import machine_text
from bidfmkd_fast.settings import to_yaml


def records_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


@pytest.fixture(scope="module")
def compared(tiny: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "out"
    run_comparison(tiny, folder, methods=["random", "control"], seeds=[3, 1], progress=False)
    return folder


def test_the_csv_has_every_meta_test_in_full(compared: Path) -> None:
    records = records_of(compared)
    assert tuple(records[0]) == COLUMNS
    assert len(records) == 2 * 2 * 2 * 2  # methods, seeds, numbers of shots, rate protocols
    for method in ("random", "control"):
        for seed in (3, 1):
            at = compared / f"seed_{seed}" / method
            summary = json.loads((at / "summary.json").read_text())
            for test in json.loads((at / "evaluation.json").read_text()):
                of_test = {
                    record["rate_protocol"]: record
                    for record in records
                    if (record["method"], record["seed"]) == (method, str(seed))
                    and record["n_shot"] == str(test["n_shot"])
                }
                assert of_test.keys() == {"meta_val", "own"}
                for protocol, held, rate in (
                    ("meta_val", test, test["learning_rate"]),
                    ("own", test["own_rate"], 0.1),
                ):
                    record = of_test[protocol]
                    assert float(record["accuracy"]) == held["mean"]
                    assert float(record["ci95"]) == held["ci95"]
                    assert float(record["learning_rate"]) == rate
                    for name in ("split", "n_way", "n_query"):
                        assert record[name] == str(held[name])
                    assert record["n_episodes"] == "4" and record["data_set"] == "glyphs"
                    assert int(record["queries"]) == summary["queries"]
                    assert float(record["seconds"]) == sum(summary["seconds"].values())
                    assert record["device"] == machine_text("cpu")


def test_the_csv_is_that_of_rfc_4180(compared: Path) -> None:
    content = (compared / "results.csv").read_bytes()
    assert content.count(b"\r\n") == content.count(b"\n") == 17
    assert not content.startswith(b"\xef\xbb\xbf")


def test_the_latex_has_the_numbers_of_the_report(compared: Path) -> None:
    text = (compared / "results.tex").read_text(encoding="utf-8")
    report = (compared / "comparison.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in report.split("\n\n")[4].splitlines()]
    for row in (rows[0], *rows[2:]):
        wanted = " & ".join(cell.strip() for cell in row).replace("_", r"\_").replace("±", r"$\pm$")
        assert rf"{wanted} \\" in text.replace("$-$", "-").replace("$+$", "+")
    assert text.startswith("% Needs \\usepackage{booktabs}")
    assert text.count(r"\begin{table}") == 1 and r"\label{tab:results-1}" in text
    assert "seeds 3, 1; " in text and "proves nothing" not in text


def test_a_sweep_writes_both_and_odd_names_come_back(
    tiny: ExperimentConfig, tmp_path: Path
) -> None:
    name = 'a "quoted", odd_name & ω'
    evaluation = replace(tiny.evaluation, n_shots=(1,), adapt_lrs=())  # no rate is chosen
    config = replace(tiny, evaluation=evaluation, train=replace(tiny.train, adapt_lr=0.07))
    (tmp_path / "base.yaml").write_text(to_yaml(config))
    variants = {name: {"method": "random"}, "[2]*": {"method": "zero_query"}}
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"experiment": "base.yaml", "variants": variants}))
    out = tmp_path / "out ü"
    run_sweep(file, out, progress=False)
    records = records_of(out)
    rates = {(record["rate_protocol"], record["learning_rate"]) for record in records}
    assert len(records) == 2 and rates == {("own", "0.07")}
    assert {(record["name"], record["method"]) for record in records} == {
        (name, "random"),
        ("[2]*", "zero_query"),
    }
    text = (out / "results.tex").read_text(encoding="utf-8")
    assert r'a "quoted", odd\_name \& ω & ' in text and "{[}2{]}{*} & " in text
    assert "% One training seed proves nothing" in text
