"""Exceptions as plain data: one line for a list, a bounded traceback for the person who looks.

A handler's exception may be anything: one whose `__str__` raises, one with a message of a
hundred megabytes or with half a surrogate pair in it. What leaves here is always short, printable
and valid UTF-8. Values of local variables are never in it.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path

from ingestd.handlers.outcome import Failure

LINE_CHARS_MAX = 1000
TRACEBACK_BYTES_MAX = 16 * 1024
_HEAD_BYTES = 4 * 1024
_CUT = "\n  [... cut ...]\n"
_OUR_FOLDER = str(Path(__file__).parent) + os.sep


def one_line(text: str, limit: int = LINE_CHARS_MAX) -> str:
    """The text in one printable line of at most `limit` characters."""
    line = " ".join(text[: 4 * limit].split())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def describe(exc: BaseException, limit: int = LINE_CHARS_MAX) -> str:
    """`module.Type: message` in one line, as the last line of a traceback has it."""
    kind = type(exc)
    name = kind.__qualname__
    if kind.__module__ not in {"builtins", "__main__"}:
        name = f"{kind.__module__}.{name}"
    try:
        message = str(exc)
    except BaseException:  # noqa: BLE001  any code can be behind __str__
        message = "<its message can't be read: __str__ raised>"
    return one_line(f"{name}: {message}" if message else name, limit)


def failure_of(exc: BaseException) -> Failure:
    """What a raising handler leaves: reason `raised`, one line, and the traceback."""
    return Failure("raised", describe(exc), _traceback(exc))


def _traceback(exc: BaseException) -> str:
    try:
        report = traceback.TracebackException.from_exception(exc)
        _leave_out_our_frames(report)
        return _bounded("".join(report.format()))
    except BaseException:  # noqa: BLE001  no memory, or an exception that is no use even for this
        return ""


def _leave_out_our_frames(report: traceback.TracebackException) -> None:
    seen: set[int] = set()
    reports = [report]
    while reports:
        one = reports.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        one.stack[:] = [f for f in one.stack if not f.filename.startswith(_OUR_FOLDER)]
        linked = (one.__cause__, one.__context__, *(getattr(one, "exceptions", None) or ()))
        reports += [other for other in linked if other is not None]


def _bounded(text: str) -> str:
    """Beginning and end of it: what was raised last stands at the end and matters most."""
    raw = text.encode("utf-8", "backslashreplace")
    if len(raw) > TRACEBACK_BYTES_MAX:
        tail = TRACEBACK_BYTES_MAX - _HEAD_BYTES - len(_CUT)
        raw = raw[:_HEAD_BYTES] + _CUT.encode() + raw[-tail:]
    return raw.decode("utf-8", "ignore")
