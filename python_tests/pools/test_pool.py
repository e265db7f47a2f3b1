from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from bidfmkd_fast.data import Dataset, make_glyphs
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.pools import load_modules, load_pool, read_pool, train_pool
from bidfmkd_fast.pools.pool import LIST, PoolEntry, write_list


@pytest.fixture(scope="module")
def glyphs() -> Dataset:
    return make_glyphs()


@pytest.fixture(scope="module")
def trained(glyphs: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool") / "deep" / "pool"
    train_pool(glyphs, folder, n_apis=2, n_way=4, width=8, epochs=24, seed=3)
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_pool_on_disk_tells_what_was_trained(glyphs: Dataset, trained: Path) -> None:
    pool = read_pool(trained)
    assert sorted(file.name for file in trained.iterdir()) == [
        "api_000.safetensors", "api_001.safetensors", "pool.yaml"
    ]  # fmt: skip
    train_names = {glyphs.class_names[i] for i in glyphs.classes("meta_train")}
    for entry in pool.entries:
        assert len(set(entry.class_names)) == 4 and set(entry.class_names) <= train_names
        assert (entry.data_set, entry.inverted, entry.image_shape) == ("glyphs", False, (1, 28, 28))
        assert (entry.architecture, entry.width, entry.input_range, entry.scores_kind) == (
            "conv4", 8, (0.0, 1.0), "logits"
        )  # fmt: skip
    assert pool.entries[0].class_names != pool.entries[1].class_names
    assert pool.accuracy == sum(entry.accuracy for entry in pool.entries) / 2
    assert read_pool(trained / "pool.yaml") == pool


def test_apis_know_their_classes(glyphs: Dataset, trained: Path) -> None:
    """Check the accuracy over all images of the classes.

    Three quarters of the images were learned, so the accuracy is well above the 1/4 of chance.
    """
    index = {name: i for i, name in enumerate(glyphs.class_names)}
    for entry, module in zip(read_pool(trained).entries, load_modules(trained)):
        assert not module.training
        right = [
            (module(glyphs.images_of(index[name])).argmax(1) == label).float().mean().item()
            for label, name in enumerate(entry.class_names)
        ]
        assert sum(right) / 4 > 0.8 and entry.accuracy > 0.6


def test_black_boxes_answer_as_the_modules(glyphs: Dataset, trained: Path) -> None:
    images = glyphs.take(torch.arange(0, 2680, 90))
    for entry, module, api in zip(
        read_pool(trained).entries, load_modules(trained), load_pool(trained)
    ):
        assert api.spec.class_names == entry.class_names and api.spec.data_set == "glyphs"
        assert api.spec.name == Path(entry.file).stem
        with torch.no_grad():
            torch.testing.assert_close(api(images), module(images), rtol=1e-4, atol=1e-4)


def rewrite(folder: Path, **changes: object) -> None:
    content = yaml.safe_load((folder / "pool.yaml").read_text())
    content["apis"][1].update(changes)
    (folder / "pool.yaml").write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"colour": "red"}, "API 1: wanted exactly the keys .*colour"),
        ({"file": "../api_001.safetensors"}, "inside the pool's folder"),
        ({"file": "api_009.safetensors"}, "api_009.safetensors are missing"),
        ({"file": 3}, "file must be of type str; got 3"),
        ({"architecture": "vgg"}, "vgg"),
        ({"width": "8"}, "width must be of type int; got '8'"),
        ({"width": 10**6}, "API 1: width must be in 1..4,096; got 1000000"),
        (
            {"image_shape": [3, 10**5, 10**5]},
            "API 1: .*image_shape must have at most 67,108,864 numbers an image",
        ),
        ({"width": 4}, "damaged or of another model"),
        ({"accuracy": "high"}, "accuracy must be of type float"),
        ({"inverted": "no"}, "inverted must be of type bool"),
        ({"data_set": 5}, "API 1: .*data_set"),
        ({"scores_kind": "top_k"}, "scores_kind must be 'logits'"),
        ({"image_shape": [28, 28]}, "API 1: .*image_shape"),
        ({"image_shape": "small"}, "API 1: .*image_shape"),
        ({"input_range": [1, 0]}, "API 1: .*input_range"),
        ({"class_names": ["a", "a", "b", "c"]}, "API 1: .*class_names"),
        ({"class_names": [1, 2, 3, 4]}, "API 1: .*class_names"),
        ({"class_names": 7}, "API 1: "),
    ],
)
def test_load_refuses_a_changed_list(copied: Path, changes: dict, says: str) -> None:
    rewrite(copied, **changes)
    for load in (load_pool, load_modules):
        with pytest.raises(InputError, match=says):
            load(copied)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("apis: [", "not readable YAML"),
        ("!!python/object/apply:os.getcwd []", "not readable YAML"),
        ("", "exactly the keys"),
        ("format: 2\napis: []", "exactly the keys"),
        ("format: 1\napis: []\nmore: 1", "exactly the keys"),
        ("format: 1\napis: []", "at least one API"),
        ("format: 1\napis: [api]", "API 0: wanted exactly the keys"),
    ],
)
def test_load_refuses_a_foreign_list(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "pool.yaml").write_text(text)
    with pytest.raises(InputError, match=says):
        load_pool(tmp_path)


def test_load_refuses_missing_list_and_damaged_weights(copied: Path) -> None:
    with pytest.raises(InputError, match="no pool list .*nowhere"):
        load_pool(copied / "nowhere")
    weights = copied / "api_001.safetensors"
    whole = weights.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\xff" * 100):
        weights.write_bytes(content)
        with pytest.raises(InputError, match="api_001.safetensors are damaged"):
            load_pool(copied)
    save_file({"weight": torch.zeros(2)}, weights)
    with pytest.raises(InputError, match="of another model"):
        load_pool(copied)


def test_a_trained_api_may_give_labels_only(copied: Path) -> None:
    with_scores = load_pool(copied)[0]
    text = (copied / "pool.yaml").read_text()
    (copied / "pool.yaml").write_text(text.replace("scores_kind: logits", "scores_kind: labels", 1))
    labels = load_pool(copied)[0]
    images = torch.rand(20, *labels.spec.image_shape)
    wanted = torch.nn.functional.one_hot(with_scores(images).argmax(1), labels.spec.n_classes)
    assert labels.spec.labels_only and torch.equal(labels(images), wanted.float())


def test_a_long_list_is_json_and_reads_the_same(tmp_path: Path) -> None:
    names = tuple(f"clässe {number}" for number in range(3))
    entries = [
        PoolEntry(
            file=f"api_{number:03d}.safetensors",
            architecture="conv4",
            width=4,
            image_shape=(1, 8, 8),
            class_names=names,
            data_set="made up",
            inverted=False,
            input_range=(0.0, 1.0),
            scores_kind="logits",
            accuracy=number / 201,
        )
        for number in range(201)
    ]
    write_list(tmp_path, entries[:200])
    assert (tmp_path / LIST).read_text().startswith("format: 1\napis:\n- file: api_000")
    assert read_pool(tmp_path).entries == tuple(entries[:200])
    write_list(tmp_path, entries)
    assert len(json.loads((tmp_path / LIST).read_text())["apis"]) == 201
    assert read_pool(tmp_path).entries == tuple(entries)
