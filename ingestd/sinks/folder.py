"""A folder of files that many writers append whole lines to: one file an hour, rotated by size.

    2026-01-31T09.jsonl      the file of this hour (UTC), being written
    2026-01-31T09.1.jsonl    what was in it when it was full; the higher the number, the newer
    2026-01-31T08.jsonl      an hour that is over

Writers are threads and processes that know nothing of each other, so the rules are the files':

* Whoever writes holds the file's `flock`, writes the whole buffer, syncs it and lets go.
* A file is renamed only under its lock, and whoever gets a lock looks whether the name still
  means that file. So nobody writes into a file that was set aside.
* What stands behind the last LF was torn by a crash. Its batch was not acknowledged and comes
  again, so the next one to hold the lock cuts it off.
* A write that fails, for want of space say, is cut off by the writer itself.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ingestd.base.private import make_folder, open_private, sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

_LOG = logging.getLogger(__name__)
_TAIL_BLOCK = 64 * 1024
NAME = re.compile(r"(?P<hour>\d{4}-\d\d-\d\dT\d\d)(?:\.(?P<number>\d+))?\.jsonl(?P<packed>\.\w+)?")


def hour_of(seconds: float) -> str:
    """The UTC hour of a time, as it begins file names; sorts like the time."""
    return time.strftime("%Y-%m-%dT%H", time.gmtime(seconds))


def next_number(names: Iterable[str], hour: str) -> int:
    """The number for the next file of an hour to be set aside: above all that are there."""
    matches = [match for name in names if (match := NAME.fullmatch(name)) and match["hour"] == hour]
    return max((int(match["number"] or 0) for match in matches), default=0) + 1


class Folder:
    """One writer's hold on the folder. Not to be shared between threads; make one each.

    Args:
        path: created when the first write needs it, mode 0700.
        rotate_bytes: a file is set aside before a write would make it longer than this.
        now: seconds since the epoch.
        set_aside: called after a file of this folder stopped being written to.
    """

    def __init__(
        self,
        path: Path,
        *,
        rotate_bytes: int,
        now: Callable[[], float] = time.time,
        set_aside: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = path
        self._rotate_bytes = rotate_bytes
        self._now = now
        self._set_aside = set_aside
        self._fd = -1
        self._file = path

    def append(self, lines: bytes) -> None:
        """Append whole lines to the file of this hour; they are on disk when this returns.

        Raises:
            OSError: nothing of it was written, or what was written has been cut off again.
        """
        while True:
            file = self.path / f"{hour_of(self._now())}.jsonl"
            if file != self._file or self._fd < 0:
                self._open(file)
            with self._locked() as is_current:
                if not is_current:
                    continue  # set aside or removed by someone else: open the new one
                size = os.fstat(self._fd).st_size
                if not size or size + len(lines) <= self._rotate_bytes:
                    self._write(lines, size)
                    return
                set_aside(file)
            self.close()
            self._set_aside()

    def close(self) -> None:
        """Let go of the file that is open; the next `append` opens it again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _open(self, file: Path) -> None:
        if self._fd >= 0:
            self.close()
            self._set_aside()
        make_folder(self.path)
        self._fd = open_private(file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self._file = file
        # Whoever made the file may not have synced its name yet, and we are about to promise.
        sync_folder(self.path)

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Hold the file's lock; says whether its name still means it. An error closes it."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            is_current = is_same(self._file, self._fd)
            if is_current:
                cut_torn_tail(self._file, self._fd)
            yield is_current
        except BaseException:
            self.close()
            raise
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            if not is_current:
                self.close()

    def _write(self, lines: bytes, size: int) -> None:
        try:
            left = memoryview(lines)
            while left:
                left = left[os.write(self._fd, left) :]
            os.fdatasync(self._fd)
        except BaseException:
            # Also after a failed sync: the batch comes again, and should not be there twice.
            try:
                os.ftruncate(self._fd, size)
            except OSError:  # then the next one to lock the file finds the torn tail
                pass
            raise


def is_same(file: Path, fd: int) -> bool:
    """Whether the name still means the open file."""
    try:
        return os.path.samestat(file.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def set_aside(file: Path) -> Path | None:
    """Give a file its number. The caller holds its lock and saw that the name means it.

    Returns:
        The new path, or `None` if there was nothing in the file and it was removed.
    """
    match = NAME.fullmatch(file.name)
    if match is None:
        raise ValueError(f"{file.name} is not a file of this folder")
    if file.stat().st_size == 0:
        file.unlink()
        return None
    number = next_number([other.name for other in file.parent.iterdir()], match["hour"])
    numbered = file.with_name(f"{match['hour']}.{number}.jsonl")
    file.rename(numbered)
    sync_folder(file.parent)
    return numbered


def cut_torn_tail(file: Path, fd: int) -> None:
    """Cut off what stands behind the last LF. The caller holds the lock."""
    size = os.fstat(fd).st_size
    if size == 0 or os.pread(fd, 1, size - 1) == b"\n":
        return
    end = size
    keep = 0
    while end > 0:
        start = max(0, end - _TAIL_BLOCK)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            keep = start + found + 1
            break
        end = start
    os.ftruncate(fd, keep)
    _LOG.warning("torn_tail_cut file=%s bytes=%d", file, size - keep)
