"""Folders with model cards, and the Hugging Face Hub, without a network."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import bidfmkd_fast as bf
from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.secrets import register

FILES = ["README.md", "config.json", "meta_model.safetensors"]
EVALUATION = bf.Evaluation(0.625, 0.0125, torch.rand(200), "glyphs", "meta_test", 5, 1, 15, 7, 10)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[bf.Run, Path]:
    """Make a small run: the Run and its folder."""

    def api(number: int) -> bf.BlackBox:
        weight = torch.randn(256, 3, generator=torch.Generator().manual_seed(number))
        spec = bf.APISpec(3, (1, 16, 16), name=f"service {number}", data_set="made | up")
        return bf.FunctionBlackBox(lambda images: images.flatten(1) @ weight, spec)

    config = bf.TrainConfig(
        seed=3,
        survey=bf.SurveyConfig(n_images=8, epochs=1, batch_size=4),
        n_per_class=2,
        meta_model_width=4,
        recovery=bf.RecoveryConfig(steps=2, num_directions=1, generator_width=4, latent_dim=8),
        replay=bf.ReplayConfig(final_steps=1, n_query=1, inner_steps=1),
    )
    folder = tmp_path_factory.mktemp("runs") / "first"
    return bf.BiDfMKD([api(0), api(1)], config=config).fit(folder, progress=False), folder


def weights_of(model: bf.MetaModel) -> dict[str, torch.Tensor]:
    return dict(model.module.state_dict())


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the header and the text of a card."""
    _, header, text = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


class Hub(ModuleType):
    """Stands in for huggingface_hub: keeps what is called, and copies what is uploaded."""

    def __init__(self, place: Path, fails: Exception | None = None) -> None:
        super().__init__("huggingface_hub")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.place, self.fails = place, fails

    def HfApi(self, **arguments: Any) -> Any:
        self.calls.append(("HfApi", arguments))
        return SimpleNamespace(create_repo=self._create_repo, upload_folder=self._upload_folder)

    def _create_repo(self, **arguments: Any) -> None:
        self.calls.append(("create_repo", arguments))
        if self.fails is not None:
            raise self.fails

    def _upload_folder(self, *, folder_path: str, **arguments: Any) -> Any:
        self.calls.append(("upload_folder", arguments))
        shutil.copytree(folder_path, self.place)
        return SimpleNamespace(commit_url="https://hub/me/model/commit/1")

    def hf_hub_download(self, **arguments: Any) -> str:
        self.calls.append(("hf_hub_download", arguments))
        if self.fails is not None:
            raise self.fails
        return str(self.place / arguments["filename"])


def install(monkeypatch: pytest.MonkeyPatch, hub: ModuleType | None) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)


@pytest.mark.parametrize("given", ["the Run", "its folder", "its folder as text"])
def test_a_folder_comes_back_without_the_package_and_its_card_tells_of_the_run(
    made: tuple[bf.Run, Path], given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, None)
    run, run_folder = made
    about = {"the Run": run, "its folder": run_folder}.get(given, str(run_folder))
    folder = tmp_path / "mein Modell é"
    run.meta_model.save_pretrained(folder, run=about, evaluation=EVALUATION, license="apache-2.0")
    assert sorted(file.name for file in folder.iterdir()) == FILES
    loaded = bf.MetaModel.from_pretrained(folder)
    assert_same(weights_of(loaded), weights_of(run.meta_model))
    assert loaded.adapt_steps == run.meta_model.adapt_steps
    assert_same(load_file(folder / FILES[2]), weights_of(run.meta_model))

    header, text = card_of(folder)
    assert header["library_name"] == "bidfmkd_fast" and header["license"] == "apache-2.0"
    assert header["pipeline_tag"] == "image-classification" and "few-shot" in header["tags"]
    assert "# mein Modell é\n" in text
    assert "| black-box APIs | 2: `service 0`, `service 1` |" in text
    assert f"| queries asked of all together | {run.queries:,} |" in text
    assert run.queries == 2 * (8 + 2 * 2 * 2 * 6)
    assert "| procedural pictures of the survey | 8 |" in text and "| seed | 3 |" in text
    row = "| glyphs | meta_test | 5-way 1-shot | 200 (7) | 15 | 10 | 62.50 ± 1.25 |"
    assert row in text.splitlines()
    assert 'from_pretrained("mein Modell é")' in text
    known = "made / up" if given == "the Run" else "not known"  # `train` notes it in the folder
    assert f"| data sets that they know | {known} |" in text
    config = json.loads((folder / "config.json").read_text())
    assert config["run"]["queries"] == run.queries and config["evaluations"][0]["mean"] == 0.625
    assert config["architecture"]["name"] == "conv4"


def test_a_run_folder_is_loaded_and_its_source_names_the_data_sets(
    made: tuple[bf.Run, Path], tmp_path: Path
) -> None:
    run, run_folder = made
    assert_same(weights_of(bf.MetaModel.from_pretrained(run_folder)), weights_of(run.meta_model))
    shutil.copytree(run_folder, copy := tmp_path / "run")
    entries = [{"name": "omniglot", "inverted": True, "file": "/home/me/omniglot.npz"}]
    (copy / "source.yaml").write_text(yaml.safe_dump({"pool": "/home/me", "data_sets": entries}))
    run.meta_model.save_pretrained(tmp_path / "out", run=copy)
    text = "".join((tmp_path / "out" / name).read_text() for name in FILES[:2])
    assert "| data sets that they know | omniglot |" in text and "/home/me" not in text


def test_without_a_run_the_card_says_what_the_model_is(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    model = bf.MetaModel(module, adapt_steps=3, adapt_learning_rate=0.5)
    model.save_pretrained(tmp_path / "own", evaluation=[EVALUATION, EVALUATION])
    header, text = card_of(tmp_path / "own")
    assert "license" not in header and "black-box APIs" not in text
    assert text.count("62.50 ± 1.25") == 2
    assert "in 3 gradient steps with a learning rate of 0.5" in text
    assert 'from_pretrained("own", module=module)' in text and "is a Sequential" in text
    with pytest.raises(InputError, match="pass the module as module="):
        bf.MetaModel.from_pretrained(tmp_path / "own")
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    loaded = bf.MetaModel.from_pretrained(tmp_path / "own", module=other)
    assert_same(weights_of(loaded), weights_of(model))


def test_no_secret_reaches_the_card(made: tuple[bf.Run, Path], tmp_path: Path) -> None:
    register("service 0")  # as the user of a URL would be
    run, _ = made
    run.meta_model.save_pretrained(tmp_path / "out", run=run)
    for name in FILES[:2]:
        text = (tmp_path / "out" / name).read_text()
        assert "service 0" not in text and "<secret>" in text and "service 1" in text


def test_pushing_uploads_the_folder_and_loading_downloads_the_weights_alone(
    made: tuple[bf.Run, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, run_folder = made
    install(monkeypatch, hub := Hub(tmp_path / "uploaded"))
    url = run.meta_model.push_to_hub(
        "me/model", run=run_folder, private=True, token="hf_abcdefgh", message="First"
    )
    assert url == "https://hub/me/model/commit/1"
    assert hub.calls == [
        ("HfApi", {"token": "hf_abcdefgh", "library_name": "bidfmkd_fast"}),
        ("create_repo", {"repo_id": "me/model", "private": True, "exist_ok": True}),
        ("upload_folder", {"repo_id": "me/model", "commit_message": "First"}),
    ]
    assert sorted(file.name for file in hub.place.iterdir()) == FILES
    assert 'from_pretrained("me/model")' in card_of(hub.place)[1]
    assert not any("hf_abc" in (hub.place / name).read_text() for name in FILES[:2])

    hub.calls.clear()
    loaded = bf.MetaModel.from_pretrained("me/model", revision="v1")
    assert_same(weights_of(loaded), weights_of(run.meta_model))
    wanted = {"repo_id": "me/model", "filename": FILES[2], "revision": "v1", "token": None}
    assert hub.calls == [("hf_hub_download", wanted | {"library_name": "bidfmkd_fast"})]


def test_what_the_hub_refuses_is_one_line_without_the_token(
    made: tuple[bf.Run, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ConnectionError("401:\n hf_abcdefgh may not\nwrite")
    install(monkeypatch, Hub(tmp_path / "uploaded", error))
    model = made[0].meta_model
    said = "the Hugging Face Hub failed: 401: <token> may not write; check the name and"
    with pytest.raises(InputError, match=f"^MetaModel.push_to_hub: me/model: {said}"):
        model.push_to_hub("me/model", token="hf_abcdefgh")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    taken = "me/model is no folder, so it is taken for a repository"
    with pytest.raises(InputError, match=f"^MetaModel.from_pretrained: {taken}: {said}") as raised:
        bf.MetaModel.from_pretrained("me/model")
    assert "\n" not in str(raised.value)


def test_the_real_package_has_the_parameters_that_are_used() -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    used = {
        hub.HfApi: ("token", "library_name"),
        hub.HfApi.create_repo: ("repo_id", "private", "exist_ok"),
        hub.HfApi.upload_folder: ("repo_id", "folder_path", "commit_message"),
        hub.hf_hub_download: ("repo_id", "filename", "revision", "token", "library_name"),
    }
    for function, names in used.items():
        assert set(names) <= set(inspect.signature(function).parameters), function
    assert "commit_url" in inspect.signature(hub.CommitInfo).parameters


def test_the_real_package_reads_the_card(made: tuple[bf.Run, Path], tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    made[0].meta_model.save_pretrained(tmp_path / "out", run=made[0], license="mit")
    data = hub.ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.library_name, data.license) == ("bidfmkd_fast", "mit")
    assert "meta-learning" in data.tags


def test_nothing_is_written_over(made: tuple[bf.Run, Path], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"save_pretrained: .*README.md is there already; give an"):
        made[0].meta_model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_a_run_that_does_not_serve_is_refused_before_anything_is_written(
    made: tuple[bf.Run, Path], tmp_path: Path
) -> None:
    run, run_folder = made
    out = tmp_path / "out"
    shutil.copytree(run_folder, damaged := tmp_path / "damaged")
    (damaged / "summary.json").write_text('{"queries": 3}')
    (empty := tmp_path / "empty").mkdir()
    model = run.meta_model
    cases: list[tuple[bf.MetaModel, Any, str]] = [
        (run.initial_model, run, "the run has another meta-model; give the run that made this"),
        (run.initial_model, run_folder, "the run has another meta-model"),
        (model, empty, "holds no finished run, since meta_model.safetensors is missing"),
        (model, tmp_path / "none", "holds no finished run"),
        (model, damaged, "the run in .*damaged is damaged: KeyError"),
        (model, 5, "run must be a Run or the folder of a run; got int"),
    ]
    for wanted, given, said in cases:
        with pytest.raises(InputError, match=f"^MetaModel.save_pretrained: .*{said}"):
            wanted.save_pretrained(out, run=given)
    with pytest.raises(InputTypeError, match="evaluation must be what bf.evaluate returned, or a "):
        model.save_pretrained(out, evaluation=[0.5])  # type: ignore[list-item]
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no such/folder/here", "there is no folder no such/folder/here, and a repository is name"),
        ("../none", r"there is no folder ../none, and a repository is named user/name"),
        (Path("none"), "there is no folder none"),
        (5, "repo_or_folder must be a string or a path; got int"),
        (
            "me/model",
            "me/model is no folder, so it is taken for a repository: huggingface_hub is not "
            "installed; `pip install 'huggingface_hub>=0.24'`",
        ),
        (".", "holds no meta_model.safetensors; give a folder of save_pretrained or of a finished"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    name: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^MetaModel.from_pretrained: .*{said}"):
        bf.MetaModel.from_pretrained(name)


@pytest.mark.parametrize("name", ["a/b/c", "me/ model", "../up", "", 5])
def test_a_name_that_is_no_repository_is_refused(made: tuple[bf.Run, Path], name: Any) -> None:
    with pytest.raises(InputError, match=r"^MetaModel.push_to_hub: repo must be named user/name"):
        made[0].meta_model.push_to_hub(name)
