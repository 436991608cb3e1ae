"""`Content-Encoding`: what the header says, and a whole body decompressed within its bounds."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

from ingestd.sources.http import problem
from ingestd.sources.http.problem import Problem
from ingestd.sources.inflate import PIECE_BYTES, Corrupt, Inflater, TooDense, TooMuch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ENCODINGS = "gzip, deflate, zstd, identity"


def name_encoding(headers: Sequence[str]) -> str:
    """`identity`, `gzip`, `deflate` or `zstd`, from all the `Content-Encoding`s of a request.

    Raises:
        Problem: 415 for any other, and for more than one.
    """
    if not headers:
        return "identity"
    name = headers[0].strip().lower() if len(headers) == 1 else ", ".join(headers)
    name = {"": "identity", "x-gzip": "gzip"}.get(name, name)
    if name in ("identity", "gzip", "deflate", "zstd"):
        return name
    detail = f"{name[:80]!r}; one of {ENCODINGS} is read"
    raise Problem(problem.ENCODING, detail, headers={"Accept-Encoding": ENCODINGS})


def inflate_short(encoding: str, wire: bytes, bytes_max: int) -> bytes | None:
    """A whole body if it is short, as most are; nothing if it is not, or there is a fault in it.

    A long one is begun anew, in a thread: its window and output are there only when its turn comes.
    """
    inflater = Inflater(encoding, min(PIECE_BYTES, bytes_max))
    try:
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
        encoding: `gzip`, `deflate` or `zstd`.
        wire: as it came.
        bytes_max: `http.body_bytes_max`.
        ratio_max: `http.inflate_ratio_max`.
        take: called with the size of each piece before there is another.

    Raises:
        Problem: 400 if it is corrupt or cut off, 413 if it is too much.
    """
    inflater = Inflater(encoding, bytes_max, ratio_max)
    with BytesIO() as sink:
        try:
            for piece in inflater.feed(wire):
                take(len(piece))
                sink.write(piece)
            inflater.finish()
        except Corrupt as error:
            raise Problem(problem.CORRUPT, str(error)) from None
        except TooDense as error:
            raise Problem(problem.RATIO, str(error)) from None
        except TooMuch:
            detail = f"more than http.body_bytes_max = {bytes_max} after decompression"
            raise Problem(problem.BODY_TOO_LARGE, detail) from None
        return sink.getvalue()
