"""Keep the list of a run's services in the folder of the run, so that the run can be continued."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from bidfmkd_fast.black_box.budget import Budget
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import write_exact
from bidfmkd_fast.files.folder_lock import LOCK, FolderLock
from bidfmkd_fast.pools.pool import LIST, Pool, read_pool
from bidfmkd_fast.pools.services import Found, Services, find_services
from bidfmkd_fast.pools.sources import SourceEntry


@contextmanager
def listed_in(
    folder: Path, services: Services, budget: Budget | None = None
) -> Iterator[Found | None]:
    """Give the block a run's folder with the `pool.yaml` of `services`.

    A folder that has the list already is continued: nothing is asked, and the block gets None. If
    the block fails before it has written anything, the list is removed again.

    Raises:
        InputError: as in `find_services`; or the folder holds the list of other services, or
            something else than a run of services.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    found = None
    with FolderLock(folder):
        if (folder / LIST).is_file():
            check_same(read_pool(folder), services)
        elif {path.name for path in folder.iterdir()} - {LOCK}:
            raise InputError(
                f"services: {folder} exists, and no run of services was begun there ({LIST} is "
                "missing); continue a run of a pool with the pool, or give another folder"
            )
        else:
            found = find_services(services, budget)
            write_exact(folder / LIST, found.text)
    try:
        yield found
    except Exception:
        others = [path for path in folder.iterdir() if path.name != LIST]
        if found is not None and not any(path.is_file() or any(path.iterdir()) for path in others):
            (folder / LIST).unlink()
            with suppress(OSError):  # another process may have put something there
                for path in (*others, *missing):
                    path.rmdir()
        raise


def check_same(pool: Pool, services: Services) -> None:
    """Raise InputError if `services` asks for something else than the list of a run holds.

    What `services` leaves open is as in the list, which the user may have edited.
    """
    entries = [entry for entry in pool.entries if isinstance(entry, SourceEntry)]
    options = [entry.options for entry in entries]
    token_of = {server.url: variable for server, variable in services.servers()}
    compared: dict[str, tuple[Sequence[str | None], Sequence[str]]] = {
        "url": ([held.get("url") for held in options], list(token_of))
    }
    if services.models:
        compared["model"] = ([held.get("model") for held in options], list(services.models))
    if services.scores_kind is not None:
        kinds = [entry.spec.get("scores_kind") for entry in entries]
        compared["scores_kind"] = (kinds, [services.scores_kind])
    if services.token_variables:
        held_tokens = [f"{held.get('token_variable')} for {held.get('url')}" for held in options]
        tokens = [f"{variable} for {url}" for url, variable in token_of.items()]
        compared["token_variable"] = (held_tokens, tokens)
    for key, (there, given) in compared.items():
        if set(there) != set(given):
            raise InputError(
                f"services: {pool.folder} holds other services ({key} is "
                f"{_listed(there)} there; got {_listed(given)}); give the same, or another folder"
            )


def _listed(values: Sequence[str | None]) -> str:
    return ", ".join(sorted(map(str, set(values)))) or "nothing"
