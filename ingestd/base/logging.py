"""Structured logs: one line an event on stderr, written by a thread that delays no caller.

A caller renders its line and puts it into a bounded queue. One daemon thread writes. A reader that
stalls, a full disk or a closed stderr therefore costs log lines, which are counted and reported
(`log_lines_dropped`), and never a record or a moment of the event loop.

Events are past-tense nouns with fields; a payload is never a field.

What our own code logs with (`get_logger`) does not pass through structlog's or logging's global
configuration, which a handler in a thread may change in good faith, and never raises: nothing of
the daemon's depends on a line.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
import queue
import select
import sys
import threading
import time
import weakref
from bisect import bisect_right
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TextIO

import msgspec
import structlog
from structlog.tracebacks import ExceptionDictTransformer

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger


LINES_MAX = 10_000
"""Bound of the lines that wait for the writer."""
BYTES_MAX = 8 * 1024**2
"""Bound of their bytes."""
LINE_BYTES_MAX = 64 * 1024
"""A longer line is written without its fields."""

_WRITE_BYTES = 64 * 1024
_POLL_MS = 200
_ERASE = b"\r\x1b[K"
_LF = 0x0A
_LIBRARIES = ("aiohttp", "asyncio")
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


_writers: weakref.WeakSet[LogWriter] = weakref.WeakSet()


def _after_fork() -> None:
    for writer in _writers:
        writer.write_at_once()


os.register_at_fork(after_in_child=_after_fork)


class LogWriter:
    """Writes lines from a bounded queue to a file descriptor, in a thread of its own.

    Args:
        fd: where to; the writer owns it and closes it. -1 writes nowhere: every line is dropped.
        report: the line that says how many lines were dropped.

    Attributes:
        above_live: a live line is drawn on the same terminal; it is erased before each write.
    """

    def __init__(self, fd: int, report: Callable[[int], bytes]) -> None:
        self.above_live = False
        self._fd = fd
        self._report = report
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # Reentrant: a signal handler may log between two bytecodes of `write`.
        self._lock = threading.RLock()
        self._lines = 0
        self._bytes = 0
        self._dropped = 0
        self._reported = 0
        self._torn = False
        self._closed = False
        self._deadline: float | None = None
        self._forked = False
        _writers.add(self)
        self._levels: Callable[[str], None] = lambda _: None
        self._restore = contextlib.ExitStack()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    @property
    def lines_lost(self) -> int:
        """Lines dropped so far, for `Metrics.watch_log`."""
        return self._dropped

    def write(self, line: bytes) -> None:
        """Takes a line with its LF, or drops it if there is no room. Never blocks or raises."""
        if self._forked:
            self._send(line)
            return
        with self._lock:
            if self._closed or self._lines >= LINES_MAX or self._bytes + len(line) > BYTES_MAX:
                self._dropped += 1
                return
            self._lines += 1
            self._bytes += len(line)
            self._queue.put(line)

    def close(self, timeout: float) -> bool:
        """Writes what waits, for `timeout` seconds at most, and takes the logging down.

        Returns:
            True if everything was written or counted as dropped; else the thread is left behind
            in a write that does not return, and dies with the process.
        """
        self._restore.close()
        with self._lock:
            if not self._closed:
                self._closed = True
                self._deadline = time.monotonic() + timeout
                self._queue.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def set_level(self, level: str) -> None:
        """Sets the least important level that is written: `log.level`."""
        self._levels(level)

    def obey(self, levels: Callable[[str], None]) -> None:
        """Has `set_level` call `levels`."""
        self._levels = levels

    def undo(self, step: Callable[[], object]) -> None:
        """Has `close` call `step`; the last one added is the first one called."""
        self._restore.callback(step)

    def write_at_once(self) -> None:
        """Writes in the caller's thread from now on: a forked child has no writer thread."""
        self._forked = True

    def _run(self) -> None:
        last = False
        while not last:
            lines, last = self._gather()
            written, size = self._put_out(lines), sum(map(len, lines))
            with self._lock:
                self._lines -= len(lines)
                self._bytes -= size
                self._dropped += len(lines) - written
                missing = self._dropped - self._reported
            if missing and self._put_out([self._report(missing)]):
                self._reported += missing
        if self._fd >= 0:
            os.close(self._fd)

    def _gather(self) -> tuple[list[bytes], bool]:
        """Waits for a line and adds those that are there already; True with the last ones."""
        line = self._queue.get()
        lines: list[bytes] = []
        size = 0
        while line is not None:
            lines.append(line)
            size += len(line)
            if size >= _WRITE_BYTES:
                return lines, False
            try:
                line = self._queue.get_nowait()
            except queue.Empty:
                return lines, False
        return lines, True

    def _put_out(self, lines: list[bytes]) -> int:
        """Writes lines; returns the number written whole, from the first one on. Drops the rest."""
        # What a failed write left of a line must not run into the next one.
        mend = (_ERASE if self.above_live else b"") + (b"\n" if self._torn else b"")
        text = mend + b"".join(lines)
        sent = self._send(text)
        if sent:
            self._torn = text[sent - 1] != _LF
        return bisect_right(list(accumulate(map(len, lines))), sent - len(mend))

    def _send(self, text: bytes) -> int:
        """Writes until the end, an error or the deadline of `close`; returns the bytes written."""
        sent = 0
        while sent < len(text):
            try:
                sent += os.write(self._fd, memoryview(text)[sent:])
            except BlockingIOError:
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    break
                self._wait()
            except OSError:
                break
        return sent

    def _wait(self) -> None:
        """Polls a descriptor that was made non-blocking and whose reader is slow."""
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        poll.poll(_POLL_MS)


class Log:
    """Logs events of our own code; each method takes the event's name and its fields.

    Before `start_logging` and after the writer's end lines go the way that structlog has them go.
    """

    __slots__ = ()

    def debug(self, event: str, **fields: object) -> None:
        """Logs details that help to find a fault."""
        _say("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Logs normal operation."""
        _say("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Logs a condition that an operator should look at some day."""
        _say("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Logs a condition that an operator should look at now."""
        _say("error", event, fields)

    def exception(self, event: str, **fields: object) -> None:
        """`error` with the exception that is being handled."""
        _say("error", event, {"exc_info": True, **fields})


def get_logger() -> Log:
    """The logger of a module of ours."""
    return _LOG


class _LoggerState:
    """Processors, level and writer of our own lines while logging is started."""

    __slots__ = ("chain", "level", "write")

    def __init__(self, chain: list[Processor], level: int, write: Callable[[bytes], None]) -> None:
        self.chain = chain
        self.level = level
        self.write = write


_LOG = Log()
_own: list[_LoggerState] = []
"""The one that is started last counts."""


def _say(level: str, event: str, fields: dict[str, object]) -> None:
    try:
        if not _own:
            getattr(structlog.get_logger(), level)(event, **fields)
        elif _LEVELS[level] >= _own[-1].level:
            own = _own[-1]
            own.write(_line(own.chain, level, {**fields, "event": event}))
    except Exception:  # noqa: BLE001, S110  nothing that is done depends on a line
        pass


def use_library_logging() -> Callable[[], None]:
    """Hands the events of our own code to `logging.getLogger("ingestd")`, for a program's tests.

    Returns:
        A function that ends it.
    """
    logger = logging.getLogger("ingestd")

    def tell(_: WrappedLogger, level: str, event: EventDict) -> bytes:
        if logger.isEnabledFor(_LEVELS[level]):
            name, traceback = event.pop("event"), event.pop("exception", "")
            facts = [f"{key}={value!r}" for key, value in event.items()]
            line = " ".join([name, *facts])
            logger.log(_LEVELS[level], "%s", f"{line}\n{traceback}".rstrip())
        return b""

    own = _LoggerState([structlog.contextvars.merge_contextvars, tell], 0, lambda _: None)
    _own.append(own)
    return partial(_own.remove, own)


def say_for(level: str, event: str, fields: dict[str, object]) -> None:
    """Logs an event of a worker process, at the level that it has there. Never raises."""
    _say(level if level in _LEVELS else "info", event, fields)


def lowest_level() -> int:
    """The level, as `logging` numbers them, below which no line is written."""
    return _own[-1].level if _own else logging.DEBUG


def start_logging(
    level: str = "info", form: str = "auto", stream: TextIO | None = None
) -> LogWriter:
    """Sends what we, structlog and the standard library's logging say to a stream's descriptor.

    Once a process, before the first line; the caller closes what it gets. Our own loggers are
    `get_logger()`, a handler's `structlog.get_logger()`; `request_id` and `batch_id` come from
    `structlog.contextvars`.

    Args:
        level: the least important lines that are written: `debug`, `info`, `warning`, `error`.
        form: `json`, `console`, or `auto`: console on a terminal.
        stream: `sys.stderr` if not given. Without a usable descriptor every line is dropped.
    """
    fd = _own_descriptor(sys.stderr if stream is None else stream)
    terminal = fd >= 0 and os.isatty(fd)
    console = form == "console" or (form == "auto" and terminal)
    render = _Console(colors=terminal and not os.environ.get("NO_COLOR")) if console else _Json()
    chain: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        render,
    ]
    least = _LEVELS[level]
    writer = LogWriter(fd, lambda lines: _line(chain, "warning", _dropped_event(lines)))
    # Loggers are cached, so that a level that changes has to change in their class.
    logger = type("Logger", (structlog.make_filtering_bound_logger(least),), {})
    own = _LoggerState(chain, least, writer.write)
    _own.append(own)
    writer.undo(partial(_own.remove, own))
    writer.obey(partial(_change_level, logger, own))
    structlog.configure(
        processors=chain,
        wrapper_class=logger,
        logger_factory=lambda *_: _Sink(writer.write),
        cache_logger_on_first_use=True,
    )
    _take_over_library_logs(writer, chain, least)
    return writer


def _change_level(logger: type[object], own: _LoggerState, level: str) -> None:
    own.level = _LEVELS[level]
    made = structlog.make_filtering_bound_logger(_LEVELS[level])
    for name, method in vars(made).items():
        if not name.startswith("__"):
            setattr(logger, name, method)
    logging.getLogger().setLevel(max(_LEVELS[level], logging.INFO))


def _own_descriptor(stream: TextIO | None) -> int:
    """Duplicates the stream's descriptor, so that no other file gets our lines if it is closed.

    It is 3 or more: with a standard stream closed, a lower number could pass for one.
    """
    if stream is None:
        return -1
    try:
        return fcntl.fcntl(stream.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
    except (OSError, ValueError):
        return -1


def _dropped_event(lines: int) -> EventDict:
    return {"event": "log_lines_dropped", "lines": lines}


def _line(chain: list[Processor], level: str, event: EventDict) -> bytes:
    """An event's line, by the way structlog's own events take."""
    value: Any = event
    for step in chain:
        value = step(None, level, value)
    line: bytes = value
    return line


class _Sink:
    """Receives rendered lines from structlog, by the name of the level."""

    __slots__ = ("critical", "debug", "error", "info", "warning")

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = write


class _Json:
    """One JSON object a line: timestamp, level and event first. An exception is a field."""

    def __init__(self) -> None:
        self._exception = structlog.processors.ExceptionRenderer(
            # Locals would put payloads into the log.
            ExceptionDictTransformer(show_locals=False, max_frames=20)
        )

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> bytes:
        try:
            if "exc_info" in event:
                event = self._exception(logger, method, event)
            line = _encode(_heads_first(event))
        except Exception as error:  # noqa: BLE001 - a log line never fails its caller
            line = _encode({**_head(event), "unrendered": type(error).__name__})
        if len(line) > LINE_BYTES_MAX:
            line = _encode({**_head(event), "left_out_bytes": len(line)})
        return line + b"\n"


def _heads_first(event: EventDict) -> dict[str, Any]:
    return {key: event[key] for key in ("timestamp", "level", "event")} | dict(event)


def _head(event: EventDict) -> dict[str, str]:
    keys = ("timestamp", "level", "event", "request_id", "batch_id")
    return {key: str(event[key])[:1000] for key in keys if key in event}


def _encode(event: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(event, enc_hook=_plain)
    except (UnicodeError, TypeError, ValueError, OverflowError):
        # Lone surrogates (file names), huge integers, odd keys: slower, but takes them.
        return json.dumps(event, default=_plain, skipkeys=True).encode()


def _plain(value: object) -> str:
    return str(value) if isinstance(value, os.PathLike) else repr(value)


class _Console:
    """Lines for a person at a terminal."""

    def __init__(self, *, colors: bool) -> None:
        self._render = structlog.dev.ConsoleRenderer(
            colors=colors,
            # structlog's pick would be the one with locals in it, which are payloads.
            exception_formatter=_write_traceback,
            # Values are quoted: what a client sent must not move the cursor.
            repr_native_str=True,
        )

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> bytes:
        head = _head(event)
        try:
            text = self._render(logger, method, event)
        except Exception as error:  # noqa: BLE001 - a log line never fails its caller
            text = f"{head} unrendered={type(error).__name__}"
        if len(text) > LINE_BYTES_MAX:
            text = f"{head} left_out_bytes={len(text)}"
        return f"{text}\n".encode(errors="backslashreplace")


def _write_traceback(out: TextIO, exc_info: ExcInfo) -> None:
    text = io.StringIO()
    structlog.dev.plain_traceback(text, exc_info)
    # An exception may quote what a client sent.
    out.write(
        "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text.getvalue())
    )


class _LibraryHandler(logging.Handler):
    """Brings what libraries say through the standard library's logging into the same lines."""

    def __init__(self, write: Callable[[bytes], None], chain: list[Processor]) -> None:
        super().__init__()
        self._write = write
        self._chain = chain

    def emit(self, record: logging.LogRecord) -> None:
        """As the event `library_logged`."""
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001 - arguments that do not fit their format
            message = str(record.msg)
        event: EventDict = {"event": "library_logged", "logger": record.name, "message": message}
        if record.exc_info:
            event["exc_info"] = record.exc_info
        self._write(_line(self._chain, record.levelname.lower(), event))


def _take_over_library_logs(writer: LogWriter, chain: list[Processor], level: int) -> None:
    """Routes library logs here until the writer is closed, without the libraries' debug lines."""
    root, handler = logging.getLogger(), _LibraryHandler(writer.write, chain)
    writer.undo(partial(root.setLevel, root.level))
    root.setLevel(max(level, logging.INFO))
    writer.undo(partial(root.removeHandler, handler))
    root.addHandler(handler)
    # Lines of the daemon's libraries do not pass logging handlers that a user's module has added:
    # these may block, and the event loop with them.
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        writer.undo(partial(setattr, library, "propagate", library.propagate))
        writer.undo(partial(library.removeHandler, handler))
        library.propagate = False
        library.addHandler(handler)
    writer.undo(partial(logging.captureWarnings, False))
    logging.captureWarnings(capture=True)
