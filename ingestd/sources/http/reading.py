"""A body as it comes from the connection: how long it may be, and what can go wrong with it."""

from __future__ import annotations

import asyncio
import contextlib
from io import BytesIO
from typing import TYPE_CHECKING

import async_timeout
from aiohttp import ClientPayloadError, HttpVersion11
from aiohttp.web_protocol import RequestPayloadError

from ingestd.sources.http import problem
from ingestd.sources.http.pace import Pace
from ingestd.sources.http.problem import Problem
from ingestd.sources.http.stream import read_piece

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiohttp import StreamReader, web

    from ingestd.base.settings import HttpSettings
    from ingestd.sources.http.room import Hold


class ClientGone(Exception):  # noqa: N818 - nobody's error
    """The client went away in the middle of its body."""


def length_of(request: web.BaseRequest, settings: HttpSettings) -> int | None:
    """The body's length on the wire; `None` if it is chunked.

    Raises:
        Problem: 411 or 413.
    """
    length = request.content_length
    if length is None:
        if "Transfer-Encoding" not in request.headers:
            raise Problem(problem.NO_LENGTH, "send Content-Length, or chunked")
    elif length > settings.wire_bytes_max:
        raise _too_large(settings)
    return length


def say_continue(request: web.BaseRequest) -> None:
    """Tells a client that waits for it to send its body.

    Raises:
        Problem: 417 if it waits for something else.
    """
    if request.headers["Expect"].strip().lower() != "100-continue":
        raise Problem(problem.EXPECTATION, "only 100-continue can be expected")
    transport = request.transport
    if request.version == HttpVersion11 and transport is not None:
        transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def read_first(
    request: web.BaseRequest, hold: Hold, settings: HttpSettings, *, encoding: str
) -> tuple[bytes, bool]:
    """A body of unknown length as far as its first lines, and whether that is all of it.

    Raises:
        Problem: 400, 408, 413, or what `Hold.grow` raises.
        ClientGone: in the middle of it.
    """
    patience = _Patience(settings)
    with in_our_words(request), BytesIO() as sink:
        while True:
            ended = False
            with contextlib.suppress(TimeoutError):
                async with async_timeout.timeout_at(patience.until):
                    ended = await read_piece(request.content, sink)
            goes_on = not ended and (encoding != "identity" or sink.getvalue().find(b"\n") >= 0)
            _hold(sink.tell(), hold)
            # What goes on has no bound as a whole: only what is held at a time counts.
            if goes_on and sink.tell():
                return sink.getvalue(), False
            _check(sink.tell(), settings)
            if ended:
                return sink.getvalue(), True
            patience.check(sink.tell())


async def read_whole(request: web.BaseRequest, hold: Hold, settings: HttpSettings) -> bytes:
    """The body as it came.

    Raises:
        Problem: 400, 408, 413, or what `Hold.grow` raises.
        ClientGone: in the middle of it.
    """
    content = request.content
    with in_our_words(request):
        if content.is_eof():  # all of it came with the head
            body = content.read_nowait()
            _check(len(body), settings)
            _hold(len(body), hold)
            return body
        patience = _Patience(settings)
        # Closed in any case: an error keeps this frame until the next collection.
        with BytesIO() as sink:
            while not await _read_until(patience.until, content, sink, hold, settings):
                patience.check(sink.tell())
            return sink.getvalue()


async def _read_until(
    moment: float, content: StreamReader, sink: BytesIO, hold: Hold, settings: HttpSettings
) -> bool:
    """More of the body, until that time at the latest; whether that was all of it."""
    try:
        async with async_timeout.timeout_at(moment):
            while block := await content.readany():
                sink.write(block)
                _check(sink.tell(), settings)
                _hold(sink.tell(), hold)
    except TimeoutError:
        return False
    return True


class _Patience:
    """How long a body is waited for: a deadline, and a least rate.

    Attributes:
        until: when to look again, in the loop's time.
    """

    def __init__(self, settings: HttpSettings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        started = self._loop.time()
        self._deadline = started + settings.body_timeout
        self._pace = Pace(settings.body_rate_min, started)
        self.until = min(self._deadline, self._pace.due)

    def check(self, total: int) -> None:
        """Whether to go on waiting.

        Args:
            total: bytes that have come so far.

        Raises:
            Problem: 408.
        """
        now = self._loop.time()
        if now >= self._deadline:
            limit = f"http.body_timeout = {self._settings.body_timeout:g} s"
            raise Problem(problem.TIMEOUT, f"not complete after {limit}")
        if now >= self._pace.due and self._pace.is_slow(total, now):
            limit = f"http.body_rate_min = {self._settings.body_rate_min} bytes a second"
            raise Problem(problem.TIMEOUT, f"slower than {limit}")
        self.until = min(self._deadline, self._pace.due)


@contextlib.contextmanager
def in_our_words(request: web.BaseRequest) -> Iterator[None]:
    """What can go wrong with a body that comes, as problems."""
    try:
        yield
    except (RequestPayloadError, ClientPayloadError, OSError, RuntimeError) as error:
        if isinstance(error, TimeoutError):
            raise
        # RuntimeError: aiohttp's word for reading on a connection that has just gone.
        if request.transport is None:
            raise ClientGone from None
        raise Problem(problem.BAD_REQUEST, "the body's framing is broken") from None


def _check(total: int, settings: HttpSettings) -> None:
    if total > settings.wire_bytes_max:
        raise _too_large(settings)


def _hold(total: int, hold: Hold) -> None:
    if total > hold.bytes:
        hold.grow(total - hold.bytes)


def _too_large(settings: HttpSettings) -> Problem:
    detail = f"more than http.wire_bytes_max = {settings.wire_bytes_max}"
    return Problem(problem.BODY_TOO_LARGE, detail)
