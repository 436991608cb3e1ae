"""A body as it comes: bounded, decompressed in pieces, and never silent for long."""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiohttp
import async_timeout

from ingestd.sources.fetch.failure import Again, GivenUp, explain
from ingestd.sources.inflate import Corrupt, Inflater, TooMuch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from ingestd.base.settings import FetchSettings

_NO_BOUND = 1 << 62


async def pieces(
    content: aiohttp.StreamReader,
    encoding: str,
    settings: FetchSettings,
    *,
    endless: bool,
    read: Callable[[int], None],
) -> AsyncGenerator[bytes, None]:
    """What is in a body, a piece at a time; each is there as soon as it came.

    Args:
        content: the body, unread.
        encoding: `identity`, or how it is compressed.
        settings: the bounds.
        endless: it is a stream, whose bytes are not bounded.
        read: called with the size of each read.

    Raises:
        Again: it was cut short, is corrupt, or nothing came for too long.
        GivenUp: it is larger than it may be.
    """
    inflater = None
    if encoding != "identity":
        inflater = Inflater(encoding, _NO_BOUND if endless else settings.bytes_max)
    bytes_max = settings.wire_bytes_max
    if inflater is None:
        bytes_max = min(bytes_max, settings.bytes_max)
    total = 0
    try:
        while wire := await _read(content, settings.silence_timeout):
            total += len(wire)
            read(len(wire))
            if total > bytes_max and not endless:
                name = "bytes_max" if bytes_max < settings.wire_bytes_max else "wire_bytes_max"
                raise GivenUp(f"it is larger than fetch.{name}")
            if inflater is None:
                yield wire
            else:
                for piece in inflater.feed(wire):
                    yield piece
        if inflater is not None and total:
            inflater.finish()
    except Corrupt as error:
        raise Again(str(error)) from None
    except TooMuch:
        raise GivenUp("it is larger than fetch.bytes_max") from None


async def _read(content: aiohttp.StreamReader, silence: float) -> bytes:
    try:
        async with async_timeout.timeout(silence):
            return await content.readany()
    except TimeoutError:
        raise Again("no byte came within fetch.silence_timeout") from None
    except (aiohttp.ClientError, OSError, RuntimeError) as error:
        raise explain(error) from None
