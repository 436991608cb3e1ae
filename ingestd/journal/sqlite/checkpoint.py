"""Checkpoints off the commit path.

SQLite copies the pages of the WAL back into the database file only when told to. A thread with a
connection of its own does that with `PASSIVE`, which never blocks a commit, and then syncs the
database file, so that what is left for the writer is short: `RESTART` copies the few pages that
came meanwhile, and the next commit writes the WAL from its start again. A WAL that is written
over syncs several times faster than one that grows, and its size stays bounded. What lives left
that were killed counts too, and where it has become much the start itself copies it: SQLite reads
all of a WAL before a start can go on, and daemons that are killed soon after each of their starts
would take longer for every next one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import threading
from typing import TYPE_CHECKING

from ingestd.journal.sqlite.store import connect

if TYPE_CHECKING:
    from pathlib import Path

WAL_BYTES = 64 << 20
"""How much goes into the WAL before it is started over."""
UNSYNCED_WAL_BYTES = 8 << 20
"""The same where nothing is synced: what is written over soon is never written to the disk."""
WAL_PART = 16
"""Of a small disk not more than this part: what is kept free of it is a tenth, and a WAL that took
so much would keep records out although nothing is pending."""
_ALLOWS_COMMITS = {errno.ENOSPC, errno.EDQUOT, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
"""Answers to a request for space that tell of a full disk, or of a file system without the call."""
_LEFT_MAX = 2
"""How many times the bound of a WAL may lie there at a start before that copies it."""
_ROUNDS_MAX = 4
_FEW_PAGES = 256
"""What is left to the writer at most, where rounds of copying get ahead of it."""


class Checkpointer:
    """Owns the checkpoint thread. All but `stop` and `close` are the writer's, and cheap.

    Args:
        path: the journal's file.
        synced: what is committed has to survive the machine. Without it nothing is synced here:
            other programs' syncs would wait for that of a cache.
    """

    def __init__(self, path: Path, *, synced: bool = True) -> None:
        self._connection = connect(path)
        self._synced = synced
        if not synced:
            self._connection.execute("PRAGMA synchronous=OFF")
        disk = os.statvfs(path)
        wal = WAL_BYTES if synced else UNSYNCED_WAL_BYTES
        self._wal_bytes = min(wal, disk.f_blocks * disk.f_frsize // WAL_PART)
        # POSIX drops every lock that a process has on a file when it closes *any* descriptor of
        # it, so this one lives as long as the connections do (see `close`).
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._written = 0
        self._wanted = threading.Event()
        self._ripe = threading.Event()
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        left = path.with_name(f"{path.name}-wal").stat().st_size
        if left >= _LEFT_MAX * self._wal_bytes:
            with contextlib.suppress(sqlite3.Error):  # a full disk, say: see `_run`
                restart(self._connection, "TRUNCATE")
        self._thread.start()
        self.wrote(left)

    def wrote(self, size: int) -> None:
        """Counts what a commit put into the WAL."""
        self._written += size
        if self._written >= self._wal_bytes:
            self.full()

    def full(self) -> None:
        """Has the WAL started over soon: a disk without space has room for more commits in it."""
        self._written = 0
        self._wanted.set()

    def ripe(self) -> bool:
        """Returns True if the writer should start the WAL over now; once for each round."""
        if self._ripe.is_set():
            self._ripe.clear()
            return True
        return False

    def check_disk(self) -> None:
        """Asks for space that the file has already: a file system that gave itself up refuses it.

        ext4 gives its own journal up some milliseconds before it turns read-only. In between a
        sync that is under way returns success although nothing was written, and so do the next
        sync, a write of no bytes and a change of times. A request for space starts a transaction
        of ext4's journal and fails at once. The file is the database and not the WAL, whose next
        sync would have to wait for that transaction.

        Raises:
            OSError: what was synced just now may not be on the disk.
        """
        if not self._synced:
            return
        try:
            os.posix_fallocate(self._fd, 0, 1)
        except OSError as error:
            if error.errno not in _ALLOWS_COMMITS:
                raise

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._stop:
                return
            try:
                self._copy()
                if self._synced:
                    os.fsync(self._fd)
            except (sqlite3.Error, OSError):
                # Nothing is lost by a checkpoint that fails: the WAL keeps its content. What is
                # really wrong with the disk shows at the next commit, which is checked.
                continue
            self._ripe.set()

    def _copy(self) -> None:
        """Copies what is in the WAL, and again what came into it meanwhile."""
        copied = 0
        for _ in range(_ROUNDS_MAX):
            _, pages, now = self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            if pages - copied <= _FEW_PAGES or self._stop:
                return
            copied = now

    def stop(self) -> None:
        """Ends the thread; the descriptor stays open until `close`."""
        self._stop = True
        self._wanted.set()
        self._thread.join()
        self._connection.close()

    def close(self) -> None:
        """Call when no connection of this process is open on the file any more."""
        os.close(self._fd)


def restart(connection: sqlite3.Connection, mode: str = "RESTART") -> None:
    """Starts the WAL over, on the writer's connection, without waiting for a reader.

    Args:
        connection: no other one may be writing.
        mode: `TRUNCATE` makes the file empty as well.

    Raises:
        sqlite3.Error: the database file could not be written or synced.
    """
    connection.execute("PRAGMA busy_timeout=0")
    try:
        connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise
    finally:
        connection.execute("PRAGMA busy_timeout=10000")
