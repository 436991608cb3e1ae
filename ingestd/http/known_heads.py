"""Known heads: a head whose bytes were read before is not read again.

Clients of a kept connection send the same head again and again; only the digits of
`Content-Length` change. `KnownHeads` maps a head without these digits to what parser, router,
authenticator and endpoint made of it. A request is *quick* if its head is known, its body came
whole in the same piece, nothing is before it on its connection, and the source takes it (`Take`).
Every other request goes the ordinary way: the table decides about cost, never about an answer.

Two requests with the same bytes may still have to be answered differently. What may differ, and
where that is looked at:

* the body's length: the digits are cut out at the first line that begins with `Content-Length: `
  or `content-length: `. A head is only learned after the parser has read the same digits there,
  and found no second such line; the parser accepts any digits in their place, and there are at
  most `DIGITS_MAX` of them, so no bound on a head or a line can be met by them;
* the connection: its certificate, its being a Unix socket. A head is not learned if who sent it
  was told by anything but its bytes (`Authenticator.decides_by_head`);
* the client's address: bounds of a client are asked with the address of its own connection;
* time: rate limits are asked for each request; a certificate may expire, so its requests are not
  learned; the `Date` of an answer is made anew each second;
* the configuration: a reload (tokens, certificates, endpoints, CORS) calls `forget`, and no head
  that was learned before is ever used again, also where a connection remembers it. The head of a
  request that was let in before a reload and ends after it is not learned;
* the state of the daemon: while it drains, at any bound, and when it is another client's turn, the
  source does not take a request, and the ordinary way says why;
* other requests with the same head: heads with a header whose value belongs to one request
  (`_OF_ONE_REQUEST`) are not learned;
* the body: one that is not records as they should be, all of them, goes the ordinary way.

The table is bounded (`HEADS_MAX` heads of at most `KNOWN_BYTES_MAX` bytes; the oldest one goes),
and each connection remembers the last one that it used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ingestd.http.heads import KNOWN_BYTES_MAX, HeadParser
from ingestd.http.request import HTTP11, BodyBuffer

if TYPE_CHECKING:
    from collections.abc import Callable

    from ingestd.http.protocol import Connection
    from ingestd.http.request import Request

    Take = Callable[[Connection, bytes], bool]

HEADS_MAX = 256
DIGITS_MAX = 7
_LINES = (b"\r\nContent-Length: ", b"\r\ncontent-length: ")
_OF_ONE_REQUEST = (
    "Content-Encoding",
    "Expect",
    "Idempotency-Key",
    "Prefer",
    "Transfer-Encoding",
    "Upgrade",
    "X-Request-Id",
    "traceparent",
)


class Generation:
    """All heads that were learned under one configuration.

    Attributes:
        is_valid: they may be used.
    """

    __slots__ = ("is_valid",)

    def __init__(self) -> None:
        self.is_valid = True


class KnownHead(NamedTuple):
    """A head that was read before.

    Attributes:
        before: its bytes up to the digits of `Content-Length`.
        after: its bytes behind them, to its end.
        generation: of the configuration.
        take: takes a body with this head, of a connection that is idle; returns False if the
            request has to go the ordinary way. One that was taken is ended with
            `Connection.finish_quick` or `Connection.go_ordinary_way`, in a later turn of the loop.
    """

    before: bytes
    after: bytes
    generation: Generation
    take: Take

    def body_of(self, data: bytes) -> bytes | None:
        """Returns the body if this is one whole request with this head, and nothing else."""
        before, after = self.before, self.after
        start = len(before)
        end = data.find(b"\r", start, start + DIGITS_MAX + 1)
        digits = data[start:end]
        if end < 0 or not digits.isdigit():
            return None
        at = end + len(after)
        if len(data) - at != int(digits):
            return None
        return data[at:] if data.startswith(before) and data.startswith(after, end) else None

    def request(self, connection: Connection, body: bytes) -> Request:
        """Returns a request with this head and a whole body, for the ordinary way."""
        head = b"%b%d%b" % (self.before, len(body), self.after)
        parser = HeadParser()
        parser.feed(head)
        request = parser.finish(head, connection)
        request.content = BodyBuffer(connection)
        request.content.feed(body)
        request.content.feed_end()
        return request


class KnownHeads:
    """The table of one server."""

    def __init__(self) -> None:
        self._heads: dict[bytes, KnownHead] = {}
        self._generation = Generation()

    def __len__(self) -> int:
        return len(self._heads)

    def find(self, data: bytes) -> KnownHead | None:
        """Returns the known head that a piece of input begins with."""
        if not self._heads:
            return None
        parts = _split(data)
        return None if parts is None else self._heads.get(parts[0] + parts[1])

    def learn(self, request: Request, take: Take) -> None:
        """Remembers the head of a request whose answer depended on its head and body alone."""
        head = request.head
        if not head or (parts := _split(head)) is None:
            return
        before, after = parts
        length = request.content_length
        digits = head[len(before) : len(head) - len(after)]
        if not length or not digits.isdigit() or int(digits) != length:
            return
        if before + after in self._heads:
            return
        if len(self._heads) >= HEADS_MAX:
            del self._heads[next(iter(self._heads))]
        self._heads[before + after] = KnownHead(before, after, self._generation, take)

    def forget(self) -> None:
        """No head is known any more."""
        self._generation.is_valid = False
        self._generation = Generation()
        self._heads.clear()


def is_common(request: Request) -> bool:
    """Returns True if nothing in a head belongs to this one request, and its connection goes on."""
    headers = request.headers
    return (
        bool(request.head)
        and request.version == HTTP11
        and not request.close
        and not any(name in headers for name in _OF_ONE_REQUEST)
    )


def _split(data: bytes) -> tuple[bytes, bytes] | None:
    """Returns the parts of a head before and behind the digits of its length."""
    for line in _LINES:
        at = data.find(line, 0, KNOWN_BYTES_MAX)
        if at >= 0:
            break
    else:
        return None
    start = at + len(line)
    end = data.find(b"\r", start, start + DIGITS_MAX + 1)
    last = data.find(b"\r\n\r\n", max(end, 0), KNOWN_BYTES_MAX) + 4
    return None if end < 0 or last < 4 else (data[:start], data[end:last])
