"""Standard streams that are closed are opened on `/dev/null` before anything else is opened.

Otherwise the first socket or file would get the number 0, 1 or 2, and whoever prints would write
into it: into the journal, at worst. libuv refuses such a number and aborts the process.
"""

from __future__ import annotations

import os
import sys


def occupy_standard_streams() -> None:
    """Call before the first file or socket that stays open."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, mode, closefd=False))
