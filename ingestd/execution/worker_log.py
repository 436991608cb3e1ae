"""Logs of worker processes in the daemon's log: with pipeline, worker and batch, and bounded.

A worker says structured lines itself (`handlers/log_relay.py`); what else is written to its
descriptor 2, by a C library or a program that the handler started, is raw text. Text that comes
together is one event. Whatever is beyond the budget is dropped and counted, once a second.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from ingestd.base.logging import say_for
from ingestd.base.rate import BurstBudget
from ingestd.handlers import log_relay

if TYPE_CHECKING:
    from ingestd.handlers.log_relay import LogLine

TEXT_CHARS_MAX = 16 * 1024
"""Of one event."""
BYTES_BURST = 4 * 1024**2
BYTES_PER_SECOND = 256 * 1024
"""What one worker may write into the log, whatever its lines are."""
_REPORT_SECONDS = 1.0


class WorkerLog:
    """One worker's lines. Used by one thread.

    Args:
        pipeline: its name.
        worker: the name of its worker.
    """

    def __init__(self, pipeline: str, worker: str) -> None:
        self._who = {"pipeline": pipeline, "worker": worker}
        now = monotonic()
        # As much as the worker's own two budgets: it drops, and a child that it forked as well.
        self._lines = BurstBudget(3 * log_relay.LINES_BURST, 3 * log_relay.LINES_PER_SECOND, now)
        self._bytes = BurstBudget(BYTES_BURST, BYTES_PER_SECOND, now)
        self._text = ""
        self._text_batch = ""
        self._dropped = 0
        self._reported = now - _REPORT_SECONDS

    @property
    def holds(self) -> bool:
        """Returns True if `flush` would write something."""
        return bool(self._text or self._dropped)

    def packet(self, packet: bytes) -> None:
        """A line as the worker sent it."""
        try:
            line = log_relay.decode(packet)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            self._dropped += 1
            return
        self._dropped += max(0, line.dropped)
        if line.event:
            self._write_text()
            self._event(line, len(packet))
        elif line.text:
            self._add(line.text + "\n", line.batch)

    def raw(self, data: bytes, batch: str) -> None:
        """Text from descriptor 2, read while the worker had that batch."""
        self._add(data.decode("utf-8", "backslashreplace"), batch)

    def flush(self, *, last: bool = False) -> None:
        """Writes the text that is held together, and how much was dropped."""
        self._write_text()
        now = monotonic()
        if self._dropped and (last or now - self._reported >= _REPORT_SECONDS):
            say_for("warning", "worker_lines_dropped", {**self._who, "lines": self._dropped})
            self._dropped, self._reported = 0, now

    def _add(self, text: str, batch: str) -> None:
        if self._text and (
            batch != self._text_batch or len(self._text) + len(text) > TEXT_CHARS_MAX
        ):
            self._write_text()
        self._text_batch = batch
        self._text += text[:TEXT_CHARS_MAX]

    def _write_text(self) -> None:
        text, self._text = self._text, ""
        if not text.strip():
            return
        if not self._affords(len(text)):
            self._dropped += max(1, text.count("\n"))
            return
        fields = self._named(self._text_batch)
        say_for("warning", "handler_wrote", {**fields, "stream": "stderr", "text": text.rstrip()})

    def _event(self, line: LogLine, size: int) -> None:
        if not self._affords(size):
            self._dropped += 1
            return
        say_for(line.level, line.event, {**line.fields, **self._named(line.batch)})

    def _affords(self, size: int) -> bool:
        now = monotonic()
        return self._lines.spend(1, now) and self._bytes.spend(size, now)

    def _named(self, batch: str) -> dict[str, object]:
        return {**self._who, "batch_id": batch} if batch else dict(self._who)
