"""One request's way, from its head to its answer.

`answer` → `_take` → gate → body → records → `Intake.accept`, below in that order. What a request
may hold and what it gets back is in `docs/HTTP.md`, who may send it in `docs/SECURITY.md`; what
there is to read (`/`, `/openapi.json`) is in `published.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple, cast

import async_timeout
from structlog.contextvars import bind_contextvars, unbind_contextvars

from ingestd.base.append import Append, DeliveryWaiter, scoped
from ingestd.base.errors import Draining
from ingestd.base.logging import get_logger
from ingestd.http import problem
from ingestd.http.admission import AdmissionController
from ingestd.http.body import (
    BLOCK_BYTES,
    ClientGone,
    in_our_words,
    length_of,
    name_encoding,
    read_first,
    read_piece,
    read_whole,
    say_continue,
)
from ingestd.http.deadlines import BodyDeadline
from ingestd.http.peer import peer_of
from ingestd.http.problem import EXPLAINED, Problem, explain
from ingestd.http.protocol import size_of_head
from ingestd.http.response import JSON, PROBLEM, Response, StaticResponse, unless_known
from ingestd.http.routing import WEBHOOKS, Cors, Resource, find, tell_options
from ingestd.sources.http import headers
from ingestd.sources.http.decode import BodyDecoder, BodyFormat, BodyLimits, format_of
from ingestd.sources.http.endpoints.webhooks import check_type
from ingestd.sources.http.headers import (
    IDEMPOTENCY_HEADER,
    NOTHING,
    REPLAYED,
    parse_key,
    parse_prefer,
)
from ingestd.sources.http.headers import PREFER_HEADER as PREFER
from ingestd.sources.http.result import IngestResult, accepted_body, processed_body
from ingestd.sources.http.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from aiohttp import web

    from ingestd.base.append import IdempotencyClaim
    from ingestd.base.record import InvalidRecord
    from ingestd.codecs.lines import Parsed
    from ingestd.http.admission import Reservation
    from ingestd.http.auth import Authenticator, Principal
    from ingestd.http.protocol import Connection
    from ingestd.http.settings import HttpSettings
    from ingestd.sources.base import Intake
    from ingestd.sources.http.endpoints.webhooks import Webhook
    from ingestd.sources.http.headers import Preferences

    OnRequest = Callable[[str, int, float, str], None]
    Resources = Mapping[str, Resource["PipelineRoute | StaticResponse | None"]]

log = get_logger()

HEAD_BYTES_FREE = 8 * 1024
"""A head that takes more counts as held while its request is answered."""

_CLIENT_GONE = 499
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class PipelineRoute(NamedTuple):
    """One pipeline as the door sees it; or a webhook, and the pipeline that it is for."""

    intake: Intake
    bounds: BodyLimits
    webhook: Webhook | None = None
    caller: Principal | None = None


class _Durable(NamedTuple):
    """A request whose records are accepted, and whose client waits for what becomes of them.

    Attributes:
        body: of its 202.
        intake: where they went.
        watch: of these records.
        refused: the first ones of the others, without their payloads.
        invalid: how many others there were.
        prefer: what the client prefers.
    """

    body: bytes
    intake: Intake
    watch: DeliveryWaiter
    refused: list[InvalidRecord]
    invalid: int
    prefer: Preferences


class IngestHandler:
    """Answers requests, one at a time each; on the event loop.

    Args:
        settings: the bounds.
        resources: what can be asked for, by path.
        gate: who may come in.
        on_request: see `HttpSource`.

    Attributes:
        draining: nothing more is taken.
        gate: may be replaced.
    """

    def __init__(
        self,
        settings: HttpSettings,
        resources: Resources,
        gate: Authenticator,
        on_request: OnRequest | None = None,
    ) -> None:
        self.draining = False
        self._settings = settings
        self._resources = resources
        self.gate = gate
        self._on_request = on_request
        self._cors = Cors(settings.cors_origins) if settings.cors_origins else None
        self._room = AdmissionController(
            settings.inflight_bytes_max,
            requests_max=settings.requests_max,
            share=settings.client_share,
            streams_max=settings.streams_max,
        )
        self._bench = BodyDecoder(settings)
        self._loop = asyncio.get_running_loop()
        self._ids = _make_ids()
        self._active = 0
        self._streams: set[Stream] = set()
        self._waiting: dict[DeliveryWaiter, tuple[web.BaseRequest, PipelineRoute]] = {}
        self._quiet: dict[BodyDeadline, tuple[web.BaseRequest, PipelineRoute]] = {}
        self._idle = asyncio.Event()

    def begin_to_drain(self) -> None:
        """From now on requests get 503; streams and waits come to an end."""
        self.draining = True
        for stream in self._streams:
            stream.leave()
        for watch in self._waiting:
            watch.done.set()
        for deadline in self._quiet:
            deadline.end(Draining())

    def look_again(self) -> None:
        """Who may come in has changed: ends what goes on and is not allowed any more."""
        for stream in tuple(self._streams):
            stream.look_again()
        for watch, (request, route) in self._waiting.items():
            try:
                self._allowed(request, route)
            except Problem:
                watch.done.set()  # its records are accepted, and the answer says so
        for deadline, (request, route) in self._quiet.items():
            try:
                self._allowed(request, route)
            except Problem as found:
                deadline.end(found.with_traceback(None))

    def _allowed(self, request: web.BaseRequest, route: PipelineRoute) -> Principal:
        """Who sends a request that was let in before, if that is still so.

        Raises:
            Problem: 401, 403 or 404 if it is not.
        """
        if route.webhook is None:
            return self.gate.identify(request, route.intake.name)
        resource = self._resources.get(f"{WEBHOOKS}/{route.webhook.name}")
        if (
            resource is None
            or not isinstance(resource.what, PipelineRoute)
            or not resource.what.caller
        ):
            raise Problem(problem.NOT_FOUND, "the webhook is there no more")
        return resource.what.caller

    async def drain(self, deadline: float) -> None:
        """Returns when the requests in progress have their answers.

        Args:
            deadline: when it stops waiting for them, in the loop's time.
        """
        if self._active:
            self._idle.clear()
            try:
                async with async_timeout.timeout_at(deadline):
                    await self._idle.wait()
            except TimeoutError:
                log.warning("requests_abandoned", requests=self._active)

    def close(self) -> None:
        """Nobody asks any more."""
        self.draining = True
        self._bench.close()

    # -- the answer ----------------------------------------------------------------------------

    async def answer(self, request: web.BaseRequest) -> Response:
        """Turns whatever becomes of a request into its answer; never raises."""
        started = self._loop.time()
        request_id = self._name(request)
        bind_contextvars(request_id=request_id)  # until the connection's next request
        trace = {}
        if headers.HEADER in request.headers:
            trace = headers.read_trace(request.headers.getall(headers.HEADER))
            bind_contextvars(**trace)
        outcome: IngestResult | StaticResponse | Problem | None
        self._active += 1
        try:
            outcome = await self._take(request)
        except Problem as found:
            log.debug("request_refused", problem=found.kind.slug)
            # Its frames hold the body, and one of them holds it: that would last until the next
            # collection.
            outcome = found.with_traceback(None)
            outcome.__context__ = None
        except EXPLAINED as error:
            outcome = explain(error)
            log.debug("request_refused", problem=outcome.kind.slug)
        except ClientGone:
            log.debug("request_abandoned")
            outcome = None
        except Exception:
            log.exception("request_failed")
            outcome = Problem(problem.INTERNAL, f"see the log for {request_id}")
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()
        answer = self._write(request, request_id, outcome)
        if self._on_request is not None and not isinstance(outcome, StaticResponse):
            resource = self._resources.get(request.raw_path.partition("?")[0])
            status = _CLIENT_GONE if outcome is None else answer.status
            slug = outcome.kind.slug if isinstance(outcome, Problem) else ""
            name = (
                resource.what.intake.name
                if resource and type(resource.what) is PipelineRoute
                else ""
            )
            self._on_request(name, status, self._loop.time() - started, slug)
        if trace:
            unbind_contextvars(*trace)
        return answer

    def _write(
        self,
        request: web.BaseRequest,
        request_id: str,
        outcome: IngestResult | StaticResponse | Problem | None,
    ) -> Response:
        headers = {"X-Request-Id": request_id}
        if self._cors is not None:
            headers.update(self._cors.headers(request.headers.get("Origin", "")))
        if outcome is None:
            outcome = Problem(problem.BAD_REQUEST, "the body is not complete")
        headers.update(outcome.headers)
        close = self.draining or not self._settings.keepalive_timeout
        if isinstance(outcome, IngestResult):
            status, kind, body = outcome.status, JSON, outcome.body
        else:
            # A body that is not wanted is not waited for.
            close = close or not request.content.is_eof()
            if isinstance(outcome, StaticResponse):
                status, kind, body = outcome.status, outcome.content_type, outcome.body
            else:
                status, kind, body = outcome.kind.status, PROBLEM, outcome.body()
                close = close or outcome.kind.closes
        timeout = self._settings.body_timeout
        return Response(status, kind, body, headers=headers, close=close, write_timeout=timeout)

    def _name(self, request: web.BaseRequest) -> str:
        """The client's id for the request if it is a decent one, else one of our own."""
        given = request.headers.get("X-Request-Id")
        if given is not None and _REQUEST_ID.fullmatch(given):
            return given
        return next(self._ids)

    # -- the request ---------------------------------------------------------------------------

    async def _take(self, request: web.BaseRequest) -> IngestResult | StaticResponse:
        """Everything that can be refused without the body; then the body; then its records."""
        resource = find(self._resources, request.method, request.raw_path)
        route, headers = resource.what, request.headers
        if request.method == "OPTIONS":
            return StaticResponse(204, headers=tell_options(resource, headers, self._cors))
        if isinstance(route, StaticResponse):
            self.gate.check_host(request)
            return unless_known(route, headers.get("If-None-Match", ""))
        if self.draining:
            raise explain(Draining())
        if route is None:
            raise self.gate.explain_unknown(request)
        caller = route.caller or self.gate.admit(request, route.intake.name)
        with self._room.enter(caller.name or peer_of(request)) as hold:
            if (head := size_of_head(request.raw_headers)) > HEAD_BYTES_FREE:
                hold.add_base(head)
            taken = await self._take_body(request, route, caller, hold)
            # Nothing holds the body any more, however long this takes.
            return await self._wait(request, route, taken) if isinstance(taken, _Durable) else taken

    async def _take_body(
        self, request: web.BaseRequest, route: PipelineRoute, caller: Principal, hold: Reservation
    ) -> IngestResult | _Durable:
        headers, settings = request.headers, self._settings
        content_type = headers.get("Content-Type", "")
        reading = _reading(route, content_type)
        encoding = name_encoding(headers.getall("Content-Encoding", ()))
        length = length_of(request, settings)
        key = None
        if IDEMPOTENCY_HEADER in headers and route.webhook is None:
            key = scoped(caller.principal, parse_key(headers.getall(IDEMPOTENCY_HEADER)))
        prefer = NOTHING
        if PREFER in headers:
            prefer = parse_prefer(headers.getall(PREFER), settings.wait_max)
        hold.expect(length or 0)
        if "Expect" in headers:
            say_continue(request)
        streams = length is None and reading is BodyFormat.LINES and key is None
        if streams and not prefer.strict and hold.begin_stream():
            try:
                first = await self._first_bytes(request, route)
                wire, ended = await read_first(
                    request, hold, settings, encoding=encoding, first=first
                )
                if not ended:
                    return await self._stream(
                        request, route, caller, hold, encoding=encoding, begun=wire
                    )
            finally:
                hold.end_stream()
        else:
            wire = await read_whole(request, hold, settings)
        fingerprint = b""
        if route.webhook is not None:
            key, fingerprint = await self._bench.verify(route.webhook, request, wire)
        elif key is not None:
            fingerprint = await self._bench.fingerprint(wire, content_type, encoding)
        # Claimed only now: a connection that died in the middle of a body must not keep the next
        # try of the same request waiting.
        claim = None if key is None else await route.intake.begin(key, fingerprint)
        if isinstance(claim, bytes):
            return IngestResult(claim, headers=REPLAYED)
        try:
            parsed = await self._bench.parse(
                wire, hold, encoding=encoding, reading=reading, form=route.intake.format,
                bounds=route.bounds,
            )  # fmt: skip
            del wire
            caller.charge(parsed.total, len(parsed.records.payload))
            return await self._accept(parsed, route, prefer, hold, claim)
        finally:
            if claim is not None:
                route.intake.forget(claim)

    async def _accept(
        self,
        parsed: Parsed,
        route: PipelineRoute,
        prefer: Preferences,
        hold: Reservation,
        claim: IdempotencyClaim | None,
    ) -> IngestResult | _Durable:
        """Makes records durable."""
        if prefer.strict and parsed.refused:
            detail = f"{parsed.invalid} of {parsed.total} records; nothing was stored"
            raise Problem(problem.NOT_STRICT, detail, refused=parsed.refused)
        body = accepted_body(parsed)
        if claim is not None:
            claim.answer = body
        kept = parsed.refused[: route.bounds.invalid_kept]
        watch = DeliveryWaiter(parsed.records.count) if prefer.wait else None
        try:
            await route.intake.accept(
                Append(
                    parsed.records,
                    kept,
                    claim=claim,
                    waiter=watch,
                    principal=hold.client,
                    unkept=parsed.invalid - len(kept),
                )
            )
        except BaseException:
            if watch is not None:
                route.intake.stop_waiting(watch)
            raise
        if watch is None:
            return IngestResult(body, headers=prefer.applied())
        hold.give_back()
        told = [one._replace(payload=b"") for one in parsed.refused]
        return _Durable(body, route.intake, watch, told, parsed.invalid, prefer)

    async def _wait(
        self, request: web.BaseRequest, route: PipelineRoute, durable: _Durable
    ) -> IngestResult:
        """Until all records have their outcome, the time is up, or nobody is there to be told."""
        watch, prefer = durable.watch, durable.prefer
        connection = cast("Connection", request.protocol)
        self._waiting[watch] = request, route
        try:
            with connection.at_end(watch.done.set):
                async with async_timeout.timeout(prefer.wait):
                    await watch.done.wait()
        except TimeoutError:
            pass
        finally:
            del self._waiting[watch]
            durable.intake.stop_waiting(watch)
        if watch.left:
            return IngestResult(durable.body, headers=prefer.applied())
        return IngestResult(
            processed_body(durable.refused, durable.invalid, watch), 200, prefer.applied()
        )

    async def _first_bytes(self, request: web.BaseRequest, route: PipelineRoute) -> bytes:
        """What comes first of a body that may be a stream; nothing if that is its end.

        The first line of a stream may come as late as any other.
        """
        silence = self._settings.stream_silence_max
        detail = f"nothing came for http.stream_silence_max = {silence:g} s"
        deadline = BodyDeadline(
            self._loop, request.content, lambda: 0, timeout=silence, rate_min=0, detail=detail
        )
        self._quiet[deadline] = request, route
        try:
            with in_our_words(request), deadline:
                return await request.content.read(BLOCK_BYTES)
        finally:
            del self._quiet[deadline]

    async def _stream(
        self,
        request: web.BaseRequest,
        route: PipelineRoute,
        caller: Principal,
        hold: Reservation,
        *,
        encoding: str,
        begun: bytes,
    ) -> IngestResult:
        """A body that goes on: its pieces are accepted one by one."""
        connection = cast("Connection", request.protocol)

        async def read() -> tuple[bytes, bool]:
            with in_our_words(request), BytesIO() as sink:
                ended = await read_piece(request.content, sink, stream.grow)
                return sink.getvalue(), ended

        stream = Stream(
            read,
            route.intake,
            caller,
            hold,
            self._bench.stream_thread,
            invalid_kept=self._settings.invalid_kept,
            encoding=encoding,
            ratio_max=self._settings.inflate_ratio_max,
            silence=self._settings.stream_silence_max,
            gone=lambda: request.transport is None or connection.half_closed,
            allowed=lambda: self._allowed(request, route),
        )
        self._streams.add(stream)
        try:
            return IngestResult(await stream.run(begun))
        finally:
            self._streams.discard(stream)


def _reading(route: PipelineRoute, content_type: str) -> BodyFormat:
    """How the records lie in a body. A delivery is one record, whatever is in it."""
    if route.webhook is None:
        return format_of(content_type, route.intake.format)
    check_type(content_type)
    return BodyFormat.VALUE


def _make_ids() -> Iterator[str]:
    """Ids that no other process makes: a random part once, then a number."""
    prefix = secrets.token_hex(6)
    return (f"{prefix}-{number:x}" for number in itertools.count(1))
