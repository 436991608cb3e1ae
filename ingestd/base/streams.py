"""Standard streams: none is closed, none is shared with what a handler does.

Standard streams that are closed are opened on `/dev/null` before anything else is opened.

Otherwise the first socket or file would get the number 0, 1 or 2, and whoever prints would write
into it: into the journal, at worst. libuv refuses such a number and aborts the process.
"""

from __future__ import annotations

import fcntl
import os
import sys
from typing import TextIO

_FIRST = 3  # what is not a standard stream


def occupy_standard_streams() -> None:
    """Call before the first file or socket that stays open."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, mode, closefd=False))


def move_input() -> int:
    """Moves standard input to a descriptor of its own, and leaves `/dev/null` in its place.

    A handler, or a program that it starts, which reads its standard input would take lines away.
    Nothing that is started gets the new descriptor. Call before a handler is imported.

    Returns:
        The descriptor.
    """
    own = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, _FIRST)
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(nothing, 0)  # which programs that are started do get
    os.close(nothing)
    return own


def own_stderr() -> TextIO:
    """Standard error under a descriptor of its own, for what is not a log line.

    A handler in a thread may close `sys.stderr` or put something else in its place.
    """
    try:
        fd = fcntl.fcntl(sys.stderr.fileno(), fcntl.F_DUPFD_CLOEXEC, _FIRST)
    except (OSError, ValueError, AttributeError):
        fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    return os.fdopen(fd, "w", encoding=encoding, errors="backslashreplace")
