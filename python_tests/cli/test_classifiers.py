"""Run `adapt` and `predict` on pictures in files; bad input is one line and nothing is written."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import urllib.request
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import bidfmkd_fast as bf
from bidfmkd_fast.cli.main import main
from bidfmkd_fast.extras import EXTRAS, installed
from bidfmkd_fast.training.run_folder import RunFolder

RUN = Path(__file__).parent.parent / "old_folders" / "run"  # images of 1x28x28
NAMES = ("left", "right", "up")


def draw(seed: int, name: str, size: tuple[int, int] = (40, 52)) -> Image.Image:
    """Draw noise with a bright half, on the side that the class is named after."""
    noise = np.random.default_rng(seed).integers(0, 60, (*size, 3))
    middle = size[1] // 2
    part = {"left": np.s_[:, :middle], "right": np.s_[:, middle:], "up": np.s_[: size[0] // 2]}
    noise[part[name]] += 190
    return Image.fromarray(noise.astype(np.uint8))


def write(folder: str, seed: int, per_class: int) -> list[Path]:
    files = []
    for name in NAMES:
        Path(folder, name).mkdir(parents=True)
        for number in range(per_class):
            files.append(Path(folder, name, f"{number}.png"))
            draw(seed + len(files), name).save(files[-1])
    return files


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(file: str) -> list[list[str]]:
    with open(file, encoding="utf-8", newline="") as opened:
        return list(csv.reader(opened))


def test_from_a_folder_per_class_to_labels(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    support, new = write("support", seed, 5), write("my new", seed + 100, 4)
    assert main(["adapt", "--run", str(RUN), "--pictures", "support", "--out", "c.st"]) == 0
    output = capsys.readouterr().out
    assert "3 classes, 15 pictures" in output and "left          5" in output
    command = shlex.split(output.splitlines()[-1].removeprefix("next: bidfmkd "))
    assert main(command) == 0
    output = capsys.readouterr().out
    assert output.count("support/left/") == 5
    if installed("export"):  # else nothing follows
        command = shlex.split(output.splitlines()[-1].removeprefix("next: bidfmkd "))
        assert command == ["export", "c.st", "--onnx", "c.onnx"]
        assert main(command) == 0
        assert "ONNX: c.onnx\nimages [N, 1, 28, 28] in [0, 1] -> " in capsys.readouterr().out
        assert bf.OnnxBlackBox("c.onnx").spec.n_classes == 3
        assert main(["predict", "c.st", "support"]) == 0
    assert "next: " not in capsys.readouterr().out

    # Compare with Pillow's pixels, by hand, and the library.
    def images(files: list[Path]) -> torch.Tensor:
        resample = Image.Resampling.BILINEAR
        pixels = [np.asarray(Image.open(f).convert("L").resize((28, 28), resample)) for f in files]
        return torch.from_numpy(np.stack(pixels)[:, None]).float() / 255

    wanted = RunFolder.open(RUN).meta_model().adapt(images(support), [f.parts[1] for f in support])
    order = sorted(new)
    probabilities = wanted.predict_proba(images(order))
    assert main(["predict", "c.st", "my new", "--out", "out/labels.csv", "--top", "2"]) == 0
    output = capsys.readouterr().out
    assert "12 pictures in out/labels.csv" in output
    header, *found = rows("out/labels.csv")
    assert header == ["file", "label", "probability", "label_2", "probability_2"]
    assert [row[0] for row in found] == [str(file) for file in order]
    best = probabilities.topk(2)
    for place in (0, 1):
        names = [NAMES[index] for index in best.indices[:, place]]
        assert [row[1 + 2 * place] for row in found] == names
        values = [float(row[2 + 2 * place]) for row in found]
        np.testing.assert_allclose(values, best.values[:, place], atol=1e-4)
    assert all(cell in output for row in found for cell in row)

    # Single files, in the order in which they are given, have the same answers.
    assert main(["predict", "c.st", str(order[7]), str(order[2]), "--out", "two.csv"]) == 0
    assert rows("two.csv")[1:] == [found[7][:3], found[2][:3]]


def test_a_csv_gives_the_same_classifier(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    files = write("support", seed, 3)
    lines = [f"{file.relative_to('support')},{file.parts[1]}" for file in files]
    Path("support/list.csv").write_text("\n".join(["file,label", *lines]))
    for source, out in (("support", "a"), ("support/list.csv", "b")):
        assert main(["adapt", "--run", str(RUN), "--pictures", source, "--out", out]) == 0
    assert Path("a").read_bytes() == Path("b").read_bytes()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "next: bidfmkd predict b support/left/0.png"


def test_long_tables_are_cut_off_only_beside_a_file(
    seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write("support", seed, 20)
    assert main(["adapt", "--run", str(RUN), "--pictures", "support", "--out", "c.st"]) == 0
    capsys.readouterr()
    assert main(["predict", "c.st", "support", "support/up/1.png"]) == 0
    assert capsys.readouterr().out.count(".png") == 60
    assert main(["predict", "c.st", "support", "--out", "all.csv"]) == 0
    output = capsys.readouterr().out
    assert output.count(".png") == 50 and "and 10 more\n" in output
    assert len(rows("all.csv")) == 61


def prepare(seed: int) -> None:
    """Make a good classifier, and sources that are bad in one way each."""
    write("support", seed, 2)
    assert main(["adapt", "--run", str(RUN), "--pictures", "support", "--out", "good.st"]) == 0
    transductive = RunFolder.open(RUN).meta_model().adapt("support", transductive=True)
    transductive.save("trans.st")
    picture = Path("support/up/0.png").read_bytes()
    for file, content in {
        "single/cat/1.png": picture,
        "texts/cat/1.txt": b"",
        "gap/cat/1.png": picture,
        "gap/dog/1.txt": b"",
        "corrupt/cat/1.png": picture,
        "corrupt/dog/bad.png": picture[:100],
        "twins/cat/1.png": picture,
        "twins/Cat /1.png": picture,
        "many.csv": "\n".join(["file,label", *(f"{n}.png,{n}" for n in range(1001))]).encode(),
        "gone.csv": b"file,label\ngone.png,cat\nsupport/up/0.png,dog\n",
        "no.st": b"no tensors",
    }.items():
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_bytes(content)
    Path("empty").mkdir()
    metadata = {"bidfmkd_classifier": json.dumps({"format": 99})}
    save_file({"weight": torch.zeros(1)}, "next.st", metadata)
    RunFolder.open(RUN).meta_model().save("meta.st")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("adapt --pictures single", "2 to 1,000 classes; got 1, 'cat'"),
        ("adapt --pictures texts", "holds no pictures that can be read; it holds 1 .txt"),
        ("adapt --pictures empty", "empty holds no pictures"),
        ("adapt --pictures gap", "class folder gap/dog holds no picture"),
        ("adapt --pictures corrupt", "corrupt/dog/bad.png cannot be read as an image"),
        ("adapt --pictures twins", "two classes of one name, 'Cat ' and 'cat'"),
        ("adapt --pictures many.csv", "2 to 1,000 classes; got 1,001"),
        ("adapt --pictures gone.csv", "cannot read gone.png: No such file"),
        ("adapt --pictures nowhere", "nowhere does not exist"),
        ("adapt --pictures support --out good.st", "good.st exists already"),
        ("adapt --pictures support --run empty", "run folder: empty holds no run"),
        ("adapt --pictures support --out no.st/c", "cannot write to no.st/c"),
        ("adapt", "the following arguments are required: --pictures"),
        ("predict no.st support", "no.st is no saved classifier"),
        ("predict nowhere.st support", "nowhere.st is no saved classifier"),
        ("predict empty support", "empty is no saved classifier: empty is not readable"),
        ("predict meta.st support", "it is a meta-model"),
        ("predict next.st support", "has format 99, and this version"),
        ("predict good.st empty", "empty holds no pictures"),
        ("predict good.st nowhere", "there is no file or folder nowhere"),
        ("predict good.st corrupt --out new.csv", "corrupt/dog/bad.png cannot be read"),
        ("predict good.st texts/cat/1.txt", "texts/cat/1.txt is not an image"),
        ("predict good.st support --top 4", "top must be at most 3; got 4"),
        ("predict good.st support --top 0", "top must be at least 1; got 0"),
        ("predict good.st support --out many.csv", "many.csv exists already"),
        ("predict good.st", "the following arguments are required: PICTURES"),
        ("predict", "the following arguments are required: CLASSIFIER"),
        ("export", "the following arguments are required: CLASSIFIER"),
        ("export good.st", "give --onnx FILE.onnx, --torch FILE.pt2, or both"),
        ("export good.st --onnx many.csv", "many.csv exists already; give another --onnx"),
        ("export good.st --onnx new --torch no.st", "no.st exists already; give another --torch"),
        ("export good.st --onnx new --torch empty/../new", "must be two files; got new for both"),
        ("export good.st --onnx new --torch no.st/new", "cannot write to no.st/new"),
        ("export meta.st --torch new", "it is a meta-model"),
        ("export trans.st --torch new", "the classifier is transductive"),
        ("serve trans.st", "serve: the classifier is transductive"),
        ("serve no.st", "no.st is no saved classifier"),
        ("serve nowhere.st", "there is no pool list nowhere.st"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    command: str, message: str, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(seed)
    arguments = command.split()
    if command.startswith("adapt"):
        arguments += [] if "--run" in arguments else ["--run", str(RUN)]
        arguments += [] if "--out" in arguments else ["--out", "new.st"]
    capsys.readouterr()
    before = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert captured.err.startswith(f"bidfmkd {arguments[0]}: ")
    assert {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("command", ["adapt", "predict", "export"])
def test_the_help_says_that_nothing_is_sent(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "Nothing is sent anywhere" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("inverted", "option", "wanted"),
    [
        ([True, True], [], True),
        ([True], ["--invert", "false"], False),
        ([True, False], [], False),
        ([], [], False),
        ([False], ["--invert", "true"], True),
    ],
)
def test_pictures_are_inverted_as_those_of_the_run_were(
    inverted: list[bool],
    option: list[str],
    wanted: bool,
    seed: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(RUN, "run")
    sets = [{"name": f"set {n}", "inverted": flag} for n, flag in enumerate(inverted)]
    Path("run/source.yaml").write_text(json.dumps({"data_sets": sets}))
    write("support", seed, 2)
    command = ["adapt", "--run", "run", "--pictures", "support", "--out", "c.st", *option]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert ("pictures are inverted" in output) is wanted
    assert ("--invert false keeps them" in output) is (wanted and not option)
    assert bf.Classifier.load("c.st").invert is wanted
    assert main(["predict", "c.st", "support", "--out", "labels.csv"]) == 0
    model = RunFolder.open(RUN).meta_model()
    labels = model.adapt("support", invert=wanted).predict("support").tolist()
    assert [row[1] for row in rows("labels.csv")[1:]] == labels


def test_export_is_named_only_where_it_would_run(
    seed: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("support", seed, 2)
    assert main(["adapt", "--run", str(RUN), "--pictures", "support", "--out", "c.st"]) == 0
    monkeypatch.setitem(EXTRAS, "export", ("no_such_package>=1",))
    capsys.readouterr()
    assert main(["predict", "c.st", "support"]) == 0
    assert "next: " not in capsys.readouterr().out
    assert main(["export", "c.st", "--torch", "c.pt2"]) == 0
    assert capsys.readouterr().out.startswith("torch.export: c.pt2\nimages [N, 1, 28, 28] in")
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    got = torch.export.load("c.pt2").module()(images)
    torch.testing.assert_close(
        got, bf.Classifier.load("c.st").predict_proba(images), rtol=0, atol=1e-4
    )


@pytest.mark.filterwarnings("ignore::bidfmkd_fast.errors.ServiceWarning")
def test_a_classifier_is_served_and_learned_from(
    seed: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = pytest.importorskip("bidfmkd_fast.serving.server")
    write("support", seed, 4)
    classifier = RunFolder.open(RUN).meta_model().adapt("support", invert=True)
    classifier.save("my pets é.st")
    served = []
    monkeypatch.setattr(
        server, "serve_until_interrupted", lambda service, *_, **__: served.append(service)
    )
    assert main(["serve", "my pets é.st"]) == 0
    with server.running(served[0]) as url:
        api = bf.RemoteBlackBox(url, "my pets é")
        assert api.spec.scores_kind == "probabilities"
        images = torch.rand(9, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(api(images), classifier.predict_proba(images), rtol=0, atol=1e-5)
        with urllib.request.urlopen(f"{url}/v2/models/{quote('my pets é')}/config") as answer:
            names = json.load(answer)["parameters"]["class_names"]["string_value"]
        assert json.loads(names) == sorted(NAMES)
        assert main(["probe", "--url", url, "--model", "my pets é"]) == 0
        assert "my pets é" in capsys.readouterr().out
        survey = bf.SurveyConfig(n_images=20, epochs=1)
        config = bf.TrainConfig(survey=survey, recovery=bf.RecoveryConfig(steps=0))
        run = bf.BiDfMKD([api], config=config).fit(progress=False)
        assert run.meta_model.adapt("support").predict("support").shape == (12,)
        assert api.ledger.queries >= 20


def test_a_damaged_source_is_one_line(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(RUN, "run")
    Path("run/source.yaml").write_text("data_sets: [omniglot]\n")
    write("support", seed, 2)
    assert main(["adapt", "--run", "run", "--pictures", "support", "--out", "c.st"]) == 2
    error = capsys.readouterr().err
    assert "data_sets must list mappings with name and inverted" in error
    assert error.count("\n") == 1 and not Path("c.st").exists()


def test_a_transductive_classifier_sees_all_pictures_together(
    seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write("support", seed, 2)
    model = RunFolder.open(RUN).meta_model()
    classifier = model.adapt("support", transductive=True)
    classifier.save("c.st")
    assert main(["predict", "c.st", "support", "--out", "labels.csv"]) == 0
    wanted = bf.Classifier.load("c.st").predict("support").tolist()
    assert [row[1] for row in rows("labels.csv")[1:]] == wanted


@pytest.mark.parametrize(
    "arguments",
    [
        ["adapt", "--run", "LONG", "--pictures", "x", "--out", "y"],
        ["predict", "LONG", "x"],
        ["report", "LONG"],
        ["init-config", "--out", "LONG"],
    ],
)
def test_a_name_that_is_too_long_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    long = 300 * "x"
    assert main([long if argument == "LONG" else argument for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert long in line and line.endswith(" is too long for a file's name; give a shorter one")
