"""How many jobs lie ready before the workers. Pure."""

from __future__ import annotations

SECONDS = 0.1
"""So much work of each worker lies ready: more than a turn of the event loop takes under load."""
AHEAD_MAX = 64
"""Of all workers together."""
_WEIGHT = 0.2  # of the newest job in the average


class Ahead:
    """Says how many, from how long jobs take.

    One a worker to begin with, and whenever one fails: what lies ready is tried even if everything
    fails by then, and an outage should use up as few tries as possible.

    Args:
        workers: at least one.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._mean = SECONDS

    @property
    def jobs(self) -> int:
        """How many."""
        ready = int(self._workers * SECONDS / max(self._mean, SECONDS / AHEAD_MAX))
        return min(max(self._workers, ready), max(self._workers, AHEAD_MAX))

    def ran(self, seconds: float, *, failed: bool) -> None:
        """A job has run for so long."""
        self._mean = SECONDS if failed else self._mean + _WEIGHT * (seconds - self._mean)
