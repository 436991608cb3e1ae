"""The source `http`: `POST /v1/records` and `POST /v1/records/{pipeline}`.

The way of a request is `_answer` → `_take` → `_read` → `_parse` → `Intake.accept`, below in that
order. What it may send and what it gets back is in `docs/HTTP.md`.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

import async_timeout
import msgspec
import structlog
from aiohttp import ClientPayloadError, HttpVersion11
from aiohttp.web_protocol import RequestPayloadError
from structlog.contextvars import bind_contextvars

from ingestd.base.address import show_address, split_address
from ingestd.base.errors import (
    AddressError,
    Draining,
    JournalFailed,
    KeyInFlight,
    KeyReused,
    Overloaded,
)
from ingestd.sources.http import problem
from ingestd.sources.http.answer import JSON, PROBLEM, Answer
from ingestd.sources.http.body import Bounds, parse_body, parse_quickly, reading_of
from ingestd.sources.http.deadline import Deadline, Late
from ingestd.sources.http.encoding import inflate, inflate_short, name_encoding
from ingestd.sources.http.idempotency import HEADER, REPLAYED, Replayed, parse_key, take_fingerprint
from ingestd.sources.http.problem import Problem, explain, list_errors
from ingestd.sources.http.room import Room
from ingestd.sources.http.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from aiohttp import web
    from aiohttp.streams import StreamReader

    from ingestd.base.settings import HttpSettings
    from ingestd.sources.http.body import Reading
    from ingestd.sources.http.room import Hold
    from ingestd.sources.intake import Intake
    from ingestd.sources.lines import Parsed

    OnRequest = Callable[[str, int, float, str], None]

log = structlog.get_logger(__name__)

THREAD_BYTES = 256 * 1024
"""From this size on a body is parsed in a thread. Checking 256 KiB of good JSON lines takes 0.3 ms,
or 10 ms if they have two bytes each, and going to a thread and back about 0.1 ms, with the
interpreter's lock shared either way."""

LARGE_BYTES = 4 * 1024 * 1024
"""Such bodies, and compressed ones that are not short, are parsed one at a time: what they need
beside themselves is as large as they are, and others have a thread where they do not wait for them.
"""

_BACKLOG = 1024
_ROOT = "/v1/records"
_CLIENT_GONE = 499
_SHUTDOWN_SECONDS = 1.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class _Route(NamedTuple):
    """One pipeline as the door sees it."""

    intake: Intake
    bounds: Bounds


class HttpSource:
    """The server for records.

    Args:
        settings: its address and its bounds.
        intakes: the pipelines by name.
        default: the one that `POST /v1/records` means.
        on_request: called for each answer with the pipeline (empty if it is not known), the
            status (499 if the client left), the seconds since the head was read, and the slug of
            the problem (empty if there was none).

    Attributes:
        addresses: where it listens, after `start`; `HOST:PORT` with the real port.
    """

    def __init__(
        self,
        settings: HttpSettings,
        intakes: Mapping[str, Intake],
        *,
        default: str,
        on_request: OnRequest | None = None,
    ) -> None:
        self._settings = settings
        self._routes: dict[str, _Route] = {}
        for name, intake in intakes.items():
            bounds = Bounds(settings.records_max, intake.record_bytes_max, intake.json_depth_max)
            self._routes[f"{_ROOT}/{name}"] = _Route(intake, bounds)
        self._routes[_ROOT] = self._routes[f"{_ROOT}/{default}"]
        self._on_request = on_request
        self._room = Room(
            settings.inflight_bytes_max,
            requests_max=settings.requests_max,
            share=settings.client_share,
        )
        self._ids = _make_ids()
        self._draining = False
        self._active = 0
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
            per_client_max=settings.connections_per_client_max,
            head_timeout=settings.head_timeout,
            keepalive_timeout=settings.keepalive_timeout,
        )
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="http-body")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="http-large")
        try:
            host, port = split_address(settings.listen)
            self._listener = await self._loop.create_server(
                self._server, host or None, port, backlog=_BACKLOG, reuse_address=True
            )
        except (OSError, ValueError) as error:
            self._threads.shutdown()
            self._large.shutdown()
            what = getattr(error, "strerror", None) or str(error)
            raise AddressError(
                address=settings.listen, setting="http.listen", problem=what
            ) from error
        self.addresses = [show_address(*sock.getsockname()[:2]) for sock in self._listener.sockets]

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
        await self._server.close(_SHUTDOWN_SECONDS)
        await self._listener.wait_closed()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._large.shutdown(wait=False, cancel_futures=True)

    # -- one request ---------------------------------------------------------------------------

    async def _answer(self, request: web.BaseRequest) -> Answer:
        """Turns whatever becomes of a request into its answer."""
        started = self._loop.time()
        request_id = self._name(request)
        bind_contextvars(request_id=request_id)
        outcome: bytes | Problem | None
        self._active += 1
        try:
            outcome = await self._take(request)
        except Problem as found:
            # Its frames hold the body, and one of them holds it: that would last until the next
            # collection.
            outcome = found.with_traceback(None)
            outcome.__context__ = None
        except (Overloaded, Draining, JournalFailed, KeyInFlight, KeyReused) as error:
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
        self, request: web.BaseRequest, request_id: str, outcome: bytes | Problem | None
    ) -> Answer:
        headers = {"X-Request-Id": request_id}
        close = self._draining or not self._settings.keepalive_timeout
        timeout = self._settings.body_timeout
        if isinstance(outcome, bytes):
            if type(outcome) is Replayed:
                headers.update(REPLAYED)
            return Answer(202, JSON, outcome, headers=headers, close=close, write_timeout=timeout)
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

    async def _take(self, request: web.BaseRequest) -> bytes:
        """Everything that can be refused without the body; then the body; then its records."""
        if self._draining:
            raise explain(Draining())
        route = self._find(request)
        headers = request.headers
        content_type = headers.get("Content-Type", "")
        reading = reading_of(content_type, route.intake.format)
        encoding = name_encoding(headers.getall("Content-Encoding", ()))
        length = self._check_length(request)
        key = parse_key(headers.getall(HEADER)) if HEADER in headers else None
        with self._room.enter(request.remote or "") as hold:
            hold.expect(length or 0)
            if "Expect" in headers:
                _say_continue(request)
            wire = await self._read(request, hold)
            if key is None:
                parsed = await self._parse(wire, encoding, reading, route, hold)
                del wire
                await route.intake.accept(parsed.records, parsed.refused)
                return _accepted(parsed)
            # Claimed only now: a connection that died in the middle of a body must not keep the
            # next try of the same request waiting.
            fingerprint = await self._fingerprint(wire, content_type, encoding)
            claim = await route.intake.begin(key, fingerprint)
            if isinstance(claim, bytes):
                return Replayed(claim)
            try:
                parsed = await self._parse(wire, encoding, reading, route, hold)
                del wire
                claim.answer = _accepted(parsed)
                await route.intake.accept(parsed.records, parsed.refused, claim)
            finally:
                route.intake.forget(claim)
            return claim.answer

    def _find(self, request: web.BaseRequest) -> _Route:
        path = request.raw_path
        route = self._routes.get(path)
        if route is None:
            path = request.path if path[:1] != "/" else path.partition("?")[0]
            route = self._routes.get(path)
        if route is None:
            if path.startswith(f"{_ROOT}/"):
                raise Problem(problem.UNKNOWN_PIPELINE, "no pipeline has this name")
            raise Problem(problem.NOT_FOUND, f"records go to {_ROOT} or {_ROOT}/{{pipeline}}")
        if request.method != "POST":
            raise Problem(problem.METHOD, "use POST", headers={"Allow": "POST"})
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

    async def _read(self, request: web.BaseRequest, hold: Hold) -> bytes:
        """The body as it came."""
        content = request.content
        try:
            if content.is_eof():  # all of it came with the head
                body = content.read_nowait()
                self._count(len(body), hold)
                return body
            # Closed in any case: an error keeps this frame until the next collection.
            with BytesIO() as sink:
                await self._read_all(content, sink, hold)
                return sink.getvalue()
        except Late as late:
            raise Problem(problem.TIMEOUT, str(late)) from None
        except (RequestPayloadError, ClientPayloadError, OSError, RuntimeError):
            # RuntimeError: aiohttp's word for reading on a connection that has just gone.
            if request.transport is None:
                raise _ClientGone from None
            raise Problem(problem.BAD_REQUEST, "the body's framing is broken") from None

    async def _read_all(self, content: StreamReader, sink: BytesIO, hold: Hold) -> None:
        deadline = Deadline(
            self._loop,
            content,
            sink.tell,
            timeout=self._settings.body_timeout,
            rate_min=self._settings.body_rate_min,
        )
        with deadline:
            while block := await content.readany():
                sink.write(block)
                self._count(sink.tell(), hold)

    def _count(self, total: int, hold: Hold) -> None:
        if total > self._settings.wire_bytes_max:
            raise self._too_large()
        if total > hold.bytes:
            hold.grow(total - hold.bytes)

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
                parsed = parse_quickly(wire, reading, form, bounds)
                if parsed is not None:
                    return parsed
            threads = self._threads if len(wire) < LARGE_BYTES else self._large
            return await self._loop.run_in_executor(
                threads, parse_body, wire, reading, form, bounds
            )
        settings = self._settings
        if len(wire) < THREAD_BYTES:
            short = inflate_short(encoding, wire, settings.body_bytes_max)
            if short is not None:
                hold.grow(len(short))
                return await self._parse(short, "identity", reading, route, hold)

        def finish() -> Parsed:
            body = inflate(
                encoding, wire, settings.body_bytes_max, settings.inflate_ratio_max, hold.grow
            )
            return parse_body(body, reading, form, bounds)

        return await self._loop.run_in_executor(self._large, finish)

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


def _say_continue(request: web.BaseRequest) -> None:
    """Tells a client that waits for it to send its body."""
    if request.headers["Expect"].strip().lower() != "100-continue":
        raise Problem(problem.EXPECTATION, "only 100-continue can be expected")
    transport = request.transport
    if request.version == HttpVersion11 and transport is not None:
        transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _accepted(parsed: Parsed) -> bytes:
    """The body of a 202."""
    if not parsed.refused:
        return b'{"accepted":%d,"rejected":0,"errors":[]}' % parsed.records.count
    return msgspec.json.encode(
        {
            "accepted": parsed.records.count,
            "rejected": len(parsed.refused),
            "errors": list_errors(parsed.refused),
        }
    )


def _make_ids() -> Iterator[str]:
    """Ids that no other process makes: a random part once, then a number."""
    prefix = secrets.token_hex(6)
    return (f"{prefix}-{number:x}" for number in itertools.count(1))
