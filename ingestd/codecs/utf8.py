"""UTF-8 of whole bodies, a piece at a time. No I/O.

As one text a body takes up to four times its size: one emoji is enough.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PIECE_BYTES = 64 * 1024


def find_fault(text: bytes) -> int:
    """Returns the place of the first byte that is not UTF-8; -1 if there is none."""
    if text.isascii():
        return -1
    at, size, view = 0, len(text), memoryview(text)
    while at < size:
        end = at + _PIECE_BYTES
        try:
            at += codecs.utf_8_decode(view[at:end], "strict", end >= size)[1]
        except UnicodeDecodeError as error:
            return at + error.start
    return -1


def replace_faults(text: bytes) -> bytes:
    """Replaces what is not UTF-8 by U+FFFD, as `bytes.decode` does."""
    return text if find_fault(text) < 0 else b"".join(_replaced(text))


def size_replaced(text: bytes) -> int:
    """Returns the bytes of `replace_faults(text)`; one that is not UTF-8 becomes three."""
    return len(text) if find_fault(text) < 0 else sum(map(len, _replaced(text)))


def _replaced(text: bytes) -> Iterator[bytes]:
    at, size, view = 0, len(text), memoryview(text)
    while at < size:
        end = at + _PIECE_BYTES
        piece, read = codecs.utf_8_decode(view[at:end], "replace", end >= size)
        yield piece.encode()
        at += read
