"""Which chunks still hold unsettled records: what `Settlement.finished` is made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ingestd.base.record import Span


class Outstanding:
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
        """When the chunk that entered first was accepted, loop time."""
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
