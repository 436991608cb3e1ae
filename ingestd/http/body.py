"""`Content-Encoding`: what the header says, and a whole body decompressed within its bounds."""

from __future__ import annotations

import asyncio
import contextlib
from io import BytesIO
from typing import TYPE_CHECKING

import async_timeout

from ingestd.codecs.compression import (
    INFLATED_PIECE_BYTES,
    Corrupt,
    Inflater,
    TooDense,
    TooMuch,
    has_snappy,
    inflate_snappy,
    measure_snappy,
)
from ingestd.http import problem
from ingestd.http.deadlines import BodyDeadline, BodyTimeout
from ingestd.http.problem import Problem
from ingestd.http.request import HTTP11, BrokenBody, ClientGone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ingestd.http.admission import Reservation
    from ingestd.http.request import BodyBuffer, Request
    from ingestd.http.settings import HttpSettings


SNAPPY = "snappy"
"""The encoding that only a whole body can be read in."""
_NAMES = {"": "identity", "x-gzip": "gzip", "x-snappy-framed": SNAPPY}


def name_encoding(headers: Sequence[str]) -> str:
    """`identity`, `gzip`, `deflate`, `zstd` or `snappy`, from all `Content-Encoding`s of a request.

    Raises:
        Problem: 415 for any other, for more than one, and for snappy without its package.
    """
    if not headers:
        return "identity"
    name = headers[0].strip().lower() if len(headers) == 1 else ", ".join(headers)
    name = _NAMES.get(name, name)
    if name == SNAPPY:
        demand_snappy()
        return name
    if name in ("identity", "gzip", "deflate", "zstd"):
        return name
    raise _unread(f"{name[:80]!r}; one of", "is read")


def demand_snappy() -> None:
    """Checks that snappy can be read.

    Raises:
        Problem: 415.
    """
    if not has_snappy():
        extra = "`pip install 'ingestd[snappy]'` where it runs"
        raise _unread(f"snappy is read with the extra package: {extra}; else one of")


def _unread(before: str, behind: str = "") -> Problem:
    encodings = f"gzip, deflate, zstd,{' snappy,' if has_snappy() else ''} identity"
    headers = {"Accept-Encoding": encodings}
    detail = f"{before} {encodings} {behind}".rstrip()
    return Problem(problem.ENCODING, detail, headers=headers)


def inflate_short(encoding: str, wire: bytes, bytes_max: int) -> bytes | None:
    """A whole body if it is short, as most are; nothing if it is not, or there is a fault in it.

    A long one is begun anew, in a thread: its window and output are there only when its turn comes.
    """
    bytes_max = min(INFLATED_PIECE_BYTES, bytes_max)
    try:
        if encoding == SNAPPY:
            return inflate_snappy(wire, measure_snappy(wire, bytes_max))
        inflater = Inflater(encoding, bytes_max)
        body = b"".join(inflater.feed(wire))
        inflater.finish()
    except (Corrupt, TooMuch):
        return None
    return body


def inflate(
    encoding: str, wire: bytes, bytes_max: int, ratio_max: int, take: Callable[[int], None]
) -> bytes:
    """A whole body.

    Args:
        encoding: `gzip`, `deflate`, `zstd` or `snappy`.
        wire: as it came.
        bytes_max: `http.decompressed_bytes_max`.
        ratio_max: `http.inflate_ratio_max`.
        take: called with the size of each piece before there is another.

    Raises:
        Problem: 400 if it is corrupt or cut off, 413 if it is too much.
    """
    try:
        if encoding == SNAPPY:
            take(size := measure_snappy(wire, bytes_max, ratio_max))
            return inflate_snappy(wire, size)
        with BytesIO() as sink:
            inflater = Inflater(encoding, bytes_max, ratio_max)
            for piece in inflater.feed(wire):
                take(len(piece))
                sink.write(piece)
            inflater.finish()
            return sink.getvalue()
    except Corrupt as error:
        raise Problem(problem.CORRUPT, str(error)) from None
    except TooDense as error:
        raise Problem(problem.RATIO, str(error)) from None
    except TooMuch:
        detail = f"more than http.decompressed_bytes_max = {bytes_max} after decompression"
        raise Problem(problem.PAYLOAD_TOO_LARGE, detail) from None


# -- A body as it comes from the connection --------------------------------------------------------
#
# A body as it comes from the connection: how long it may be, and what can go wrong with it.

PIECE_BYTES = 256 * 1024
"""A piece is accepted when it is this large on the wire,"""
PIECE_SECONDS = 0.5
"""or this long after its first byte."""
BLOCK_BYTES = 64 * 1024
"""What is read of a stream at once, before it is counted."""


def length_of(request: Request, settings: HttpSettings) -> int | None:
    """The body's length on the wire; `None` if it is chunked.

    Raises:
        Problem: 411 or 413.
    """
    length = request.content_length
    if length is None:
        if "Transfer-Encoding" not in request.headers:
            raise Problem(problem.NO_LENGTH, "send Content-Length, or chunked")
    elif length > settings.request_bytes_max:
        raise _too_large(settings)
    return length


def say_continue(request: Request) -> None:
    """Tells a client that waits for it to send its body.

    Raises:
        Problem: 417 if it waits for something else.
    """
    if "Expect" not in request.headers:
        return
    if request.headers["Expect"].strip().lower() != "100-continue":
        raise Problem(problem.EXPECTATION, "only 100-continue can be expected")
    transport = request.transport
    if request.version == HTTP11 and transport is not None:
        transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def read_first(
    request: Request,
    hold: Reservation,
    settings: HttpSettings,
    *,
    encoding: str,
    first: bytes,
) -> tuple[bytes, bool]:
    """A body of unknown length as far as its first lines, and whether that is all of it.

    Args:
        request: whose body it is.
        hold: what it counts as.
        settings: the bounds.
        encoding: its `Content-Encoding`.
        first: what came of it first; nothing if it is empty.

    Raises:
        Problem: 400, 408, 413, or what `Reservation.grow` raises.
        ClientGone: in the middle of it.
    """
    if not first:
        return first, True
    with in_our_words(request), BytesIO() as sink, _deadline(request, sink.tell, settings):
        while True:
            begun = sink.tell()
            ended = await read_piece(request.content, sink, first=first)
            first = b""
            _hold(sink.tell(), hold)
            has_line = b"\n" in bytes(sink.getbuffer()[begun:])
            # What goes on has no bound as a whole: only what is held at a time counts.
            if not ended and (encoding != "identity" or has_line):
                return sink.getvalue(), False
            _check(sink.tell(), settings)
            if ended:
                return sink.getvalue(), True


async def read_whole(request: Request, hold: Reservation, settings: HttpSettings) -> bytes:
    """The body as it came.

    Raises:
        Problem: 400, 408, 413, or what `Reservation.grow` raises.
        ClientGone: in the middle of it.
    """
    content = request.content
    if content.is_eof() and content.exception() is None:  # all of it came with the head
        body = content.read_nowait()
        _check(len(body), settings)
        _hold(len(body), hold)
        return body
    # The sink is closed in any case: an error keeps this frame until the next collection.
    with in_our_words(request), BytesIO() as sink, _deadline(request, sink.tell, settings):
        while block := await content.readany():
            sink.write(block)
            _check(sink.tell(), settings)
            _hold(sink.tell(), hold)
        return sink.getvalue()


def _deadline(request: Request, total: Callable[[], int], settings: HttpSettings) -> BodyDeadline:
    return BodyDeadline(
        asyncio.get_running_loop(),
        request.content,
        total,
        timeout=settings.body_timeout,
        rate_min=settings.body_rate_min,
    )


@contextlib.contextmanager
def in_our_words(request: Request) -> Iterator[None]:
    """Turns the errors of reading a body into problems."""
    try:
        yield
    except BodyTimeout as late:
        raise Problem(problem.TIMEOUT, str(late)) from None
    except (BrokenBody, OSError) as error:
        if isinstance(error, TimeoutError):
            raise  # the reader of the next piece of a stream has a deadline of its own
        if request.transport is None:
            raise ClientGone from None
        raise Problem(problem.BAD_REQUEST, "the body's framing is broken") from None


def _check(total: int, settings: HttpSettings) -> None:
    if total > settings.request_bytes_max:
        raise _too_large(settings)


def _hold(total: int, hold: Reservation) -> None:
    if total + hold.base > hold.bytes:
        hold.grow(total + hold.base - hold.bytes)


def _too_large(settings: HttpSettings) -> Problem:
    detail = f"more than http.request_bytes_max = {settings.request_bytes_max}"
    return Problem(problem.PAYLOAD_TOO_LARGE, detail)


async def read_piece(
    content: BodyBuffer,
    sink: BytesIO,
    grow: Callable[[int], bool] | None = None,
    *,
    first: bytes = b"",
) -> bool:
    """Reads until the piece is full or old enough; waits for its first byte.

    Args:
        content: the body.
        sink: gets it, also if this is cancelled.
        grow: asked with the size so far; the piece is full when it says no.
        first: what of it has been read already.

    Returns:
        Whether the body ended with it.
    """
    begun = sink.tell()
    if not (block := first or await content.read(BLOCK_BYTES)):
        return True
    sink.write(block)
    try:
        async with async_timeout.timeout(PIECE_SECONDS):
            while (size := sink.tell() - begun) < PIECE_BYTES and (grow is None or grow(size)):
                if not (block := await content.read(BLOCK_BYTES)):
                    return True
                sink.write(block)
    except TimeoutError:
        pass
    return False
