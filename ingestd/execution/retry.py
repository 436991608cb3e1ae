"""What a result means: settle, try again, or give up. Pure.

The backoff is exponential with full jitter (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/):
a random wait between 0 and `min(backoff_max, backoff * 2 ** (attempts - 1))` seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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
    exponent = min(attempts - 1, 62)
    return random() * min(rule.backoff_max, rule.backoff * 2.0**exponent)


def decide(
    result: Result, *, count: int, attempts: int, rule: RetryRule, random: Callable[[], float]
) -> Settled | Postponed:
    """What a result means.

    Args:
        result: what the worker said.
        count: records in the batch.
        attempts: tries made, this one included; at least 1.
        rule: the settings.
        random: gives numbers in [0, 1).
    """
    failure = result.failure
    if failure is not None:
        if attempts < rule.attempts_max:
            return Postponed(backoff(attempts, rule, random), failure)
        return _exhausted(failure, count)
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


def _exhausted(failure: Failure, count: int) -> Settled:
    """The whole batch is given up. Isolating the guilty records goes here."""
    return Settled(
        tuple(GivenUp(i, "failed", failure.error, failure.traceback) for i in range(count)), ()
    )
