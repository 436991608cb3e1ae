"""The one clock. Stages take it as an argument, so tests set the time instead of sleeping."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where time comes from."""

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
