"""A bounded traceback: Python's own format, made without running code of the exception's class.

`traceback.format_exception` puts the whole message together several times, follows a chain of
causes as long as it is, and asks the exception's class for all of it. Here the chain, the frames,
the members of a group and the bytes are bounded, and attributes are read past the class.
"""

from __future__ import annotations

import linecache
import os
import traceback
from collections import deque
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ingestd.handlers.outcome import Failure
from ingestd.handlers.text import clip, describe, message_of, name_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType


TRACEBACK_BYTES_MAX = 16 * 1024
CHAIN_MAX = 16
"""Causes and contexts of one exception that are shown."""
FRAMES_MAX = 32
"""Innermost frames of one exception that are shown, and as many of the outermost."""
MEMBERS_MAX = 15
"""Exceptions of a group that are shown; a group in a group counts its own."""
_GROUPS_MAX = 4  # inside one another
_MESSAGE_CHARS = 4 * 1024
_SOURCE_CHARS = 500
_PATH_CHARS = 4096
_NOTES_MAX = 10
_HEAD_BYTES = 4 * 1024
_CUT = "\n  [... cut ...]\n"
_OUR_FOLDER = str(Path(__file__).parent) + os.sep

_CAUSE = BaseException.__dict__["__cause__"].__get__
_CONTEXT = BaseException.__dict__["__context__"].__get__
_SUPPRESSED = BaseException.__dict__["__suppress_context__"].__get__
_TRACEBACK = BaseException.__dict__["__traceback__"].__get__
_MEMBERS = BaseExceptionGroup.__dict__["exceptions"].__get__

_CAUSED = "The above exception was the direct cause of the following exception:"
_DURING = "During handling of the above exception, another exception occurred:"


def trace_of(exc: BaseException) -> str:
    """The traceback as Python prints it, without our own frames; bounded.

    Empty if there is no memory for it, or if the exception is of no use even for this.
    """
    try:
        return _bounded("\n".join(_chain(exc, _GROUPS_MAX)))
    except BaseException:  # noqa: BLE001
        return ""


def _chain(exc: BaseException, groups: int) -> Iterator[str]:
    """Lines of an exception and of what led to it, oldest first."""
    links: list[tuple[BaseException, str]] = [(exc, "")]
    seen = {id(exc)}
    while len(links) < CHAIN_MAX:
        earlier, why = _CAUSE(links[-1][0]), _CAUSED
        if earlier is None and not _SUPPRESSED(links[-1][0]):
            earlier, why = _CONTEXT(links[-1][0]), _DURING
        if earlier is None or id(earlier) in seen:
            break
        seen.add(id(earlier))
        links.append((earlier, why))
    for number in range(len(links) - 1, -1, -1):
        yield from _one(links[number][0], groups)
        if number:
            yield from ("", links[number][1], "")


def _one(exc: BaseException, groups: int) -> Iterator[str]:
    frames = list(_frames(_TRACEBACK(exc)))
    if frames:
        yield "Traceback (most recent call last):"
        yield from frames
    message = message_of(exc, _MESSAGE_CHARS)
    yield f"{name_of(type(exc))}: {message}" if message else name_of(type(exc))
    yield from _notes(exc)
    if issubclass(type(exc), BaseExceptionGroup):
        yield from _group(exc, groups)


def _group(exc: BaseException, groups: int) -> Iterator[str]:
    members = _MEMBERS(exc)
    for number, member in enumerate(members[:MEMBERS_MAX], 1):
        yield f"  +---------------- {number} ----------------"
        lines = _chain(member, groups - 1) if groups else iter([name_of(type(member))])
        yield from (f"  | {line}" for text in lines for line in text.split("\n"))
    if len(members) > MEMBERS_MAX:
        yield f"  and {len(members) - MEMBERS_MAX} more exceptions"


def _notes(exc: BaseException) -> Iterator[str]:
    try:
        notes = exc.__notes__ if type(exc.__notes__) is list else []
        for note in notes[:_NOTES_MAX]:
            yield clip(note if type(note) is str else str(note), _SOURCE_CHARS)
    except BaseException:  # noqa: BLE001  there are none, or they can't be read
        return


def _frames(first: TracebackType | None) -> Iterator[str]:
    """Lines of the frames that are not ours; of a deep recursion the outermost and innermost."""
    outer: list[TracebackType] = []
    inner: deque[TracebackType] = deque(maxlen=FRAMES_MAX)
    left_out = 0
    here = first
    while here is not None:
        if not here.tb_frame.f_code.co_filename.startswith(_OUR_FOLDER):
            if len(outer) < FRAMES_MAX:
                outer.append(here)
            else:
                left_out += len(inner) == FRAMES_MAX
                inner.append(here)
        here = here.tb_next
    yield from _formatted(outer)
    if left_out:
        yield f"  [... {left_out} frames ...]"
    yield from _formatted(inner)


def _formatted(frames: Iterable[TracebackType]) -> Iterator[str]:
    """In Python's own format, where a line that repeats is counted."""
    stack = traceback.StackSummary.from_list([_summary(frame) for frame in frames])
    for text in stack.format():
        yield text.rstrip("\n")


def _summary(frame: TracebackType) -> traceback.FrameSummary:
    code, number = frame.tb_frame.f_code, frame.tb_lineno
    filename, name = clip(code.co_filename, _PATH_CHARS), clip(code.co_name, _SOURCE_CHARS)
    line = _source(code.co_filename, number)
    place = next(islice(code.co_positions(), max(0, frame.tb_lasti) // 2, None), None)
    if place is None or place[0] != number or not line or len(line) > _SOURCE_CHARS:
        return traceback.FrameSummary(filename, number, name, line=clip(line, _SOURCE_CHARS))
    _, end, column, end_column = place
    return traceback.FrameSummary(
        filename, number, name, line=line, end_lineno=end, colno=column, end_colno=end_column
    )


def _source(filename: str, number: int) -> str:
    """The line of source, without asking a module's loader, which may be anything."""
    try:
        linecache.checkcache(filename)
        return linecache.getline(filename, number)
    except Exception:  # noqa: BLE001  a file of another encoding, or one that went meanwhile
        return ""


def _bounded(text: str) -> str:
    """Beginning and end of it: what was raised last stands at the end and matters most."""
    raw = (text + "\n").encode("utf-8", "backslashreplace")
    if len(raw) > TRACEBACK_BYTES_MAX:
        tail = TRACEBACK_BYTES_MAX - _HEAD_BYTES - len(_CUT)
        raw = raw[:_HEAD_BYTES] + _CUT.encode() + raw[-tail:]
    return raw.decode("utf-8", "ignore")


# -- exceptions as plain data ----------------------------------------------------------------------
#
# Values of local variables are never in it.


def failure_of(exc: BaseException) -> Failure:
    """The failure that a raising handler leaves: reason `raised`, one line, and the traceback.

    Never raises: without the memory for a traceback, or even for a line, it does without.
    """
    try:
        return Failure("raised", describe(exc), trace_of(exc))
    except BaseException:  # noqa: BLE001
        return Failure("raised", "an exception that can't be described")
