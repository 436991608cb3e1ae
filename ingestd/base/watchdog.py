"""Liveness: detects a stage that could go on and does not. Pure: no I/O and no clock.

Observed are stages: the pump, the consumer and the dispatcher of a pipeline, its journal's
thread. A stage hangs if it could go on and did not, at every look for a long time. A stage that
waits for another one cannot go on: behind a sink that is down, a handler that takes its time, a
batch in its backoff, a journal at its bound or on a full disk the others rest, and that is no
reason to end the daemon. A restart would help none of these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

HUNG_SECONDS = 120.0
"""Time without progress after which a stage hangs. One sync may well take some ten seconds."""
LOOK_SECONDS = 1.0
"""Interval of the observations."""


class Stage(NamedTuple):
    """One stage at the time of a look.

    Attributes:
        name: for people, and unique.
        could_go_on: there is something to do for it, and nothing that it has to wait for.
        steps: what it has done so far; any number that is another one when it has moved.
    """

    name: str
    could_go_on: bool
    steps: int


class Liveness:
    """Tracks the time without progress of each stage.

    Args:
        hung_after: seconds from which on a stage hangs.
    """

    def __init__(self, hung_after: float = HUNG_SECONDS) -> None:
        self._hung_after = hung_after
        self._stalled: dict[str, tuple[int, float]] = {}
        self._looked_at: float | None = None

    def look(self, stages: Iterable[Stage], now: float) -> None:
        """Records the steps of all stages.

        Args:
            stages: all of them.
            now: seconds that do not go back.
        """
        # No stage moves while the process is stopped, or does not get the processor.
        since = 0.0 if self._looked_at is None else now - self._looked_at
        passed = min(since, 2 * LOOK_SECONDS)
        self._looked_at = now
        before, self._stalled = self._stalled, {}
        for stage in stages:
            if stage.could_go_on:
                steps, seconds = before.get(stage.name, (stage.steps, -passed))
                stood = seconds + passed if steps == stage.steps else 0.0
                self._stalled[stage.name] = stage.steps, stood

    def hung(self) -> str:
        """Describes the stage that hangs; empty if none does."""
        for name, (_, seconds) in self._stalled.items():
            if seconds >= self._hung_after:
                return f"{name} has not moved for {seconds:.0f} s"
        return ""
