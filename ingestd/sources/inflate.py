"""Decompression in pieces, so that a few small bytes can't become a great many at once."""

from __future__ import annotations

import sys
import zlib
from typing import TYPE_CHECKING, Protocol

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE_BYTES = 256 * 1024
"""What one step puts out at most."""

RATIO_FREE_BYTES = 1024 * 1024
"""Up to here the ratio of what came out to what went in does not matter."""

_MEMBERS_FREE = 1000
_MEMBER_BYTES = 512
# Small steps: the ratio is that of what came out to what went in so far, and zlib hands back what
# it did not use as a copy.
_WIRE_BYTES = 8 * 1024
_GZIP = 31
_ZLIB = 15
_RAW_DEFLATE = -15
# RFC 9659: a `zstd` body needs a window of 8 MiB at most.
_ZSTD_OPTIONS: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 23}


class Corrupt(Exception):  # noqa: N818 - what it is
    """It is not what it says it is."""


class TooMuch(Exception):  # noqa: N818
    """More comes out than is wanted."""


class TooDense(TooMuch):
    """So much more comes out than went in that it was made to."""


class Inflater:
    """Takes a compressed body as it comes and gives what was in it.

    Several gzip members or zstd frames, one behind the other, are one body. They have to hold
    `_MEMBER_BYTES` each on average, after the first `_MEMBERS_FREE`: opening one costs more than
    reading some bytes does.

    Args:
        encoding: `gzip`, `deflate` or `zstd`.
        bytes_max: more than this is not decompressed.
        ratio_max: how many times as much may come out as went in, as soon as more than
            `RATIO_FREE_BYTES` have; 0 for any.
    """

    def __init__(self, encoding: str, bytes_max: int, ratio_max: int = 0) -> None:
        self._encoding = encoding
        self._bytes_max = bytes_max
        self._ratio_max = ratio_max
        self._wire_bytes = 0
        self._bytes = 0
        self._members = 0
        self._stream: _Stream | None = None
        self._head = b""
        self._ended = False

    def feed(self, wire: bytes) -> Iterator[bytes]:
        """What comes out, `PIECE_BYTES` at most at a time; has to be read to its end.

        Raises:
            Corrupt: it is not what it says.
            TooMuch: more comes out than is wanted.
            TooDense: more comes out than such an input should hold.
        """
        for start in range(0, len(wire), _WIRE_BYTES):
            piece = wire[start : start + _WIRE_BYTES]
            self._wire_bytes += len(piece)
            yield from self._feed(piece)

    def finish(self) -> None:
        """Says that there is no more.

        Raises:
            Corrupt: the stream is cut off.
        """
        if not self._ended:
            raise self._corrupt("it is cut off")

    def _feed(self, wire: bytes) -> Iterator[bytes]:
        while wire or (self._stream and self._stream.more and not self._ended):
            stream = self._stream
            if stream is None:
                wire = self._head + wire
                if self._encoding == "deflate" and len(wire) < 2:
                    self._head = wire
                    return
                self._head = b""
                self._count_member()
                stream = self._stream = self._open(wire)
                self._ended = False
            try:
                piece = stream.take(wire)
            except (zlib.error, zstd.ZstdError):
                raise self._corrupt("it can't be decompressed") from None
            self._count(len(piece))
            if piece:
                yield piece
            wire = b""
            if stream.ended:
                wire = stream.rest
                self._ended = True
                self._stream = None

    def _count(self, size: int) -> None:
        self._bytes += size
        if self._bytes > self._bytes_max:
            raise TooMuch(f"more than {self._bytes_max} bytes after decompression")
        if (
            self._ratio_max
            and self._bytes > RATIO_FREE_BYTES
            and self._bytes > self._ratio_max * self._wire_bytes
        ):
            raise TooDense(f"more than {self._ratio_max} times its size after decompression")

    def _count_member(self) -> None:
        self._members += 1
        if self._members > _MEMBERS_FREE + self._bytes // _MEMBER_BYTES:
            raise TooDense("too many members with next to nothing in them")

    def _open(self, wire: bytes) -> _Stream:
        """The first stream, or the next one; only gzip and zstd may have a next one."""
        if self._encoding == "zstd":
            return _Zstd()
        if self._encoding == "gzip":
            return _Zlib(_GZIP)
        if self._ended:
            raise self._corrupt("something follows its end")
        # RFC 9110 means zlib's form; some clients send bare deflate.
        zlib_head = wire[0] & 0x8F == 0x08 and (wire[0] << 8 | wire[1]) % 31 == 0
        return _Zlib(_ZLIB if zlib_head else _RAW_DEFLATE)

    def _corrupt(self, what: str) -> Corrupt:
        return Corrupt(f"the {self._encoding} body is not valid: {what}")


class _Stream(Protocol):
    """One compressed stream."""

    @property
    def ended(self) -> bool: ...
    @property
    def more(self) -> bool:
        """There may be output without new input."""
        ...

    @property
    def rest(self) -> bytes:
        """What stood behind the end."""
        ...

    def take(self, wire: bytes) -> bytes:
        """The next piece; `wire` is new input, or nothing."""
        ...


class _Zlib:
    def __init__(self, wbits: int) -> None:
        self._stream = zlib.decompressobj(wbits)
        self.more = False

    def take(self, wire: bytes) -> bytes:
        stream = self._stream
        piece = stream.decompress(stream.unconsumed_tail + wire, PIECE_BYTES)
        # A full piece may have left output inside zlib although it used all its input.
        self.more = bool(stream.unconsumed_tail) or len(piece) == PIECE_BYTES
        return piece

    @property
    def ended(self) -> bool:
        return self._stream.eof

    @property
    def rest(self) -> bytes:
        return self._stream.unused_data


class _Zstd:
    def __init__(self) -> None:
        self._stream = zstd.ZstdDecompressor(options=_ZSTD_OPTIONS)

    def take(self, wire: bytes) -> bytes:
        return self._stream.decompress(wire, PIECE_BYTES)

    @property
    def more(self) -> bool:
        return not self._stream.eof and not self._stream.needs_input

    @property
    def ended(self) -> bool:
        return self._stream.eof

    @property
    def rest(self) -> bytes:
        return self._stream.unused_data
