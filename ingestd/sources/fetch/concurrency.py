"""Bounds of downloads: slots by host, bytes in flight, decompression memory, and waits."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, NamedTuple

from ingestd.codecs.compression import WINDOW_MAX

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ingestd.sources.fetch import FetchSettings


class SlotLease:
    """A slot of a running download; released once, at its end or before."""

    def __init__(self, *semaphores: asyncio.Semaphore) -> None:
        self._semaphores = semaphores

    def release(self) -> None:
        """Releases the slot; does nothing the second time."""
        semaphores, self._semaphores = self._semaphores, ()
        for semaphore in semaphores:
            semaphore.release()


class DownloadSlots:
    """Bounds the downloads that run at once.

    Args:
        most: in all.
        most_per_host: for each host.
    """

    def __init__(self, most: int, most_per_host: int) -> None:
        self._all = asyncio.Semaphore(most)
        self._hosts: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(most_per_host)
        )

    @asynccontextmanager
    async def lease(self, host: str) -> AsyncIterator[SlotLease]:
        """Waits for a slot for a download from a host."""
        # The host first: a download that waits for it does not keep others from running.
        await self._hosts[host].acquire()
        try:
            await self._all.acquire()
        except BaseException:
            self._hosts[host].release()
            raise
        lease = SlotLease(self._all, self._hosts[host])
        try:
            yield lease
        finally:
            lease.release()


# -- bytes in flight -------------------------------------------------------------------------------

DOWNLOADS_AT_ONCE = 4
"""Downloads that may hold the usual zstd window at once; others wait."""


class InflightBudget:
    """Counts bytes that all URLs hold together: read and not committed, or for decompression.

    Args:
        bytes_max: the bound; callers of `take` check it.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._used = 0
        self._moved = asyncio.Event()

    @property
    def used(self) -> int:
        """Bytes that are held."""
        return self._used

    def has(self, size: int) -> bool:
        """Returns True if so many more fit."""
        return self._used + size <= self._bytes_max

    def take(self, size: int) -> None:
        """Adds bytes, or releases them if negative."""
        self._used += size
        if size < 0:
            self.wake()

    def wake(self) -> None:
        """Wakes all waiters."""
        self._moved.set()

    async def freed(self) -> None:
        """Waits until some bytes are released."""
        self._moved.clear()
        await self._moved.wait()


class DecompressionMemory(NamedTuple):
    """Memory of zstd windows.

    Attributes:
        downloads: of bodies with an end, which wait for each other.
        streams: of those without one, which would wait for ever.
    """

    downloads: InflightBudget
    streams: InflightBudget


def memory_for(settings: FetchSettings) -> DecompressionMemory:
    """The bounds: a large window is the only one while it is held."""
    downloads = max(settings.window_max, DOWNLOADS_AT_ONCE * WINDOW_MAX)
    return DecompressionMemory(
        InflightBudget(downloads), InflightBudget(max(settings.window_max, WINDOW_MAX))
    )


# -- waits between requests ------------------------------------------------------------------------

RECONNECT_MIN = 0.1
"""Shortest wait before a stream that ended is requested again, seconds."""


def retry_after(text: str | None, date: str | None, now: float, longest: float) -> float | None:
    """Seconds that a server's `Retry-After` asks for; `None` if there is none.

    Args:
        text: the header: seconds, or a date.
        date: the answer's `Date`: the server's clock may be another one than ours.
        now: our clock, seconds since the epoch.
        longest: `fetch.retry_after_max`, seconds.
    """
    text = (text or "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:12]), longest)
    at = _moment(text)
    if at is None:
        return None
    there = _moment(date or "")
    return min(max(0.0, at - (now if there is None else there)), longest)


def reconnect(asked: float | None, first: float, longest: float) -> float:
    """Seconds before a stream that ended is requested again.

    Args:
        asked: what the stream's `retry` said, seconds.
        first: `fetch.backoff`, if it said nothing.
        longest: `fetch.backoff_max`.
    """
    return max(RECONNECT_MIN, min(first if asked is None else asked, longest))


def _moment(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
