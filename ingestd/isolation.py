"""Keeps what is known of failing batches: what `execution.retry` and `execution.outage` decide by.

A family is what is left of one batch that is being split. How long a batch has been failing and
how many of its tries count is written down with each postponed try; the rest is kept in memory
only. After a restart a part of another batch is simply a batch with many attempts, time in which
the daemon did not run does not count as failing, and evidence has to come anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.execution.retry import Standing, counted_when_proven, spends_try

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ingestd.batching.batch import Batch
    from ingestd.execution.outage import Outage
    from ingestd.handlers.outcome import Result


class Isolation:
    """One pipeline's view of its failing batches.

    Args:
        outage: whether the handler works; is told what became of each try.
        attempts_max: `retry.attempts_max`.
    """

    def __init__(self, outage: Outage, attempts_max: int) -> None:
        self._outage = outage
        self._attempts_max = attempts_max
        self._families: dict[int, dict[int, int]] = {}  # parts of each: records by number
        self._failing: dict[int, Batch] = {}
        self._begun = 0  # successes when a whole batch was split last

    @property
    def families(self) -> int:
        """Batches that are being split at the moment."""
        return len(self._families)

    def standing(self, batch: Batch, result: Result, now: float) -> Standing:
        """Takes note of a try, and says where its batch stands.

        Args:
            batch: with this try among its attempts.
            result: of the try.
            now: loop time.
        """
        outage = self._outage
        if result.failure is not None or result.retries:
            self._count(batch, now, spent=spends_try(result))
        if result.failure is not None:
            self._failing[batch.number] = batch
            was = outage.is_outage
            outage.failed(
                batch.number,
                batch.number if batch.family is None else batch.family,
                now,
                fresh=batch.first_failed == outage.successes,
                after=result.failure.after,
            )
            if outage.is_outage and not was:
                self._forgive()
        elif len(result.rejections) + len(result.retries) < batch.count:
            outage.succeeded()
        elif self._shows_recovery(batch, result):
            outage.recovered()
        else:
            outage.answered(batch.number)
        return Standing(
            count=batch.count,
            attempts=batch.attempts,
            counted=batch.counted,
            age=0.0 if batch.failing_since is None else now - batch.failing_since,
            proven=batch.first_failed is not None and outage.successes > batch.first_failed,
            paused=outage.paused,
            may_split=self._may_split(batch),
            is_part=batch.family is not None,
        )

    def _shows_recovery(self, batch: Batch, result: Result) -> bool:
        """Whether an answer that processed nothing ends an outage; `execution.outage` says when."""
        if result.retries or all(one.reason != "rejected" for one in result.rejections):
            return False
        failed = batch.number in self._failing
        if len(self._failing) == failed:
            return True
        return failed and batch.family is None and batch.last_failed == self._outage.successes

    def _count(self, batch: Batch, now: float, *, spent: bool) -> None:
        successes = self._outage.successes
        if batch.failing_since is None:
            batch.failing_since = now
        if batch.first_failed is None:
            batch.first_failed = batch.last_failed = successes
            batch.counted_before = batch.counted
        elif batch.last_failed != successes:
            if batch.last_failed == batch.first_failed:  # from now on it is proven
                batch.counted = counted_when_proven(batch.counted, self._attempts_max)
            batch.last_failed, batch.counted_before = successes, batch.counted
        if spent and not self._outage.is_outage:
            batch.counted += 1

    def _forgive(self) -> None:
        """What failed since the last success was the outage's."""
        for batch in self._failing.values():
            if batch.last_failed == self._outage.successes:
                batch.counted = batch.counted_before

    def _may_split(self, batch: Batch) -> bool:
        """The smallest part that there is; without one, one whole batch after each success.

        An outage makes few parts. A part of one record can't be split: it may be a bad one, for
        which the evidence has to come from other batches.
        """
        parts = [n for family in self._families.values() for n in family.values() if n > 1]
        if batch.family is not None:
            return batch.count <= min(parts, default=batch.count)
        return not parts and (not self._families or self._begun < self._outage.successes)

    def split(self, batch: Batch, parts: Iterable[Batch]) -> None:
        """A batch is being replaced by its parts; `settled(batch)` follows."""
        family = batch.number if batch.family is None else batch.family
        if batch.family is None:
            self._begun = self._outage.successes
        for part in parts:
            part.family = family
            self._families.setdefault(family, {})[part.number] = part.count
            self._failing[part.number] = part

    def settled(self, batch: Batch) -> None:
        """A batch is over, or has been replaced."""
        if batch.family is not None:
            parts = self._families[batch.family]
            del parts[batch.number]
            if not parts:
                del self._families[batch.family]
        if self._failing.pop(batch.number, None) is not None and not self._failing:
            self._outage.nothing_fails()
