"""An HTTP answer as one write: head and body together, ready before aiohttp sees it.

aiohttp builds a header map, a writer and several coroutines for each answer; for small requests
that is half of the work. An `Answer` is what `finish_response` needs and nothing more.
"""

from __future__ import annotations

import time
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING

import async_timeout
from aiohttp import HttpVersion10, web

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp.abc import AbstractStreamWriter

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\nServer: ingestd\r\nDate: ".encode()
    for status in HTTPStatus
}
_CLOSE = b"Connection: close\r\n"
_KEEP = b"Connection: keep-alive\r\n"
JSON = b"application/json"
PROBLEM = b"application/problem+json"
HTML = b"text/html; charset=utf-8"

_now: tuple[int, bytes] = (0, b"")


def date() -> bytes:
    """The `Date` header's value; made once a second."""
    global _now  # noqa: PLW0603
    second = int(time.time())
    if _now[0] != second:
        _now = second, formatdate(second, usegmt=True).encode()
    return _now[1]


def encode(
    status: int,
    content_type: bytes,
    body: bytes,
    *,
    headers: Mapping[str, str] | None = None,
    connection: bytes = b"",
    bodiless: bool = False,
) -> bytes:
    """A whole answer as it goes over the wire.

    Args:
        status: known to `http.HTTPStatus`.
        content_type: of `body`; empty where there can't be one (204, 304).
        body: of the answer.
        headers: more of them; ASCII without CR and LF.
        connection: the `Connection` line, or nothing.
        bodiless: the answer to a HEAD: everything but the body.
    """
    more = b"".join(
        [f"{k}: {v}\r\n".encode("ascii") for k, v in headers.items()] if headers else ()
    )
    if not content_type:
        return b"%b%b\r\n%b%b\r\n" % (_STATUS_LINES[status], date(), more, connection)
    return b"%b%b\r\nContent-Type: %b\r\nContent-Length: %d\r\n%b%b\r\n%b" % (
        _STATUS_LINES[status],
        date(),
        content_type,
        len(body),
        more,
        connection,
        b"" if bodiless else body,
    )


class Answer(web.StreamResponse):
    """What the handler of a request gives back.

    Args:
        status: of the answer.
        content_type: of the body.
        body: the whole.
        headers: more of them; ASCII without CR and LF.
        close: the connection ends with this answer.
        write_timeout: seconds that a client may leave its answers unread.
    """

    def __init__(
        self,
        status: int,
        content_type: bytes,
        body: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        close: bool = False,
        write_timeout: float = 30.0,
    ) -> None:
        # Not the base's: it makes what is saved here.
        self._set_status(status, None)
        self._keep_alive = not close
        self._parts = (content_type, body, headers)
        self._write_timeout = write_timeout

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Writes all of it."""
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError
        is_last = getattr(request.protocol, "is_last", False)
        self._keep_alive = bool(self._keep_alive) and request.keep_alive and not is_last
        connection = b"" if self._keep_alive else _CLOSE
        if self._keep_alive and request.version == HttpVersion10:
            connection = _KEEP
        content_type, body, headers = self._parts
        transport.write(
            encode(
                self.status,
                content_type,
                body,
                headers=headers,
                connection=connection,
                bodiless=request.method == "HEAD",
            )
        )
        if request.protocol.writing_paused:
            try:
                async with async_timeout.timeout(self._write_timeout):
                    await request.writer.drain()
            except TimeoutError:
                transport.abort()
                raise ConnectionResetError from None
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to write."""
