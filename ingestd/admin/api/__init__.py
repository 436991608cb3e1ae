"""The API of the admin address, which the console and `ingestd top` are made of.

`operations.py` has each operation with its route and the right that it needs; here is what answers
it. Nothing of it is imported before it is asked for. Dead letters are read and changed as
`ingestd dead` does, in a thread of its own: the event loop never waits for a disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from ingestd.admin.access import Need
from ingestd.admin.connection import AdminPage, StreamedResponse, pieced
from ingestd.admin.operations import (
    LETTERS_MAX,
    OPERATIONS,
    LetterChoice,
    describe,
    filter_in,
    number_in,
    query_of,
)
from ingestd.admin.tap import Taps, read_query
from ingestd.admin.watch import History, Watchers
from ingestd.base.logging import get_logger
from ingestd.base.tasks import OwnThread
from ingestd.http import problem
from ingestd.http.problem import Problem, retry_after
from ingestd.http.response import JSON, Response
from ingestd.http.routing import Resource, path_of
from ingestd.journal.dead_letters import LetterFilter
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
    from collections.abc import Awaitable, Callable, Mapping

    from ingestd.admin.access import AdminAccess
    from ingestd.admin.connection import AdminRequest, Answer, Outlet
    from ingestd.admin.status import AdminView
    from ingestd.journal.dead_letters import DeadLetters
    from ingestd.pipeline import Pipeline

LETTERS = 100
"""The same, if nothing else is asked for."""
PAYLOAD_BYTES = 256 << 10
"""The part of a payload that an answer shows; an export has all of it."""
CALLS_MAX = 16
"""Requests that wait for the thread of dead letters."""
EXPORTS_MAX = 4
"""Exports at one time."""
HIDDEN = (
    "payloads are shown on a loopback address alone, to this machine; admin.payloads may say more"
)

log = get_logger()


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
        self._exports = self._calls = 0

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
        query_of(request, "watch")
        self._watchers.check()
        may_go_on = partial(self._may_read, request)
        return StreamedResponse("text/event-stream", self._watchers.write, may_go_on)

    async def tap(self, request: AdminRequest) -> StreamedResponse:
        """Answers `/v1/tap`."""
        asked = query_of(request, "tap")
        query = read_query(asked, list(self._pipelines(asked)))
        if not self._access().may_tap(request):
            raise Problem(problem.FORBIDDEN, f"{HIDDEN}, with a token of the role admin")
        return self._taps.open(
            query, lambda: self._may_read(request) and self._access().may_tap(request)
        )

    def history(self, request: AdminRequest) -> Response:
        """Answers `/v1/history`."""
        asked = query_of(request, "history")
        return _json(self._history.of(self._pipelines(asked) if asked else None))

    def workers(self, request: AdminRequest) -> Response:
        """Answers `/v1/workers`."""
        found = {}
        for name, one in self._pipelines(query_of(request, "workers")).items():
            found[name] = {
                "executor": one.dispatcher.executor,
                "running": one.dispatcher.running,
                "workers": [each._asdict() for each in one.dispatcher.pool.activity()],
            }
        return _json({"pipelines": found})

    def batches(self, request: AdminRequest) -> Response:
        """Answers `/v1/batches`."""
        asked = query_of(request, "batches")
        limit = number_in(asked, "limit")
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
        query_of(request, "settings")
        rows = self._view.effective_settings()
        named = [{"key": key, "value": value, "origin": origin} for key, value, origin in rows]
        return _json({"settings": named})

    async def pause(self, request: AdminRequest) -> Response:
        """Answers `/v1/pipelines/{pipeline}/pause`."""
        query_of(request, "pause")
        name, pipeline = self._named(request)
        await pipeline.pause()
        log.info("pipeline_paused", pipeline=name, by=request.principal)
        return _json({"pipeline": name, "paused": True})

    async def resume(self, request: AdminRequest) -> Response:
        """Answers `/v1/pipelines/{pipeline}/resume`."""
        query_of(request, "resume")
        name, pipeline = self._named(request)
        await pipeline.resume()
        log.info("pipeline_resumed", pipeline=name, by=request.principal)
        return _json({"pipeline": name, "paused": False})

    def openapi(self, _: AdminRequest) -> Response:
        """Answers `/openapi.json`."""
        return _json(describe())

    def _may_read(self, request: AdminRequest) -> bool:
        return self._access().still_allows(request, Need.READ)

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
                detail = f"there is no pipeline {name[:80]!r}; there are: {', '.join(known)}"
                raise Problem(problem.UNKNOWN_PIPELINE, detail)
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
        """Runs a call in the thread of dead letters.

        Raises:
            Problem: 503; too many wait for it already.
        """
        if self._calls >= CALLS_MAX:
            detail = "too many requests about dead letters wait already"
            raise Problem(problem.BUSY, detail, headers=retry_after(5.0))
        self._calls += 1
        try:
            return await asyncio.wrap_future(self._thread.submit(call))
        finally:
            self._calls -= 1

    async def letters(self, request: AdminRequest) -> Response:
        """Answers `/v1/dead`."""
        asked = query_of(request, "letters")
        stores, chosen = self._stores(asked), filter_in(asked)
        limit = min(number_in(asked, "limit") or LETTERS, LETTERS_MAX)
        before = number_in(asked, "before")
        if before is None:
            before = sys.maxsize
        elif len(stores) > 1:
            raise Problem(problem.BAD_REQUEST, "before needs the pipeline whose numbers it means")

        def read() -> dict[str, Any]:
            found = letters_of(stores, chosen._replace(limit=limit), whole=False, before=before)
            rows = [letter_facts(*one, whole=False) for one in found]
            there = counted(stores, chosen).values()
            totals = {key: sum(getattr(one, key) for one in there) for key in _COUNTS}
            return {"letters": rows, **{_COUNTS[key]: value for key, value in totals.items()}}

        return _json(await self._in_thread(read))

    async def summary(self, request: AdminRequest) -> Response:
        """Answers `/v1/dead/summary`."""
        asked = query_of(request, "summary")
        stores, chosen = self._stores(asked), filter_in(asked)
        rows = await self._in_thread(lambda: summed_up(letters_of(stores, chosen, whole=False)))
        named = [
            {"pipeline": pipeline, "reason": reason, **count._asdict()}
            for pipeline, reason, count in rows
        ]
        return _json({"errors": named})

    async def letter(self, request: AdminRequest) -> Response:
        """Answers `/v1/dead/{id}`."""
        asked = query_of(request, "letter")
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
        asked = query_of(request, "export")
        stores, chosen = self._stores(asked), filter_in(asked)
        if not self._access().shows_payloads(request):
            raise Problem(problem.FORBIDDEN, HIDDEN)
        if self._exports >= EXPORTS_MAX:
            detail = f"{EXPORTS_MAX} exports are going on"
            raise Problem(problem.BUSY, detail, headers=retry_after(10.0))
        headers = {"Content-Disposition": 'attachment; filename="dead-letters.ndjson"'}
        write = partial(self._write_export, stores, chosen)
        return StreamedResponse(
            "application/x-ndjson",
            write,
            lambda: self._may_read(request) and self._access().shows_payloads(request),
            headers,
        )

    async def _write_export(
        self, stores: dict[str, DeadLetters], chosen: LetterFilter, outlet: Outlet
    ) -> None:
        lines = (
            msgspec.json.encode(letter_facts(*one, whole=True)) + b"\n"
            for one in letters_of(stores, chosen, whole=True)
        )
        self._exports += 1
        try:
            # Beside the bound on calls: it would end an export that has begun, and there are few.
            while piece := await asyncio.wrap_future(self._thread.submit(pieced, lines)):
                await outlet.send(piece)
        finally:
            self._exports -= 1
            with contextlib.suppress(RuntimeError):  # the daemon leaves
                self._thread.submit(lines.close)  # what it has open was opened in that thread

    async def retry(self, request: AdminRequest) -> Response:
        """Answers `/v1/dead/retry`."""
        stores, chosen = self._chosen(request, "retry")
        checks = {name: one.settings.record_fault for name, one in self._view.pipelines.items()}
        totals = await self._in_thread(lambda: retry(stores, chosen, checks.__getitem__))
        log.info("dead_letters_marked", letters=totals.marked, by=request.principal)
        return _json(totals._asdict())

    async def purge(self, request: AdminRequest) -> Response:
        """Answers `/v1/dead/purge`."""
        stores, chosen = self._chosen(request, "purge")

        def change() -> dict[str, int]:
            there = counted(stores, chosen)
            gone = purge(stores, chosen, there)
            return {"purged": gone, "marked": sum(one.marked for one in there.values())}

        totals = await self._in_thread(change)
        log.info("dead_letters_purged", letters=totals["purged"], by=request.principal)
        return _json(totals)

    def _chosen(
        self, request: AdminRequest, name: str
    ) -> tuple[dict[str, DeadLetters], LetterFilter]:
        """The dead letters that a change is meant for.

        Raises:
            Problem: 400, 404.
        """
        query_of(request, name)
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
        chosen = filter_in(asked)._replace(ids=frozenset(choice.ids), limit=choice.limit)
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
