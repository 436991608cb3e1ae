"""A body as it comes from the connection: how long it may be, and what can go wrong with it."""

from __future__ import annotations

import contextlib
from io import BytesIO
from typing import TYPE_CHECKING

import async_timeout
from aiohttp import ClientPayloadError, HttpVersion11
from aiohttp.web_protocol import RequestPayloadError

from ingestd.sources.http import problem
from ingestd.sources.http.problem import Problem
from ingestd.sources.http.stream import read_piece

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiohttp import web

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
    sink = BytesIO()
    with in_our_words(request, settings):
        async with async_timeout.timeout(settings.body_timeout):
            while True:
                piece, ended = await read_piece(request.content)
                sink.write(piece)
                goes_on = not ended and (encoding != "identity" or b"\n" in piece)
                # What goes on has no bound as a whole: only what is held at a time counts.
                _count(len(piece), 0 if goes_on else sink.tell(), hold, settings)
                if ended or goes_on:
                    return sink.getvalue(), ended


async def read_whole(
    request: web.BaseRequest, hold: Hold, settings: HttpSettings, *, counted: bool
) -> bytes:
    """The body as it came.

    Args:
        request: whose body it is.
        hold: grows with it.
        settings: the bounds.
        counted: its length is known, and held already.

    Raises:
        Problem: 400, 408, 413, or what `Hold.grow` raises.
        ClientGone: in the middle of it.
    """
    content = request.content
    with in_our_words(request, settings):
        if content.is_eof():  # all of it came with the head
            body = content.read_nowait()
            if not counted:
                _count(len(body), len(body), hold, settings)
            return body
        sink = BytesIO()
        async with async_timeout.timeout(settings.body_timeout):
            while block := await content.readany():
                sink.write(block)
                if not counted:
                    _count(len(block), sink.tell(), hold, settings)
        return sink.getvalue()


@contextlib.contextmanager
def in_our_words(request: web.BaseRequest, settings: HttpSettings) -> Iterator[None]:
    """What can go wrong with a body that comes, as problems."""
    try:
        yield
    except TimeoutError:
        detail = f"not complete after http.body_timeout = {settings.body_timeout:g} s"
        raise Problem(problem.TIMEOUT, detail) from None
    except (RequestPayloadError, ClientPayloadError, OSError, RuntimeError):
        # RuntimeError: aiohttp's word for reading on a connection that has just gone.
        if request.transport is None:
            raise ClientGone from None
        raise Problem(problem.BAD_REQUEST, "the body's framing is broken") from None


def _count(more: int, total: int, hold: Hold, settings: HttpSettings) -> None:
    if total > settings.wire_bytes_max:
        raise _too_large(settings)
    hold.grow(more)


def _too_large(settings: HttpSettings) -> Problem:
    detail = f"more than http.wire_bytes_max = {settings.wire_bytes_max}"
    return Problem(problem.BODY_TOO_LARGE, detail)
