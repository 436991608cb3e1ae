"""Decompression of gzip, deflate and zstd as they arrive, and of whole snappy bodies; bounded."""

from __future__ import annotations

import sys
import zlib
from collections import deque
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Iterator

INFLATED_PIECE_BYTES = 256 * 1024
"""Largest piece that one step returns."""

RATIO_FREE_BYTES = 1024 * 1024
"""Output up to which the compression ratio is not checked."""

MEMBERS_FREE = 1000
"""Members of a body that may have next to nothing in them, where nothing else is said."""
_MEMBER_BYTES = 512
# Small steps: the ratio is that of output to input so far, and zlib copies unused input.
_WIRE_BYTES = 8 * 1024
_GZIP = 31
_ZLIB = 15
_RAW_DEFLATE = -15
WINDOW_MAX = 8 * 1024**2
"""The largest window that a zstd body may need where nothing else is said (RFC 9659), bytes."""
_WINDOW_LOG_MIN = 10
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPED = b"\x2a\x4d\x18"  # behind a byte from 0x50 to 0x5f
_SNAPPY_STREAM = b"\xff\x06\x00\x00sNaPpY"
_SNAPPY_RATIO = 22  # three bytes are a copy of 64 at most
_SNAPPY_CHUNK = 64 * 1024
_VARINT_BYTES = 5


class Corrupt(Exception):  # noqa: N818 - names the condition
    """The input is not valid in its encoding."""


class WindowTooLarge(Corrupt):
    """A zstd frame needs a larger window than allowed.

    Attributes:
        window: bytes that it needs.
    """

    def __init__(self, window: int, window_max: int) -> None:
        super().__init__(
            f"the zstd body needs a window of {mib(window)}, more than {mib(window_max)}"
        )
        self.window = window


class TooMuch(Exception):  # noqa: N818
    """The output is larger than allowed."""


class TooDense(TooMuch):
    """The ratio of output to input is that of a decompression bomb."""


class Inflater:
    """Decompresses a body as it arrives.

    Several gzip members or zstd frames, one behind the other, are one body. They have to hold
    `_MEMBER_BYTES` each on average, after the first `members_free`: opening one costs more than
    reading some bytes does. Zero bytes behind a gzip member are padding, as gzip(1) has it.

    Args:
        encoding: `gzip`, `deflate` or `zstd`.
        bytes_max: more than this is not decompressed.
        ratio_max: how many times as much may come out as went in, as soon as more than
            `RATIO_FREE_BYTES` have; 0 for any.
        window_max: the largest window that a zstd frame may need, bytes.
        members_free: see above.

    Attributes:
        window_max: as it was given; may be raised between two calls of `feed`.
        window: bytes that the zstd frame that is being read needs beside what is fed.
    """

    def __init__(
        self,
        encoding: str,
        bytes_max: int,
        ratio_max: int = 0,
        *,
        window_max: int = WINDOW_MAX,
        members_free: int = MEMBERS_FREE,
    ) -> None:
        self.window_max = window_max
        self._members_free = members_free
        self.window = 0
        self._encoding = encoding
        self._bytes_max = bytes_max
        self._ratio_max = ratio_max
        self._wire_bytes = 0
        self._bytes = 0
        self._members = 0
        self._stream: _Stream | None = None
        self._head = b""
        self._waiting: deque[bytes] = deque()
        self._ended = False

    def feed(self, wire: bytes = b"") -> Iterator[bytes]:
        """Yields the output in pieces of at most `INFLATED_PIECE_BYTES`; read it to its end.

        Raises:
            Corrupt: the input is not valid.
            WindowTooLarge: a zstd frame needs more than `window_max`; once that is raised, `feed()`
                goes on where it stopped.
            TooMuch: more than `bytes_max` comes out.
            TooDense: the ratio is above `ratio_max`.
        """
        self._waiting.extend(
            wire[start : start + _WIRE_BYTES] for start in range(0, len(wire), _WIRE_BYTES)
        )
        while self._waiting:
            piece = self._waiting.popleft()
            self._wire_bytes += len(piece)
            yield from self._feed(piece)

    def finish(self) -> None:
        """Checks that the input is complete.

        Raises:
            Corrupt: the stream is cut off.
        """
        if self._head or not self._ended:
            raise self._corrupt("it is cut off")

    def _feed(self, wire: bytes) -> Iterator[bytes]:
        while wire or (self._stream and self._stream.more and not self._ended):
            if self._stream is None:
                wire = self._begin(self._head + wire)
            stream = self._stream
            if stream is None:
                return
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

    def _begin(self, wire: bytes) -> bytes:
        """Opens the stream that `wire` begins, as soon as enough of it is there.

        Returns:
            The input of that stream.
        """
        self._head = b""
        if self._encoding == "gzip" and self._ended:
            wire = wire.lstrip(b"\0")
            if not wire:
                return wire
        window = zstd_window(wire) if self._encoding == "zstd" else 0
        if window is None or (self._encoding == "deflate" and len(wire) < 2):
            self._head = wire
            return b""
        if window > self.window_max:
            self._waiting.appendleft(wire)
            self._wire_bytes -= len(wire)
            raise WindowTooLarge(window, self.window_max)
        self._count_member()
        self.window = window
        self._stream = self._open(wire)
        self._ended = False
        return wire

    def _count(self, size: int) -> None:
        self._bytes += size
        _check_size(self._bytes, self._wire_bytes, self._bytes_max, self._ratio_max)

    def _count_member(self) -> None:
        self._members += 1
        _check_members(self._members, self._bytes, self._members_free)

    def _open(self, wire: bytes) -> _Stream:
        """Opens the first stream or the next one, which only gzip and zstd may have."""
        if self._encoding == "zstd":
            return _Zstd(self.window)
        if self._encoding == "gzip":
            return _Zlib(_GZIP)
        if self._ended:
            raise self._corrupt("something follows its end")
        # RFC 9110 means zlib's form; some clients send bare deflate.
        zlib_head = wire[0] & 0x8F == 0x08 and (wire[0] << 8 | wire[1]) % 31 == 0
        return _Zlib(_ZLIB if zlib_head else _RAW_DEFLATE)

    def _corrupt(self, what: str) -> Corrupt:
        return Corrupt(f"the {self._encoding} body is not valid: {what}")


def _check_size(size: int, wire_bytes: int, bytes_max: int, ratio_max: int) -> None:
    if size > bytes_max:
        raise TooMuch(f"more than {bytes_max} bytes after decompression")
    if ratio_max and size > RATIO_FREE_BYTES and size > ratio_max * wire_bytes:
        raise TooDense(f"more than {ratio_max} times its size after decompression")


def _check_members(members: int, size: int, free: int) -> None:
    if members > free + size // _MEMBER_BYTES:
        raise TooDense("too many members with next to nothing in them")


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
        """The input behind the end."""
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
        piece = stream.decompress(stream.unconsumed_tail + wire, INFLATED_PIECE_BYTES)
        # A full piece may have left output inside zlib although it used all its input.
        self.more = bool(stream.unconsumed_tail) or len(piece) == INFLATED_PIECE_BYTES
        return piece

    @property
    def ended(self) -> bool:
        return self._stream.eof

    @property
    def rest(self) -> bytes:
        return self._stream.unused_data


class _Zstd:
    def __init__(self, window: int) -> None:
        log = max((window - 1).bit_length(), _WINDOW_LOG_MIN)
        options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: log}
        self._stream = zstd.ZstdDecompressor(options=options)

    def take(self, wire: bytes) -> bytes:
        return self._stream.decompress(wire, INFLATED_PIECE_BYTES)

    @property
    def more(self) -> bool:
        return not self._stream.eof and not self._stream.needs_input

    @property
    def ended(self) -> bool:
        return self._stream.eof

    @property
    def rest(self) -> bytes:
        return self._stream.unused_data


def zstd_window(head: bytes) -> int | None:
    """The window that a zstd frame needs, in bytes; `None` if its head is not there yet.

    It is 0 for a frame that is skipped, and for what is no frame. See RFC 8878, 3.1.1.1.

    Args:
        head: the beginning of the frame; 18 bytes are always enough.
    """
    if len(head) < len(_ZSTD_MAGIC):
        is_begun = _ZSTD_MAGIC.startswith(head) or _ZSTD_SKIPPED.startswith(head[1:])
        return None if is_begun else 0
    if not head.startswith(_ZSTD_MAGIC):
        return 0
    if len(head) < 6:
        return None
    descriptor, window = head[4], head[5]
    if not descriptor & 0x20:
        base = 1 << (_WINDOW_LOG_MIN + (window >> 3))
        return base + (base >> 3) * (window & 7)
    # A single segment: its window is its content, whose size stands behind the dictionary's id.
    at = 5 + (0, 1, 2, 4)[descriptor & 3]
    width = 1 << (descriptor >> 6)
    if len(head) < at + width:
        return None
    size = int.from_bytes(head[at : at + width], "little")
    return size + 256 if width == 2 else size


# -- snappy ----------------------------------------------------------------------------------------
#
# One block, as most clients send it (Fluent Bit, Loki, Prometheus), or the framed form, which has a
# mark at its beginning; https://github.com/google/snappy, format_description.txt and
# framing_format.txt. A copy in a block may reach back to the block's beginning, so a body is read
# whole. It says its size itself, which is checked before anything is allocated.


@cache
def has_snappy() -> bool:
    """Returns True if the package for snappy, the extra `snappy`, is installed."""
    return find_spec("cramjam") is not None


def measure_snappy(wire: bytes, bytes_max: int, ratio_max: int = 0) -> int:
    """Returns the size of a body after decompression, as the body says it.

    Args:
        wire: the whole body.
        bytes_max: see `Inflater`.
        ratio_max: see `Inflater`.

    Raises:
        Corrupt: it cannot be true.
        TooMuch: it is more than `bytes_max`.
        TooDense: it is above `ratio_max`, or there is next to nothing in its chunks.
    """
    if not wire.startswith(_SNAPPY_STREAM):
        size = _measure_block(wire, 0, len(wire))
        _check_size(size, len(wire), bytes_max, ratio_max)
        return size
    at = size = chunks = 0
    while at < len(wire):
        begin = at + 4
        kind, at = wire[at], begin + int.from_bytes(wire[at + 1 : begin], "little")
        if at > len(wire) or begin > len(wire):
            raise _not_snappy("it is cut off")
        if kind < 2:  # compressed or not, behind a checksum
            begin += 4
            chunk = at - begin if kind else _measure_block(wire, begin, at)
            if not 0 <= chunk <= _SNAPPY_CHUNK:
                raise _not_snappy("a chunk has more than 64 KiB")
            size += chunk
        chunks += 1
        _check_members(chunks, size, MEMBERS_FREE)
        _check_size(size, len(wire), bytes_max, ratio_max)
    return size


def _measure_block(wire: bytes, begin: int, end: int) -> int:
    """The number in front of a block, seven bits a byte, the lowest ones first."""
    size = shift = 0
    for byte in wire[begin : min(end, begin + _VARINT_BYTES)]:
        size |= (byte & 0x7F) << shift
        if byte < 0x80:
            if size > _SNAPPY_RATIO * (end - begin):
                raise _not_snappy("its length is not that of its content")
            return size
        shift += 7
    raise _not_snappy("it has no length")


def inflate_snappy(wire: bytes, size: int) -> bytes:
    """Returns a body of a size that was measured, after decompression.

    Raises:
        Corrupt: it is not valid.
    """
    import cramjam  # noqa: PLC0415  an extra

    body = bytearray(size)
    framed = wire.startswith(_SNAPPY_STREAM)
    inflate = cramjam.snappy.decompress_into if framed else cramjam.snappy.decompress_raw_into
    try:
        written = inflate(wire, body)
    except cramjam.DecompressionError:
        raise _not_snappy("it can't be decompressed") from None
    if written != size:
        raise _not_snappy("its length is not that of its content")
    return bytes(body)


def _not_snappy(what: str) -> Corrupt:
    return Corrupt(f"the snappy body is not valid: {what}")


def mib(size: int) -> str:
    """A size as errors show it."""
    return f"{size / 1024**2:g} MiB"
