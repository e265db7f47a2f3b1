"""Check classifiers of pictures of any kind, with labels of any kind, and their files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tolerances import TOLERANCES
from torch import Tensor, nn

import bidfmkd_fast as bf
from bidfmkd_fast.data.convert import convert_dataset
from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.meta.model_images import images_of
from bidfmkd_fast.models import build_model
from bidfmkd_fast.seeds import seeded

NAMES = ("ant", "bee", "cat")


def meta_model(
    seed: int, channels: int = 3, size: tuple[int, int] = (16, 16), name: str = "conv4"
) -> bf.MetaModel:
    with seeded(seed, "network"):
        module = build_model(
            name,
            in_channels=channels,
            n_classes=2,
            image_size=size,
            width=16,
            batch_statistics=True,
        )
    return bf.MetaModel(module, adapt_steps=20, adapt_learning_rate=0.1)


def pictures(
    seed: int, per_class: int = 5, height: int = 20, width: int = 28
) -> tuple[np.ndarray, list[str]]:
    """Draw noisy pictures of three colours, uint8 `[N, H, W, 3]`, and their labels."""
    generator = np.random.default_rng(seed)
    colours = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)])
    labels = list(NAMES) * per_class
    base = np.stack([colours[NAMES.index(label)] for label in labels])[:, None, None]
    noise = generator.integers(-40, 41, (len(labels), height, width, 3))
    return (base + noise).astype(np.uint8), labels


def write_folder(root: Path, images: np.ndarray, labels: list[str]) -> Path:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (root / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / label / f"{number:03}.png")
    return root


def test_pictures_of_every_kind_are_the_same_images(seed: int, tmp_path: Path) -> None:
    """Compare arrays, tensors, Pillow images, paths and a folder with what `convert` makes."""
    images, labels = pictures(seed)
    folder = write_folder(tmp_path / "support", images, labels)
    dataset = convert_dataset(folder, tmp_path / "wanted.npz", size=16).dataset
    module = meta_model(seed).module
    order = sorted(range(len(labels)), key=lambda row: (labels[row], row))
    wanted = dataset.take(torch.arange(len(labels)))
    files = sorted(folder.rglob("*.png"))
    for given in (
        images[order],
        torch.from_numpy(images[order]).permute(0, 3, 1, 2),
        [Image.fromarray(image) for image in images[order]],
        [Image.open(file) for file in files],
        list(images[order]),
        files,
        [str(file) for file in files],
        folder,
        str(folder),
    ):
        assert torch.equal(images_of("test", given, module), wanted)
    # Floats are resized by torch's filter, which Pillow rounds to 8 bits after each direction.
    floats = images[order].astype(np.float64) / 255
    channels_first = torch.from_numpy(floats).permute(0, 3, 1, 2)
    for given in (floats, floats.astype(np.float32), list(floats), channels_first):
        got = images_of("test", given, module)
        assert got.dtype == torch.float32
        assert (got - wanted).abs().max() <= 1.01 / 255


def test_colours_and_orientation_are_those_of_the_model(seed: int, tmp_path: Path) -> None:
    images, _ = pictures(seed, 1, 16, 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(images[0]).save(tmp_path / "lying.png", exif=exif)
    grey, colour = meta_model(seed, 1, (24, 16)).module, meta_model(seed, 3, (24, 16)).module
    upright = np.rot90(images[0], -1)
    got = images_of("test", [tmp_path / "lying.png"], colour)
    np.testing.assert_array_equal((got[0] * 255).round().byte().permute(1, 2, 0), upright)
    luma = upright @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    for given in ([tmp_path / "lying.png"], upright[None], upright[None] / 255.0):
        got = images_of("test", given, grey)
        assert got.shape == (1, 1, 24, 16)
        assert np.abs(255 * got[0, 0].numpy() - luma).max() <= 1.01
    single = upright[None, :, :, 0]
    for given in (single, single[..., None], single / 255.0, [Image.fromarray(single[0])]):
        got = images_of("test", given, colour)
        assert got.shape == (1, 3, 24, 16)
        np.testing.assert_allclose(255 * got[0, 2].numpy(), single[0], atol=1e-4)


def test_labels_of_any_kind_come_back(seed: int) -> None:
    images, names = pictures(seed)
    new, wanted = pictures(seed + 1, 4)
    model = meta_model(seed)
    numbers = {"ant": 700, "bee": -4, "cat": 2**40}
    as_numbers = [numbers[name] for name in names]
    for labels, of in (
        (names, lambda name: name),
        (tuple(names), lambda name: name),
        (np.array(names), lambda name: name),
        (np.array(names, object), lambda name: name),
        (as_numbers, numbers.__getitem__),
        (np.array(as_numbers), numbers.__getitem__),
    ):
        classifier = model.adapt(images, labels)
        assert isinstance(classifier.classes_, np.ndarray)
        assert classifier.classes_.tolist() == sorted(set(labels))  # type: ignore[type-var]
        predicted = classifier.predict(new)
        assert isinstance(predicted, np.ndarray) and predicted.shape == (12,)
        assert predicted.tolist() == [of(name) for name in wanted]
        assert classifier.score(new, [of(name) for name in wanted]) == 1.0
    classifier = model.adapt(images, torch.tensor(as_numbers))
    predicted = classifier.predict(new)
    assert isinstance(predicted, Tensor) and predicted.dtype == torch.int64
    assert predicted.tolist() == [numbers[name] for name in wanted]
    # Labels numbered from 0 name the outputs, and give the same classifier.
    numbered = torch.tensor([NAMES.index(name) for name in names])
    counted = model.adapt(images, numbered)
    assert torch.equal(counted.scores(new), model.adapt(images, names).scores(new))
    assert counted.predict(new).tolist() == [NAMES.index(name) for name in wanted]


def test_probabilities_and_accuracy(seed: int) -> None:
    images, labels = pictures(seed)
    new, wanted = pictures(seed + 1)
    for given in (labels, torch.tensor([2 * NAMES.index(name) for name in labels])):
        classifier = meta_model(seed).adapt(images, given)
        probabilities = classifier.predict_proba(new)
        scores = classifier.scores(new).double().numpy()
        if isinstance(given, Tensor):  # labels 0, 2 and 4 use three of five outputs
            assert scores.shape == (15, 5)
            scores = scores[:, ::2]
        expected = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        np.testing.assert_allclose(probabilities.numpy(), expected, *TOLERANCES["float32"])
        assert probabilities.shape == (15, 3)
        np.testing.assert_allclose(probabilities.sum(1).numpy(), 1, rtol=1e-6)
        best = classifier.classes_[probabilities.argmax(1).numpy()]
        np.testing.assert_array_equal(classifier.predict(new), best)
    classifier = meta_model(seed).adapt(images, labels)
    wrong = list(wanted)
    wrong[0], wrong[1] = "cat", "unknown"
    assert classifier.score(new, wrong) == pytest.approx(13 / 15)
    with pytest.raises(InputTypeError, match="labels must be strings"):
        classifier.score(new, range(15))
    with pytest.raises(InputError, match=r"N = 15.*got \[14\]"):
        classifier.score(new, wanted[1:])


def test_a_picture_alone_and_in_a_batch_has_the_same_label(seed: int) -> None:
    images, labels = pictures(seed)
    generator = np.random.default_rng(seed)
    batch = generator.integers(0, 256, (75, 16, 16, 3), dtype=np.uint8)
    batch[:30] = pictures(seed + 2, 10, 16, 16)[0]
    classifier = meta_model(seed).adapt(images, labels)
    together = classifier.predict(batch)
    assert [classifier.predict(image[None])[0] for image in batch] == together.tolist()
    flipped = classifier.predict(batch[::-1].copy())
    assert flipped[::-1].tolist() == together.tolist()
    rtol, atol = TOLERANCES["float32"]
    large = np.concatenate([batch] * 4)  # more than run at once
    torch.testing.assert_close(
        classifier.scores(large)[225:], classifier.scores(batch), rtol=rtol, atol=atol
    )


def test_a_thousand_classes_and_no_more(seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (1001, 16, 16), dtype=np.uint8)
    model = meta_model(seed, 1)
    names = [f"class {number}" for number in range(1001)]
    classifier = model.adapt(images[:1000], names[:1000], steps=1)
    assert len(classifier.classes_) == 1000
    assert classifier.predict_proba(images[:2]).shape == (2, 1000)
    for labels in (names, torch.arange(1001)):
        with pytest.raises(InputError, match="2 to 1,000 classes; got 1,001"):
            model.adapt(images, labels)


def test_what_is_no_picture_or_label_is_refused(seed: int, tmp_path: Path) -> None:
    images, labels = pictures(seed, 2)
    model = meta_model(seed)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    good = tmp_path / "good.png"
    Image.fromarray(images[0]).save(good)
    for bad, names, message in (
        (images.astype(np.float32), labels, "unit range, 0 to 1; got .* divide by 255"),
        (torch.from_numpy(images).permute(0, 3, 1, 2).float(), labels, "divide by 255"),
        (images.astype(np.int64), labels, "uint8, 0 to 255, or float, 0 to 1; got int64"),
        (images.transpose(0, 3, 1, 2), labels, r"\[N, H, W, 1 or 3\].*torch.from_numpy"),
        (images[0], labels, r"a single picture as picture\[None\]"),
        (images[:0], labels, "must be"),
        ([], labels, "empty list"),
        ([images[0], good], labels, "all of one kind"),
        ([good, tmp_path / "bad.png"], ["a", "b"], "bad.png is not an image"),
        ([good, tmp_path / "none.png"], ["a", "b"], "cannot read .*none.png: No such file"),
        ([good, tmp_path], ["a", "b"], "is not a picture file"),
        (tmp_path / "nothing", labels, "no file or folder"),
        (images, ["a"] * len(labels), "2 to 1,000 classes; got 1, 'a'"),
        (images, [*labels[1:], 3], "all of one kind; got int, str"),
        (images, np.arange(6) / 2, "strings or integers"),
        (images, "abcdef", "strings or integers"),
        (images, [2**70] * 6, "fit into 64 bits"),
        (images, labels[1:], r"N = 6, one per image; got \[5\]"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            model.adapt(bad, names)
        assert "\n" not in str(caught.value) and str(caught.value).startswith("adapt: ")


def test_a_module_of_ones_own_takes_pictures_of_one_size(seed: int) -> None:
    images, labels = pictures(seed, 2, 8, 8)
    with seeded(seed, "linear"):
        module = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    classifier = bf.MetaModel(module).adapt(images, labels)
    wide, _ = pictures(seed, 2, 12, 20)
    assert classifier.image_shape == (3, 8, 8)
    assert classifier.predict(wide).shape == (6,)  # resized to the support set's size
    with pytest.raises(InputError, match="differ in size, and the module is not one of"):
        bf.MetaModel(module).adapt([*images[:5], wide[5]], labels)
    with pytest.raises(InputError, match="Classifier.save: .* cannot rebuild .* Sequential"):
        classifier.save("nowhere.safetensors")
    assert not Path("nowhere.safetensors").exists()


def test_images_of_any_size_stay_as_they_are(seed: int) -> None:
    """Check that a meta-model that resizes by itself gets float tensors untouched."""
    images, labels = pictures(seed)
    model = meta_model(seed, name="conv4_any_size")
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(images_of("test", tensors, model.module), tensors)
    assert images_of("test", images, model.module).shape == (15, 3, 16, 16)
    assert model.adapt(images, labels).score(tensors, labels) == 1.0


@pytest.mark.parametrize("name", ["conv4", "conv4_any_size", "resnet10"])
@pytest.mark.parametrize("transductive", [False, True])
def test_a_saved_classifier_comes_back(
    name: str, transductive: bool, seed: int, tmp_path: Path
) -> None:
    images, names = pictures(seed)
    new, _ = pictures(seed + 1)
    model, file = meta_model(seed, name=name), tmp_path / "new" / "classifier.safetensors"
    for labels in (
        names,
        [len(name) + NAMES.index(name) for name in names],
        torch.tensor([NAMES.index(name) + 1 for name in names]),
    ):
        classifier = model.adapt(images, labels, transductive=transductive)
        classifier.save(file)
        loaded = bf.Classifier.load(file)
        assert torch.equal(loaded.scores(new), classifier.scores(new))
        assert loaded.classes_.dtype == classifier.classes_.dtype
        assert loaded.classes_.tolist() == classifier.classes_.tolist()
        assert type(loaded.predict(new)) is type(classifier.predict(new))
        np.testing.assert_array_equal(loaded.predict(new), classifier.predict(new))
        assert loaded.image_shape == (3, 16, 16) and loaded.transductive is transductive
        again = tmp_path / "again"
        loaded.save(again)
        assert again.read_bytes() == file.read_bytes()


def test_inverted_pictures_are_inverted_everywhere(seed: int, tmp_path: Path) -> None:
    """Compare with images that are inverted beforehand."""
    images, labels = pictures(seed, 5, 16, 16)
    new, _ = pictures(seed + 1, 5, 16, 16)
    model = meta_model(seed)

    def by_hand(pixels: np.ndarray) -> Tensor:
        return 1 - torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255

    classifier = model.adapt(images, labels, invert=True)
    wanted = model.adapt(by_hand(images), labels)
    assert classifier.invert is True and wanted.invert is False
    classifier.save(tmp_path / "c.safetensors")
    for asked in (classifier, bf.Classifier.load(tmp_path / "c.safetensors")):
        probabilities = asked.predict_proba(new)
        assert torch.equal(probabilities, wanted.predict_proba(by_hand(new)))
        assert not torch.allclose(probabilities, wanted.predict_proba(new), atol=1e-2)


def test_a_file_of_format_1_does_not_invert(seed: int, tmp_path: Path) -> None:
    images, labels = pictures(seed)
    file = tmp_path / "c.safetensors"
    classifier = meta_model(seed).adapt(images, labels)
    classifier.save(file)
    with safe_open(file, framework="pt") as opened:
        held = json.loads(opened.metadata()["bidfmkd_classifier"])
    assert held.pop("invert") is False and held.pop("format") == 2
    save_file(load_file(file), file, {"bidfmkd_classifier": json.dumps(held | {"format": 1})})
    loaded = bf.Classifier.load(file)
    assert loaded.invert is False
    assert torch.equal(loaded.scores(images), classifier.scores(images))


def test_files_that_are_no_classifier_are_refused(seed: int, tmp_path: Path) -> None:
    images, labels = pictures(seed)
    model = meta_model(seed)
    file, other = tmp_path / "good.safetensors", tmp_path / "other.safetensors"
    classifier = model.adapt(images, labels)
    classifier.save(file)
    with safe_open(file, framework="pt") as opened:
        held = json.loads(opened.metadata()["bidfmkd_classifier"])
    tensors = load_file(file)

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            bf.Classifier.load(other)
        assert "\n" not in str(caught.value) and str(other) in str(caught.value)

    refused("is no saved classifier: .* No such file")
    other.write_bytes(pickle.dumps({"weights": 1}))
    refused("is no saved classifier")
    save_file(tensors, other)
    refused("is no saved classifier; wanted a file that")
    model.save(other)
    refused("it is a meta-model: load it with MetaModel.load, adapt it")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    other.write_bytes(content)
    refused("does not match its checksum")
    for change, message in (
        ({"format": 3}, "has format 3, and this version of bidfmkd_fast reads formats 1 to 2"),
        ({"classes": ["ant"]}, "is damaged"),
        ({"classes": ["cat", "bee", "ant"]}, "is damaged: .*sorted"),
        ({"classes": [0.5, 1, 2]}, "is damaged"),
        ({"outputs": [0, 1, 9]}, "is damaged"),
        ({"architecture": {"name": "conv5"}}, "is damaged"),
        ({"architecture": None}, "is damaged"),
        ({"architecture": held["architecture"] | {"width": 8}}, "is damaged"),
        ({"image_shape": [3, 16]}, "is damaged"),
    ):
        save_file(tensors, other, {"bidfmkd_classifier": json.dumps(held | change)})
        refused(message)
    for text in ("[]", "{", "{}", "7"):
        save_file(tensors, other, {"bidfmkd_classifier": text})
        refused("is damaged")
    name = next(iter(tensors))
    save_file(
        tensors | {name: tensors[name] * torch.nan}, other, {"bidfmkd_classifier": json.dumps(held)}
    )
    refused(f"holds NaN in {name}")
    with pytest.raises(InputError, match="not a saved meta-model"):
        bf.MetaModel.load(file)
