"""Packing files that nobody writes to any more, in a thread of its own, one file at a time.

A file is packed into a hidden temporary one, that is synced and renamed, and only then is the
file removed. A crash at any point leaves either the file, or both it and its whole packed form:
then the file only has to be removed. A number is not given again while a file has it, so the two
belong together.

Only set-aside files are packed. The file of an hour that is over is first set aside under its
lock, which is a rename: no writer waits for the packing.
"""

from __future__ import annotations

import fcntl
import gzip
import logging
import os
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ingestd.base.private import open_private, sync_folder
from ingestd.sinks.folder import NAME, cut_torn_tail, hour_of, is_same, set_aside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_LOG = logging.getLogger(__name__)
_BLOCK = 1024 * 1024
_LOCK_FILE = ".compress.lock"
_TMP_SUFFIX = ".tmp"
_BUSY_RETRY = 1.0  # seconds until the folder is tried again that another one is packing
_LOOK_AGAIN = 60.0  # seconds until an hour that ended without a write is noticed
SUFFIXES = {"gzip": ".gz", "zstd": ".zst"}


class Steps(NamedTuple):
    """What there is to do in a folder, by name, each list in order of time."""

    remove: list[str]
    set_aside: list[str]
    pack: list[str]


def steps(names: Iterable[str], this_hour: str) -> Steps:
    """Decide from the names alone.

    Remove temporary files (whoever asks holds the folder's lock, so nobody is writing them) and
    files that are packed already; set aside the hours that are over; pack what is set aside.
    """
    have = sorted(names)
    packed = {name.removesuffix(s) for name in have for s in SUFFIXES.values() if name.endswith(s)}
    plan = Steps([], [], [])
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
    """Packs what is to be packed in a folder, until it is closed.

    Each writer has one; the folder's lock sees to it that only one of them works at a time.
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
        """Look now."""
        self._wake.set()

    def close(self) -> None:
        """Give up what is under way and end the thread."""
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
        """Do all there is to do; `False` if another one is at it in this folder."""
        if not self._path.is_dir():
            return True
        with _folder_lock(self._path) as is_ours:
            if not is_ours:
                return False
            plan = steps([file.name for file in self._path.iterdir()], hour_of(self._now()))
            for name in plan.remove:
                (self._path / name).unlink(missing_ok=True)
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
        except FileNotFoundError:  # someone fetched it in the meantime
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
    """Set aside the file of an hour that is over, unless someone else just did."""
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
