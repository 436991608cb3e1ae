"""Hourly files that many writers append whole lines to: rotation by size, and compression.

    2026-01-31T09.jsonl      the file of this hour (UTC), being written
    2026-01-31T09.1.jsonl    what was in it when it was full; the higher the number, the newer
    2026-01-31T08.jsonl      an hour that is over

Writers are threads and processes that know nothing of each other, so the rules are the files':

* A writer holds the file's `flock`, writes the whole buffer, syncs it and unlocks.
* A file is renamed only under its lock, and a writer that gets a lock checks that the name still
  means that file. So no line goes into a file that was set aside.
* What stands behind the last LF was torn by a crash. Its batch was not acknowledged and comes
  again, so the next one to hold the lock cuts it off.
* A write that fails, for want of space say, is cut off by the writer itself.
* A batch with names goes through the folder's ledger (`ledger.py`), whose lock comes first: then
  whole lines that a crash left of it are cut off as well, and it is there once.
"""

from __future__ import annotations

import fcntl
import gzip
import logging
import os
import re
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ingestd.base.files import make_folder, open_private, sync_folder
from ingestd.sinks.ledger import NAME as LEDGER
from ingestd.sinks.ledger import BatchLedger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence


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
    """Appends lines to the files of one folder. Not thread-safe: each thread has its own.

    Args:
        path: created when the first write needs it, mode 0700.
        rotate_bytes: a file is set aside before a write would make it longer than this.
        now: seconds since the epoch.
        set_aside: called after a file of this folder stopped being written to.
        ledger: of the folder; batches with names need it.
    """

    def __init__(
        self,
        path: Path,
        *,
        rotate_bytes: int,
        now: Callable[[], float] = time.time,
        set_aside: Callable[[], None] = lambda: None,
        ledger: BatchLedger | None = None,
    ) -> None:
        self.path = path
        self._rotate_bytes = rotate_bytes
        self._now = now
        self._set_aside = set_aside
        self._fd = -1
        self._file = path
        self._ledger = ledger
        self._looked = False

    def append(self, lines: bytes, names: Sequence[str] = ()) -> None:
        """Appends whole lines to the file of this hour; they are on disk when this returns.

        Args:
            lines: of one batch.
            names: of the batches that it was split from and, last, its own: if one of them is in
                the ledger, nothing is written. Without names it is written in any case.

        Raises:
            OSError: nothing of it was written, or what was written has been cut off again.
        """
        if not names or self._ledger is None:
            self._append(lines, None)
            return
        with self._ledger.locked() as ledger:
            if not self._looked:
                cut_unfinished(ledger)
                self._looked = True
            if not ledger.has(names):
                self._append(lines, ledger, names[-1])

    def _append(self, lines: bytes, ledger: BatchLedger | None, name: str = "") -> None:
        while True:
            file = self.path / f"{hour_of(self._now())}.jsonl"
            if file != self._file or self._fd < 0:
                self._open(file)
            with self._locked() as is_current:
                if not is_current:
                    continue  # set aside or removed by another writer: open the new one
                size = ledger.settle(file, self._fd) if ledger else os.fstat(self._fd).st_size
                if not size or size + len(lines) <= self._rotate_bytes:
                    self._write(lines, size)
                    if ledger:
                        self._enter(ledger, name, file, size, len(lines))
                    return
                set_aside(file)
            self._close_file()
            self._set_aside()

    def _enter(self, ledger: BatchLedger, name: str, file: Path, size: int, written: int) -> None:
        try:
            ledger.enter(name, file, size + written)
        except BaseException:
            with suppress(OSError):  # else the next writer cuts it off
                os.ftruncate(self._fd, size)
            raise

    def close(self) -> None:
        """Closes the open files; the next `append` opens them again."""
        if self._ledger is not None:
            self._ledger.close()
        self._close_file()

    def _close_file(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _open(self, file: Path) -> None:
        if self._fd >= 0:
            self._close_file()
            self._set_aside()
        make_folder(self.path)
        self._fd = open_private(file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self._file = file
        # The writer that made the file may not have synced its name yet.
        sync_folder(self.path)

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Holds the file's lock; yields True if its name still means it. An error closes it."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            is_current = is_same(self._file, self._fd)
            if is_current:
                cut_torn_tail(self._file, self._fd)
            yield is_current
        except BaseException:
            self._close_file()
            raise
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            if not is_current:
                self._close_file()

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


def cut_unfinished(ledger: BatchLedger) -> None:
    """Cuts what a crash left of a batch off the files that are not being written any more."""
    for file in ledger.unfinished():
        with suppress(FileNotFoundError), file.open("r+b") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            if is_same(file, opened.fileno()):
                ledger.settle(file, opened.fileno())


def is_same(file: Path, fd: int) -> bool:
    """Returns True if the name still means the open file."""
    try:
        return os.path.samestat(file.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def set_aside(file: Path) -> Path | None:
    """Renames a file to its number. The caller holds its lock and saw that the name means it.

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
    """Truncates a file behind its last LF. The caller holds the lock."""
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


# -- compression -----------------------------------------------------------------------------------
#
# Files that are no longer written to are packed in a thread of its own, one at a time.
#
# A file is packed into a hidden temporary one, that is synced and renamed, and only then is the
# file removed. A crash at any point leaves either the file, or both it and its whole packed form:
# then the file only has to be removed. A number is not given again while a file has it, so the two
# belong together.
#
# Only set-aside files are packed. The file of an hour that is over is first set aside under its
# lock, which is a rename: no writer waits for the packing.

_BLOCK = 1024 * 1024
_LOCK_FILE = ".compress.lock"
_TMP_SUFFIX = ".tmp"
_BUSY_RETRY = 1.0  # seconds until the folder is tried again that another one is packing
_LOOK_AGAIN = 60.0  # seconds until an hour that ended without a write is noticed
SUFFIXES = {"gzip": ".gz", "zstd": ".zst"}


class PackingPlan(NamedTuple):
    """Files of a folder to remove, rename and pack, each list in order of time."""

    remove: list[str]
    set_aside: list[str]
    pack: list[str]


def plan_packing(names: Iterable[str], this_hour: str) -> PackingPlan:
    """Plans the packing of a folder from the names alone.

    Temporary files are removed (the caller holds the folder's lock, so none is being written), and
    so are files that are packed already; the hours that are over are set aside, then packed.
    """
    have = sorted(names)
    packed = {name.removesuffix(s) for name in have for s in SUFFIXES.values() if name.endswith(s)}
    plan = PackingPlan([], [], [])
    for name in have:
        if name.startswith(".") and name.endswith(_TMP_SUFFIX):
            if NAME.fullmatch(name[1 : -len(_TMP_SUFFIX)]):
                plan.remove.append(name)
            continue
        match = NAME.fullmatch(name)
        if not match or match["packed"]:
            continue
        if not match["number"]:
            if match["hour"] < this_hour:
                plan.set_aside.append(name)
        else:
            (plan.remove if name in packed else plan.pack).append(name)
    return plan


class Compressor:
    """Packs the files of a folder in a thread, until it is closed.

    Each writer has one; the folder's lock lets only one of them work at a time.
    A packing that is under way when it is closed is given up and done at the next start.
    """

    def __init__(self, path: Path, kind: str, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._kind = kind
        self._now = now
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(
            target=self._run, name="ingestd-jsonl-compressor", daemon=True
        )
        self._thread.start()

    def wake(self) -> None:
        """Starts a pass now."""
        self._wake.set()

    def close(self) -> None:
        """Gives up the file under way and ends the thread."""
        self._closed = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            self._wake.clear()
            try:
                wait = _LOOK_AGAIN if self.work() else _BUSY_RETRY
            except Exception:  # noqa: BLE001  a full disk, say: the files stay as they are
                _LOG.exception("compression_failed folder=%s", self._path)
                wait = _LOOK_AGAIN
            if not self._closed:
                self._wake.wait(wait)

    def work(self) -> bool:
        """Runs one pass; returns False if another compressor holds the folder."""
        if not self._path.is_dir():
            return True
        with _folder_lock(self._path) as is_ours:
            if not is_ours:
                return False
            plan = plan_packing([file.name for file in self._path.iterdir()], hour_of(self._now()))
            for name in plan.remove:
                (self._path / name).unlink(missing_ok=True)
            if plan.set_aside and (self._path / LEDGER).exists():
                # With all that is finished, and nothing else.
                ledger = BatchLedger(self._path)
                with ledger.locked():
                    cut_unfinished(ledger)
                ledger.close()
            retired = [_retire(self._path / name) for name in plan.set_aside]
            for file in (*[self._path / name for name in plan.pack], *retired):
                if file is not None and not self._closed:
                    self._pack(file)
        return True

    def _pack(self, file: Path) -> None:
        packed = file.with_name(file.name + SUFFIXES[self._kind])
        tmp = packed.with_name(f".{packed.name}{_TMP_SUFFIX}")
        try:
            source = file.open("rb")
        except FileNotFoundError:  # it was fetched in the meantime
            return
        try:
            with source, open(tmp, "wb", opener=_private) as raw:
                with _packer(self._kind, raw) as out:
                    while block := source.read(_BLOCK):
                        if self._closed:
                            return
                        out.write(block)
                raw.flush()
                os.fsync(raw.fileno())
            tmp.rename(packed)
        finally:
            tmp.unlink(missing_ok=True)
        sync_folder(self._path)
        file.unlink(missing_ok=True)


def _retire(file: Path) -> Path | None:
    """Sets aside the file of an hour that is over, unless another process just did."""
    try:
        fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        if not is_same(file, fd):
            return None
        cut_torn_tail(file, fd)
        return set_aside(file)
    finally:
        os.close(fd)


def _private(path: str, flags: int) -> int:
    return open_private(Path(path), flags)


@contextmanager
def _folder_lock(path: Path) -> Iterator[bool]:
    fd = open_private(path / _LOCK_FILE, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def _packer(kind: str, raw: BinaryIO) -> BinaryIO:
    if kind == "gzip":
        return gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=6)  # type: ignore[return-value]
    if sys.version_info >= (3, 14):
        from compression import zstd  # noqa: PLC0415  only where it is asked for
    else:
        from backports import zstd  # noqa: PLC0415
    return zstd.ZstdFile(raw, "wb")  # type: ignore[return-value]
