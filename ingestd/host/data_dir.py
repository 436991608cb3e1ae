"""The data directory: made private, and held by one daemon at a time.

Three locks, because folders can overlap: one on the data directory, one on the folder of each named
pipeline, and one on each journal's file itself. Each is `flock` on an open file, so it belongs to
what the name leads to, through links, bind mounts and `a/../b`. SQLite's own locks are of another
kind, and a process that only reads a journal beside the daemon takes none of these.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from ingestd.base.errors import DataDirError
from ingestd.base.files import make_folder, make_private, open_private, open_to_others, tighten

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK_NAME = "lock"
_held: set[int] = set()
"""Every descriptor that holds a lock; a child that is forked closes them, so it holds none."""


def _let_go_in_child() -> None:
    for fd in _held:
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


class FileLock:
    """Holds the lock of a file from construction until `close`; the kernel drops it, too.

    POSIX drops the locks of another kind that a process has on a file when it closes any descriptor
    of it: so a journal's is closed after every connection to it.

    Args:
        path: the file; made private if it is not there.
        of: what is locked by it, for the error.
        signed: this process's number is written into it, for the error of the next one; so it must
            be no link.

    Raises:
        DataDirError: it can't be opened, or another daemon holds it.
    """

    def __init__(self, path: Path, *, of: Path, signed: bool = False) -> None:
        try:
            make_private(path)
            fd = open_private(path, os.O_RDWR | (os.O_NOFOLLOW if signed else 0))
        except OSError as error:
            raise DataDirError(path=of, problem=_why(error)) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):  # to read a FIFO would wait for ever
            os.close(fd)
            raise DataDirError(path=of, problem=f"{path.name} is no regular file")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if signed:
                os.ftruncate(fd, 0)
                os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace") if signed else _holder(fd)
            problem = _held_by(holder.strip(), fd)
            os.close(fd)
            raise DataDirError(path=of, problem=problem) from None
        except OSError as error:
            os.close(fd)
            raise DataDirError(path=of, problem=_why(error)) from error
        self._fd = fd
        _held.add(fd)

    def close(self) -> None:
        """Lets go; the file stays, because removing it would race with the next daemon."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            _held.discard(fd)
            os.close(fd)


def pipeline_folder(data_dir: Path, pipeline: str) -> Path:
    """The folder of a pipeline in a data directory: the directory itself for `default`."""
    return data_dir if pipeline == "default" else data_dir / "pipelines" / pipeline


class DataDir:
    """Holds its locks from construction until `close`.

    Args:
        path: created with mode 0700, with its parents, if it is not there.

    Attributes:
        is_open: it was there before, and others may look into it; what is made in it is private.

    Raises:
        DataDirError: it can't be created or written, or another daemon holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._locks: list[FileLock] = []
        try:
            make_folder(path)
            self.is_open = open_to_others(path)
        except OSError as error:
            raise DataDirError(path=path, problem=_why(error)) from error
        self._locks.append(FileLock(path / LOCK_NAME, of=path, signed=True))

    def folder(self, pipeline: str) -> Path:
        """The folder of a pipeline's journal: the directory itself for `default`; made if missing.

        Raises:
            DataDirError: it can't be created, or another daemon or pipeline uses it.
        """
        folder = pipeline_folder(self.path, pipeline)
        if folder == self.path:
            return folder
        try:
            make_folder(folder)
            tighten(folder.parent)
            tighten(folder)
        except OSError as error:
            raise DataDirError(path=folder, problem=_why(error)) from error
        self._locks.append(FileLock(folder / LOCK_NAME, of=folder, signed=True))
        return folder

    def close(self) -> None:
        """Lets go."""
        while self._locks:
            self._locks.pop().close()


def _holder(fd: int) -> str:
    """The process that has the lock, as the kernel lists them; empty if that can't be read."""
    found = os.fstat(fd)
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if len(words) > 5 and words[1] == "FLOCK" and words[5] == device:
                return words[4]
    return ""


_REMEDY = "stop that one, or choose another directory (--data-dir)"


def _held_by(holder: str, fd: int) -> str:
    """Finds the process that holds the lock: the one that took it, or a fork of it."""
    if holder.isdigit() and Path("/proc", holder).exists():
        return f"another ingestd (process {holder}) uses it; {_REMEDY}"
    heirs = [str(pid) for pid in _that_have_open(fd)]
    if not heirs:
        return f"another ingestd uses it; {_REMEDY}"
    return (
        f"an ingestd that has ended left a process behind that still has it open:"
        f" end process {' and '.join(heirs)}"
    )


def _that_have_open(fd: int) -> Iterator[int]:
    """Other processes that have the same file open, as far as we may look."""
    wanted = os.fstat(fd)
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        try:
            for link in (folder / "fd").iterdir():
                if os.path.samestat(link.stat(), wanted):
                    yield int(folder.name)
                    break
        except OSError:
            continue  # it has ended, or is another user's


def _why(error: OSError) -> str:
    problem = f"it can't be used: {error.strerror or error}"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "it can't be used: it is, or lies below, a file and not a folder"
    if isinstance(error, PermissionError):
        problem += (
            f"; give it to the user with the id {os.geteuid()}, who runs this command,"
            f" or choose another one (--data-dir)"
        )
    return problem
