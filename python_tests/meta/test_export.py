"""Check exported files against the classifier, and that nothing is left of those that differ."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

import bidfmkd_fast as bf
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta.export import TOLERANCE
from bidfmkd_fast.models import build_model
from bidfmkd_fast.seeds import seeded

ROOT = Path(__file__).parents[2]
ABOUT, WORDS = "bidfmkd_classifier.json", "description.txt"


def pictures(seed: int, n: int, size: tuple[int, int] = (20, 28)) -> np.ndarray:
    """Draw pictures uint8 `[n, H, W, 3]` of three colours in turn, some of them hardly coloured."""
    generator = np.random.default_rng(seed)
    colours = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200)])[np.arange(n) % 3]
    strength = generator.uniform(0.02, 1, (n, 1, 1, 1))
    noise = generator.integers(0, 56, (n, *size, 3))
    return (128 + (colours[:, None, None] - 128) * strength + noise).astype(np.uint8)


def adapted(seed: int, name: str = "conv4", **settings: Any) -> bf.Classifier:
    with seeded(seed, "network"):
        module = build_model(
            name, in_channels=3, n_classes=2, image_size=(16, 16), width=8, batch_statistics=True
        )
    model = bf.MetaModel(module, adapt_steps=10, adapt_learning_rate=0.1)
    labels = torch.arange(15) % 3 * 2 if settings.pop("tensor", False) else list("cab" * 5)
    return model.adapt(pictures(seed, 15), labels, **settings)


def prepared(picture: np.ndarray, about: dict) -> np.ndarray:
    """Prepare a picture as the file's JSON says, with Pillow and NumPy alone."""
    _, height, width = about["image_shape"]
    assert about["channels"] == ["red", "green", "blue"] and about["layout"] == "NCHW"
    assert about["range"] == [0, 1] and about["resize"] == "bilinear"
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32).transpose(2, 0, 1) / 255


def read_onnx(path: Path) -> tuple[dict, str, Callable[[np.ndarray], np.ndarray]]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["images"]
    assert [value.name for value in session.get_outputs()] == ["probabilities"]
    held = session.get_modelmeta()
    assert held.description == held.custom_metadata_map[WORDS]
    return (
        json.loads(held.custom_metadata_map[ABOUT]),
        held.description,
        lambda images: session.run(None, {"images": images})[0],
    )


def read_torch(path: Path) -> tuple[dict, str, Callable[[np.ndarray], np.ndarray]]:
    extra = {ABOUT: "", WORDS: ""}
    module = torch.export.load(path, extra_files=extra).module()
    return (
        json.loads(extra[ABOUT]),
        extra[WORDS],
        lambda images: module(torch.from_numpy(images)).numpy(),
    )


class Exported(NamedTuple):
    """A classifier that inverts, and the folder with its files `pets.onnx` and `pets.torch`."""

    classifier: bf.Classifier
    folder: Path


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Export once to both kinds of file; each takes seconds."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    classifier = adapted(request.config.option.seed, invert=True)
    folder = tmp_path_factory.mktemp("exported") / "a new folder é"
    classifier.export_onnx(str(folder / "pets.onnx"))
    classifier.export_torch(folder / "pets.torch")
    assert sorted(path.name for path in folder.iterdir()) == ["pets.onnx", "pets.torch"]
    return Exported(classifier, folder)


def check_file(file: Path, classifier: bf.Classifier, seed: int, about: dict) -> None:
    """Compare a file with the classifier on 200 pictures; `about` is a part of its JSON."""
    held, words, answer = (read_onnx if file.suffix == ".onnx" else read_torch)(file)
    assert held | about == held and held["format"] == 1
    assert "[N, 3, 16, 16]" in words and "\n" not in words
    assert ("exchanged inside the file" in words) is held["inverted_inside"]
    new = pictures(seed + 1, 200)
    wanted = classifier.predict(list(new))
    images = np.stack([prepared(picture, held) for picture in new])
    probabilities = answer(images)
    labels = np.array(held["classes"])[probabilities.argmax(1)]
    assert labels.tolist() == wanted.tolist() and len(set(labels.tolist())) == 3
    np.testing.assert_allclose(probabilities, classifier.predict_proba(new), atol=TOLERANCE)
    np.testing.assert_allclose(answer(images[:1]), probabilities[:1], atol=TOLERANCE)
    assert str(ROOT).encode() not in file.read_bytes()  # no path of the machine that wrote it


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_a_file_classifies_200_pictures_as_we_do(kind: str, seed: int, exported: Exported) -> None:
    file = exported.folder / f"pets.{kind}"
    about = {"classes": ["a", "b", "c"], "inverted_inside": True}
    check_file(file, exported.classifier, seed, about)
    with pytest.raises(InputError, match="exists already; give another file") as caught:
        getattr(exported.classifier, f"export_{kind}")(file)
    assert "\n" not in str(caught.value)


def test_labels_that_name_outputs_are_those_of_the_file(seed: int, tmp_path: Path) -> None:
    """Export a module of five outputs, of which the labels 0, 2 and 4 use three."""
    classifier = adapted(seed, "conv4_any_size", tensor=True)
    classifier.export_torch(tmp_path / "pets.pt2")
    about = {"classes": [0, 2, 4], "inverted_inside": False}
    check_file(tmp_path / "pets.pt2", classifier, seed, about)


def test_an_exported_onnx_file_is_an_api_of_a_pool(
    seed: int, tmp_path: Path, exported: Exported
) -> None:
    shutil.copy(exported.folder / "pets.onnx", tmp_path)
    spec = {"scores_kind": "probabilities", "class_names": ["a", "b", "c"]}
    listed = {"format": 1, "apis": [{"kind": "onnx", "file": "pets.onnx", "spec": spec}]}
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump(listed))
    (api,) = bf.load_pool(tmp_path)
    assert api.spec.image_shape == (3, 16, 16) and api.spec.n_classes == 3
    images = torch.rand(300, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    wanted = exported.classifier.predict_proba(images)
    torch.testing.assert_close(api(images), wanted, rtol=0, atol=TOLERANCE)


def test_the_snippets_of_the_page_run_as_they_are(
    seed: int,
    tmp_path: Path,
    exported: Exported,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (ROOT / "docs" / "classifiers.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    by_package = {
        name: [text for text in snippets if f"import {name}\n" in text]
        for name in ("onnxruntime", "torch")
    }
    monkeypatch.chdir(tmp_path)
    Path("new").mkdir()
    for number, picture in zip((7, 8), pictures(seed + 1, 2), strict=True):
        Image.fromarray(picture).save(f"new/{number}.jpg")
    shutil.copy(exported.folder / "pets.onnx", "pets.onnx")
    shutil.copy(exported.folder / "pets.torch", "pets.pt2")
    (onnx_snippet,), (torch_snippet,) = by_package.values()
    exec(compile(onnx_snippet, "classifiers.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    wanted = exported.classifier.predict(["new/7.jpg", "new/8.jpg"]).tolist()
    assert [line.split()[:2] for line in lines] == [
        ["new/7.jpg", wanted[0]],
        ["new/8.jpg", wanted[1]],
    ]
    exec(compile(torch_snippet, "classifiers.md", "exec"), {})
    assert re.fullmatch(r"\['[abc]', '[abc]'\]\n", capsys.readouterr().out)


def test_a_file_that_answers_otherwise_is_not_left(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = adapted(seed)
    ours = classifier.predict_proba
    monkeypatch.setattr(classifier, "predict_proba", lambda images: ours(images).flip(1))
    with pytest.raises(InputError, match=r"a batch of 1 random images otherwise .* more than"):
        classifier.export_torch(tmp_path / "pets.pt2")

    def only_alone(images: Tensor) -> Tensor:
        return ours(images) + (0.01 if len(images) > 1 else 0)

    monkeypatch.setattr(classifier, "predict_proba", only_alone)
    with pytest.raises(InputError, match="a batch of 7 random images otherwise"):
        classifier.export_torch(tmp_path / "pets.pt2")
    monkeypatch.setattr(classifier, "predict_proba", lambda images: ours(images)[:, :2])
    with pytest.raises(InputError, match=r"it answers \[1, 3\] instead of \[1, 2\]; no file"):
        classifier.export_torch(tmp_path / "pets.pt2")
    asked: list[Tensor] = []

    def noted(images: Tensor) -> Tensor:
        asked.append(images)
        return ours(images)

    monkeypatch.setattr(classifier, "predict_proba", noted)
    for number in (0, 1):
        classifier.export_torch(tmp_path / "pets.pt2", seed=number)
        (tmp_path / "pets.pt2").unlink()
    assert [len(images) for images in asked] == [1, 7, 1, 7]
    assert not torch.equal(asked[1], asked[3])

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(torch.export, "load", broken)
    with pytest.raises(InputError, match="cannot be loaded, so none is left: two lines"):
        classifier.export_torch(tmp_path / "pets.pt2")
    monkeypatch.setattr(torch.export, "save", broken)
    with pytest.raises(InputError, match="Classifier.export_torch: torch.export.save fails: two"):
        classifier.export_torch(tmp_path / "pets.pt2")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    transductive = adapted(seed, transductive=True)
    for refused in (
        lambda: transductive.export_torch(tmp_path / "a"),
        lambda: transductive.export_onnx(tmp_path / "a"),
        transductive.as_module,
    ):
        with pytest.raises(InputError, match="the classifier is transductive") as caught:
            refused()
        assert "\n" not in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write to"):
        adapted(seed).export_torch(tmp_path / "file" / "pets.pt2")

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(768, 3)

        def forward(self, images: Tensor) -> Tensor:
            scores: Tensor = self.linear(images.flatten(1))
            return scores if scores.sum() > 0 else -scores

    own = bf.MetaModel(Own()).adapt(pictures(seed, 6, (16, 16)), list("abcabc"))
    with pytest.raises(InputError, match="torch.export cannot trace Own: ") as caught:
        own.export_torch(tmp_path / "a")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        InputError, match="Classifier.export_onnx: onnxscript is not installed; `pip"
    ):
        adapted(seed).export_onnx(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_module_of_ones_own_can_be_exported(seed: int, tmp_path: Path) -> None:
    with seeded(seed, "linear"):
        module = nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).double()
    images = pictures(seed, 6, (16, 16))
    classifier = bf.MetaModel(module).adapt(images, list("abcabc"))
    classifier.export_torch(tmp_path / "own.pt2")
    about, _, answer = read_torch(tmp_path / "own.pt2")
    got = answer(np.stack([prepared(picture, about) for picture in images]))
    np.testing.assert_allclose(got, classifier.predict_proba(images), atol=TOLERANCE)
