"""Progress of a run over an input: one live line on a terminal, else a log line now and then."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, TextIO

from ingestd.base.clock import SystemClock
from ingestd.base.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from ingestd.base.clock import Clock

log = get_logger()

LIVE_SECONDS = 0.1
"""Interval of the live line."""
LOG_SECONDS = 10.0
"""Interval of the log lines without a terminal."""

RATE_SECONDS = 5.0
"""Window of the live line's rate."""

_KIB = 1024.0
_SHORT_MIN = 10_000  # what is less has its digits in the narrowest line
_COLUMNS = 80  # of a terminal that does not say


class ProgressSnapshot(NamedTuple):
    """Counters of a run.

    Attributes:
        lines: records read, also those that were not accepted.
        bytes: read.
        accepted: made durable.
        invalid: never accepted, because they can't be records.
        processed: done.
        dead: accepted and given up.
        pending: accepted and not settled.
        urls_done: of the source `fetch`.
        urls_total: of the source `fetch`.
        bytes_left: still to be read, about, if that is known.
    """

    lines: int
    bytes: int
    accepted: int
    invalid: int
    processed: int
    dead: int
    pending: int
    urls_done: int | None = None
    urls_total: int | None = None
    bytes_left: float | None = None

    def facts(self) -> dict[str, int | float]:
        """The known counters, for a log line."""
        return {key: value for key, value in self._asdict().items() if value is not None}

    @property
    def is_fruitless(self) -> bool:
        """Returns True if records were read and none of them was processed or is pending."""
        if not self.lines:
            return False
        return self.lines == self.invalid or not (self.processed or self.pending)


class Progress:
    """Shows snapshots until it is stopped, and a summary at the end.

    Args:
        snapshot: reads the counters.
        stream: gets the live line, if it is a terminal.
        clock: gives the time.
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
        # A rate over a short time jumps about: batches are done one at a time.
        looks = round(RATE_SECONDS / live_seconds) if self._live else 1
        self._seen: deque[tuple[float, ProgressSnapshot]] = deque(maxlen=max(looks, 1) + 1)
        self._task: asyncio.Task[None] | None = None

    @property
    def is_live(self) -> bool:
        """Returns True if it draws on a terminal."""
        return self._live

    def start(self) -> None:
        """Begins; the rate counts from here."""
        self._began = self._clock.monotonic()
        self._first = self._logged = self._snapshot()
        self._seen = deque([(self._began, self._first)], maxlen=self._seen.maxlen)
        self._task = asyncio.create_task(self._run(), name="progress")

    async def stop(self) -> ProgressSnapshot | None:
        """Ends with the summary. Does nothing if it is not running.

        Returns:
            The counters at the end.
        """
        task, self._task = self._task, None
        if task is None:
            return None
        task.cancel()
        await asyncio.wait([task])
        now, seconds = self._snapshot(), self._clock.monotonic() - self._began
        rate = (now.processed - self._first.processed) / seconds if seconds > 0 else 0.0
        if self._live:
            self._draw(f"\r\x1b[K{_summary(now, rate, seconds, self._width())}\n")
        else:
            log.info("input_summed_up", seconds=round(seconds, 3), rate=round(rate), **now.facts())
        return now

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            now, at = self._snapshot(), self._clock.monotonic()
            self._seen.append((at, now))
            before_at, before = self._seen[0]
            elapsed = at - before_at
            rate = (now.processed - before.processed) / elapsed if elapsed > 0 else 0.0
            if self._live:
                left = seconds_left(now, before, elapsed)
                self._draw(f"\r\x1b[K{describe(now, rate, left, width=self._width())}")
            elif now != self._logged:  # a source that only waits logs nothing
                log.info("input_progressed", rate=round(rate), **now.facts())
                self._logged = now

    def _width(self) -> int:
        """Columns that may be written into: the last one makes some terminals wrap."""
        columns = os.environ.get("COLUMNS", "")
        if columns.isascii() and columns.isdigit() and int(columns):
            return max(int(columns) - 1, 1)
        try:
            # Of the terminal that is drawn on: standard output may be a file.
            return max((os.get_terminal_size(self._stream.fileno()).columns or _COLUMNS) - 1, 1)
        except (OSError, ValueError):
            return _COLUMNS - 1

    def _draw(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._live = False  # the terminal is gone; the work goes on


def seconds_left(now: ProgressSnapshot, before: ProgressSnapshot, elapsed: float) -> float | None:
    """Seconds until all is read, at the rate since `before`; `None` if that is unknown."""
    came = now.bytes - before.bytes
    if now.bytes_left is None or came <= 0 or elapsed <= 0:
        return None
    return now.bytes_left * elapsed / came


def describe(
    snapshot: ProgressSnapshot, rate: float, left: float | None = None, *, width: int | None = None
) -> str:
    """Renders the live line.

    Args:
        snapshot: the counters.
        rate: records that are processed in a second.
        left: estimated seconds until all is read.
        width: columns there are; numbers get shorter, and what matters least goes, until it fits.
    """
    full = ", ".join(_parts(snapshot, rate, left, _exact))
    if width is None or len(full) <= width:
        return full
    parts = _parts(snapshot, rate, left, _short)
    while len(parts) > 1 and len(", ".join(parts)) > width:
        parts.pop()
    return ", ".join(parts)[:width]


def _summary(now: ProgressSnapshot, rate: float, seconds: float, width: int) -> str:
    """The line that stays, with exact numbers; only the size goes if it does not fit."""
    *parts, size = _parts(now, rate, None, _exact)
    full = ", ".join([*parts, size, f"{seconds:.1f} s"])
    return full if len(full) <= width else ", ".join([*parts, f"{seconds:.1f} s"])


def _parts(
    now: ProgressSnapshot, rate: float, left: float | None, number: Callable[[float], str]
) -> list[str]:
    """The parts of a line, the most important first, without counters that are 0."""
    parts = []
    if now.urls_total is not None:
        parts.append(f"{number(now.urls_done or 0)}/{number(now.urls_total)} URLs")
        if left is not None:
            parts.append(f"{number(left)} s left")
    parts.append(f"{number(now.lines)} lines")
    parts.append(f"{number(now.processed)} processed ({number(rate)}/s)")
    parts.append(f"{number(now.pending)} pending")
    parts += [f"{number(now.dead)} dead"] if now.dead else []
    parts += [f"{number(now.invalid)} invalid"] if now.invalid else []
    parts.append(_size(now.bytes))
    return parts


def _exact(count: float) -> str:
    return f"{count:,.0f}"


def _short(count: float) -> str:
    """Five characters at most, up to a great many."""
    if count < _SHORT_MIN - 0.5:
        return _exact(count)
    for unit in ("k", "M", "G"):
        count /= 1000
        if count < 999.5:
            return f"{count:.{0 if count >= 99.95 else 1}f}{unit}"
    return f"{count / 1000:,.0f}T"


def _size(count: float) -> str:
    if count < _KIB:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= _KIB
        if count < _KIB:
            return f"{count:.1f} {unit}"
    return f"{count / _KIB:.1f} TiB"
