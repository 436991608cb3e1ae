"""How far a run over an input is: one live line on a terminal, else a log line now and then."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING, NamedTuple, TextIO

import structlog

from ingestd.base.clock import SystemClock

if TYPE_CHECKING:
    from collections.abc import Callable

    from ingestd.base.clock import Clock

log = structlog.get_logger(__name__)

LIVE_SECONDS = 0.1
"""How often the live line is drawn."""
LOG_SECONDS = 10.0
"""How often a log line says the same where there is no terminal."""

_KIB = 1024.0


class ProgressSnapshot(NamedTuple):
    """Where things stand, in this run.

    Attributes:
        lines: records read, good and refused.
        bytes: read.
        accepted: made durable.
        processed: done.
        dead: dead letters, refused records among them.
        pending: accepted and not settled.
        urls_done: of the source `fetch`.
        urls_total: of the source `fetch`.
        bytes_left: still to be read, about, if that is known.
    """

    lines: int
    bytes: int
    accepted: int
    processed: int
    dead: int
    pending: int
    urls_done: int | None = None
    urls_total: int | None = None
    bytes_left: float | None = None

    def facts(self) -> dict[str, int | float]:
        """What is known, for a log line."""
        return {key: value for key, value in self._asdict().items() if value is not None}


class Progress:
    """Shows snapshots until it is stopped, and a summary at the end.

    Args:
        snapshot: where things stand now.
        stream: where to draw, if it is a terminal.
        clock: where time comes from.
        live_seconds: between two drawings.
        log_seconds: between two log lines.
    """

    def __init__(
        self,
        snapshot: Callable[[], ProgressSnapshot],
        stream: TextIO,
        *,
        clock: Clock | None = None,
        live_seconds: float = LIVE_SECONDS,
        log_seconds: float = LOG_SECONDS,
    ) -> None:
        self._snapshot = snapshot
        self._stream = stream
        self._clock = clock or SystemClock()
        self._live = stream.isatty()
        self._every = live_seconds if self._live else log_seconds
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins; the rate counts from here."""
        self._began = self._seen_at = self._clock.monotonic()
        self._first = self._seen = self._snapshot()
        self._task = asyncio.create_task(self._run(), name="progress")

    async def stop(self) -> None:
        """Ends, with the summary. Does nothing if it is not running."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait([task])
        now, seconds = self._snapshot(), self._clock.monotonic() - self._began
        rate = (now.lines - self._first.lines) / seconds if seconds > 0 else 0.0
        if self._live:
            # In full: this line stays.
            self._draw(f"\r\x1b[K{describe(now, rate)}, {seconds:.1f} s\n")
        else:
            log.info("input_summed_up", seconds=round(seconds, 3), rate=round(rate), **now.facts())

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            now, at = self._snapshot(), self._clock.monotonic()
            elapsed = at - self._seen_at
            rate = (now.lines - self._seen.lines) / elapsed if elapsed > 0 else 0.0
            left = seconds_left(now, self._seen, elapsed)
            if self._live:
                # The last column stays free: writing into it makes some terminals wrap.
                width = max(shutil.get_terminal_size().columns - 1, 1)
                self._draw(f"\r\x1b[K{describe(now, rate, left)[:width]}")
                if elapsed < 1.0:
                    continue  # a rate over less than a second jumps about
            elif now != self._seen:  # a source that only waits has nothing to say
                log.info("input_progressed", rate=round(rate), **now.facts())
            self._seen, self._seen_at = now, at

    def _draw(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._live = False  # the terminal is gone; the work goes on


def seconds_left(now: ProgressSnapshot, before: ProgressSnapshot, elapsed: float) -> float | None:
    """How long it takes until all is read, at the rate since `before`; `None` if nothing tells."""
    came = now.bytes - before.bytes
    if now.bytes_left is None or came <= 0 or elapsed <= 0:
        return None
    return now.bytes_left * elapsed / came


def describe(snapshot: ProgressSnapshot, rate: float, left: float | None = None) -> str:
    """One line; the most important comes first, because a terminal may be narrow."""
    urls = ""
    if snapshot.urls_total is not None:
        urls = f"{snapshot.urls_done:,}/{snapshot.urls_total:,} URLs, "
        if left is not None:
            urls += f"about {left:,.0f} s left, "
    return urls + (
        f"{snapshot.lines:,} lines, {rate:,.0f}/s, {_size(snapshot.bytes)}: "
        f"{snapshot.processed:,} processed, {snapshot.pending:,} pending, {snapshot.dead:,} dead, "
        f"{snapshot.accepted:,} accepted"
    )


def _size(count: float) -> str:
    if count < _KIB:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= _KIB
        if count < _KIB:
            return f"{count:.1f} {unit}"
    return f"{count / _KIB:.1f} TiB"
