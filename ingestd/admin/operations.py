"""Operations of the API of the admin address: their routes and rights, parameters, description.

`OPERATIONS` has each operation once. `AdminApi` has a method of the same name for those that the
server does not answer itself, `/openapi.json` is made of them, and a request with a parameter that
its operation does not name is refused.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from urllib.parse import parse_qs

import msgspec

from ingestd import __version__
from ingestd.admin.access import Need
from ingestd.admin.status import Status
from ingestd.http import problem
from ingestd.http.problem import Problem
from ingestd.journal.dead_letters import REASONS, LetterFilter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ingestd.admin.connection import AdminRequest

LETTERS_MAX = 500
"""Dead letters of one answer."""


class LetterChoice(msgspec.Struct, forbid_unknown_fields=True):
    """Dead letters that a change is meant for: all of these conditions hold for each.

    Attributes:
        pipeline: the name of one; empty for all.
        ids: numbers of dead letters; empty for any.
        reasons: empty for any.
        error: a part of the error.
        since: given up then or later: ISO 8601, or seconds since the epoch.
        until: given up before.
        limit: only so many, the oldest ones.
        all: every dead letter is meant, if there is no condition.
    """

    pipeline: str = ""
    ids: list[int] = []
    reasons: list[str] = []
    error: str = ""
    since: str | float | None = None
    until: str | float | None = None
    limit: Annotated[int, msgspec.Meta(ge=1)] | None = None
    all: bool = False


class Operation(NamedTuple):
    """One operation of the API.

    Attributes:
        method: of the request.
        path: with `{name}` for a part that varies.
        need: the right that it needs.
        summary: one line for `/openapi.json`.
        query: parameters with what they mean.
        body: the form of the body.
        gives: the media type of the answer, or its form.
    """

    method: str
    path: str
    need: Need
    summary: str
    query: Mapping[str, str] = {}
    body: type[msgspec.Struct] | None = None
    gives: str | type[msgspec.Struct] = "application/json"


_ONE = {"pipeline": "Name of a pipeline; all if it is left out"}
_FILTER = {
    **_ONE,
    "id": "Number of a dead letter; repeatable",
    "reason": f"Repeatable: {', '.join(REASONS)}",
    "error": "A part of the error",
    "since": "Given up then or later: ISO 8601, or seconds since the epoch",
    "until": "Given up before",
}
_TEXT = "text/plain"
OPERATIONS: Mapping[str, Operation] = {
    "livez": Operation("GET", "/livez", Need.PROBE, "Tell if the event loop turns", gives=_TEXT),
    "readyz": Operation("GET", "/readyz", Need.PROBE, "Tell if records are taken", gives=_TEXT),
    "metrics": Operation("GET", "/metrics", Need.PROBE, "Metrics for Prometheus", gives=_TEXT),
    "status": Operation("GET", "/v1/status", Need.STATUS, "Status of the daemon", gives=Status),
    "watch": Operation(
        "GET", "/v1/watch", Need.READ, "Status, batches and samples as they come",
        gives="text/event-stream",
    ),
    "tap": Operation(
        "GET", "/v1/tap", Need.READ, "Records as they pass a stage, one a line, sampled if many",
        {
            **_ONE,
            "stage": "accepted, processed or dead",
            "where": "KEY=VALUE in JSON records; repeatable",
            "sample": "The part of the records that is shown, up to 1",
            "limit": "Number of records after which it ends",
        },
        gives="application/x-ndjson",
    ),
    "history": Operation("GET", "/v1/history", Need.READ, "Samples of the last 15 minutes", _ONE),
    "workers": Operation("GET", "/v1/workers", Need.READ, "Workers and what each does", _ONE),
    "batches": Operation(
        "GET", "/v1/batches", Need.READ, "The last tries of batches, the newest first",
        {**_ONE, "limit": "Number of tries of each pipeline"},
    ),
    "settings": Operation(
        "GET", "/v1/settings", Need.READ, "Settings in effect with their origins, secrets masked"
    ),
    "letters": Operation(
        "GET", "/v1/dead", Need.READ, "Dead letters without payloads, the newest first",
        {
            **_FILTER,
            "before": "Only those with smaller numbers; of several pipelines it needs one",
            "limit": f"Number of dead letters, at most {LETTERS_MAX}",
        },
    ),
    "summary": Operation(
        "GET", "/v1/dead/summary", Need.READ, "Dead letters summed up by error", _FILTER
    ),
    "export": Operation(
        "GET", "/v1/dead/export", Need.READ, "Dead letters with payloads, one a line", _FILTER,
        gives="application/x-ndjson",
    ),
    "letter": Operation(
        "GET", "/v1/dead/{id}", Need.READ, "One dead letter with traceback and payload", _ONE
    ),
    "retry": Operation(
        "POST", "/v1/dead/retry", Need.CHANGE, "Requeue dead letters", body=LetterChoice
    ),
    "purge": Operation(
        "POST", "/v1/dead/purge", Need.CHANGE, "Delete dead letters for good", body=LetterChoice
    ),
    "pause": Operation(
        "POST", "/v1/pipelines/{pipeline}/pause", Need.CHANGE, "Give out no batch of a pipeline"
    ),
    "resume": Operation(
        "POST", "/v1/pipelines/{pipeline}/resume", Need.CHANGE, "Give out batches again"
    ),
    "openapi": Operation("GET", "/openapi.json", Need.PROBE, "This description"),
}  # fmt: skip


# -- parameters ------------------------------------------------------------------------------------


def query_of(request: AdminRequest, name: str) -> dict[str, list[str]]:
    """The parameters of a request.

    Raises:
        Problem: 400; one is unknown.
    """
    query = request.target.partition("#")[0].partition("?")[2]
    try:
        found = parse_qs(query, keep_blank_values=True, max_num_fields=1000)
    except ValueError:
        raise Problem(problem.BAD_REQUEST, "there are too many parameters") from None
    known = OPERATIONS[name].query
    for key in found:
        if key not in known:
            what = f"{', '.join(known)} are known" if known else "there are none here"
            raise Problem(problem.BAD_REQUEST, f"unknown parameter {key[:40]!r}; {what}")
    return found


def number_in(asked: Mapping[str, Sequence[str]], name: str) -> int | None:
    """A parameter that is a number, not negative; `None` if it is left out.

    Raises:
        Problem: 400.
    """
    texts = asked.get(name, ())
    if not texts:
        return None
    if not (texts[-1].isascii() and texts[-1].isdigit() and 0 < len(texts[-1]) < 19):
        raise Problem(problem.BAD_REQUEST, f"{name} should be a number")
    return int(texts[-1])


def filter_in(asked: Mapping[str, Sequence[str]]) -> LetterFilter:
    """The filter in parameters.

    Raises:
        Problem: 400.
    """
    reasons = tuple(reason for reason in asked.get("reason", ()) if reason)
    if wrong := [one for one in reasons if one not in REASONS]:
        detail = f"{wrong[0][:40]!r} is no reason; there are {', '.join(REASONS)}"
        raise Problem(problem.BAD_REQUEST, detail)
    ids = frozenset(number_in({"id": [one]}, "id") or 0 for one in asked.get("id", ()))
    since, until = (_moment_in(asked, name) for name in ("since", "until"))
    return LetterFilter(reasons, since, until, ids, error=asked.get("error", [""])[-1])


def _moment_in(asked: Mapping[str, Sequence[str]], name: str) -> float | None:
    """A parameter that is a point in time, as seconds since the epoch.

    Raises:
        Problem: 400.
    """
    text = asked.get(name, [""])[-1]
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        detail = f"{name} should be ISO 8601 or seconds since the epoch"
        raise Problem(problem.BAD_REQUEST, detail) from None
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()


# -- the description -------------------------------------------------------------------------------


def describe() -> dict[str, Any]:
    """The API as OpenAPI 3.1."""
    forms = [Status, LetterChoice]
    schemas, parts = msgspec.json.schema_components(
        forms, ref_template="#/components/schemas/{name}"
    )
    named = dict(zip(forms, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for name, one in OPERATIONS.items():
        gives, schema = one.gives, dict[str, Any](type="object")
        if not isinstance(gives, str):
            schema, gives = named[gives], "application/json"
        elif gives != "application/json":
            schema = {"type": "string"}
        refusals = ["400", "404", "421", "403", "503"]
        operation: dict[str, Any] = {
            "operationId": name,
            "summary": one.summary,
            "parameters": [*_variables(one.path), *_parameters(one.query)],
            "responses": {
                "200": {"description": "OK", "content": {gives: {"schema": schema}}},
                **dict.fromkeys(refusals, _PROBLEM),
            },
        }
        if one.need is not Need.PROBE:
            operation["security"] = [{"bearer": []}, {"basic": []}, {"key": []}]
            operation["responses"]["401"] = _PROBLEM
        if one.need in {Need.READ, Need.STATUS}:
            operation["security"].append({})  # on a loopback address
        if one.method == "POST":
            form = named[one.body] if one.body else {"type": "object"}
            operation["requestBody"] = {"content": {"application/json": {"schema": form}}}
            operation["responses"]["415"] = _PROBLEM
        paths.setdefault(one.path, {})[one.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "ingestd admin", "version": __version__},
        "paths": paths,
        "components": {"schemas": parts, "securitySchemes": _SCHEMES},
    }


_PROBLEM = {
    "description": "A problem (RFC 9457)",
    "content": {"application/problem+json": {"schema": {"type": "object"}}},
}
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "basic": {"type": "http", "scheme": "basic"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def _variables(path: str) -> Iterator[dict[str, Any]]:
    for part in path.split("/"):
        if part.startswith("{"):
            schema = {"type": "integer" if part == "{id}" else "string"}
            yield {"name": part[1:-1], "in": "path", "required": True, "schema": schema}


def _parameters(query: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for name, text in query.items():
        schema: dict[str, Any] = {"type": "string"}
        if name in {"id", "reason"}:
            schema = {"type": "array", "items": schema}
        yield {"name": name, "in": "query", "description": text, "schema": schema}
