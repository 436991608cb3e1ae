"""Requests as handlers see them: a head, and a body that arrives meanwhile."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from multidict import CIMultiDict

    from ingestd.http.protocol import Connection

HTTP10 = "1.0"
HTTP11 = "1.1"

HEADER_BYTES = 400
"""What a line of a head takes beside its own bytes, of which there are three copies."""

READ_LOW_BYTES = 32 * 1024
READ_HIGH_BYTES = 64 * 1024
"""From here on a body is not read before its reader has taken some of it."""


def size_of_head(headers: Sequence[tuple[bytes, bytes]]) -> int:
    """Size of a head in memory: as it came, decoded, and as a map."""
    return 3 * sum(map(len, chain.from_iterable(headers))) + HEADER_BYTES * len(headers)


class ClientGone(Exception):  # noqa: N818 - nobody's error
    """The client went away in the middle of its body."""


class BrokenBody(Exception):  # noqa: N818 - what it is
    """A body is not what its head said, or its client left in the middle of it."""


class BodyBuffer:
    """Buffers a body between its connection and its one reader.

    Args:
        connection: stops reading while much is buffered; `None` for a body that is empty.

    Attributes:
        total: bytes that have come.
        size: of these, bytes that were not read.
    """

    __slots__ = ("_connection", "_ended", "_error", "_pieces", "_waiter", "size", "total")

    def __init__(self, connection: Connection | None = None) -> None:
        self._connection = connection
        self._pieces: deque[bytes] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._ended = connection is None
        self.size = self.total = 0

    # -- the connection's side -----------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Takes bytes that arrived; not empty."""
        self.total += len(data)
        self.size += len(data)
        self._pieces.append(data)
        self._wake()

    def feed_end(self) -> None:
        """Nothing more comes."""
        self._ended = True
        self._wake()

    def fail(self, error: Exception) -> None:
        """The rest will not come: the reader gets the error, and what was buffered is freed."""
        self._ended = True
        self._pieces.clear()
        self.size = 0
        self.set_exception(error)

    @property
    def is_complete(self) -> bool:
        """Returns True if nothing more comes."""
        return self._ended

    # -- the reader's side ---------------------------------------------------------------------

    def is_eof(self) -> bool:
        """Returns True if nothing more comes, whether what came was read or not."""
        return self._ended

    def exception(self) -> Exception | None:
        """The error that the next read raises."""
        return self._error

    def set_exception(self, error: Exception | None) -> None:
        """Has this raised where the body is read, now and later; `None` for nothing."""
        self._error = error
        waiter = self._waiter
        if error is not None and waiter is not None and not waiter.done():
            waiter.set_exception(error)

    def read_nowait(self) -> bytes:
        """All that is buffered."""
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._took(len(data))
        return data

    async def readany(self) -> bytes:
        """Returns all that is buffered, or the bytes after it; empty at the end.

        Raises:
            BrokenBody: it will not come to its end, or what `set_exception` was given.
        """
        await self._wait()
        return self.read_nowait()

    async def read(self, size: int) -> bytes:
        """The same, at most so many bytes."""
        await self._wait()
        if self.size <= size:
            return self.read_nowait()
        taken, left = [], size
        while left:
            piece = self._pieces.popleft()
            if len(piece) > left:
                self._pieces.appendleft(piece[left:])
                piece = piece[:left]
            taken.append(piece)
            left -= len(piece)
        self._took(size)
        return b"".join(taken)

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        if self._pieces or self._ended:
            return
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _took(self, size: int) -> None:
        self.size -= size
        if self._connection is not None and self._connection.reading_paused:
            self._connection.adjust_reading()


class Request:
    """One request.

    Attributes:
        method: of the request line.
        raw_path: the target as the request line has it.
        version: `HTTP10` or `HTTP11`.
        headers: in any case; each value decoded, without white space around it.
        raw_headers: name and value of each line, as they came.
        content: the body.
        content_length: its length; `None` if it has none or is chunked.
        is_chunked: the body tells its length in pieces.
        close: the client wants the connection to end after the answer.
        head: the bytes of all that, if they are few.
        protocol: the connection.
    """

    __slots__ = (
        "close",
        "content",
        "content_length",
        "head",
        "headers",
        "is_chunked",
        "method",
        "protocol",
        "raw_headers",
        "raw_path",
        "version",
    )

    def __init__(
        self,
        method: str,
        target: str,
        version: str,
        headers: CIMultiDict[str],
        raw_headers: Sequence[tuple[bytes, bytes]],
        *,
        close: bool,
        protocol: Connection,
    ) -> None:
        self.method = method
        self.raw_path = target
        self.version = version
        self.headers = headers
        self.raw_headers = raw_headers
        self.close = close
        self.protocol = protocol
        self.content_length: int | None = None
        self.is_chunked = False
        self.head = b""
        self.content = BodyBuffer()

    @property
    def transport(self) -> asyncio.Transport | None:
        """The connection's transport; `None` if it has gone."""
        return self.protocol.transport

    @property
    def remote(self) -> str:
        """The peer's IP address; empty if it has none."""
        return self.protocol.remote

    @property
    def held(self) -> int:
        """Bytes that it holds."""
        return size_of_head(self.raw_headers) + self.content.size
