"""Find the models of prediction services and describe them as a pool, without a list by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from bidfmkd_fast.black_box.budget import Budget
from bidfmkd_fast.black_box.remote.reading import short
from bidfmkd_fast.black_box.remote.v2_http import RemoteBlackBox
from bidfmkd_fast.black_box.remote.v2_messages import ServerMismatch
from bidfmkd_fast.black_box.remote.v2_server import V2Server, image_spec
from bidfmkd_fast.black_box.scores_kind import KIND_QUERIES, look_at_scores
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, BudgetExhausted, InputError
from bidfmkd_fast.files.atomic import write_exact
from bidfmkd_fast.files.folder_lock import FolderLock
from bidfmkd_fast.files.yaml_files import parse_yaml
from bidfmkd_fast.pools.pool import LIST, Pool, pool_of_list
from bidfmkd_fast.pools.services_list import FoundModel, list_text
from bidfmkd_fast.secrets import scrub

# Kinds that `--scores-kind` may state; top-k also wants its k.
STATED_KINDS = ("logits", "probabilities", "log_probabilities", "labels")


@dataclass(frozen=True)
class Services:
    """Which servers and models a user asks for.

    Args:
        urls: servers of the Open Inference Protocol v2 over HTTP.
        models: names of models; empty for all that take images and give scores.
        scores_kind: the kind of scores of all models; None to ask each of them `KIND_QUERIES`
            queries.
        token_variables: environment variables with tokens: none, one for all servers, or one for
            each.

    Raises:
        InputError: an address or a kind cannot be used, or comes twice.
    """

    urls: Sequence[str]
    models: Sequence[str] = ()
    scores_kind: str | None = None
    token_variables: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.scores_kind is not None and self.scores_kind not in STATED_KINDS:
            raise InputError(
                f"services: scores_kind must be one of {', '.join(STATED_KINDS)}; "
                f"got {self.scores_kind!r}"
            )
        if len(self.token_variables) not in (0, 1, len(self.urls)):
            raise InputError(
                f"services: token_variable wants one name, or {len(self.urls)}, one per URL; "
                f"got {len(self.token_variables)}"
            )
        servers = self.servers()
        for what, values in (("URL", [url.url for url, _ in servers]), ("model", self.models)):
            if twice := [value for value, times in Counter(values).items() if times > 1]:
                raise InputError(f"services: the {what} {twice[0]} is given twice; give it once")

    def servers(self) -> list[tuple[V2Server, str | None]]:
        """Return each server with the name of the variable that holds its token."""
        names: list[str | None] = [*self.token_variables] or [None]
        names *= len(self.urls) if len(names) == 1 else 1
        return [(V2Server(url, name), name) for url, name in zip(self.urls, names, strict=True)]


class Found(NamedTuple):
    """What the services hold.

    Attributes:
        text: the text of `pool.yaml`.
        models: the models in the list, in its order.
        left_out: for each other model, its name, server and why it is left out.
        queries: what the search has asked.
    """

    text: str
    models: tuple[FoundModel, ...]
    left_out: tuple[str, ...]
    queries: int

    def pool(self, folder: Path) -> Pool:
        """Return the pool; `folder` is where its list lies or would lie."""
        return pool_of_list(parse_yaml(self.text, LIST), folder / LIST)


def find_services(services: Services, budget: Budget | None = None) -> Found:
    """Ask servers for their models, and describe those that take images and give scores.

    Metadata cost no query. What they do not state, the kind of the scores, costs `KIND_QUERIES`
    queries a model, taken from `budget`, unless `services` states it.

    Raises:
        InputError: no model can be used, a model of `services` is missing or cannot be used, or a
            server does not list its models and none are named.
        BudgetExhausted: `budget` does not pay for all queries; nothing was asked then.
        APIUnavailable, BadAnswer: a server does not answer as the protocol says.
    """
    found, left_out = _described(services)
    if not found:
        reasons = f": {'; '.join(left_out)}" if left_out else ""
        raise InputError(f"services: no model takes images and gives scores{reasons}")
    queries = 0
    if services.scores_kind is None:
        queries = KIND_QUERIES * len(found)
        requests = sum(
            -(-KIND_QUERIES // (model.spec.max_batch or KIND_QUERIES)) for model in found
        )
        if budget is not None and not budget.affords(queries, requests):
            raise BudgetExhausted(
                f"services: {len(found)} models would be asked {queries} queries to find their "
                f"kind of scores, more than is left of {budget}; raise the budget, or state "
                "scores_kind"
            )
        found = [_asked(model, budget) for model in found]
    else:
        kind = services.scores_kind
        found = [model._replace(spec=replace(model.spec, scores_kind=kind)) for model in found]
    made = Found(list_text(found, left_out), tuple(found), tuple(left_out), queries)
    if scrub(made.text) != made.text:
        raise InputError("services: a URL or the name of a model holds a secret, such as a token")
    made.pool(Path())  # refuses what could not be read back
    return made


def pool_from_services(
    services: Services, folder: str | Path, budget: Budget | None = None
) -> Found:
    """Write the `pool.yaml` of `find_services` into a new folder.

    Raises:
        InputError: as in `find_services`, or the folder holds something or cannot be written to.
            Nothing is asked or written then.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"services: {folder} exists already; give another folder or remove it")
    with FolderLock(folder):
        found = find_services(services, budget)
        write_exact(folder / LIST, found.text)
    return found


def _described(services: Services) -> tuple[list[FoundModel], list[str]]:
    """Return the models that can be used, without their kind of scores, and why others cannot."""
    found: list[FoundModel] = []
    left_out: list[str] = []
    listed: set[str] = set()
    for server, token_variable in services.servers():
        states = _states(server, services.models)
        listed |= set(states)
        for model in services.models or states:
            if model not in states:
                continue
            where = f"{short(model)} at {server.url}"
            try:
                if states[model]:
                    raise ServerMismatch(f"{where}: it is not ready ({short(states[model])})")
                described = server.read(model)
                if described is None:
                    raise ServerMismatch(f"{where}: the server has no description of it")
                spec = replace(image_spec(where, described), name=model)
            except InputError as error:
                if services.models:
                    raise InputError(f"services: {error}") from None
                left_out.append(short(str(error), 400))
                continue
            found.append(FoundModel(server.url, model, spec, token_variable))
    if missing := [model for model in services.models if model not in listed]:
        there = short(", ".join(sorted(listed))) or "no other that is asked for"
        raise InputError(f"services: no server has a model {missing[0]!r}; there are {there}")
    return _with_names(found), left_out


def _states(server: V2Server, wanted: Sequence[str]) -> dict[str, str]:
    """Return the models of a server and their states.

    A server that lists no models is asked for each of the `wanted` ones by name.
    """
    try:
        return server.models()
    except InputError:
        if not wanted:
            raise
    return {model: "" for model in wanted if server.read(model) is not None}


def _with_names(found: Sequence[FoundModel]) -> list[FoundModel]:
    """Give models of one name on several servers different names: `cats@127.0.0.1:8000`."""
    times = Counter(model.model for model in found)
    return [
        model
        if times[model.model] == 1
        else model._replace(
            spec=replace(model.spec, name=f"{model.model}@{model.url.partition('://')[2]}")
        )
        for model in found
    ]


def _asked(model: FoundModel, budget: Budget | None) -> FoundModel:
    """Return the model with the kind of scores that its answers look like."""
    try:
        box = RemoteBlackBox(
            model.url, model.model, model.spec, token_variable=model.token_variable, budget=budget
        )
        spec, notes = look_at_scores(box)
    except (APIUnavailable, BadAnswer) as error:
        raise type(error)(
            f"services: {short(model.model)} at {model.url} does not answer as it should: {error}; "
            "name the models to use without it, or state scores_kind"
        ) from None
    return model._replace(spec=spec, notes=tuple(notes), asked=True)
