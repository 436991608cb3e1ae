"""Chunks on their way to the queue: reading in order, the memory budget, unsettled chunks."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ingestd.base.record import Span
    from ingestd.journal.interface import Chunk, Journal


class UnsettledChunks:
    """Counts down the unsettled records of each chunk that is in work.

    A chunk enters when it is taken into the queue or when a recovered batch names it, so the
    table is as large as what is in work, never as what is pending.
    """

    def __init__(self) -> None:
        self._chunks: dict[int, tuple[int, int, float]] = {}

    def __len__(self) -> int:
        return len(self._chunks)

    @property
    def oldest(self) -> float | None:
        """Loop time at which the oldest chunk was accepted."""
        for _, _, since in self._chunks.values():
            return since
        return None

    def add(self, chunk: int, count: int, *, size: int, since: float) -> None:
        """`count` more unsettled records of a chunk that takes `size` bytes in the journal."""
        known = self._chunks.get(chunk)
        self._chunks[chunk] = (
            (count, size, since) if known is None else (known[0] + count, *known[1:])
        )

    def settle(self, spans: Iterable[Span]) -> tuple[list[int], int]:
        """Counts records as settled.

        Returns:
            The chunks that are finished by this, and the sum of their bytes.
        """
        finished, freed = [], 0
        for span in spans:
            count, size, since = self._chunks[span.chunk]
            if count > span.count:
                self._chunks[span.chunk] = (count - span.count, size, since)
            else:
                del self._chunks[span.chunk]
                finished.append(span.chunk)
                freed += size
        return finished, freed


# -- reading in order ------------------------------------------------------------------------------
#
# A chunk that has just been committed is still in memory, and usually goes on from there. When the
# pipeline falls behind, fresh chunks are only remembered by id, and are read back later. So a
# burst is bounded by the disk, and `MemoryBudget` bounds what is in memory.

READ_BYTES = 4 << 20
"""How much one read brings back from disk."""
FRESH_MAX = 4096
"""Most chunks in memory here: `MemoryBudget` counts payloads, and small ones take more."""


class MemoryBudget:
    """Counts the bytes of records that a pipeline holds in memory, and waits for room."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes = 0
        self._freed = asyncio.Event()

    def has(self, size: int) -> bool:
        """Returns True if `size` more bytes fit; anything fits into an empty budget."""
        return self.bytes == 0 or self.bytes + size <= self.bytes_max

    def take(self, size: int) -> None:
        """Counts bytes in."""
        self.bytes += size

    def free(self, size: int) -> None:
        """Counts bytes out."""
        self.bytes -= size
        self._freed.set()

    async def wait(self, size: int) -> None:
        """Returns when `size` more bytes fit."""
        while not self.has(size):
            self._freed.clear()
            await self._freed.wait()


class ChunkReader:
    """Gives each chunk once, in order.

    Args:
        journal: where chunks are read back from.
        room: bounds what is in memory; the caller frees what it got from `next`.
        first: the first chunk to give.
        last: the newest chunk that is in the journal.

    Attributes:
        on_push: called with each chunk that has become durable, while a client looks at them.
    """

    on_push: Callable[[Chunk], None] | None = None

    def __init__(self, journal: Journal, room: MemoryBudget, *, first: int, last: int) -> None:
        self._journal = journal
        self._room = room
        self._next = first
        self._last = last
        self._fresh: deque[Chunk] = deque()
        self._came = asyncio.Event()
        self._given = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Chunks that have not been given yet."""
        return max(0, self._last - self._next + 1)

    @property
    def given(self) -> int:
        """The newest chunk that has been given."""
        return self._next - 1

    @property
    def could_give(self) -> bool:
        """Returns True if there is a chunk to give, and memory for it if it has to be read back."""
        return bool(self._fresh) or (self.waiting > 0 and self._has_room())

    def push(self, chunk: Chunk) -> None:
        """A chunk that has just become durable; on the loop, in order."""
        contiguous = self._fresh[-1].id if self._fresh else self._next - 1
        size = chunk.records.held_bytes
        fits = len(self._fresh) < FRESH_MAX and self._room.has(size)
        if contiguous == chunk.id - 1 and fits:
            self._room.take(size)
            self._fresh.append(chunk)
        self._last = chunk.id
        self._came.set()
        if self.on_push is not None:
            self.on_push(chunk)

    async def next(self) -> Chunk:
        """The next chunk; its payload's bytes are counted in the room."""
        while True:
            if self._fresh:
                chunk = self._fresh.popleft()
                self._next = chunk.id + 1
                self._given.set()
                return chunk
            if self._next <= self._last:
                await self._read_back()
            else:
                self._came.clear()
                await self._came.wait()

    async def emptied(self) -> None:
        """Returns when everything that is in the journal has been given."""
        while self.waiting:
            self._given.clear()
            await self._given.wait()

    def _read_bytes(self) -> int:
        return min(READ_BYTES, self._room.bytes_max)

    def _has_room(self) -> bool:
        return self._room.has(self._read_bytes())

    async def _read_back(self) -> None:
        """Fills `_fresh` from disk; nothing is pushed to it meanwhile, as it is behind."""
        first, last = self._next, self._last
        await self._room.wait(self._read_bytes())
        chunks = await self._journal.read(first, READ_BYTES)
        if not chunks:
            self._given.set()
            self._next = last + 1  # rows that are gone; the ledger's own count will tell
            return
        for chunk in chunks:
            self._room.take(chunk.records.held_bytes)
            self._fresh.append(chunk)
