"""Rates, waits until capacity is free, backoff, token buckets. Pure: time comes from the caller."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


WINDOW_SECONDS = 10.0
"""Time constant: an event this long ago counts for 1/e."""
ROOM_SHARE = 0.9
"""Fill of a bound at which a rejected client is asked to come back."""
SHORTEST = 1.0
LONGEST = 60.0
"""Bounds of `Retry-After`, seconds."""
STALLED = 30.0
"""Seconds to wait when nothing goes out at all."""
_JITTER = 0.25
_DOUBLINGS_MAX = 60


class Rate:
    """An exponentially weighted rate, per second.

    Args:
        now: seconds, from any clock that does not go back; the same one in every call.
        window: how far it looks back, seconds.
    """

    __slots__ = ("_at", "_began", "_per_second", "_window")

    def __init__(self, now: float, window: float = WINDOW_SECONDS) -> None:
        self._window = window
        self._began = self._at = now
        self._per_second = 0.0

    def add(self, amount: float, now: float) -> None:
        """That much happened."""
        if now > self._at:
            self._per_second *= math.exp((self._at - now) / self._window)
            self._at = now
        self._per_second += amount / self._window

    def per_second(self, now: float) -> float:
        """The rate now; 0 if nothing happened for long."""
        # Young rates have seen less than a window: without this they would start too low.
        seen = 1.0 - math.exp(min(-0.1, self._began - now) / self._window)
        return self._per_second * math.exp(min(0.0, self._at - now) / self._window) / seen


def wait_for_room(
    used: float, bound: float, per_second: float, random: Callable[[], float]
) -> float:
    """Seconds until usage is down to `ROOM_SHARE` of the bound, at the rate at which it goes out.

    Args:
        used: how much there would be.
        bound: how much there may be, in the same unit.
        per_second: how much goes out.
        random: 0 to 1; clients rejected together do not come back together.

    Returns:
        `SHORTEST` to `LONGEST`, about `STALLED` if it would take for ever.
    """
    excess = max(0.0, used - ROOM_SHARE * bound)
    # A rate that fades after everything stopped is no rate: slower than this is standing still.
    stalled = excess > 0 and excess >= 10 * LONGEST * per_second
    seconds = STALLED if stalled else excess / max(per_second, 1e-300)
    spread = 1.0 - _JITTER + 2 * _JITTER * random()
    return min(LONGEST, max(SHORTEST, seconds * spread))


# -- token buckets --------------------------------------------------------------------------------


class TokenBucket:
    """A token bucket that may be in debt, for amounts that are known when they are spent.

    Whatever is spent is spent whole; then nothing more may be until the debt is paid. In any time
    no more is spent than the rate gives in that time and in the burst, and the last amount.

    Args:
        rate: tokens that come back a second; more than 0.
        now: seconds that do not go back.
        burst: seconds for which tokens that were not spent are saved.
    """

    __slots__ = ("_at", "_full", "_level", "_rate")

    def __init__(self, rate: float, now: float, burst: float) -> None:
        self._rate = rate
        self._level = self._full = rate * burst
        self._at = now

    def wait(self, now: float) -> float:
        """Seconds until the debt is paid; 0 if there is none."""
        self._fill(now)
        return max(0.0, -self._level / self._rate)

    def charge(self, amount: float, now: float) -> None:
        """Takes an amount out, also if it is not in there."""
        self._fill(now)
        self._level -= amount

    def _fill(self, now: float) -> None:
        self._level = min(self._level + (now - self._at) * self._rate, self._full)
        self._at = now


class BurstBudget:
    """A token bucket that spends what is left, or nothing.

    Args:
        burst: what may be spent at once.
        per_second: what comes back.
        now: seconds, from any clock that does not go back; the same one in every call.
    """

    __slots__ = ("_at", "_burst", "_left", "_per_second")

    def __init__(self, burst: float, per_second: float, now: float) -> None:
        self._burst = self._left = burst
        self._per_second = per_second
        self._at = now

    def spend(self, amount: float, now: float) -> bool:
        """Spends an amount; returns False, and spends nothing, if so much is not left."""
        self._left = min(self._burst, self._left + max(0.0, now - self._at) * self._per_second)
        self._at = now
        if amount > self._left:
            return False
        self._left -= amount
        return True


def backoff(attempts: int, first: float, longest: float, random: Callable[[], float]) -> float:
    """Seconds before the next try, between 0 and `min(longest, first * 2 ** (attempts - 1))`.

    Exponential, with full jitter:
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/

    Args:
        attempts: tries that have failed, at least 1.
        first: the longest wait after the first of them, seconds.
        longest: no wait is longer, seconds.
        random: gives numbers from 0 to 1.
    """
    return min(longest, first * 2.0 ** min(attempts - 1, _DOUBLINGS_MAX)) * random()
