"""How slowly a body may come. No I/O: the time is passed in, in seconds that do not go back."""

from __future__ import annotations

GRACE_SECONDS = 5.0
"""A body is measured over windows this long, so a stall shorter than this ends nothing."""

LATE_SECONDS = 1.0
"""A deadline that is looked at later than this says something about this process (it was stopped,
or had no time), not about its client: what that sent meanwhile may not have been read yet. It gets
as long once more."""


def is_late(due: float, now: float) -> bool:
    """Whether what was due is looked at late."""
    return now >= due + LATE_SECONDS


class Pace:
    """Decides, a window at a time, whether bytes come too slowly.

    A window that is looked at late says something about this process, not about its client (it
    was stopped, or had no time): that one is let pass.

    Args:
        rate_min: bytes a second; 0 for any.
        now: when the first window begins.

    Attributes:
        due: when to ask next; never if any rate will do.
    """

    def __init__(self, rate_min: int, now: float) -> None:
        self._bytes_min = rate_min * GRACE_SECONDS
        self._bytes = 0
        self.due = now + GRACE_SECONDS if rate_min else float("inf")

    def is_slow(self, total: int, now: float) -> bool:
        """Whether the window that ends now was too slow; begins the next one.

        Args:
            total: bytes that have come so far.
            now: at or after `due`.
        """
        slow = total - self._bytes < self._bytes_min and not is_late(self.due, now)
        self._bytes = total
        self.due = now + GRACE_SECONDS
        return slow
