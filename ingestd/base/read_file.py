"""Files that settings name, read without waiting and within a bound."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

BYTES_MAX = 16 * 1024**2
"""The default bound: no settings and no certificates are larger."""


def read_file(path: Path, bytes_max: int = BYTES_MAX, *, may_wait: bool = False) -> bytes:
    """The whole of a regular file.

    A FIFO, a terminal or a device may make its reader wait for ever, or have no end. And what a
    pipe held is there once: read again it is empty, and that would be taken for settings without
    any token.

    Args:
        path: of the file; links are followed.
        bytes_max: a larger one is refused.
        may_wait: a pipe is read too, and waited for.

    Raises:
        OSError: it can't be read, or is none of that; `strerror` says so.
    """
    # Without O_NONBLOCK the opening of a FIFO that nobody writes to waits already.
    flags = os.O_CLOEXEC | os.O_NOCTTY | (0 if may_wait else os.O_NONBLOCK)
    with open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as opened:
        found = os.fstat(opened.fileno())
        mode = found.st_mode
        if os.path.samestat(found, os.stat(os.devnull)):  # noqa: PTH116  it is always empty
            return b""
        if not (stat.S_ISREG(mode) or (may_wait and stat.S_ISFIFO(mode))):
            raise OSError(errno.EINVAL, "it is no regular file")
        content = opened.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise OSError(errno.EFBIG, f"it is larger than {bytes_max} bytes")
    return content
