"""What a result means: settle, try again, split, or give up. Pure.

A batch that failed `attempts_max` times is split into halves, and those again when they fail, until
the guilty records stand alone and become dead letters: O(bad * log n) calls. Splitting proves
nothing while the handler fails for everyone (its database is down), so without evidence that it
works, which is a success since the batch first failed, two things are different: only one batch of
a pipeline is split at a time, and a record is given up only after `attempts_max` tries alone. An
outage then costs the dead letters of one batch, slowly, and everything else waits in the journal;
a poison record in an otherwise idle pipeline still comes to its end.

The backoff is exponential with full jitter, see `ingestd/base/backoff.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ingestd.base import backoff as base

if TYPE_CHECKING:
    from collections.abc import Callable

    from ingestd.handlers.outcome import Failure, Result


class RetryRule(NamedTuple):
    """The settings that decide.

    Attributes:
        attempts_max: tries in all, the first included.
        backoff: seconds; the bound of the first wait.
        backoff_max: seconds; the bound of every wait.
    """

    attempts_max: int
    backoff: float
    backoff_max: float


class Standing(NamedTuple):
    """Where a batch stands when a try of it has ended.

    Attributes:
        count: its records.
        attempts: tries made, this one included; at least 1.
        alone: of these, tries in which its one record stood alone; 0 for more records.
        proven: the handler has succeeded with something since this batch first failed.
        may_split: no other batch of the pipeline is being split without such evidence.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count
    attempts: int
    alone: int = 0
    proven: bool = True
    may_split: bool = True


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
    """The whole batch again, unchanged, after some seconds."""

    after: float
    failure: Failure


class Settled(NamedTuple):
    """The batch is over: what is neither given up nor tried again is done."""

    given_up: tuple[GivenUp, ...]
    again: tuple[Again, ...]


def backoff(attempts: int, rule: RetryRule, random: Callable[[], float]) -> float:
    """Seconds to wait after `attempts` tries; `random` gives numbers in [0, 1)."""
    return base.backoff(attempts, rule.backoff, rule.backoff_max, random)


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
    attempts = standing.attempts
    if result.failure is not None:
        return _failed(result.failure, standing, rule, random)
    given_up = [GivenUp(r.index, r.reason, r.error) for r in result.rejections]
    waits: dict[float, list[int]] = {}
    usual = backoff(attempts, rule, random)
    for retry in result.retries:
        if attempts >= rule.attempts_max:
            given_up.append(GivenUp(retry.index, "failed", retry.error))
        else:
            after = usual if retry.after is None else retry.after
            waits.setdefault(after, []).append(retry.index)
    again = tuple(Again(tuple(indices), after) for after, indices in waits.items())
    return Settled(tuple(given_up), again)


def _failed(
    failure: Failure, standing: Standing, rule: RetryRule, random: Callable[[], float]
) -> Settled | Postponed:
    if standing.attempts >= rule.attempts_max:
        if standing.count > 1 and (standing.proven or standing.may_split):
            return _halves(standing.count)
        if standing.count == 1 and (standing.proven or standing.alone >= rule.attempts_max):
            reason = "failed" if failure.reason == "raised" else failure.reason
            return Settled((GivenUp(0, reason, failure.error, failure.traceback),), ())
    return Postponed(backoff(standing.attempts, rule, random), failure)


def _halves(count: int) -> Settled:
    """The batch is replaced by its halves, due at once; each has one try until it is split."""
    middle = count // 2
    return Settled((), (Again(tuple(range(middle)), 0.0), Again(tuple(range(middle, count)), 0.0)))
