"""The source `http`: `POST /v1/records` and `POST /v1/records/{pipeline}`.

The way of a request is `_answer` → `_take` → `_read` → `_parse` → `Intake.accept`, below in that
order. What it may send and what it gets back is in `docs/HTTP.md`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

import async_timeout
import structlog
from aiohttp import ClientPayloadError, HttpVersion11
from aiohttp.web_protocol import RequestPayloadError
from structlog.contextvars import bind_contextvars

from ingestd.base.address import split_address
from ingestd.base.errors import (
    AddressError,
    Draining,
)
from ingestd.base.passed import show_socket
from ingestd.base.watch import Watch
from ingestd.sources.http import problem
from ingestd.sources.http.access import check_exposure, read_access
from ingestd.sources.http.answer import JSON, PROBLEM, Answer
from ingestd.sources.http.body import Bounds, Reading, parse_body, reading_of
from ingestd.sources.http.encoding import inflate, name_encoding
from ingestd.sources.http.gate import Caller, Gate
from ingestd.sources.http.idempotency import HEADER, REPLAYED, parse_key, take_fingerprint
from ingestd.sources.http.listener import Listener, bind
from ingestd.sources.http.peer import peer_of
from ingestd.sources.http.prefer import HEADER as PREFER
from ingestd.sources.http.prefer import NOTHING, parse_prefer
from ingestd.sources.http.problem import EXPLAINED, Problem, explain
from ingestd.sources.http.room import Room
from ingestd.sources.http.server import Server
from ingestd.sources.http.stream import HELD_BYTES, Stream, read_piece
from ingestd.sources.http.taken import Taken, accepted_body, processed_body
from ingestd.sources.http.webhooks import Webhook, check_type

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from aiohttp import web

    from ingestd.base.once import Claim
    from ingestd.base.settings import HttpSettings
    from ingestd.sources.http.access import Access
    from ingestd.sources.http.prefer import Preferences
    from ingestd.sources.http.room import Hold
    from ingestd.sources.http.webhooks import Delivery
    from ingestd.sources.intake import Intake
    from ingestd.sources.lines import Parsed

    OnRequest = Callable[[str, int, float, str], None]

log = structlog.get_logger(__name__)

THREAD_BYTES = 1024 * 1024
"""From this size on a body is parsed in a thread. Checking 1 MiB of JSON lines takes 1 to 2 ms,
and going to a thread and back about 0.1 ms, with the interpreter's lock shared either way."""

_THREADS = 2
_BACKLOG = 1024
_ROOT = "/v1/records"
_WEBHOOKS = "/v1/webhooks"
_CLIENT_GONE = 499
_SHUTDOWN_SECONDS = 1.0
_HEAR_SECONDS = 1.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class _Route(NamedTuple):
    """One pipeline as the door sees it; or a webhook, and the pipeline that it is for."""

    intake: Intake
    bounds: Bounds
    webhook: Webhook | None = None
    caller: Caller | None = None


class HttpSource:
    """The server for records.

    Args:
        settings: its address and its bounds.
        intakes: the pipelines by name.
        default: the one that `POST /v1/records` means.
        on_request: called for each answer with the pipeline (empty if it is not known), the
            status (499 if the client left), the seconds since the head was read, and the slug of
            the problem (empty if there was none).
        sockets: listening ones to serve on, instead of on one of its own at `http.listen`.

    Attributes:
        addresses: where it listens, after `start`; `HOST:PORT` with the real port, `unix:PATH`.

    Raises:
        ConfigError: a file with tokens, secrets or certificates is not what it should be.
    """

    def __init__(
        self,
        settings: HttpSettings,
        intakes: Mapping[str, Intake],
        *,
        default: str,
        on_request: OnRequest | None = None,
        sockets: Sequence[socket.socket] = (),
    ) -> None:
        self._settings = settings
        self._default = default
        self._sockets = list(sockets)
        self._routes: dict[str, _Route] = {}
        for name, intake in intakes.items():
            bounds = Bounds(settings.records_max, intake.record_bytes_max)
            self._routes[f"{_ROOT}/{name}"] = _Route(intake, bounds)
        self._routes[_ROOT] = self._routes[f"{_ROOT}/{default}"]
        check_exposure(settings, self._sockets)
        access = read_access(settings)
        self._gate = Gate(settings, access)
        _tell(access)
        self._routes.update(self._webhook_routes(settings, access))
        self._on_request = on_request
        self._room = Room(
            settings.inflight_bytes_max,
            requests_max=settings.requests_max,
            share=settings.client_share,
        )
        self._ids = _make_ids()
        self._draining = False
        self._active = 0
        self._streams: set[Stream] = set()
        self._waiting: set[Watch] = set()
        self._idle = asyncio.Event()
        self.addresses: list[str] = []

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listens.

        Raises:
            AddressError: it can't, and why.
        """
        settings = self._settings
        self._loop = asyncio.get_running_loop()
        self._server = Server(
            self._answer,
            connections_max=settings.connections_max,
            keepalive_timeout=settings.keepalive_timeout,
        )
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="http-body")
        try:
            sockets = self._sockets or await bind(*split_address(settings.listen), _BACKLOG)
        except (OSError, ValueError) as error:
            self._threads.shutdown()
            what = getattr(error, "strerror", None) or str(error)
            raise AddressError(
                address=settings.listen, setting="http.listen", problem=what
            ) from error
        self._listener = Listener(self._server, sockets, self._gate.access.context)
        self.addresses = [show_socket(sock) for sock in sockets]

    def _webhook_routes(self, settings: HttpSettings, access: Access) -> dict[str, _Route]:
        routes = {}
        for name, webhook in settings.webhooks.items():
            to = self._routes[f"{_ROOT}/{webhook.pipeline or self._default}"]
            routes[f"{_WEBHOOKS}/{name}"] = to._replace(
                webhook=Webhook(name, webhook, access.webhooks[name]),
                caller=Caller(f"webhook {name}"),
            )
        return routes

    async def prepare(self, settings: HttpSettings) -> Callable[[], None]:
        """Reads tokens, secrets and certificates anew, and changes nothing yet.

        Args:
            settings: of them the tables of who may come in count; the rest is as at the start.

        Returns:
            What makes it so: connections stay, and none is refused.

        Raises:
            ConfigError: something is wrong with them.
        """
        check_exposure(settings, self._sockets)
        access: Access = await self._loop.run_in_executor(None, read_access, settings)

        def change() -> None:
            _tell(access)
            self._gate = Gate(settings, access, before=self._gate)
            mine = {key: route for key, route in self._routes.items() if route.webhook is None}
            self._routes = {**mine, **self._webhook_routes(settings, access)}
            self._listener.context = access.context

        return change

    async def reload(self, settings: HttpSettings | None = None) -> None:
        """Prepares and changes; with the settings of the start if there are no others."""
        (await self.prepare(settings or self._settings))()

    async def wait_finished(self) -> None:
        """Never returns: a server has no end of input."""
        await self._loop.create_future()

    async def stop_taking(self, deadline: float) -> None:
        """New requests get 503, new connections are refused; those in progress are finished.

        Args:
            deadline: when it stops waiting for them, in the loop's time.
        """
        self._draining = True
        self._listener.close()
        for stream in self._streams:
            stream.leave()
        for watch in self._waiting:
            watch.done.set()
        # Who was let in before the door was closed gets an answer, too.
        await self._server.hear_out(min(_HEAR_SECONDS, deadline - self._loop.time()))
        if self._active:
            self._idle.clear()
            try:
                async with async_timeout.timeout_at(deadline):
                    await self._idle.wait()
            except TimeoutError:
                log.warning("requests_abandoned", requests=self._active)

    async def close(self) -> None:
        """Closes every connection. A request that is still in progress gets no answer."""
        self._draining = True
        self._listener.close()
        await self._listener.wait_closed()  # or a handshake would end as one more connection
        await self._server.close(_SHUTDOWN_SECONDS)
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -- one request ---------------------------------------------------------------------------

    async def _answer(self, request: web.BaseRequest) -> Answer:
        """Turns whatever becomes of a request into its answer."""
        started = self._loop.time()
        request_id = self._name(request)
        bind_contextvars(request_id=request_id)
        outcome: Taken | Problem | None
        self._active += 1
        try:
            outcome = await self._take(request)
        except Problem as found:
            outcome = found
        except EXPLAINED as error:
            outcome = explain(error)
        except _ClientGone:
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
        if self._on_request is not None:
            route = self._routes.get(request.raw_path.partition("?")[0])
            status = _CLIENT_GONE if outcome is None else answer.status
            slug = outcome.kind.slug if isinstance(outcome, Problem) else ""
            name = route.intake.name if route else ""
            self._on_request(name, status, self._loop.time() - started, slug)
        return answer

    def _write(
        self, request: web.BaseRequest, request_id: str, outcome: Taken | Problem | None
    ) -> Answer:
        headers = {"X-Request-Id": request_id}
        close = self._draining or not self._settings.keepalive_timeout
        timeout = self._settings.body_timeout
        if isinstance(outcome, Taken):
            headers.update(outcome.headers)
            return Answer(
                outcome.status,
                JSON,
                outcome.body,
                headers=headers,
                close=close,
                write_timeout=timeout,
            )
        if outcome is None:
            outcome = Problem(problem.BAD_REQUEST, "the body is not complete")
        headers.update(outcome.headers)
        # A body that is not wanted is not waited for.
        close = close or outcome.kind.closes or not request.content.is_eof()
        return Answer(
            outcome.kind.status,
            PROBLEM,
            outcome.body(),
            headers=headers,
            close=close,
            write_timeout=timeout,
        )

    async def _take(self, request: web.BaseRequest) -> Taken:
        """Everything that can be refused without the body; then the body; then its records."""
        if self._draining:
            raise explain(Draining())
        route = self._find(request)
        caller = route.caller or self._gate.admit(request, route.intake.name)
        headers = request.headers
        content_type = headers.get("Content-Type", "")
        reading = _reading(route, content_type)
        encoding = name_encoding(headers.getall("Content-Encoding", ()))
        length = self._check_length(request)
        key = None
        if HEADER in headers and route.webhook is None:
            key = parse_key(headers.getall(HEADER))
        prefer = NOTHING
        if PREFER in headers:
            prefer = parse_prefer(headers.getall(PREFER), self._settings.wait_max)
        with self._room.enter(caller.name or peer_of(request)) as hold:
            hold.grow(length or 0)
            if "Expect" in headers:
                _say_continue(request)
            streams = length is None and reading is Reading.LINES and key is None
            if streams and not prefer.strict and len(self._streams) < self._settings.streams_max:
                wire, ended = await self._begin(request, hold, encoding)
                if not ended:
                    return await self._stream(
                        request, route.intake, caller, hold, encoding=encoding, begun=wire
                    )
            else:
                wire = await self._read(request, hold, counted=length is not None)
            fingerprint = b""
            if route.webhook is not None:
                key, fingerprint = await self._verify(route.webhook, request, wire)
            if key is None:
                parsed = await self._parse(wire, encoding, reading, route, hold)
                del wire
                caller.charge(parsed.total, len(parsed.records.payload))
                return await self._accept(parsed, route.intake, prefer, hold)
            # Claimed only now: a connection that died in the middle of a body must not keep the
            # next try of the same request waiting.
            fingerprint = fingerprint or await self._fingerprint(wire, content_type, encoding)
            claim = await route.intake.begin(key, fingerprint)
            if isinstance(claim, bytes):
                return Taken(claim, headers=REPLAYED)
            try:
                parsed = await self._parse(wire, encoding, reading, route, hold)
                del wire
                caller.charge(parsed.total, len(parsed.records.payload))
                claim.answer = accepted_body(parsed)
                return await self._accept(parsed, route.intake, prefer, hold, claim)
            finally:
                route.intake.forget(claim)

    async def _accept(
        self,
        parsed: Parsed,
        intake: Intake,
        prefer: Preferences,
        hold: Hold,
        claim: Claim | None = None,
    ) -> Taken:
        """Makes records durable, and waits for what becomes of them where that is preferred."""
        if prefer.strict and parsed.refused:
            detail = f"{len(parsed.refused)} of {parsed.total} records; nothing was stored"
            raise Problem(problem.NOT_STRICT, detail, refused=parsed.refused)
        if not prefer.wait:
            await intake.accept(parsed.records, parsed.refused, claim)
            return Taken(accepted_body(parsed), headers=prefer.applied())
        watch = Watch(parsed.records.count)
        try:
            await intake.accept(parsed.records, parsed.refused, claim, watch)
            hold.give_back()
            await self._wait(watch, prefer.wait)
        finally:
            intake.unwatch(watch)
        if watch.left:
            return Taken(accepted_body(parsed), headers=prefer.applied())
        return Taken(processed_body(parsed, watch), 200, prefer.applied())

    async def _wait(self, watch: Watch, seconds: float) -> None:
        """Until all of its records have their outcome, the time is up, or the daemon drains."""
        self._waiting.add(watch)
        try:
            async with async_timeout.timeout(seconds):
                await watch.done.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting.discard(watch)

    async def _stream(
        self,
        request: web.BaseRequest,
        intake: Intake,
        caller: Caller,
        hold: Hold,
        *,
        encoding: str,
        begun: bytes,
    ) -> Taken:
        """A body that goes on: its pieces are accepted one by one."""
        hold.give_back()
        hold.grow(HELD_BYTES)

        async def read() -> tuple[bytes, bool]:
            with self._reading(request):
                return await read_piece(request.content)

        stream = Stream(
            read,
            intake,
            caller,
            encoding=encoding,
            silence=self._settings.stream_silence_max,
            gone=lambda: request.transport is None,
        )
        self._streams.add(stream)
        try:
            return Taken(await stream.run(begun))
        finally:
            self._streams.discard(stream)

    def _find(self, request: web.BaseRequest) -> _Route:
        path = request.raw_path
        route = self._routes.get(path)
        if route is None:
            path = request.path if path[:1] != "/" else path.partition("?")[0]
            route = self._routes.get(path)
        if route is None and not path.startswith(f"{_ROOT}/"):
            raise Problem(problem.NOT_FOUND, f"records go to {_ROOT} or {_ROOT}/{{pipeline}}")
        # Before it is said whether the pipeline exists: that is not for everybody.
        if request.method != "POST":
            raise Problem(problem.METHOD, "use POST", headers={"Allow": "POST"})
        if route is None:
            raise self._gate.explain_unknown(request)
        return route

    def _check_length(self, request: web.BaseRequest) -> int | None:
        """The body's length on the wire, if the client says it."""
        length = request.content_length
        if length is None:
            if "Transfer-Encoding" not in request.headers:
                raise Problem(problem.NO_LENGTH, "send Content-Length, or chunked")
        elif length > self._settings.wire_bytes_max:
            raise self._too_large()
        return length

    async def _begin(
        self, request: web.BaseRequest, hold: Hold, encoding: str
    ) -> tuple[bytes, bool]:
        """A body of unknown length as far as its first lines, and whether that is all of it."""
        sink = BytesIO()
        with self._reading(request):
            async with async_timeout.timeout(self._settings.body_timeout):
                while True:
                    piece, ended = await read_piece(request.content)
                    sink.write(piece)
                    goes_on = not ended and (encoding != "identity" or b"\n" in piece)
                    # What goes on has no bound as a whole: only what is held at a time counts.
                    self._count(len(piece), 0 if goes_on else sink.tell(), hold)
                    if ended or goes_on:
                        return sink.getvalue(), ended

    async def _read(self, request: web.BaseRequest, hold: Hold, *, counted: bool) -> bytes:
        """The body as it came."""
        content = request.content
        with self._reading(request):
            if content.is_eof():  # all of it came with the head
                body = content.read_nowait()
                if not counted:
                    self._count(len(body), len(body), hold)
                return body
            sink = BytesIO()
            async with async_timeout.timeout(self._settings.body_timeout):
                while block := await content.readany():
                    sink.write(block)
                    if not counted:
                        self._count(len(block), sink.tell(), hold)
            return sink.getvalue()

    @contextlib.contextmanager
    def _reading(self, request: web.BaseRequest) -> Iterator[None]:
        """What can go wrong with a body that comes, in our words."""
        try:
            yield
        except TimeoutError:
            detail = f"not complete after http.body_timeout = {self._settings.body_timeout:g} s"
            raise Problem(problem.TIMEOUT, detail) from None
        except (RequestPayloadError, ClientPayloadError, OSError, RuntimeError):
            # RuntimeError: aiohttp's word for reading on a connection that has just gone.
            if request.transport is None:
                raise _ClientGone from None
            raise Problem(problem.BAD_REQUEST, "the body's framing is broken") from None

    def _count(self, more: int, total: int, hold: Hold) -> None:
        if total > self._settings.wire_bytes_max:
            raise self._too_large()
        hold.grow(more)

    def _too_large(self) -> Problem:
        detail = f"more than http.wire_bytes_max = {self._settings.wire_bytes_max}"
        return Problem(problem.BODY_TOO_LARGE, detail)

    async def _parse(
        self, wire: bytes, encoding: str, reading: Reading, route: _Route, hold: Hold
    ) -> Parsed:
        """The records of a body; what takes long is done in a thread."""
        form, bounds = route.intake.format, route.bounds
        if encoding == "identity" or not wire:
            if len(wire) < THREAD_BYTES:
                return parse_body(wire, reading, form, bounds)
            return await self._loop.run_in_executor(
                self._threads, parse_body, wire, reading, form, bounds
            )
        sink = BytesIO()

        def take(piece: bytes) -> None:
            hold.grow(len(piece))
            sink.write(piece)

        steps = inflate(encoding, self._settings.body_bytes_max, wire, take)

        def finish() -> Parsed:
            for _ in steps:
                pass
            return parse_body(sink.getvalue(), reading, form, bounds)

        if len(wire) < THREAD_BYTES and _is_short(steps):
            return finish()
        return await self._loop.run_in_executor(self._threads, finish)

    async def _verify(self, webhook: Webhook, request: web.BaseRequest, wire: bytes) -> Delivery:
        if len(wire) < THREAD_BYTES:
            return webhook.check(request.headers, wire, time.time())
        return await self._loop.run_in_executor(
            self._threads, webhook.check, request.headers, wire, time.time()
        )

    async def _fingerprint(self, wire: bytes, content_type: str, encoding: str) -> bytes:
        if len(wire) < THREAD_BYTES:
            return take_fingerprint(wire, content_type, encoding)
        return await self._loop.run_in_executor(
            self._threads, take_fingerprint, wire, content_type, encoding
        )

    def _name(self, request: web.BaseRequest) -> str:
        """The client's id for the request if it is a decent one, else one of our own."""
        given = request.headers.get("X-Request-Id")
        if given is not None and _REQUEST_ID.fullmatch(given):
            return given
        return next(self._ids)


class _ClientGone(Exception):  # noqa: N818 - nobody's error
    """The client went away in the middle of its body."""


def _tell(access: Access) -> None:
    for doubt in access.doubts:
        log.warning("certificate_doubtful", problem=doubt)


def _reading(route: _Route, content_type: str) -> Reading:
    """How the records lie in a body. A delivery is one record, whatever is in it."""
    if route.webhook is None:
        return reading_of(content_type, route.intake.format)
    check_type(content_type)
    return Reading.VALUE


def _is_short(steps: Iterator[None]) -> bool:
    """Whether one step is all of it: most bodies are, and need no thread."""
    next(steps, None)
    return next(steps, steps) is steps


def _say_continue(request: web.BaseRequest) -> None:
    """Tells a client that waits for it to send its body."""
    if request.headers["Expect"].strip().lower() != "100-continue":
        raise Problem(problem.EXPECTATION, "only 100-continue can be expected")
    transport = request.transport
    if request.version == HttpVersion11 and transport is not None:
        transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _make_ids() -> Iterator[str]:
    """Ids that no other process makes: a random part once, then a number."""
    prefix = secrets.token_hex(6)
    return (f"{prefix}-{number:x}" for number in itertools.count(1))
