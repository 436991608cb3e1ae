"""What the service manager hears of the daemon, from its start to its end; see `base/notify.py`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from ingestd.base.liveness import LOOK_SECONDS
from ingestd.base.notify import monotonic_usec

if TYPE_CHECKING:
    from collections.abc import Callable

    from ingestd.base.notify import Notifier

STATUS_SECONDS = 5.0
EXTENSION_SECONDS = 20.0
"""How much time is asked for at once. It is asked for again every `STATUS_SECONDS`."""

_CPU_SHARE = 0.01
_IO_BYTES = 4096


class Standing(NamedTuple):
    """How the daemon is doing.

    Attributes:
        state: where in its life it is.
        hung: what hangs; empty if nothing does.
        leave_by: when it will have left at the latest, seconds on the caller's clock; `None` if
            nothing bounds that.
        accepted, processed, pending: records, of all pipelines.
    """

    state: Literal["starting", "running", "draining"]
    hung: str
    leave_by: float | None
    accepted: int
    processed: int
    pending: int


class Effort(NamedTuple):
    """What the process has done so far: seconds of processors, bytes read and written."""

    cpu: float
    io: int


def effort() -> Effort:
    """This process's."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        io = sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))
    except (OSError, ValueError):
        io = 0
    return Effort(time.process_time(), io)


class Herald:
    """Decides what is to be said, and says it.

    Args:
        notifier: to whom.
        effort: what tells a long recovery from a start that hangs.

    Attributes:
        period: seconds between two calls of `turn`.
    """

    def __init__(self, notifier: Notifier, effort: Callable[[], Effort] = effort) -> None:
        self._notifier = notifier
        self._effort = effort
        self._before = Effort(0.0, 0)
        watchdog = notifier.watchdog
        self.period = min(LOOK_SECONDS, watchdog / 2) if watchdog else LOOK_SECONDS
        self._fed: float | None = None
        self._said_at: float | None = None
        self._said: Standing | None = None

    def ready(self) -> None:
        """It takes records in; also the end of a reload."""
        self._notifier.tell("READY=1")

    def reloading(self) -> None:
        """It reads its settings again; `ready` ends it."""
        self._notifier.tell("RELOADING=1", monotonic_usec())

    def stopping(self) -> None:
        """It drains."""
        self._notifier.tell("STOPPING=1")

    def turn(self, standing: Standing, now: float) -> None:
        """Says what is due.

        Args:
            standing: how it is doing now.
            now: seconds that do not go back.
        """
        if not self._notifier.listened_to:
            return
        lines = []
        if self._notifier.watchdog and not standing.hung and self._is_hungry(now):
            lines.append("WATCHDOG=1")
            self._fed = now
        said, at = self._said, self._said_at
        if said is None or at is None or standing.state != said.state or self._is_due(at, now):
            lines.append(f"STATUS={_status(standing, said, now - at if at is not None else 0.0)}")
            if self._may_take_longer(standing, now):
                lines.append(f"EXTEND_TIMEOUT_USEC={EXTENSION_SECONDS * 1e6:.0f}")
            self._said, self._said_at = standing, now
        if lines:
            self._notifier.tell(*lines)

    def _is_hungry(self, now: float) -> bool:
        """Whether the next turn would be too late: half of the time shall always be left."""
        return self._fed is None or now - self._fed + self.period > self._notifier.watchdog / 2

    def _is_due(self, said_at: float, now: float) -> bool:
        return now - said_at + self.period > STATUS_SECONDS

    def _may_take_longer(self, standing: Standing, now: float) -> bool:
        """Whether it is worth waiting for a start that recovers, or for a drain."""
        if standing.state == "draining":
            return not standing.hung and (standing.leave_by is None or now < standing.leave_by)
        if standing.state == "running":
            return False
        before, self._before = self._before, self._effort()
        worked = self._before.cpu - before.cpu > _CPU_SHARE * STATUS_SECONDS
        return worked or self._before.io - before.io > _IO_BYTES


def _status(now: Standing, before: Standing | None, seconds: float) -> str:
    if now.state == "starting":
        return "starting: handlers are loaded, journals recovered"
    text = f"{now.state}: {now.pending} pending"
    if before is not None and before.state != "starting" and seconds > 0:
        accepted = (now.accepted - before.accepted) / seconds
        processed = (now.processed - before.processed) / seconds
        text += f", {accepted:.0f} accepted/s, {processed:.0f} processed/s"
    return f"{text}; {now.hung}" if now.hung else text
