"""`Content-Encoding`: what the header says, and a whole body decompressed within its bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.sources.http import problem
from ingestd.sources.http.problem import Problem
from ingestd.sources.inflate import Corrupt, Inflater, TooMuch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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


def inflate(
    encoding: str, bytes_max: int, wire: bytes, take: Callable[[bytes], None]
) -> Iterator[None]:
    """A whole body in steps: each hands one piece to `take`.

    Raises:
        Problem: 400 if it is corrupt or cut off, 413 if it is too much.
    """
    inflater = Inflater(encoding, bytes_max)
    try:
        for piece in inflater.feed(wire):
            take(piece)
            yield
        inflater.finish()
    except Corrupt as error:
        raise Problem(problem.CORRUPT, str(error)) from None
    except TooMuch:
        detail = f"more than http.body_bytes_max = {bytes_max} after decompression"
        raise Problem(problem.BODY_TOO_LARGE, detail) from None
