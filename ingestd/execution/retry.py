"""Decides what a result means: settle, try again, split, or give up. Pure.

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

The backoff is exponential with full jitter, see `ingestd/base/backoff.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from ingestd.base import backoff as base
from ingestd.handlers.outcome import POSTPONED

if TYPE_CHECKING:
    from collections.abc import Callable

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


class Standing(NamedTuple):
    """Where a batch stands when a try of it has ended.

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


class GivenUp(NamedTuple):
    """A record that becomes a dead letter."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    reason: str
    error: str
    traceback: str = ""


class Again(NamedTuple):
    """Records, by index, that become a batch of their own, due after some seconds."""

    indices: tuple[int, ...]
    after: float


class Postponed(NamedTuple):
    """The whole batch again, unchanged, after some seconds; `asked` for by the handler or not."""

    after: float
    failure: Failure
    asked: bool = False


class Settled(NamedTuple):
    """The batch is over: what is neither given up nor tried again is done."""

    given_up: tuple[GivenUp, ...]
    again: tuple[Again, ...]


def backoff(attempts: int, rule: RetryRule, random: Callable[[], float]) -> float:
    """Seconds to wait after `attempts` tries; `random` gives numbers in [0, 1)."""
    return base.backoff(attempts, rule.backoff, rule.backoff_max, random)


def spends_try(result: Result) -> bool:
    """Whether the try counts as one; `raise Retry` does not."""
    return result.failure is None or result.failure.reason != POSTPONED


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
    result: Result, standing: Standing, *, rule: RetryRule, random: Callable[[], float]
) -> Settled | Postponed:
    """What a result means.

    Args:
        result: what the worker said.
        standing: of the batch.
        rule: the settings.
        random: gives numbers in [0, 1).
    """
    usual = _usual(standing, rule, random)
    if result.failure is not None:
        return _failed(result.failure, standing, rule, usual)
    given_up = [GivenUp(r.index, r.reason, r.error) for r in result.rejections]
    waits: dict[float, list[int]] = {}
    is_over = _is_too_old(standing, rule) or _is_guilty(standing, rule)
    for retry in result.retries:
        if is_over:
            given_up.append(GivenUp(retry.index, "failed", retry.error))
            continue
        after = usual if retry.after is None else rounded(retry.after)
        if standing.attempts >= rule.attempts_max:
            after = max(after, usual)  # or a handler that never wants them would turn for ever
        waits.setdefault(after, []).append(retry.index)
    again = tuple(Again(tuple(indices), after) for after, indices in waits.items())
    return Settled(tuple(given_up), again)


def _usual(standing: Standing, rule: RetryRule, random: Callable[[], float]) -> float:
    # What is counted starts over with evidence, and so do the waits; without any they grow on.
    tries = standing.counted if standing.proven else standing.attempts
    return backoff(max(1, tries), rule, random)


def _is_guilty(standing: Standing, rule: RetryRule) -> bool:
    return standing.proven and not standing.paused and standing.counted >= rule.attempts_max


def _is_too_old(standing: Standing, rule: RetryRule, *, asked: bool = False) -> bool:
    # Beside successes it is the tries that decide, but for `raise Retry`, which spends none.
    nothing_succeeds = standing.paused or not standing.proven
    return standing.age >= rule.give_up_after and (nothing_succeeds or asked)


def _failed(
    failure: Failure, standing: Standing, rule: RetryRule, usual: float
) -> Settled | Postponed:
    asked = failure.reason == POSTPONED
    guilty = not asked and _is_guilty(standing, rule)
    too_old = _is_too_old(standing, rule, asked=asked)
    if standing.count > 1 and not asked:
        most = min(rule.attempts_max, PART_TRIES) if standing.is_part else rule.attempts_max
        spent = standing.attempts >= most and standing.may_split
        # Alone in failing, an old one may be bad in a single record.
        if guilty or (not standing.paused if too_old else spent):
            return _halves(standing.count)
    if guilty or too_old:
        reason = "failed" if failure.reason in {"raised", POSTPONED} else failure.reason
        return Settled(
            tuple(
                GivenUp(index, reason, failure.error, failure.traceback)
                for index in range(standing.count)
            ),
            (),
        )
    if asked and failure.after is not None:
        return Postponed(failure.after, failure, asked=True)
    return Postponed(usual, failure)


def _halves(count: int) -> Settled:
    """The batch is replaced by its halves, due at once; each has one try until it is split."""
    middle = count // 2
    return Settled((), (Again(tuple(range(middle)), 0.0), Again(tuple(range(middle, count)), 0.0)))
