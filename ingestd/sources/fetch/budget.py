"""Bytes that all URLs hold together: read and not committed, or for decompression."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from ingestd.sources.inflate import WINDOW_MAX

if TYPE_CHECKING:
    from ingestd.sources.fetch.settings import FetchSettings

DOWNLOADS_AT_ONCE = 4
"""So many downloads may have the window that any zstd body may need; others wait for theirs."""


class Budget:
    """Counts what is held.

    Args:
        bytes_max: so much fits; whoever takes sees to it.
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
        """Whether so many more fit."""
        return self._used + size <= self._bytes_max

    def take(self, size: int) -> None:
        """So many come, or go if it is less than none."""
        self._used += size
        if size < 0:
            self.wake()

    def wake(self) -> None:
        """Has everybody who waits look again."""
        self._moved.set()

    async def freed(self) -> None:
        """Waits until some have gone."""
        self._moved.clear()
        await self._moved.wait()


class Memory(NamedTuple):
    """What zstd windows may take.

    Attributes:
        downloads: of bodies with an end, which wait for each other.
        streams: of those without one, which would wait for ever.
    """

    downloads: Budget
    streams: Budget


def memory_for(settings: FetchSettings) -> Memory:
    """The bounds: a large window is the only one while it is held."""
    downloads = max(settings.window_max, DOWNLOADS_AT_ONCE * WINDOW_MAX)
    return Memory(Budget(downloads), Budget(max(settings.window_max, WINDOW_MAX)))
