"""An HTTP answer as one write: head and body together.

aiohttp builds a header map, a writer and several coroutines for each answer; for small requests
that is half of the work.
"""

from __future__ import annotations

import hashlib
import time
from email.utils import formatdate
from http import HTTPStatus
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\nServer: ingestd\r\nDate: ".encode()
    for status in HTTPStatus
}
CLOSE = b"Connection: close\r\n"
KEEP = b"Connection: keep-alive\r\n"
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


class Response(NamedTuple):
    """Answer of a request's handler.

    Attributes:
        status: of the answer.
        content_type: of the body; empty where there can't be one (204, 304).
        body: the whole.
        headers: more of them; ASCII without CR and LF.
        close: the connection ends with this answer.
        write_timeout: seconds that a client may leave its answers unread.
    """

    status: int
    content_type: bytes
    body: bytes
    headers: Mapping[str, str] = {}
    close: bool = False
    write_timeout: float = 30.0


# -- static responses ------------------------------------------------------------------------------
#
# Answers that are made once: a body with an `ETag`, or nothing but headers.

_NONE: Mapping[str, str] = MappingProxyType({})


class StaticResponse(NamedTuple):
    """One such answer.

    Attributes:
        status: of the answer.
        content_type: of the body; empty if there is none.
        body: the whole.
        headers: more of them; ASCII without CR and LF.
    """

    status: int
    content_type: bytes = b""
    body: bytes = b""
    headers: Mapping[str, str] = _NONE


def make_document(content_type: bytes, body: bytes, headers: Mapping[str, str]) -> StaticResponse:
    """A document that browsers and caches may keep, and ask every time whether it is still so."""
    tag = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
    common = {"ETag": tag, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    return StaticResponse(200, content_type, body, {**common, **headers})


class LateDocument:
    """A document that is made when it is asked for first: most daemons are never asked.

    Args:
        make: makes it.
    """

    __slots__ = ("_made", "_make")

    def __init__(self, make: Callable[[], StaticResponse]) -> None:
        self._make = make
        self._made: StaticResponse | None = None

    @property
    def document(self) -> StaticResponse:
        """The document."""
        if self._made is None:
            self._made = self._make()
        return self._made


def unless_known(document: StaticResponse, if_none_match: str) -> StaticResponse:
    """The document, or 304 if the client has it already (RFC 9110, 13.1.2; weak comparison)."""
    if not if_none_match:
        return document
    known = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    if known & {document.headers["ETag"], "*"}:
        return StaticResponse(304, headers=document.headers)
    return document
