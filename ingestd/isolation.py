"""Who is being split, and whether the handler works at all: what `execution.retry` decides by.

Kept in memory only. After a restart a batch that is a part of another one is simply a batch with
many attempts, and evidence has to come anew.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ingestd.execution.retry import Standing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ingestd.batching.batch import Batch
    from ingestd.handlers.outcome import Result


class Isolation:
    """One pipeline's view of its failing batches. A family is what is left of one split batch."""

    def __init__(self) -> None:
        self._succeeded_at = float("-inf")
        self._families: Counter[int] = Counter()

    @property
    def families(self) -> int:
        """Batches that are being split at the moment."""
        return len(self._families)

    def standing(self, batch: Batch, result: Result, now: float) -> Standing:
        """Takes note of a try, and says where its batch stands.

        Args:
            batch: with this try counted.
            result: of the try.
            now: loop time.
        """
        if result.failure is None:
            if len(result.rejections) + len(result.retries) < batch.count:
                self._succeeded_at = now
        else:
            if batch.failing_since is None:
                batch.failing_since = now
            batch.alone += batch.count == 1
        since = now if batch.failing_since is None else batch.failing_since
        return Standing(
            count=batch.count,
            attempts=batch.attempts,
            alone=batch.alone,
            proven=self._succeeded_at > since,
            may_split=all(family == batch.family for family in self._families),
        )

    def split(self, batch: Batch, parts: Iterable[Batch]) -> None:
        """A batch is being replaced by its parts; `settled(batch)` follows."""
        family = batch.number if batch.family is None else batch.family
        for part in parts:
            part.family = family
            part.failing_since = batch.failing_since
            self._families[family] += 1

    def settled(self, batch: Batch) -> None:
        """A batch is over, or has been replaced."""
        if batch.family is not None:
            self._families[batch.family] -= 1
            if not self._families[batch.family]:
                del self._families[batch.family]
