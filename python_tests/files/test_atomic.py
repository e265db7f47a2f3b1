"""Test that files are written whole or not at all.

They have the permissions of the umask and a checksum; a failure is one clear line.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files import atomic as files
from bidfmkd_fast.files import tensors as tensor_files
from bidfmkd_fast.meta import MetaModel
from bidfmkd_fast.models import build_model

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "empty": torch.zeros(0, 4),
    "one": torch.tensor(True),
}


def numpy_file(path: Path) -> None:
    with files.written_whole(path) as file:
        np.savez(file, x=np.zeros(3))


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: files.write_text(path, "x"),
    "tensors": lambda path: tensor_files.write_tensors(path, TENSORS),
    "numpy": numpy_file,
    "line": lambda path: files.append_line(path, "x"),
}


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a path whose partial file lies on a device that is always full."""
    path = tmp_path / "file"
    (tmp_path / "file.partial").symlink_to("/dev/full")
    yield path


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("kind", WRITERS)
def test_permissions_follow_the_umask(tmp_path: Path, kind: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        WRITERS[kind](tmp_path / "file")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["text", "tensors", "numpy"])
def test_a_full_disk_leaves_what_was_there(full_disk: Path, kind: str) -> None:
    full_disk.write_text("before")
    with pytest.raises(
        InputError, match=r"cannot write to .*file: No space left on device; free some space"
    ) as caught:
        WRITERS[kind](full_disk)
    assert "\n" not in str(caught.value)
    assert [file.name for file in full_disk.parent.iterdir()] == [
        "file"
    ] and full_disk.read_text() == "before"


def test_a_line_on_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "lines").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"cannot write to .*lines: No space left"):
        files.append_line(tmp_path / "lines", "x")


LIMITED = """
import resource, sys
from pathlib import Path
from bidfmkd_fast.files import atomic as files
from bidfmkd_fast.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
file = Path(sys.argv[1])
WITH = {files.write_text: (file, "x" * 2000), files.reserve: (file, 2000)}
for function in (files.write_text, files.reserve, files.check_writable):
    try:
        function(*WITH.get(function, (file,)))
    except InputError as error:
        print(error)
"""


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """Set the limit in a process of its own, since it would also hold for files of the test run."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path / "file"],
        capture_output=True,
        text=True,
        check=True,
    )
    text, reserved, writable = done.stdout.splitlines()
    assert "File too large; raise the limit on the size of files" in text
    assert all(
        re.match("cannot write to .*file: File too large", line) for line in (reserved, writable)
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_in_its_place_and_a_file_as_folder(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").mkdir()
    (tmp_path / "plain").touch()
    for path in (tmp_path / "file", tmp_path / "plain" / "file"):
        with pytest.raises(InputError, match=f"cannot write to {path}: "):
            WRITERS[kind](path)
    for path in (tmp_path / "file", tmp_path / "plain" / "file"):
        with pytest.raises(InputError, match=f"cannot write to {path}: "):
            files.check_writable(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "plain"]


def test_an_interrupted_writer_leaves_what_was_there(tmp_path: Path) -> None:
    files.write_text(tmp_path / "file", "before")
    with pytest.raises(KeyboardInterrupt), files.written_whole(tmp_path / "file") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_reserved_space_is_used_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with files.reserved(path, 100_000):
        assert (tmp_path / "new" / "file.partial").stat().st_size == 100_000
        files.write_text(path, "short")
    assert path.read_text() == "short"
    with pytest.raises(KeyboardInterrupt), files.reserved(path, 100_000):
        raise KeyboardInterrupt
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_a_tensor_in_pieces_is_written_as_the_whole(tmp_path: Path) -> None:
    """Its bytes in the file stand where safetensors itself puts them, which aligns them."""
    whole = {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "images_0": torch.rand(11, 2, 3),
        "images_1": torch.rand(5, 1),
        "none": torch.empty(0, 4),
        "numbers": torch.arange(3),
    }
    pieces = {
        **whole,
        "images_0": tensor_files.Pieces([whole["images_0"][:4], whole["images_0"][4:]]),
        "images_1": tensor_files.Pieces([whole["images_1"].expand(5, 1)]),
    }
    tensor_files.write_tensors(tmp_path / "whole", whole, {"about": "it"})
    tensor_files.write_tensors(tmp_path / "pieces", pieces, {"about": "it"})
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    read, about = tensor_files.read_tensors(tmp_path / "pieces")
    assert about == {"about": "it"}
    for name, value in whole.items():
        assert torch.equal(read[name], value)


def test_tensors_come_back_and_old_files_still_open(tmp_path: Path) -> None:
    tensor_files.write_tensors(
        tmp_path / "new", {**TENSORS, "shared": TENSORS["a"]}, {"about": "ü"}
    )
    save_file(TENSORS, tmp_path / "old", metadata={"about": "ü"})
    for name in ("new", "old"):
        tensors, about = tensor_files.read_tensors(tmp_path / name)
        assert about == {"about": "ü"}
        assert all(
            torch.equal(tensors[key], value) and tensors[key].dtype == value.dtype
            for key, value in TENSORS.items()
        )


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    """Check that equal content has equal bytes, so that sha256sum can compare two runs.

    A name outside of ASCII keeps its tensor.
    """
    about = {name: f"value of {name}" for name in ("b", "a", "é", "c", "d")}
    written = set()
    for number in range(8):  # safetensors orders metadata anew each time
        path = tmp_path / f"{number}.safetensors"
        tensor_files.write_tensors(
            path, TENSORS | {"ü": torch.ones(3)}, dict(reversed(about.items()) if number else about)
        )
        written.add(path.read_bytes())
        tensors, read = tensor_files.read_tensors(path)
        assert read == about and torch.equal(tensors["ü"], torch.ones(3))
    assert len(written) == 1


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "file"
    tensor_files.write_tensors(path, TENSORS, {"about": "text"})
    whole = path.read_bytes()
    refused = 0
    for byte in range(len(whole)):
        spoilt = bytearray(whole)
        spoilt[byte] ^= 1 << byte % 8
        path.write_bytes(spoilt)
        try:
            tensors, about = tensor_files.read_tensors(path)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:  # in what only fills up the header, or the name of the checksum itself
            assert about["about"] == "text"
            assert all(torch.equal(tensors[key], value) for key, value in TENSORS.items())
    assert refused > 0.9 * len(whole)


@pytest.mark.parametrize("spoil", ["missing", "folder", "empty", "truncated", "text"])
def test_files_that_hold_no_tensors_are_named(tmp_path: Path, spoil: str) -> None:
    path = tmp_path / "file"
    if spoil == "folder":
        path.mkdir()
    elif spoil != "missing":
        tensor_files.write_tensors(path, TENSORS)
        path.write_bytes(
            {"empty": b"", "truncated": path.read_bytes()[:-3], "text": b"x" * 100}[spoil]
        )
    with pytest.raises(InputError, match=f"{path} is not readable: ") as caught:
        tensor_files.read_tensors(path)
    assert "\n" not in str(caught.value)


def test_a_model_with_a_flipped_bit_or_nan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = MetaModel(
        build_model("conv4", in_channels=1, n_classes=2, image_size=(16, 16), width=2)
    )
    model.save(path)
    spoilt = bytearray(path.read_bytes())
    spoilt[-10] ^= 4
    path.write_bytes(spoilt)
    with pytest.raises(InputError, match="model.safetensors is damaged"):
        MetaModel.load(path)
    with torch.no_grad():
        model.module.classifier.bias[0] = float("nan")
    model.save(path)
    with pytest.raises(InputError, match="model.safetensors holds NaN in classifier.bias"):
        MetaModel.load(path)
