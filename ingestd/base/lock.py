"""The data directory: made private, and held by one daemon at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ingestd.base.errors import DataDirError

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK_NAME = "lock"


class DataDir:
    """Holds the lock from construction until `close`; the kernel drops it with the process.

    Args:
        path: created with mode 0700, with its parents, if it is not there.

    Raises:
        DataDirError: it can't be created or written, or another daemon holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DataDirError(path=path, problem=_why(error)) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip()
            problem = _held_by(holder, self._fd)
            os.close(self._fd)
            raise DataDirError(path=path, problem=problem) from None
        except OSError as error:
            os.close(self._fd)
            raise DataDirError(path=path, problem=_why(error)) from error

    def folder(self, pipeline: str) -> Path:
        """Where a pipeline's journal lies: the directory itself for `default`; made if missing.

        Raises:
            DataDirError: it can't be created.
        """
        if pipeline == "default":
            return self.path
        folder = self.path / "pipelines" / pipeline
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DataDirError(path=folder, problem=_why(error)) from error
        return folder

    def close(self) -> None:
        """Lets go; the file stays, because removing it would race with the next daemon."""
        os.close(self._fd)


def _held_by(holder: str, fd: int) -> str:
    """Which process has the lock: the one that took it, or one that was forked from it."""
    if holder.isdigit() and Path("/proc", holder).exists():
        return f"another ingestd (process {holder}) uses it"
    heirs = [str(pid) for pid in _that_have_open(fd)]
    if not heirs:
        return "another ingestd uses it"
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
    return f"it can't be used: {error.strerror or error}"
