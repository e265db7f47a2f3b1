"""Keep a meta-model as a folder with a model card, and share such folders on the Hugging Face Hub.

A folder holds the weights (`meta_model.safetensors`), `config.json` and the card `README.md`. There
is no pickle, and only the safetensors file is read back.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.extras import not_installed
from bidfmkd_fast.files.atomic import check_writable, write_json, write_text
from bidfmkd_fast.meta.model_card import card_text, evaluations_of, facts_of_run
from bidfmkd_fast.models import model_arguments
from bidfmkd_fast.secrets import register

if TYPE_CHECKING:
    from bidfmkd_fast.meta.evaluate import Evaluation
    from bidfmkd_fast.meta.model import MetaModel
    from bidfmkd_fast.training.run import Run

WEIGHTS, CONFIG, CARD = "meta_model.safetensors", "config.json", "README.md"
LIBRARY = "bidfmkd_fast"
# The names that the hub takes: a repository, or a user or organisation and a repository.
_REPOSITORY = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)


def save_folder(
    operation: str,
    model: MetaModel,
    folder: Path,
    run: Run | str | Path | None,
    evaluation: Evaluation | Sequence[Evaluation] | None,
    licence: str | None,
    name: str,
) -> None:
    """Write weights, config and card of `model` to `folder`; the card calls the model `name`.

    Raises:
        InputError: a file is there already or cannot be written, or `run` or `evaluation` does not
            serve.
    """
    for file in (WEIGHTS, CONFIG, CARD):
        if (folder / file).exists():
            raise InputError(
                f"{operation}: {folder / file} is there already; give another folder or remove it"
            )
    facts = None if run is None else facts_of_run(operation, run, model)
    evaluations = evaluations_of(operation, evaluation)
    card = card_text(model, name, facts, evaluations, licence)
    check_writable(*(folder / file for file in (WEIGHTS, CONFIG, CARD)))
    config = {
        "library_name": LIBRARY,
        "architecture": model_arguments(model.module),
        "adapt_steps": model.adapt_steps,
        "adapt_learning_rate": model.adapt_learning_rate,
        "run": facts,
        "evaluations": evaluations,
    }
    write_text(folder / CARD, card)
    write_json(folder / CONFIG, config)
    model.save(folder / WEIGHTS)  # last, since it marks a whole folder


def find_weights(
    operation: str, repository: str | Path, revision: str | None, token: str | None
) -> Path:
    """Return the path of the weights in a folder, or in a repository that is downloaded.

    Raises:
        InputError: there is no such folder or repository, it holds no meta-model, or the package
            huggingface_hub is needed and not installed.
    """
    if not isinstance(repository, (str, Path)):
        raise InputTypeError(
            f"{operation}: repo_or_folder must be a string or a path; got "
            f"{type(repository).__name__}"
        )
    folder = Path(repository).expanduser()
    if folder.is_dir():
        if not (folder / WEIGHTS).is_file():
            raise InputError(
                f"{operation}: {folder} holds no {WEIGHTS}; give a folder of save_pretrained or of "
                "a finished run"
            )
        return folder / WEIGHTS
    if isinstance(repository, Path) or not _REPOSITORY.fullmatch(repository):
        raise InputError(
            f"{operation}: there is no folder {repository}, and a repository is named user/name"
        )
    taken = f"{operation}: {repository} is no folder, so it is taken for a repository"
    hub = _hub(taken)
    _hide(token)
    with _failures(taken):
        return Path(
            hub.hf_hub_download(
                repo_id=repository,
                filename=WEIGHTS,
                revision=revision,
                token=token,
                library_name=LIBRARY,
            )
        )


def push(
    operation: str,
    model: MetaModel,
    repository: str,
    private: bool | None,
    token: str | None,
    message: str,
    **about: Any,
) -> str:
    """Upload the files of `save_folder` as one commit; return the address of the commit.

    Args:
        operation: opens the message of an error.
        model: the meta-model.
        repository: user/name; it is made if it is missing.
        private: whether a new repository is private; None for the account's default.
        token: of the hub; None for the one that the user has logged in with.
        message: of the commit.
        about: `run`, `evaluation` and `licence`, as for `save_folder`.

    Raises:
        InputError: as `save_folder` raises, or the hub refuses.
    """
    if not isinstance(repository, str) or not _REPOSITORY.fullmatch(repository):
        raise InputError(f"{operation}: repo must be named user/name; got {str(repository)!r}")
    hub = _hub(operation)
    _hide(token)
    with tempfile.TemporaryDirectory(prefix="bidfmkd-") as place:
        save_folder(operation, model, Path(place), name=repository, **about)
        with _failures(f"{operation}: {repository}"):
            api = hub.HfApi(token=token, library_name=LIBRARY)
            api.create_repo(repo_id=repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=place, commit_message=message
            )
    return str(commit.commit_url)


def _hub(operation: str) -> ModuleType:
    """Import huggingface_hub; raise InputError if it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise not_installed(operation, error.name or "huggingface_hub", "hub") from None
    return huggingface_hub


def _hide(token: str | None) -> None:
    """Keep the token of the hub, given or from the environment, out of all messages."""
    for secret in (token, os.environ.get("HF_TOKEN")):
        if secret:
            register(secret, "token")


@contextmanager
def _failures(what: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into one line that opens with `what`.

    The classes of its errors differ between its versions, and network errors come from below it.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(
            f"{what}: the Hugging Face Hub failed: {reason}; check the name and the network, and "
            "log in with `hf auth login` or give token="
        ) from error
