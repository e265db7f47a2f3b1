from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bidfmkd_fast.data import Dataset, load_dataset, make_glyphs
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.pools import api_training, load_modules, load_pool, read_pool, train_pool
from bidfmkd_fast.pools.classifier_fit import fit_classifier


@pytest.fixture(scope="module")
def glyphs() -> Dataset:
    return make_glyphs()


@pytest.fixture(scope="module")
def trained(glyphs: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool") / "deep" / "pool"
    train_pool(glyphs, folder, n_apis=2, n_way=4, width=8, epochs=12, seed=3)
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_held_out_images_are_never_learned(
    glyphs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned, measured = [], []
    monkeypatch.setattr(
        api_training,
        "fit_classifier",
        lambda module, images, labels, **rest: learned.append((images, labels)),
    )
    monkeypatch.setattr(
        api_training, "held_out_accuracy", lambda module, *held: measured.append(held) or 1.0
    )
    pool = train_pool(glyphs, tmp_path / "pool", n_apis=3, n_way=5, width=2, holdout=0.25)
    index = {name: i for i, name in enumerate(glyphs.class_names)}
    for entry, (images, labels), (held_images, held_labels) in zip(pool.entries, learned, measured):
        assert (
            labels.bincount().tolist() == [30] * 5 and held_labels.bincount().tolist() == [10] * 5
        )
        for label, name in enumerate(entry.class_names):
            both = torch.cat([images[labels == label], held_images[held_labels == label]]).flatten(
                1
            )
            assert {row.numpy().tobytes() for row in both} == {
                row.numpy().tobytes() for row in glyphs.images_of(index[name]).flatten(1)
            }


def test_an_api_depends_on_seed_and_index_only(
    glyphs: Dataset, trained: Path, tmp_path: Path
) -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    arguments = {"n_way": 4, "width": 8, "epochs": 12}
    same = train_pool(glyphs, tmp_path / "same", n_apis=1, seed=3, **arguments)
    other = train_pool(glyphs, tmp_path / "other", n_apis=1, seed=4, **arguments)
    load_modules(trained)
    assert torch.equal(
        before, torch.random.get_rng_state()
    )  # nobody else's random numbers are touched
    old, new = (
        load_file(trained / "api_000.safetensors"),
        load_file(tmp_path / "same" / "api_000.safetensors"),
    )
    assert (
        same.entries[0].class_names
        == read_pool(trained).entries[0].class_names
        != other.entries[0].class_names
    )
    for key, value in old.items():
        torch.testing.assert_close(new[key], value)


def test_every_class_name_survives_the_list(
    glyphs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use class names such as "1", "=", "~", "#" and "{", which mean something in YAML."""
    monkeypatch.setattr(api_training, "fit_classifier", lambda module, *data, **rest: module.eval())
    pool = train_pool(glyphs, tmp_path / "pool", n_apis=1, n_way=40, width=1)
    assert read_pool(tmp_path / "pool") == pool
    assert len(load_pool(tmp_path / "pool")[0].spec.class_names) == 40


def test_inverted_data_is_noted(glyphs: Dataset, tmp_path: Path) -> None:
    train_pool(load_dataset("glyphs", invert=True), tmp_path, n_apis=1, n_way=2, width=1, epochs=1)
    assert read_pool(tmp_path).entries[0].inverted is True


def test_omniglot_pool(tmp_path: Path) -> None:
    if not (Path(os.environ.get("BIDFMKD_DATA", "")) / "omniglot.npz").is_file():
        pytest.skip("BIDFMKD_DATA holds no omniglot.npz")
    pool = train_pool(
        load_dataset("omniglot", invert=True), tmp_path, n_apis=1, n_way=5, epochs=30, seed=0
    )
    assert pool.accuracy > 0.7


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_apis": 0}, "n_apis"),
        ({"n_way": 1}, "n_way must be at least 2"),
        ({"n_way": 41}, "has 40 classes; n_way=41"),
        ({"width": 0}, "width"),
        ({"epochs": 0}, "epochs"),
        ({"holdout": 0.0}, "holdout"),
        ({"holdout": 1.0}, "holdout"),
        ({"resnet_width": 0}, "resnet_width"),
        ({"n_apis": 10**9}, "n_apis must be at most 100000; got 1000000000"),
        ({"width": 5000}, "width must be at most 4096; got 5000"),
        ({"resnet_width": 10**9}, "resnet_width must be at most 4096; got 1000000000"),
    ],
)
def test_train_refuses_before_writing(
    glyphs: Dataset, tmp_path: Path, change: dict, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        train_pool(glyphs, tmp_path / "pool", **change)
    assert not (tmp_path / "pool").exists()


def test_train_refuses_a_class_of_one_image(tmp_path: Path) -> None:
    images = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    lone = Dataset(
        "lone", images, torch.tensor([0, 0, 1]), ("a", "b"), ("meta_train", "meta_train")
    )
    with pytest.raises(InputError, match="class 'b' has one image"):
        train_pool(lone, tmp_path / "pool", n_way=2)


def test_train_never_overwrites(glyphs: Dataset, copied: Path) -> None:
    before = {file.name: file.read_bytes() for file in copied.iterdir()}
    with pytest.raises(InputError, match="holds a trained pool already"):
        train_pool(glyphs, copied)
    assert before == {file.name: file.read_bytes() for file in copied.iterdir()}
    (copied / "pool.yaml").unlink()
    with pytest.raises(InputError, match="cut off in training, and no training.json that says"):
        train_pool(glyphs, copied)
    with pytest.raises(InputError, match="is a file"):
        train_pool(glyphs, copied / "api_000.safetensors")
    with pytest.raises(InputError, match="cannot write to"):
        train_pool(glyphs, copied / "api_000.safetensors" / "pool")


def test_a_pool_that_was_cut_off_is_continued(tmp_path: Path) -> None:
    """Interrupt the training when one API of three is trained."""
    data, settings = tiny("dots", (1, 16, 16)), {"n_apis": 3, "n_way": 3, "width": 4, "epochs": 2}
    whole = train_pool(data, tmp_path / "whole", progress=False, **settings)
    assert not (tmp_path / "whole" / "training.json").exists()
    folder, trained = tmp_path / "cut", []

    def cut_off(module: nn.Module, *arguments: Any, **keywords: Any) -> None:
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(module)
        fit_classifier(module, *arguments, **keywords)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(api_training, "fit_classifier", cut_off)
            with pytest.raises(KeyboardInterrupt):
                train_pool(data, folder, progress=False, **settings)
    finally:
        torch.set_num_threads(threads)
    assert [file.name for file in folder.glob("api_*")] == ["api_000.safetensors"]
    before = (folder / "api_000.safetensors").stat().st_mtime_ns
    with pytest.raises(InputError, match="cut off in training, with another epochs, seed; give"):
        train_pool(data, folder, progress=False, seed=1, **{**settings, "epochs": 3})
    pool = train_pool(data, folder, progress=False, **settings)
    assert pool.entries == whole.entries
    assert before == (folder / "api_000.safetensors").stat().st_mtime_ns
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()
    }


def tiny(name: str, shape: tuple[int, int, int], n_classes: int = 6) -> Dataset:
    """Return a data set whose classes differ in brightness."""
    labels = torch.arange(n_classes).repeat_interleave(8)
    noise = torch.randint(
        0, 30, (len(labels), *shape), generator=torch.Generator().manual_seed(len(name))
    )
    images = (noise + 30 * labels[:, None, None, None]).to(torch.uint8)
    names = tuple(f"{name} {k}" for k in range(n_classes))
    return Dataset(name, images, labels, names, ("meta_train",) * n_classes)


def test_mixed_architectures(tmp_path: Path) -> None:
    data = tiny("grey", (1, 16, 16))
    pool = train_pool(
        data, tmp_path, scenario="sh", n_apis=4, n_way=2, width=4, resnet_width=2, epochs=1, seed=1
    )
    assert [(entry.architecture, entry.width) for entry in pool.entries] == [
        ("conv4", 4), ("resnet10", 2), ("resnet18", 2), ("conv4", 4)
    ]  # fmt: skip
    assert [type(module).__name__ for module in load_modules(tmp_path)] == [
        "Conv4",
        "ResNet10",
        "ResNet18",
        "Conv4",
    ]
    images = torch.rand(3, 1, 16, 16)
    for module, api in zip(load_modules(tmp_path), load_pool(tmp_path)):
        with torch.no_grad():
            torch.testing.assert_close(api(images), module(images), rtol=1e-4, atol=1e-4)
    again = train_pool(
        data,
        tmp_path / "more",
        scenario="sh",
        n_apis=5,
        n_way=2,
        width=4,
        resnet_width=2,
        epochs=1,
        seed=1,
    )
    assert (
        again.entries[:4] == pool.entries
    )  # API i depends on the seed and i, not on how many there are


def test_mixed_data_sets(tmp_path: Path) -> None:
    """Check that every data set meets every architecture."""
    data = [tiny("grey", (1, 16, 16)), tiny("colours", (3, 20, 20))]
    pool = train_pool(
        data, tmp_path, scenario="mh", n_apis=6, n_way=2, width=2, resnet_width=1, epochs=1
    )
    kinds = [(entry.data_set, entry.architecture) for entry in pool.entries]
    assert kinds == [
        (name, kind) for kind in ("conv4", "resnet10", "resnet18") for name in ("grey", "colours")
    ]
    for entry in pool.entries:
        assert entry.image_shape == ((1, 16, 16) if entry.data_set == "grey" else (3, 20, 20))
        assert all(name.startswith(entry.data_set) for name in entry.class_names)


def test_a_resnet_learns_its_classes(glyphs: Dataset, tmp_path: Path) -> None:
    pool = train_pool(
        glyphs,
        tmp_path,
        scenario="sh",
        n_apis=2,
        n_way=3,
        width=2,
        resnet_width=4,
        epochs=20,
        seed=3,
    )
    assert pool.entries[1].architecture == "resnet10"
    assert pool.entries[1].accuracy > 0.8


def test_batch_norm_of_a_resnet_fits_its_finished_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the first batch norm has the statistics of the images under the final weights."""
    learned_from: list[torch.Tensor] = []
    fit = api_training.fit_classifier

    def noting(
        module: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, **options: object
    ) -> None:
        learned_from.append(images)
        fit(module, images, labels, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(api_training, "fit_classifier", noting)
    train_pool(
        tiny("grey", (1, 16, 16)),
        tmp_path,
        scenario="sh",
        n_apis=3,
        n_way=2,
        width=4,
        resnet_width=2,
        epochs=3,
        seed=1,
    )
    modules = load_modules(tmp_path)
    for module, images, settled in zip(modules, learned_from, (False, True, True), strict=True):
        convolution = next(part for part in module.modules() if isinstance(part, torch.nn.Conv2d))
        norm = next(part for part in module.modules() if isinstance(part, torch.nn.BatchNorm2d))
        with torch.no_grad():
            seen = convolution(images).double()
        assert (
            norm.running_mean is not None and norm.running_var is not None and norm.momentum == 0.1
        )
        if settled:
            torch.testing.assert_close(
                norm.running_mean.double(), seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                norm.running_var.double(),
                seen.transpose(0, 1).flatten(1).var(1),
                rtol=1e-4,
                atol=1e-6,
            )
        else:
            assert not torch.allclose(norm.running_mean.double(), seen.mean((0, 2, 3)), rtol=1e-2)


def test_training_in_parallel_gives_the_same_apis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny("grey", (1, 16, 16))
    arguments = {
        "scenario": "sh",
        "n_apis": 6,
        "n_way": 2,
        "width": 3,
        "resnet_width": 2,
        "epochs": 2,
        "seed": 5,
    }
    alone = train_pool(data, tmp_path / "alone", **arguments)
    seen, plain = set(), api_training.fit_classifier

    def watched(*args: object, **options: object) -> None:
        seen.add(threading.get_ident())
        plain(*args, **options)

    monkeypatch.setattr(api_training, "fit_classifier", watched)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = train_pool(data, tmp_path / "together", **arguments)
    assert len(seen) > 1
    assert together.entries == alone.entries
    for entry in alone.entries:
        ours, theirs = (
            load_file(tmp_path / folder / entry.file) for folder in ("alone", "together")
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    torch.set_num_threads(1)


def test_a_fault_in_one_api_ends_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(api_training, "fit_classifier", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        train_pool(tiny("grey", (1, 16, 16)), tmp_path, n_apis=3, n_way=2, width=1, epochs=1)
    assert not (tmp_path / "pool.yaml").exists()


@pytest.mark.parametrize(
    ("scenario", "shapes", "says"),
    [
        ("xy", [(1, 16, 16)], "scenario must be one of ss, sh, mh; got 'xy'"),
        ("mh", [(1, 16, 16)], "mixes data sets, 2 or more; got 1"),
        ("sh", [(1, 16, 16), (3, 16, 16)], "'sh' takes one data set; got 2"),
        ("mh", [(1, 16, 16), (1, 16, 16)], "different names"),
        ("mh", [(1, 16, 16), (3, 16, 16)], "n_apis must be at least 2, one per data set; got 1"),
        ("sh", [(1, 12, 12)], "image_size must be at least"),
    ],
)
def test_scenario_and_data_sets_must_go_together(
    tmp_path: Path, scenario: str, shapes: list[tuple[int, int, int]], says: str
) -> None:
    data = [tiny(f"data {shape[0]}", shape) for shape in shapes]
    with pytest.raises(InputError, match=says):
        train_pool(data, tmp_path / "pool", scenario=scenario, n_apis=1, n_way=2)
    assert not (tmp_path / "pool").exists()
