"""Heads of requests and chunked bodies: llhttp, and the strictness that it leaves to its users.

Where two servers in a row disagree about where a request ends, the rest of it becomes a request of
its own ("request smuggling"). So the end of a head is found twice: as the first empty line, and by
the parser, which gets not a byte beyond it; a head that the two see end at different places is
refused. A body with `Content-Length` is cut out by its length and never parsed. A chunked one goes
through a parser of its own, which has seen no head but one of ours: nothing of a request but its
chunks has a say in where they end.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from multidict import CIMultiDict

from ingestd.http import problem
from ingestd.http.problem import Problem
from ingestd.http.request import Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ingestd.http.protocol import Connection

HEAD_BYTES_MAX = 32 * 1024
"""The head of one request, all lines together."""
LINE_BYTES_MAX = 8190
"""A target, or a name with its value."""
LINES_MAX = 128
"""Header lines of a head, and of trailers."""
LENGTH_DIGITS_MAX = 20
"""Digits of a `Content-Length`. More of them are leading zeros or more than 64 bits."""
KNOWN_BYTES_MAX = 2048
"""The bytes of a longer head are not kept."""

# RFC 3986: what may stand in host and port; without the comma, which joins two of them.
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+;=%:\[\]-]*")
# RFC 9112, 3.2.2 and RFC 9110, 4.2.4: http and https alone, and no user information.
_ABSOLUTE = re.compile(rb"https?://[A-Za-z0-9._~!$&'()*+;=%:\[\]-]+(?:[/?].*)?", re.IGNORECASE)
_SINGLE = frozenset(
    b"content-length content-location content-range content-type etag host max-forwards server"
    b" transfer-encoding user-agent".split()
)
"""Headers that mean nothing together with another one of their name."""
_CHUNKED_HEAD = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
_CHUNKED_END = b"\r\n0\r\n\r\n"


def head_too_large() -> Problem:
    """The problem of a head that is larger than it may be."""
    detail = f"the head of the request has more than {HEAD_BYTES_MAX} bytes"
    return Problem(problem.HEADERS_TOO_LARGE, detail)


class HeadParser:
    """Parses one head, in any pieces."""

    def __init__(self) -> None:
        self._parser: HttpRequestParser | None = HttpRequestParser(self)
        self._begun = False
        self._complete = False
        self._target = b""
        self._lines: list[tuple[bytes, bytes]] = []
        self._method = b""
        self._version = b""
        self._close = False
        self._mixed = False

    def feed(self, data: bytes) -> None:
        """Takes a part of the head.

        Raises:
            Problem: 400 or 431.
        """
        if self._parser is None:
            raise unreadable()
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            pass  # answered like any other request; nothing is upgraded
        except HttpParserError as error:
            self.release()
            if isinstance(error.__context__, Problem):
                raise error.__context__.with_traceback(None) from None
            raise unreadable() from None

    def release(self) -> None:
        """Frees the parser, which holds this object."""
        self._parser = None

    def finish(self, head: bytes, connection: Connection) -> Request:
        """Returns the request of a head that is whole, with an empty body.

        Args:
            head: all of it, without line ends before it.
            connection: of the request.

        Raises:
            Problem: 400 or 431.
        """
        self.release()
        if len(head) > HEAD_BYTES_MAX:
            raise head_too_large()
        if not self._complete or self._mixed:
            raise unreadable()
        method, target, version = self._method, self._target, self._version
        fields = {name.lower(): value for name, value in self._lines}
        detail = fault(method, target, version, fields)
        if not detail and len(fields) != len(self._lines):
            detail = _repeated(self._lines)
        if not detail and not head.startswith(b"%b %b HTTP/%b\r\n" % (method, target, version)):
            detail = "the request line has more than one space between its words"
        if detail:
            raise Problem(problem.BAD_REQUEST, detail)
        request = Request(
            method.decode("ascii"),
            target.decode("utf-8", "surrogateescape"),
            version.decode("ascii"),
            CIMultiDict(
                [
                    (name.decode("ascii"), value.decode("utf-8", "surrogateescape"))
                    for name, value in self._lines
                ]
            ),
            tuple(self._lines),
            close=self._close,
            protocol=connection,
        )
        request.is_chunked = b"transfer-encoding" in fields
        if b"content-length" in fields:
            request.content_length = int(fields[b"content-length"])
        if len(head) <= KNOWN_BYTES_MAX:
            request.head = head
        return request

    # -- what the parser calls -----------------------------------------------------------------

    def on_message_begin(self) -> None:  # noqa: D102 - httptools' names
        self._mixed = self._mixed or self._begun
        self._begun = True

    def on_url(self, url: bytes) -> None:  # noqa: D102
        self._target += url
        if len(self._target) > LINE_BYTES_MAX:
            raise Problem(problem.HEADERS_TOO_LARGE, "a line of the head is too long")

    def on_header(self, name: bytes, value: bytes) -> None:  # noqa: D102
        _add_line(self._lines, name, value)

    def on_headers_complete(self) -> None:  # noqa: D102
        parser = self._parser
        if parser is None or self._complete:
            self._mixed = True
            return
        self._complete = True
        self._method = parser.get_method()
        self._version = parser.get_http_version().encode()
        self._close = parser.should_upgrade() or not parser.should_keep_alive()

    def on_body(self, _: bytes) -> None:  # noqa: D102
        self._mixed = True


class ChunkDecoder:
    """Decodes a chunked body.

    Attributes:
        ended: its last chunk and its trailers have come.
        wire_bytes: that it took.
        count: chunks, or parts of them, in what it took last.
        bare_bytes: that it took since the last one with a byte of the body: the parser keeps a
            trailer that is not whole, and copies it with each piece.
        is_followed: something may stand behind it in what came with its end.
    """

    def __init__(self) -> None:
        self._parser: HttpRequestParser | None = HttpRequestParser(self)
        self._pieces: list[bytes] = []
        self._trailers: list[tuple[bytes, bytes]] = []
        self._begun = False
        self._tail = b"\r\n"
        self.wire_bytes = self.count = self.bare_bytes = 0
        self.ended = False
        self.is_followed = False
        self._parser.feed_data(_CHUNKED_HEAD)
        self._trailers.clear()

    def feed(self, data: bytes) -> bytes:
        """Takes what came, and returns what there is of the body in it.

        Raises:
            Problem: 400 or 431.
        """
        if self._parser is None:
            raise unreadable()
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            if not self.ended:
                self.release()
                if isinstance(error.__context__, Problem):
                    raise error.__context__.with_traceback(None) from None
                raise unreadable() from None
        body = b"".join(self._pieces)
        self.count = len(self._pieces)
        self.bare_bytes = 0 if body else self.bare_bytes + len(data)
        self._pieces.clear()
        self.wire_bytes += len(data)
        self._tail = (self._tail + data)[-len(_CHUNKED_END) :]
        if self.ended:
            # Trailers and extensions are not looked at: a request behind them is not read.
            self.is_followed = self.is_followed or self._tail != _CHUNKED_END
            self.release()
        return body

    def release(self) -> None:
        """Frees the parser, which holds this object."""
        self._parser = None

    def on_message_begin(self) -> None:  # noqa: D102 - httptools' names
        if self._begun:
            self.is_followed = True
            raise unreadable()  # ends the parser: nothing behind the body is for it
        self._begun = True

    def on_header(self, name: bytes, value: bytes) -> None:  # noqa: D102
        _add_line(self._trailers, name, value)

    def on_body(self, body: bytes) -> None:  # noqa: D102
        self._pieces.append(body)

    def on_message_complete(self) -> None:  # noqa: D102
        self.ended = True


def _add_line(lines: list[tuple[bytes, bytes]], name: bytes, value: bytes) -> None:
    if len(name) + len(value) > LINE_BYTES_MAX:
        raise Problem(problem.HEADERS_TOO_LARGE, "a line of the head is too long")
    lines.append((name, value.strip(b" \t")))
    if len(lines) > LINES_MAX:
        raise Problem(problem.HEADERS_TOO_LARGE, "the head has too many lines")


def unreadable() -> Problem:
    """The problem of bytes that are not HTTP, or not as it should be."""
    return Problem(problem.BAD_REQUEST, "it can't be read as HTTP/1.1")


# -- heads that the parser lets pass and this server does not ------------------------------------


def fault(method: bytes, target: bytes, version: bytes, fields: Mapping[bytes, bytes]) -> str:
    """Returns the fault of a head in a few words that quote nothing; empty if it has none.

    Args:
        method: of the request line.
        target: of the request line.
        version: `1.1` and the like.
        fields: the last header of each name, in small letters.
    """
    if version not in (b"1.1", b"1.0"):
        return "only HTTP/1.1 and HTTP/1.0 are spoken"
    usual = target[:1] == b"/" and b"#" not in target
    if not usual and (detail := _target_fault(method, target)):
        return detail
    length, coding = fields.get(b"content-length"), fields.get(b"transfer-encoding")
    if length is not None:
        if len(length) > LENGTH_DIGITS_MAX:
            return "Content-Length has too many digits"
        if not length.isdigit():
            return "Content-Length is no number"
    if coding is not None:
        if version == b"1.0":
            return "Transfer-Encoding needs HTTP/1.1"  # RFC 9112, 6.1
        if coding.lower() != b"chunked":
            return "Transfer-Encoding can only be chunked"
        if length is not None:
            return "Content-Length beside Transfer-Encoding"
    host = fields.get(b"host")
    if host is None:
        return "" if version == b"1.0" else "there is no Host"
    return "" if _HOST.fullmatch(host) else "Host is not a host"


def _repeated(lines: Sequence[tuple[bytes, bytes]]) -> str:
    seen = set()
    for name, _ in lines:
        lower = name.lower()
        if lower in seen and lower in _SINGLE:
            return f"there is more than one {lower.decode('ascii')}"
        seen.add(lower)
    return ""


def _target_fault(method: bytes, target: bytes) -> str:
    """Returns the fault of a target that has none of the four forms of RFC 9112, 3.2."""
    if b"#" in target:
        return "the request's target has a fragment"
    if target[:1] == b"/" or method == b"CONNECT" or (target == b"*" and method == b"OPTIONS"):
        return ""
    if not _ABSOLUTE.fullmatch(target):
        return "the request's target is no http URL"
    try:
        urlsplit(target).port  # noqa: B018 - raises for ports and IPv6 addresses that are none
    except ValueError:
        return "the request's target is no http URL"
    return ""
