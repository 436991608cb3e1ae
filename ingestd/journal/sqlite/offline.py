"""Journals as another process than their daemon sees them: found, opened, and never created.

A reader opens the file read-only. A writer's transactions are short and it pauses between them,
because SQLite's lock is not fair: a daemon that waits for it must find it free soon.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ingestd.base import envelope
from ingestd.base.errors import DataDirError, JournalUnreadable, UsageError
from ingestd.base.record import Span
from ingestd.host.data_dir import LOCK_NAME, FileLock
from ingestd.journal.sqlite.schema import APPLICATION_ID, VERSION, carry_over
from ingestd.journal.sqlite.store import (
    connect,
    read_chunks,
    read_one,
    read_sealed,
    why,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ingestd.journal.interface import Chunk

BUSY_SECONDS = 30.0
"""How long to wait for the daemon's commit; one takes milliseconds unless the disk hangs."""
FILE, CACHE = "journal.db", "cache.db"
"""The second one is the cache of a journal that lies elsewhere (`ingestd/journal/log`)."""
ADOPTED = "adopted"
"""The folder beside it, with those of other daemons that are adopted at present."""
_ERRORS = (sqlite3.Error, OSError, UnicodeDecodeError)
"""The last one: SQLite's words about a damaged file quote it."""


def journals(data_dir: Path, only: Sequence[str] = ()) -> dict[str, Path]:
    """The journals in a data directory by the names of their pipelines, `default` first.

    Args:
        data_dir: as `run` uses it.
        only: these pipelines; empty for all.

    Raises:
        DataDirError: there is none, or the directory is another user's.
        UsageError: a pipeline of `only` has none.
    """
    found = dict[str, Path]()
    try:
        for file in (CACHE, FILE):
            places = {"default": data_dir / file}
            inner = sorted(data_dir.glob(f"pipelines/*/{file}"))
            places |= {path.parent.name: path for path in inner}
            found |= {name: path for name, path in places.items() if path.is_file()}
    except PermissionError as error:
        problem = f"{error.strerror}; only its daemon's user and root may read it"
        raise DataDirError(path=data_dir, problem=problem) from error
    for name, path in [*found.items()]:
        for adopted in path.parent.glob(f"{ADOPTED}/*/{CACHE}"):
            found[f"{name}@{adopted.parent.name}"] = adopted
    found = {name: found[name] for name in sorted(found, key=lambda one: (one != "default", one))}
    if not found:
        raise DataDirError(path=data_dir, problem="there is no journal in it")
    for name in only:
        if name not in found:
            known = ", ".join(found)
            problem = f"pipeline {name!r} has no journal in {data_dir}; there are those of: {known}"
            raise UsageError(problem=problem)
    return {name: path.resolve() for name, path in found.items() if not only or name in only}


@contextmanager
def opened(path: Path, *, write: bool = False) -> Iterator[sqlite3.Connection]:
    """Opens an existing journal, beside other processes that use it.

    Raises:
        JournalUnreadable: the file is no journal, or another version's.
        DataDirError: it can't be opened, read or written, inside of the block too.
    """
    mode = "rw" if write else "ro"
    _carry_over(path)
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}",
            uri=True, isolation_level=None, timeout=BUSY_SECONDS,
        )  # fmt: skip
        try:
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA wal_autocheckpoint=0")  # the daemon's checkpoints do it
            _check(connection, path)
            yield connection
        finally:
            connection.close()
    except _ERRORS as error:
        raise DataDirError(path=path, problem=why(error)) from error


def version_of(path: Path) -> int:
    """Reads the version of a journal's tables; changes nothing.

    Raises:
        JournalUnreadable: the file is no journal.
        DataDirError: it can't be read.
    """
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
            return _version(db, path)
    except _ERRORS as error:
        raise DataDirError(path=path, problem=why(error)) from error


def _version(connection: sqlite3.Connection, path: Path) -> int:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise JournalUnreadable(path=path, problem="this is not a journal of ingestd")
    return int(version)


def _carry_over(path: Path) -> None:
    """Makes a journal of an earlier version one of this version, as the daemon does at its start.

    Raises:
        DataDirError: an earlier ingestd runs on it, or it can't be written.
    """
    try:
        if not 0 < version_of(path) < VERSION:
            return
    except (DataDirError, JournalUnreadable):
        return  # the opener raises the reason
    folder = path.absolute().parent
    places = [folder, *([folder.parent.parent] if folder.parent.name == "pipelines" else [])]
    with contextlib.ExitStack() as held:
        for place in places:  # an earlier daemon has locked the data directory, whichever that is
            if (place / LOCK_NAME).is_file():
                held.callback(FileLock(place / LOCK_NAME, of=place).close)
        held.callback(FileLock(path, of=path).close)
        try:
            with contextlib.closing(connect(path)) as db:
                carry_over(db)
        except _ERRORS as error:
            raise DataDirError(path=path, problem=why(error)) from error


def _check(connection: sqlite3.Connection, path: Path) -> None:
    version = _version(connection, path)
    if version != VERSION:
        text = f"it has version {version}, this ingestd reads version {VERSION}"
        raise JournalUnreadable(path=path, problem=text)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """A short transaction that writes; leaves the lock free for as long as it held it."""
    connection.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    time.sleep(max(0.002, time.monotonic() - began))


# -- pending records -------------------------------------------------------------------------------

PEEK_BYTES = 1 << 20
"""How much of the chunks one read brings."""


class PendingRecord(NamedTuple):
    """A record that is accepted and not settled.

    Attributes:
        id: of the record.
        accepted_at: of its chunk, seconds since the epoch.
        batch: the id of the sealed batch that it is in; empty before it is sealed.
        attempts: tries of that batch.
        payload: the record; `None` if its chunk is damaged.
        envelope: packed.
    """

    id: str
    accepted_at: float
    batch: str
    attempts: int
    payload: bytes | None
    envelope: bytes


def pending(path: Path) -> Iterator[PendingRecord]:
    """Reads the pending records: those of sealed batches, then the others, each in order.

    It reads what one moment had and leaves out what was settled since. No read lasts: an open one
    would keep the daemon from starting its WAL over.

    Raises:
        JournalUnreadable, DataDirError: see `opened`.
    """
    with opened(path) as db:
        db.execute("BEGIN")
        journal, chunk, first, last = db.execute(
            "SELECT journal, cursor_chunk, cursor_record, last_chunk FROM meta"
        ).fetchone()
        batches = list(read_sealed(db))
        db.execute("COMMIT")
        held: Chunk | None = None
        for number, attempts, spans in batches:
            for span in spans:
                if held is None or held.id != span.chunk:
                    held = read_one(db, span.chunk)
                if held is not None:
                    batch = f"{journal}-{number}"
                    yield from _records(journal, held, span, batch, attempts)
        while chunk <= last:
            found = [one for one in read_chunks(db, chunk, PEEK_BYTES) if one.id <= last]
            for one in found:
                skipped = first if one.id == chunk else 0
                left = Span(one.id, skipped, one.records.count - skipped)
                yield from _records(journal, one, left)
            if not found:
                return
            chunk, first = found[-1].id + 1, 0


def _records(
    journal: str, chunk: Chunk, span: Span, batch: str = "", attempts: int = 0
) -> Iterator[PendingRecord]:
    records, (_, first, count) = chunk.records, span
    payloads: list[bytes] | list[None] = [None] * count
    envelopes = [b""] * count
    if not chunk.damaged:
        payloads = records.items()[first : first + count]
        envelopes = envelope.singles(records.envelopes, records.count)[first : first + count]
    for index, (payload, packed) in enumerate(zip(payloads, envelopes, strict=True), first):
        name = (records.names and records.names[index]) or f"{journal}.{chunk.id}.{index}"
        yield PendingRecord(name, chunk.accepted_at, batch, attempts, payload, packed)
