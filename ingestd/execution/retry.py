"""Retry decisions: settle, try again, split, or give up; and the splitter of failing batches.

A batch that failed `attempts_max` times is split into halves, and those again when they fail, until
the guilty records stand alone and become dead letters: O(bad * log n) calls.

A record is given up only if something else of its pipeline has succeeded since it first failed (it
is *proven* that the handler works), or after `give_up_after` seconds of failing without that; a
batch that is so old is split, too, unless the handler is paused. Without such
evidence a failure may be the handler's own (its database is down), and the batch waits. Then

* one batch of a pipeline at a time is split all the same, and of its parts only the smallest: a bad
  record in an otherwise idle pipeline is found because its neighbours succeed, which is the
  evidence, and an outage makes few parts. A whole batch is split after `attempts_max` tries and
  never earlier, because its parts have other ids; a part after `PART_TRIES`;
* tries count up to a few less than `attempts_max`, so that a batch which has waited through an
  outage alone has some left when there is evidence at last (`counted_when_proven`);
* tries in an outage (see `outage.py`) do not count at all, and while the handler is paused no batch
  is judged: what was proven before may not be true any more.

`raise Retry` is neither: it spends no try. It is bounded by `give_up_after` alone.

`raise Unavailable` is like any other failure, but it takes evidence and `give_up_after` to give a
record up: the sink said that none is at fault. With a time to wait it spends no try, as `Retry`,
and nothing gives its records up. `raise Blocked` is known to be the sink's at once.
Its batch stays whole and waits, unless something else has succeeded since it first failed: then it
is judged like any other, for then it is this batch alone that the sink refuses.

The backoff is exponential with full jitter, see `ingestd/base/rate.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from ingestd.base import rate
from ingestd.handlers.outcome import BLOCKED, SAID, UNAVAILABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ingestd.base.batch import SealedBatch
    from ingestd.execution.outage import Outage
    from ingestd.handlers.outcome import Failure, Result


LEFT_WHEN_PROVEN = 3
"""Tries that a batch has left when there is evidence, however often it failed before."""
PART_TRIES = 3
"""Tries after which a part of a batch may be split further while nothing succeeds."""
_STEPS = 8  # of an octave, to which waits are rounded


class RetryRule(NamedTuple):
    """The settings that decide.

    Attributes:
        attempts_max: tries in all, the first included.
        backoff: seconds; the bound of the first wait.
        backoff_max: seconds; the bound of every wait.
        give_up_after: seconds of failing after which a record is given up without evidence.
    """

    attempts_max: int
    backoff: float
    backoff_max: float
    give_up_after: float = math.inf


class RetryContext(NamedTuple):
    """Facts about a batch when a try of it has ended.

    Attributes:
        count: its records.
        attempts: tries made, this one included; at least 1.
        counted: of these, tries that count against it.
        age: seconds since it first failed.
        proven: something else has succeeded since then.
        paused: the handler seems to fail for everyone at the moment.
        may_split: it may be split without evidence.
        is_part: another batch was split for it, in search of evidence or of a bad record.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count
    attempts: int
    counted: int
    age: float = 0.0
    proven: bool = True
    paused: bool = False
    may_split: bool = True
    is_part: bool = False


class DeadLettered(NamedTuple):
    """A record that becomes a dead letter."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    reason: str
    error: str
    traceback: str = ""


class RetryRecords(NamedTuple):
    """Records, by index, that become a batch of their own, due after some seconds."""

    indices: tuple[int, ...]
    after: float


class RetryBatch(NamedTuple):
    """The whole batch again, unchanged, after some seconds; `asked` for by the handler or not."""

    after: float
    failure: Failure
    asked: bool = False


class Resolve(NamedTuple):
    """The batch is over: what is neither given up nor tried again is done."""

    given_up: tuple[DeadLettered, ...]
    again: tuple[RetryRecords, ...]


def backoff(attempts: int, rule: RetryRule, random: Callable[[], float]) -> float:
    """Seconds to wait after `attempts` tries; `random` gives numbers in [0, 1)."""
    return rate.backoff(attempts, rule.backoff, rule.backoff_max, random)


def spends_try(result: Result) -> bool:
    """Returns True if the try counts; one after which the batch is asked for again does not."""
    return result.failure is None or not result.failure.is_asked


def rank(count: int, attempts: int, attempts_max: int, *, is_part: bool) -> int:
    """The place of a waiting batch among those that are tried while the handler is paused.

    First the parts of a batch that can be split further, because one of them may succeed; then the
    batch that is nearest to be split; then all others, which take turns by the time they are due.
    """
    if is_part and count > 1:
        return 0
    others = attempts_max + 1
    return others if is_part or attempts >= attempts_max else attempts_max - attempts


def counted_when_proven(counted: int, attempts_max: int) -> int:
    """The tries that still count when there is evidence for the first time."""
    return min(counted, max(1, attempts_max - LEFT_WHEN_PROVEN))


def rounded(after: float) -> float:
    """A wait, rounded up by at most an eighth: records that wait about as long share a batch."""
    if after <= 0:
        return 0.0
    step = 2.0 ** (math.frexp(max(after, 1.0))[1] - 1) / _STEPS
    return math.ceil(after / step) * step


def decide(
    result: Result, context: RetryContext, *, rule: RetryRule, random: Callable[[], float]
) -> Resolve | RetryBatch:
    """Decides on a result.

    Args:
        result: what the worker said.
        context: of the batch.
        rule: the settings.
        random: gives numbers in [0, 1).
    """
    usual = _usual(context, rule, random)
    if result.failure is not None:
        return _failed(result.failure, context, rule, usual)
    given_up = [DeadLettered(r.index, r.reason, r.error) for r in result.rejections]
    waits: dict[float, list[int]] = {}
    is_over = _is_too_old(context, rule) or _is_guilty(context, rule)
    for retry in result.retries:
        # The sink postpones it again and again, perhaps, as where a rate limit is below what comes.
        is_kept = retry.is_unavailable and context.age < rule.give_up_after
        if is_over and not is_kept:
            given_up.append(DeadLettered(retry.index, "failed", retry.error))
            continue
        after = usual if retry.after is None else rounded(retry.after)
        if context.attempts >= rule.attempts_max:
            after = max(after, usual)  # or a handler that never wants them would turn for ever
        waits.setdefault(after, []).append(retry.index)
    again = tuple(RetryRecords(tuple(indices), after) for after, indices in waits.items())
    return Resolve(tuple(given_up), again)


def _usual(context: RetryContext, rule: RetryRule, random: Callable[[], float]) -> float:
    # What is counted starts over with evidence, and so do the waits; without any they grow on.
    tries = context.counted if context.proven else context.attempts
    return backoff(max(1, tries), rule, random)


def _is_guilty(context: RetryContext, rule: RetryRule) -> bool:
    return context.proven and not context.paused and context.counted >= rule.attempts_max


def _is_too_old(context: RetryContext, rule: RetryRule, *, asked: bool = False) -> bool:
    # Beside successes it is the tries that decide, but for `raise Retry`, which spends none.
    nothing_succeeds = context.paused or not context.proven
    return context.age >= rule.give_up_after and (nothing_succeeds or asked)


def _failed(
    failure: Failure, context: RetryContext, rule: RetryRule, usual: float
) -> Resolve | RetryBatch:
    if failure.reason == BLOCKED and not context.proven:
        return RetryBatch(usual, failure)
    asked = failure.is_asked
    guilty = not asked and _is_guilty(context, rule)
    too_old = failure.reason != UNAVAILABLE and _is_too_old(context, rule, asked=asked)
    if context.count > 1 and not asked:
        most = min(rule.attempts_max, PART_TRIES) if context.is_part else rule.attempts_max
        spent = context.attempts >= most and context.may_split
        # Alone in failing, an old one may be bad in a single record.
        if guilty or (not context.paused if too_old else spent):
            return _halves(context.count)
    if failure.reason == UNAVAILABLE and context.age < rule.give_up_after:
        # The sink restarts again and again, perhaps, and this record was there each time.
        return RetryBatch(failure.after or usual, failure, asked=asked)
    if guilty or too_old:
        reason = "failed" if failure.reason in SAID else failure.reason
        return Resolve(
            tuple(
                DeadLettered(index, reason, failure.error, failure.traceback)
                for index in range(context.count)
            ),
            (),
        )
    if asked and failure.after is not None:
        return RetryBatch(failure.after, failure, asked=True)
    return RetryBatch(usual, failure)


def _halves(count: int) -> Resolve:
    """The batch is replaced by its halves, due at once; each has one try until it is split."""
    middle = count // 2
    return Resolve(
        (),
        (RetryRecords(tuple(range(middle)), 0.0), RetryRecords(tuple(range(middle, count)), 0.0)),
    )


# -- splitting -------------------------------------------------------------------------------------
#
# A family is what is left of one batch that is being split. How long a batch has been failing and
# how many of its tries count is written down with each postponed try; the rest is kept in memory
# only. After a restart a part of another batch is simply a batch with many attempts, time in which
# the daemon did not run does not count as failing, and evidence has to come anew.


class BatchSplitter:
    """One pipeline's view of its failing batches.

    Args:
        outage: whether the handler works; is told what became of each try.
        attempts_max: `retry.attempts_max`.
    """

    def __init__(self, outage: Outage, attempts_max: int) -> None:
        self._outage = outage
        self._attempts_max = attempts_max
        self._families: dict[int, dict[int, int]] = {}  # parts of each: records by number
        self._failing: dict[int, SealedBatch] = {}
        self._begun = 0  # successes when a whole batch was split last

    @property
    def families(self) -> int:
        """Batches that are being split at the moment."""
        return len(self._families)

    def retry_context(self, batch: SealedBatch, result: Result, now: float) -> RetryContext:
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
                reason=result.failure.reason,
            )
            if outage.is_outage and not was:
                self._forgive()
        elif len(result.rejections) + len(result.retries) < batch.count:
            outage.succeeded()
        elif self._shows_recovery(batch, result):
            outage.recovered()
        else:
            outage.answered(batch.number)
        return RetryContext(
            count=batch.count,
            attempts=batch.attempts,
            counted=batch.counted,
            age=0.0 if batch.failing_since is None else now - batch.failing_since,
            proven=batch.first_failed is not None and outage.successes > batch.first_failed,
            paused=outage.paused,
            may_split=self._may_split(batch),
            is_part=batch.family is not None,
        )

    def _shows_recovery(self, batch: SealedBatch, result: Result) -> bool:
        """Returns True if a result without success ends an outage (see `execution.outage`)."""
        if result.retries or all(one.reason != "rejected" for one in result.rejections):
            return False
        failed = batch.number in self._failing
        if len(self._failing) == failed:
            return True
        return failed and batch.family is None and batch.last_failed == self._outage.successes

    def _count(self, batch: SealedBatch, now: float, *, spent: bool) -> None:
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
        """Forgives the tries since the last success: they were the outage's."""
        for batch in self._failing.values():
            if batch.last_failed == self._outage.successes:
                batch.counted = batch.counted_before

    def _may_split(self, batch: SealedBatch) -> bool:
        """The smallest part that there is; without one, one whole batch after each success.

        An outage makes few parts. A part of one record can't be split: it may be a bad one, for
        which the evidence has to come from other batches.
        """
        parts = [n for family in self._families.values() for n in family.values() if n > 1]
        if batch.family is not None:
            return batch.count <= min(parts, default=batch.count)
        return not parts and (not self._families or self._begun < self._outage.successes)

    def split(self, batch: SealedBatch, parts: Iterable[SealedBatch]) -> None:
        """A batch is being replaced by its parts; `settled(batch)` follows."""
        family = batch.number if batch.family is None else batch.family
        if batch.family is None:
            self._begun = self._outage.successes
        for part in parts:
            part.family = family
            self._families.setdefault(family, {})[part.number] = part.count
            self._failing[part.number] = part

    def settled(self, batch: SealedBatch) -> None:
        """A batch is over, or has been replaced."""
        if batch.family is not None:
            parts = self._families[batch.family]
            del parts[batch.number]
            if not parts:
                del self._families[batch.family]
        if self._failing.pop(batch.number, None) is not None and not self._failing:
            self._outage.nothing_fails()
