"""Reads the body of a download: bounded, decompressed in pieces, with a timeout, and whole.

A body is whole if its length agrees, if its chunks ended properly, or if what is compressed in it
ended. Only where its head announces none of these may the end of the connection be its end: then
some of it must have come, and what came is all that can be known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import aiohttp
import async_timeout

from ingestd.codecs.compression import Corrupt, Inflater, TooMuch, WindowTooLarge, mib
from ingestd.sources.fetch.failure import DownloadFailed, ResponseMismatch, TryAgain, explain

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from ingestd.sources.fetch.concurrency import InflightBudget
    from ingestd.sources.fetch.settings import FetchSettings

_NO_BOUND = 1 << 62
_WINDOW_MIN = 64 * 1024


class Ending(NamedTuple):
    """Facts that tell the end of a body.

    Attributes:
        length: bytes as they are sent, if its head or its range says so.
        framed: its head announces its end: by a length, or by chunks.
        endless: it is a stream, which may end anywhere, and whose bytes are not bounded.
    """

    length: int | None
    framed: bool
    endless: bool = False


async def pieces(
    content: aiohttp.StreamReader,
    encoding: str,
    settings: FetchSettings,
    *,
    ending: Ending,
    windows: InflightBudget,
    read: Callable[[int], None],
) -> AsyncGenerator[bytes, None]:
    """Yields the decompressed body in pieces, each as soon as it arrives.

    Args:
        content: the body, unread.
        encoding: `identity`, or how it is compressed.
        settings: the bounds.
        ending: facts that tell its end.
        windows: the memory for zstd windows.
        read: called with the size of each read.

    Raises:
        TryAgain: it was cut short, is corrupt, or nothing came for too long.
        DownloadFailed: it is larger than it may be.
    """
    inflater = None
    if encoding != "identity":
        bytes_max = _NO_BOUND if ending.endless else settings.decompressed_bytes_max
        inflater = Inflater(encoding, bytes_max, window_max=0)
    window = _Window(windows, settings.window_max, waits=not ending.endless)
    total = 0
    try:
        while wire := await _read(content, settings.silence_timeout):
            total += len(wire)
            read(len(wire))
            _check_size(total, ending, settings, packed=inflater is not None)
            if inflater is None:
                yield wire
                continue
            more: bytes | None = wire
            while more is not None:
                try:
                    for piece in inflater.feed(more):
                        yield piece
                    more = None
                except WindowTooLarge as large:
                    inflater.window_max = await window.grow(large.window)
                    more = b""
        if not ending.endless:
            _check_end(total, ending)
        if inflater is not None and total:
            inflater.finish()
    except Corrupt as error:
        raise TryAgain(str(error)) from None
    except TooMuch:
        raise DownloadFailed("it is larger than fetch.decompressed_bytes_max") from None
    finally:
        window.close()


def _check_size(total: int, ending: Ending, settings: FetchSettings, *, packed: bool) -> None:
    """Raises if more came than may come."""
    if ending.endless:
        return
    if ending.length is not None and total > ending.length:
        raise ResponseMismatch("more came than its Content-Range says")
    if total > settings.response_bytes_max:
        raise DownloadFailed("it is larger than fetch.response_bytes_max")
    if total > settings.decompressed_bytes_max and not packed:
        raise DownloadFailed("it is larger than fetch.decompressed_bytes_max")


def _check_end(total: int, ending: Ending) -> None:
    """Raises if less came than has to come; see the module."""
    if ending.length is not None and total < ending.length:
        raise TryAgain(f"the body was cut short: {total} of {ending.length} bytes came")
    if not total and not ending.framed:
        raise TryAgain("the connection was closed behind the head, which gives no length")


class _Window:
    """The memory that one body has for its zstd window.

    Args:
        budget: of all bodies.
        bytes_max: of one.
        waits: for memory of others; a stream may never release it.
    """

    def __init__(self, budget: InflightBudget, bytes_max: int, *, waits: bool) -> None:
        self._budget = budget
        self._bytes_max = bytes_max
        self._waits = waits
        self._held = 0

    async def grow(self, size: int) -> int:
        """Takes memory for a window, after that of the frame before is released.

        Returns:
            Bytes that a window may need now.
        """
        if size > self._bytes_max:
            raise DownloadFailed(
                f"it needs a zstd window of {mib(size)}, more than "
                f"fetch.window_max = {mib(self._bytes_max)}"
            )
        self.close()
        size = max(size, _WINDOW_MIN)
        while self._budget.used and not self._budget.has(size):
            if not self._waits:
                raise TryAgain("there is no memory left for its zstd window (see fetch.window_max)")
            await self._budget.freed()
        self._budget.take(size)
        self._held = size
        return size

    def close(self) -> None:
        """Releases the memory."""
        held, self._held = self._held, 0
        self._budget.take(-held)


async def _read(content: aiohttp.StreamReader, silence: float) -> bytes:
    try:
        async with async_timeout.timeout(silence):
            return await content.readany()
    except TimeoutError:
        raise TryAgain("no byte came within fetch.silence_timeout") from None
    except (aiohttp.ClientError, OSError, RuntimeError) as error:
        raise explain(error) from None
