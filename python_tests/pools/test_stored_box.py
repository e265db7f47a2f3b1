"""Serve large pools: modules are read when they are asked, and dropped when others are."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from bidfmkd_fast.black_box import TorchBlackBox
from bidfmkd_fast.data import make_glyphs
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.pools import load_pool, stored_box, train_pool
from bidfmkd_fast.pools.stored_box import StoredBlackBox


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pools") / "pool"
    train_pool(make_glyphs(), out, n_apis=5, n_way=3, width=4, epochs=1)
    return out


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[nn.Module]]:
    """Hold two modules at once; return references to those that were read, in order."""
    monkeypatch.setattr(stored_box, "MOST_LOADED", 2)
    modules: list[weakref.ref[nn.Module]] = []
    serve = stored_box.TorchBlackBox

    def noted(module: nn.Module, *arguments: object) -> TorchBlackBox:
        box = serve(module, *arguments)  # type: ignore[arg-type]
        modules.append(weakref.ref(box))  # type: ignore[arg-type]
        return box

    monkeypatch.setattr(stored_box, "TorchBlackBox", noted)
    return modules


def test_boxes_of_a_large_pool_answer_as_those_of_a_small_one(
    folder: Path, read: list[weakref.ref[nn.Module]]
) -> None:
    boxes = load_pool(folder)
    assert all(isinstance(box, StoredBlackBox) for box in boxes) and not read
    images = torch.rand(7, 1, 28, 28)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_box, "MOST_LOADED", 5)
        plain = load_pool(folder)
    for number in (0, 1, 4, 0, 3):
        assert not isinstance(plain[number], StoredBlackBox)
        assert torch.equal(boxes[number](images), plain[number](images))
    gc.collect()
    assert len(read) == 5 and sum(one() is not None for one in read) == 2
    assert boxes[0].ledger.queries == 14 and boxes[2].ledger.queries == 0
    assert [box.name for box in boxes] == [box.name for box in plain]
    assert [box.spec for box in boxes] == [box.spec for box in plain]


def test_a_missing_file_is_named_when_the_pool_is_loaded(
    folder: Path, read: list[weakref.ref[nn.Module]], tmp_path: Path
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "api_003.safetensors").unlink()
    with pytest.raises(InputError, match=r"api_003\.safetensors are missing"):
        load_pool(tmp_path)
    (tmp_path / "api_003.safetensors").write_bytes(b"no weights")
    boxes = load_pool(tmp_path)
    with pytest.raises(InputError, match=r"api_003\.safetensors are damaged"):
        boxes[3](torch.rand(1, 1, 28, 28))
    assert boxes[2](torch.rand(1, 1, 28, 28)).shape == (1, 3)
