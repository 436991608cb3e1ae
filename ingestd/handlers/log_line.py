"""One thing that a handler logged in a worker process, on its way to the daemon's log."""

from __future__ import annotations

import msgspec

LINES_BURST = 1000
LINES_PER_SECOND = 100.0
"""What a worker may log; beyond it lines are dropped and counted. Warnings have a budget as large
of their own."""
MESSAGE_CHARS_MAX = 8 * 1024
FIELDS_MAX = 32
FIELD_CHARS_MAX = 1000
LINE_BYTES_MAX = 128 * 1024


class LogLine(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """A log line.

    Attributes:
        batch: id of the batch that the worker had then; empty between two batches.
        level: debug, info, warning, error or critical.
        event: the event's name; empty for text that was written to stderr.
        fields: of the event.
        text: what was written to stderr.
        dropped: lines that were given up since the last one.
    """

    batch: str = ""
    level: str = "info"
    event: str = ""
    fields: dict[str, str | int | float | bool | None] = {}
    text: str = ""
    dropped: int = 0


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(LogLine).decode
