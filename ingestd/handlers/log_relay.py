"""Relays the logs of a handler in a worker process to the daemon, which writes them."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec

from ingestd.base.rate import BurstBudget
from ingestd.handlers.failure import trace_of
from ingestd.handlers.text import clip, message_of, name_of, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableMapping


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


# -- relay -----------------------------------------------------------------------------------------
#
# `logging`, `warnings`, structlog as it comes, threads that raise and what is written to
# `sys.stderr` are taken here, each with the batch that the worker has then. A line is one packet
# on a socket of its own, so a forked child can log as well. A reader that does not keep up, and a
# handler that logs without end, cost lines, which are counted, and never more than `WAIT_SECONDS`
# of the handler's time.
#
# stdout is the user's. It is the daemon's own, unlabelled and never dropped, and each line of it
# leaves at once: what was printed before a worker is killed is not lost, and lines stay whole.

WAIT_SECONDS = 0.02
"""How long a line waits for the daemon to read, if it does not keep up; at most once a second."""
_HELD_CHARS = 4 * 1024
_LEVELS = ((50, "critical"), (40, "error"), (30, "warning"), (20, "info"))
_NAMES = frozenset(name for _, name in _LEVELS)
_TIMEVAL = (0).to_bytes(8, "little") + int(WAIT_SECONDS * 1e6).to_bytes(8, "little")


class Relay:
    """Sends lines to the daemon.

    Args:
        fd: a packet socket to the daemon.
        level: lines below it are not sent (as `logging` numbers them).

    Attributes:
        batch: id of the batch that the worker has.
    """

    def __init__(self, fd: int, level: int) -> None:
        self._sock = socket.socket(fileno=fd)
        self._sock.set_inheritable(False)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL)
        found = os.fstat(fd)
        self._is = found.st_dev, found.st_ino
        self.level = level
        self.batch = ""
        now = time.monotonic()
        self._usual = BurstBudget(LINES_BURST, LINES_PER_SECOND, now)
        self._grave = BurstBudget(LINES_BURST, LINES_PER_SECOND, now)
        self._dropped = 0
        self._wait_again = 0.0

    def allows(self, number: int) -> bool:
        """Returns True if a line of that level may be written; counts it if the budget is spent."""
        if number < self.level:
            return False
        budget = self._grave if number >= logging.WARNING else self._usual
        if budget.spend(1, time.monotonic()):
            return True
        self._dropped += 1
        return False

    def event(self, number: int, event: str, fields: Mapping[str, Any]) -> None:
        """Sends an event; `allows` was asked before."""
        level = next((name for least, name in _LEVELS if number >= least), "debug")
        self._send(LogLine(self.batch, level, clip(event, FIELD_CHARS_MAX), _plain_of(fields)))

    def text(self, text: str) -> None:
        """Sends text that was written to stderr, without its last line end."""
        if self.allows(logging.WARNING):
            text = clip(text, MESSAGE_CHARS_MAX)
            self._send(LogLine(self.batch, "warning", text=_encodable(text)))

    def done(self) -> None:
        """The batch is over: what is held back or was dropped is said."""
        for stream in (sys.stdout, sys.stderr):
            try:  # not contextlib.suppress: for each batch it costs as much as the flush
                stream.flush()
            except Exception:  # noqa: BLE001, S110  a stream of the handler's
                pass
        if self._dropped:
            self._send(LogLine(self.batch))
        self.batch = ""

    def _send(self, line: LogLine) -> None:
        dropped = self._dropped
        if dropped:
            line = LogLine(line.batch, line.level, line.event, line.fields, line.text, dropped)
        try:
            sent = self._put(encode(line))
        except Exception:  # noqa: BLE001  a line never fails its caller
            sent = False
        self._dropped += -dropped if sent else 1

    def _put(self, packet: bytes) -> bool:
        found = os.fstat(self._sock.fileno())
        if (found.st_dev, found.st_ino) != self._is or len(packet) > LINE_BYTES_MAX:
            return False  # a handler that closes descriptors has the number for its own
        now = time.monotonic()
        try:
            self._sock.send(packet, 0 if now >= self._wait_again else socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._wait_again = max(self._wait_again, now + 1.0)
            return False
        return True

    # -- where lines come from -----------------------------------------------------------------

    def install(self) -> None:
        """Takes over what Python says in this process. Before the handler's module is imported."""
        root = logging.getLogger()
        root.addHandler(_LibraryRelay(self))
        root.setLevel(max(logging.INFO, min(self.level, logging.WARNING)))
        logging.captureWarnings(capture=True)
        threading.excepthook = self._thread_raised
        with contextlib.suppress(Exception):
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        sys.stderr = _Stderr(self)

    def adopt_structlog(self) -> None:
        """Has structlog log here, if the handler uses it and has not configured it."""
        structlog: Any = sys.modules.get("structlog")
        if structlog is None:
            return
        with contextlib.suppress(Exception):
            if structlog.is_configured():
                return
            drop: Callable[[], BaseException] = structlog.DropEvent

            def relay(_: object, method: str, event: MutableMapping[str, Any]) -> Any:
                self._structured(method, dict(event))
                raise drop()

            structlog.configure(
                processors=[structlog.contextvars.merge_contextvars, relay],
                wrapper_class=structlog.make_filtering_bound_logger(self.level),
                cache_logger_on_first_use=False,
            )

    def _structured(self, method: str, event: dict[str, Any]) -> None:
        name = "error" if method == "exception" else method
        number = getattr(logging, name.upper(), logging.INFO) if name in _NAMES else logging.DEBUG
        if not self.allows(number):
            return
        exc_info = event.pop("exc_info", None)
        if exc_info:
            event["traceback"] = _trace_of(exc_info)
        self.event(number, plain(event.pop("event", "")) or "handler_logged", event)

    def _thread_raised(self, raised: threading.ExceptHookArgs) -> None:
        if raised.exc_value is None or issubclass(type(raised.exc_value), SystemExit):
            return
        if self.allows(logging.ERROR):
            thread = raised.thread.name if raised.thread else ""
            error = f"{name_of(type(raised.exc_value))}: {message_of(raised.exc_value, 1000)}"
            fields = {"thread": thread, "error": error, "traceback": trace_of(raised.exc_value)}
            self.event(logging.ERROR, "handler_thread_failed", fields)


class _LibraryRelay(logging.Handler):
    """Relays lines of `logging` and `warnings` as the event `library_logged`."""

    def __init__(self, relay: Relay) -> None:
        super().__init__()
        self._relay = relay

    def emit(self, record: logging.LogRecord) -> None:
        """Sends the record."""
        if not self._relay.allows(record.levelno):
            return
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001  arguments that do not fit their format
            message = plain(record.msg)
        fields = {"logger": record.name, "message": clip(message, MESSAGE_CHARS_MAX)}
        if record.exc_info and (trace := _trace_of(record.exc_info)):
            fields["traceback"] = trace
        self._relay.event(record.levelno, "library_logged", fields)


class _Stderr(io.TextIOBase):
    """`sys.stderr`: whole lines go to the relay, each thread's by itself."""

    encoding = "utf-8"
    errors = "backslashreplace"
    name = "<stderr>"
    mode = "w"

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._held = threading.local()
        self.buffer = io.FileIO(2, "w", closefd=False)

    def write(self, text: str) -> int:
        """Holds back what has no line end yet, up to a bound."""
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {name_of(type(text))}")
        lines, end, rest = (getattr(self._held, "text", "") + text).rpartition("\n")
        if len(rest) > _HELD_CHARS:
            lines, end, rest = f"{lines}{end}{rest}", "\n", ""
        self._held.text = rest
        if end:
            self._relay.text(lines)
        return len(text)

    def flush(self) -> None:
        """Sends also what has no line end."""
        rest = getattr(self._held, "text", "")
        if rest:
            self._held.text = ""
            self._relay.text(rest)

    def writable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """The process's own: a program that gets it as its stderr is heard as well."""
        return 2

    def isatty(self) -> bool:
        """It is no terminal."""
        return False

    def close(self) -> None:
        """Stays open."""


def _plain_of(fields: Mapping[str, Any]) -> dict[str, str | int | float | bool | None]:
    found: dict[str, str | int | float | bool | None] = {}
    for key, value in fields.items():
        if len(found) >= FIELDS_MAX:
            break
        name, kind = plain(key, 100), type(value)
        if kind is str:
            limit = 32 * 1024 if name in {"traceback", "message"} else FIELD_CHARS_MAX
            found[name] = _encodable(clip(value, limit))
        elif kind in {bool, float, type(None)} or (kind is int and -(2**63) <= value < 2**63):
            found[name] = value
        else:
            found[name] = plain(value)
    return found


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _trace_of(exc_info: Any) -> str:
    raised: Any = sys.exc_info()[1] if exc_info is True else exc_info
    if type(raised) is tuple and len(raised) == 3:
        raised = raised[1]
    return trace_of(raised) if issubclass(type(raised), BaseException) else ""
