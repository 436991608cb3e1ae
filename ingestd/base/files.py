"""Private files and folders, synced folder names, and bounded reading of files."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


FILE_MODE = 0o600
FOLDER_MODE = 0o700
_OTHERS = 0o077


def open_private(path: Path, flags: int) -> int:
    """Opens a file of ours: a new one is private, and an old one that others may read becomes so.

    Args:
        path: its name.
        flags: as `os.open` takes them; close-on-exec is added.

    Raises:
        OSError: as `os.open`.
    """
    fd = os.open(path, flags | os.O_CLOEXEC, FILE_MODE)
    found = os.fstat(fd)
    if found.st_mode & _OTHERS and stat.S_ISREG(found.st_mode):
        with contextlib.suppress(OSError):  # another user's: it stays as it is
            os.fchmod(fd, FILE_MODE)
    return fd


def tighten(path: Path) -> None:
    """Makes a file or folder private that others may look into, but no linked one.

    It is not opened: closing a file drops the locks that the process has on it.
    """
    with contextlib.suppress(OSError):
        mode = path.lstat().st_mode
        if mode & _OTHERS and (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            path.chmod(FOLDER_MODE if stat.S_ISDIR(mode) else FILE_MODE)


def make_private(path: Path) -> None:
    """Makes an empty private file if there is none, else makes the one that is there private.

    What root makes in a folder of another user's belongs to that user, whose daemon has to open it:
    SQLite does the same with its files.

    Raises:
        OSError: it can't be made.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    except FileExistsError:
        tighten(path)
        return
    try:
        if os.geteuid() == 0:
            owner = path.parent.stat()
            os.fchown(fd, owner.st_uid, owner.st_gid)
    finally:
        os.close(fd)


def create_new(path: Path) -> int:
    """Opens a new private file for writing in place of one of that name; follows no link.

    Raises:
        OSError: it can't be made, or was made by another process meanwhile.
    """
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, FILE_MODE)


def make_folder(path: Path) -> None:
    """Makes a folder and what is missing above it, private, with their names synced.

    Raises:
        OSError: one of them can't be made.
    """
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    try:
        path.mkdir(mode=FOLDER_MODE)
    except FileExistsError:
        if not path.is_dir():
            raise
    with contextlib.suppress(PermissionError):  # it may be written to, and not be read
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Puts the names in a folder on disk.

    Raises:
        OSError: it can't be opened or synced.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_to_others(path: Path) -> bool:
    """Tells if others than its owner may read a folder."""
    return bool(path.stat().st_mode & _OTHERS)


# -- bounded reads --------------------------------------------------------------------------------

BYTES_MAX = 16 * 1024**2
"""The default bound: no settings and no certificates are larger."""


def read_file(path: Path, bytes_max: int = BYTES_MAX, *, may_wait: bool = False) -> bytes:
    """Reads the whole of a regular file.

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
    # Without O_NONBLOCK the opening of a FIFO without a writer waits already.
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
