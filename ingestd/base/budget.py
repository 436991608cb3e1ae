"""How much of something may happen: a burst at once, and so much a second after that. Pure."""

from __future__ import annotations


class Budget:
    """A token bucket.

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
        """Whether there was so much left; then it is spent."""
        self._left = min(self._burst, self._left + max(0.0, now - self._at) * self._per_second)
        self._at = now
        if amount > self._left:
            return False
        self._left -= amount
        return True
