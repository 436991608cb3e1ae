"""The API of the admin address, which the console and `ingestd top` are made of.

`OPERATIONS` has each operation once: its route, the right that it needs, and what `/openapi.json`
says of it. Nothing here is imported before it is asked for. Dead letters are read and changed as
`ingestd dead` does, in a thread of its own: the event loop never waits for a disk.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs

import msgspec

from ingestd import __version__
from ingestd.admin.access import Need
from ingestd.admin.connection import AdminPage, StreamedResponse
from ingestd.admin.status import Status
from ingestd.admin.tap import Taps, read_query
from ingestd.admin.watch import History, Watchers
from ingestd.base.logging import get_logger
from ingestd.base.tasks import OwnThread
from ingestd.http import problem
from ingestd.http.problem import Problem, retry_after
from ingestd.http.response import JSON, Response
from ingestd.http.routing import Resource, path_of
from ingestd.journal.dead_letters import REASONS, LetterFilter
from ingestd.journal.handling import (
    counted,
    letter_facts,
    letters_of,
    payload_fields,
    purge,
    retry,
    summed_up,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from ingestd.admin.access import AdminAccess
    from ingestd.admin.connection import AdminRequest, Answer, Outlet
    from ingestd.admin.status import AdminView
    from ingestd.journal.dead_letters import DeadLetters
    from ingestd.pipeline import Pipeline

LETTERS_MAX = 500
"""Dead letters of one answer."""
LETTERS = 100
"""The same, if nothing else is asked for."""
PAYLOAD_BYTES = 256 << 10
"""The part of a payload that an answer shows; an export has all of it."""
EXPORTS_MAX = 4
"""Exports at one time."""
PIECE_BYTES = 256 << 10
"""Part of an export that is read at once."""
HIDDEN = (
    "payloads are shown on a loopback address alone, to this machine; admin.payloads may say more"
)

log = get_logger()


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
    limit: int | None = None
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
            "before": "Only those with smaller numbers",
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


class AdminApi:
    """Answers the operations.

    Args:
        view: the daemon.
        access: gives what decides on requests now.
        history: samples of the daemon.
    """

    def __init__(
        self, view: AdminView, access: Callable[[], AdminAccess], history: History
    ) -> None:
        self._view = view
        self._access = access
        self._history = history
        self._watchers = Watchers(view, history)
        self._taps = Taps(view)
        self._thread = OwnThread("admin-dead-letters")
        self._exports = 0

    def pages(self) -> dict[str, Resource[AdminPage]]:
        """The operations by path, those that are not answered by the server itself."""
        found = {}
        for name, one in OPERATIONS.items():
            answer: Callable[[AdminRequest], Response | Awaitable[Answer]] | None
            answer = getattr(self, name, None)
            if answer is not None:
                methods = ("GET", "HEAD") if one.method == "GET" else (one.method,)
                path = one.path.replace("{id}", "*").replace("{pipeline}", "*")
                found[path] = Resource(methods, AdminPage(one.need, answer))
        return found

    def close(self) -> None:
        """Ends its thread, and the events of those that watch."""
        self._watchers.stop()
        self._thread.shutdown(wait=False)

    # -- the daemon ----------------------------------------------------------------------------

    async def watch(self, request: AdminRequest) -> StreamedResponse:
        """Answers `/v1/watch`."""
        _query(request, "watch")
        self._watchers.check()
        return StreamedResponse("text/event-stream", self._watchers.write)

    async def tap(self, request: AdminRequest) -> StreamedResponse:
        """Answers `/v1/tap`."""
        asked = _query(request, "tap")
        query = read_query(asked, list(self._pipelines(asked)))
        if not self._access().may_tap(request):
            raise Problem(problem.FORBIDDEN, f"{HIDDEN}, with a token of the role admin")
        return self._taps.open(query)

    def history(self, request: AdminRequest) -> Response:
        """Answers `/v1/history`."""
        asked = _query(request, "history")
        return _json(self._history.of(self._pipelines(asked) if asked else None))

    def workers(self, request: AdminRequest) -> Response:
        """Answers `/v1/workers`."""
        found = {}
        for name, one in self._pipelines(_query(request, "workers")).items():
            found[name] = {
                "executor": one.dispatcher.executor,
                "running": one.dispatcher.running,
                "workers": [each._asdict() for each in one.dispatcher.pool.activity()],
            }
        return _json({"pipelines": found})

    def batches(self, request: AdminRequest) -> Response:
        """Answers `/v1/batches`."""
        asked = _query(request, "batches")
        limit = _number(asked, "limit")
        found = {
            name: [
                one._asdict()
                for one in islice(reversed(pipeline.settlements.recent.batches), limit)
            ]
            for name, pipeline in self._pipelines(asked).items()
        }
        return _json({"pipelines": found})

    def settings(self, request: AdminRequest) -> Response:
        """Answers `/v1/settings`."""
        _query(request, "settings")
        rows = self._view.effective_settings()
        named = [{"key": key, "value": value, "origin": origin} for key, value, origin in rows]
        return _json({"settings": named})

    async def pause(self, request: AdminRequest) -> Response:
        """Answers `/v1/pipelines/{pipeline}/pause`."""
        name, pipeline = self._named(request)
        await pipeline.pause()
        log.info("pipeline_paused", pipeline=name, by=request.principal)
        return _json({"pipeline": name, "paused": True})

    async def resume(self, request: AdminRequest) -> Response:
        """Answers `/v1/pipelines/{pipeline}/resume`."""
        name, pipeline = self._named(request)
        await pipeline.resume()
        log.info("pipeline_resumed", pipeline=name, by=request.principal)
        return _json({"pipeline": name, "paused": False})

    def openapi(self, _: AdminRequest) -> Response:
        """Answers `/openapi.json`."""
        return _json(describe())

    def _named(self, request: AdminRequest) -> tuple[str, Pipeline]:
        name = path_of(request.target, request.method).split("/")[3]
        return name, self._pipelines({"pipeline": [name]})[name]

    def _pipelines(self, asked: Mapping[str, list[str]]) -> Mapping[str, Pipeline]:
        """The pipelines that a request is about.

        Raises:
            Problem: 404.
        """
        known = self._view.pipelines
        names = [name for name in asked.get("pipeline", ()) if name]
        for name in names:
            if name not in known:
                raise Problem(problem.UNKNOWN_PIPELINE, "no pipeline has this name")
        return {name: known[name] for name in names} if names else known

    # -- dead letters --------------------------------------------------------------------------

    def _stores(self, asked: Mapping[str, list[str]]) -> dict[str, DeadLetters]:
        """The stores of dead letters of some pipelines; a journal may have none.

        Raises:
            Problem: 404.
        """
        found = self._pipelines(asked).items()
        stores = {name: one.journal.dead_letters for name, one in found}
        return {name: store for name, store in stores.items() if store is not None}

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def letters(self, request: AdminRequest) -> Response:
        """Answers `/v1/dead`."""
        asked = _query(request, "letters")
        stores, chosen = self._stores(asked), _filter(asked)
        limit = min(_number(asked, "limit") or LETTERS, LETTERS_MAX)
        before = _number(asked, "before") or sys.maxsize

        def read() -> dict[str, Any]:
            found = letters_of(stores, chosen._replace(limit=limit), whole=False, before=before)
            rows = [letter_facts(*one, whole=False) for one in found]
            there = counted(stores, chosen).values()
            totals = {key: sum(getattr(one, key) for one in there) for key in _COUNTS}
            return {"letters": rows, **{_COUNTS[key]: value for key, value in totals.items()}}

        return _json(await self._in_thread(read))

    async def summary(self, request: AdminRequest) -> Response:
        """Answers `/v1/dead/summary`."""
        asked = _query(request, "summary")
        stores, chosen = self._stores(asked), _filter(asked)
        rows = await self._in_thread(lambda: summed_up(letters_of(stores, chosen, whole=False)))
        named = [
            {"pipeline": pipeline, "reason": reason, **count._asdict()}
            for pipeline, reason, count in rows
        ]
        return _json({"errors": named})

    async def letter(self, request: AdminRequest) -> Response:
        """Answers `/v1/dead/{id}`."""
        asked = _query(request, "letter")
        last = path_of(request.target, request.method).rpartition("/")[2]
        number = int(last) if last.isascii() and last.isdigit() and len(last) < 19 else 0
        stores, chosen = self._stores(asked), LetterFilter(ids=frozenset((number,)))
        found = await self._in_thread(lambda: list(letters_of(stores, chosen, whole=True)))
        if not found:
            raise Problem(problem.NOT_FOUND, "there is no dead letter with this number")
        if len(found) > 1:
            names = " or ".join(name for name, _ in found)
            detail = f"there is more than one dead letter with this number: say pipeline={names}"
            raise Problem(problem.BAD_REQUEST, detail)
        name, kept = found[0]
        facts = letter_facts(name, kept, whole=False)
        facts |= {"traceback": kept.letter.traceback, "payload_hidden": True}
        if self._access().shows_payloads(request):
            payload = kept.letter.payload
            facts |= payload_fields(_cut(payload))
            facts |= {"payload_hidden": False, "payload_cut": len(payload) > PAYLOAD_BYTES}
        return _json(facts)

    async def export(self, request: AdminRequest) -> StreamedResponse:
        """Answers `/v1/dead/export`."""
        asked = _query(request, "export")
        stores, chosen = self._stores(asked), _filter(asked)
        if not self._access().shows_payloads(request):
            raise Problem(problem.FORBIDDEN, HIDDEN)
        if self._exports >= EXPORTS_MAX:
            detail = f"{EXPORTS_MAX} exports are going on"
            raise Problem(problem.BUSY, detail, headers=retry_after(10.0))
        headers = {"Content-Disposition": 'attachment; filename="dead-letters.ndjson"'}
        write = partial(self._write_export, stores, chosen)
        return StreamedResponse("application/x-ndjson", write, headers)

    async def _write_export(
        self, stores: dict[str, DeadLetters], chosen: LetterFilter, outlet: Outlet
    ) -> None:
        lines = (
            msgspec.json.encode(letter_facts(*one, whole=True)) + b"\n"
            for one in letters_of(stores, chosen, whole=True)
        )
        self._exports += 1
        try:
            while piece := await self._in_thread(partial(_piece, lines)):
                await outlet.send(piece)
        finally:
            self._exports -= 1
            self._thread.submit(lines.close)  # what it has open was opened in that thread

    async def retry(self, request: AdminRequest) -> Response:
        """Answers `/v1/dead/retry`."""
        stores, chosen = self._chosen(request)
        checks = {name: one.settings.record_fault for name, one in self._view.pipelines.items()}
        totals = await self._in_thread(lambda: retry(stores, chosen, checks.__getitem__))
        log.info("dead_letters_marked", letters=totals.marked, by=request.principal)
        return _json(totals._asdict())

    async def purge(self, request: AdminRequest) -> Response:
        """Answers `/v1/dead/purge`."""
        stores, chosen = self._chosen(request)

        def change() -> dict[str, int]:
            there = counted(stores, chosen)
            gone = purge(stores, chosen, there)
            return {"purged": gone, "marked": sum(one.marked for one in there.values())}

        totals = await self._in_thread(change)
        log.info("dead_letters_purged", letters=totals["purged"], by=request.principal)
        return _json(totals)

    def _chosen(self, request: AdminRequest) -> tuple[dict[str, DeadLetters], LetterFilter]:
        """The dead letters that a change is meant for.

        Raises:
            Problem: 400, 404.
        """
        try:
            choice = msgspec.json.decode(request.body, type=LetterChoice)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise Problem(
                problem.BAD_REQUEST, f"the body is not as it should be: {error}"
            ) from None
        asked = {"pipeline": [choice.pipeline], "reason": choice.reasons, "error": [choice.error]}
        asked |= {
            name: [str(value)]
            for name, value in (("since", choice.since), ("until", choice.until))
            if value is not None
        }
        chosen = _filter(asked)._replace(ids=frozenset(choice.ids), limit=choice.limit)
        if chosen.is_open and not choice.all:
            raise Problem(problem.BAD_REQUEST, "a change needs a condition, or all")
        return self._stores(asked), chosen


_COUNTS = {"letters": "count", "bytes": "bytes", "marked": "marked", "incomplete": "incomplete"}


def _json(value: object) -> Response:
    return Response(200, JSON, msgspec.json.encode(value, enc_hook=str) + b"\n")


def _cut(payload: bytes) -> bytes:
    """The shown part of a payload; text is not cut within a character."""
    if len(payload) <= PAYLOAD_BYTES:
        return payload
    text = payload[:PAYLOAD_BYTES].decode(errors="ignore").encode()
    return text if len(text) > PAYLOAD_BYTES - 4 else payload[:PAYLOAD_BYTES]


def _piece(lines: Iterator[bytes]) -> bytes:
    found, size = [], 0
    for line in lines:
        found.append(line)
        size += len(line)
        if size >= PIECE_BYTES:
            break
    return b"".join(found)


def _query(request: AdminRequest, name: str) -> dict[str, list[str]]:
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


def _number(asked: Mapping[str, list[str]], name: str) -> int | None:
    """A parameter that is a number from 1 on; `None` if it is left out.

    Raises:
        Problem: 400.
    """
    texts = asked.get(name, ())
    if not texts:
        return None
    if not (texts[-1].isascii() and texts[-1].isdigit() and 0 < len(texts[-1]) < 19):
        raise Problem(problem.BAD_REQUEST, f"{name} should be a number")
    return max(1, int(texts[-1]))


def _filter(asked: Mapping[str, list[str]]) -> LetterFilter:
    """The filter in parameters.

    Raises:
        Problem: 400.
    """
    reasons = tuple(reason for reason in asked.get("reason", ()) if reason)
    if wrong := [one for one in reasons if one not in REASONS]:
        detail = f"{wrong[0][:40]!r} is no reason; there are {', '.join(REASONS)}"
        raise Problem(problem.BAD_REQUEST, detail)
    ids = frozenset(_number({"id": [one]}, "id") or 0 for one in asked.get("id", ()))
    since, until = (_moment(asked, name) for name in ("since", "until"))
    return LetterFilter(reasons, since, until, ids, error=asked.get("error", [""])[-1])


def _moment(asked: Mapping[str, list[str]], name: str) -> float | None:
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
