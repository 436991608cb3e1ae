"""The one clock. Stages take it as an argument, so tests set the time instead of sleeping."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from typing import NamedTuple, Protocol


class Clock(Protocol):
    """Wall-clock and monotonic time."""

    def now(self) -> float:
        """Wall-clock time, seconds since the epoch: what is written down."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back: what is measured and waited for (the event loop's time)."""
        ...


class SystemClock:
    """The machine's clocks."""

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)


def shown(at: float) -> str:
    """`2026-05-01T12:00:00.000Z`."""
    text = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


# -- ages of wall-clock stamps --------------------------------------------------------------------
#
# A machine without a battery for its clock starts in 1970 and jumps to the present once it is
# synchronised. What was stamped a minute ago is then fifty years old by the clock, and would
# expire. The clock that never goes back tells how much time has passed: where the wall clock went
# further, it jumped, and stamps from before the jump are younger by as much.

JUMP_SECONDS = 60.0
"""Gain of the wall clock between two looks from which on it has jumped."""
JUMPS_MAX = 64
"""So many jumps are remembered, the newest ones."""
PLAUSIBLE = 1_704_067_200.0
"""2024-01-01: a stamp from before was made by a clock that was not set."""


class _Jump(NamedTuple):
    """From one wall-clock time to another one, at one moment."""

    before: float
    after: float


class Ages:
    """Knows the jumps that the wall clock made in this life. Safe to use from any thread.

    Args:
        clock: both clocks.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._began = clock.monotonic()
        self._seen = clock.now(), self._began
        self._jumps: tuple[_Jump, ...] = ()

    def observe(self) -> float:
        """Detects a jump of the wall clock; returns its time now."""
        with self._lock:
            now, passed = self._clock.now(), self._clock.monotonic()
            expected = self._seen[0] + passed - self._seen[1]
            if now - expected > JUMP_SECONDS:
                self._jumps = (*self._jumps, _Jump(expected, now))[-JUMPS_MAX:]
            self._seen = now, passed
        return now

    def before(self, age: float) -> float:
        """The newest stamp that is at least so many seconds old."""
        bound = self.observe() - age
        for jump in reversed(self._jumps):
            if bound >= jump.after:
                break  # the jump itself is that long ago, and so is all that was before it
            bound -= jump.after - jump.before
        return bound

    def since(self, age: float) -> float:
        """Stamps from before this time tell no age: they were made by a clock that was not set.

        0 once this life is so many seconds old itself.
        """
        now, passed = self.observe(), self._clock.monotonic() - self._began
        return PLAUSIBLE if passed < age and now >= PLAUSIBLE else 0.0
