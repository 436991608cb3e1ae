"""Whether the daemon hangs. A decision, without I/O and clock.

What is looked at are stages: the pump, the consumer and the dispatcher of a pipeline, its journal's
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
"""So long a stage may stand still. A disk may well take some ten seconds for one sync."""
LOOK_SECONDS = 1.0
"""How often somebody should look."""


class Stage(NamedTuple):
    """One stage at the time of a look.

    Attributes:
        name: for people, and unique.
        could_go_on: there is something to do for it, and nobody it has to wait for.
        steps: what it has done so far; any number that is another one when it has moved.
    """

    name: str
    could_go_on: bool
    steps: int


class Liveness:
    """Remembers how long each stage has been standing still.

    Args:
        hung_after: seconds from which on that is hanging.
    """

    def __init__(self, hung_after: float = HUNG_SECONDS) -> None:
        self._hung_after = hung_after
        self._standing: dict[str, tuple[int, float]] = {}
        self._looked_at: float | None = None

    def look(self, stages: Iterable[Stage], now: float) -> None:
        """Takes down where all stages are.

        Args:
            stages: all of them.
            now: seconds that do not go back.
        """
        # Nobody moved while the process was stopped, or did not get the processor.
        since = 0.0 if self._looked_at is None else now - self._looked_at
        passed = min(since, 2 * LOOK_SECONDS)
        self._looked_at = now
        before, self._standing = self._standing, {}
        for stage in stages:
            if stage.could_go_on:
                steps, seconds = before.get(stage.name, (stage.steps, -passed))
                stood = seconds + passed if steps == stage.steps else 0.0
                self._standing[stage.name] = stage.steps, stood

    def hung(self) -> str:
        """What hangs, in a few words; empty if nothing does."""
        for name, (_, seconds) in self._standing.items():
            if seconds >= self._hung_after:
                return f"{name} has not moved for {seconds:.0f} s"
        return ""
