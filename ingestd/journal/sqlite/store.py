"""The SQLite file behind a journal: its tables and what one transaction does to them.

Nothing here knows threads or the event loop; a connection belongs to its opener.

* `synchronous=FULL` in WAL mode: `COMMIT` returns after `fdatasync` of the WAL
  (https://www.sqlite.org/pragma.html#pragma_synchronous).
* `wal_autocheckpoint=0`: a commit never pays for a checkpoint (see `checkpoint.py`).
* Pages of 16 KiB: a chunk of 125 KB then lies on 8 overflow pages instead of 31, which makes
  writing and deleting it cheaper; a commit with one small chunk still writes only a few pages.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import time
import zlib
from collections import Counter
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ingestd.base.append import principal_of
from ingestd.base.errors import JournalUnreadable
from ingestd.base.files import make_private, sync_folder
from ingestd.base.record import Layout, Records, Span, join
from ingestd.journal.dead_letters import InvalidQuota, Moved
from ingestd.journal.idempotency import RememberedKey, size_of
from ingestd.journal.interface import (
    Chunk,
    ChunkSize,
    Cursor,
    Failing,
    Ledger,
    Recovered,
    Seal,
    Sealed,
    Settle,
)
from ingestd.journal.sqlite import first_page, letters, offsets, schema, sender_ids

if TYPE_CHECKING:
    from asyncio import Future
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from ingestd.base.append import Deduplicated, HeldIds, IdempotencyClaim, SourceOffset
    from ingestd.journal.dead_letters import DeadLetter
    from ingestd.journal.sqlite import kept

PAGE_BYTES = 16384
WRITER_CACHE_KIB = 12 * 1024
"""Deleting a chunk reads its pages again; of those that went in lately they are here."""
READER_CACHE_KIB = 2 * 1024
"""Chunks are read back once each, and a copy of pages back uses the system's cache."""
SHRINK_BYTES = 16 << 20
"""A file with more free pages than this, and less else, is made smaller when it is closed."""
CHECKED_BYTES_MAX = 16 << 20
"""A file up to this size is looked at page by page at a start, which takes milliseconds."""
LOOK_SECONDS = 0.05
"""How often, while one commit follows the other, it is read what else has changed."""
READ_CHUNKS = 4096
"""Most chunks that one read brings into memory."""

_spans_decoder = msgspec.msgpack.Decoder(tuple[Span, ...])
_spans_encode = _lineage_encode = msgspec.msgpack.Encoder().encode
_lineage_decoder = msgspec.msgpack.Decoder(tuple[int, ...])


class Meta(NamedTuple):
    """The one row that moves with every commit."""

    ledger: Ledger
    cursor: Cursor
    last_chunk: int
    next_batch: int


class KeyChange(NamedTuple):
    """The number of idempotency keys, and their bytes: all of them, or those that a commit removed.

    Attributes:
        count: keys.
        bytes: of them.
        owners: how many of those that were removed each principal had.
    """

    count: int = 0  # type: ignore[assignment]  # hides tuple.count
    bytes: int = 0
    owners: Mapping[str, int] = MappingProxyType({})


_NO_CHANGE = KeyChange()
_NOT_MOVED = Moved()


class Write(NamedTuple):
    """Everything that one commit writes.

    Attributes:
        requeue_at: marked dead letters are taken back, and what arrived from other pipelines is
            taken in, accepted at this time.
        room: bytes that the journal has left for what is taken in.
        keep: bounds of finished chunks that are kept; `None` where none are.
        expire: dead letters that were given up from the first of these times to the other go.
        claims: idempotency keys that come, accepted at `at`; an expired one of the same name goes.
        bookmarks: in the order of their appends; the last one of a key counts.
        ids: that senders gave the records.
        deduplicated: keys of `dedupe.key`.
        sweep: at most so many of the oldest keys go, as far as they came before `keys_before`.
    """

    chunks: Sequence[Chunk] = ()
    invalid: Sequence[DeadLetter] = ()
    sealed: Sequence[Seal] = ()
    postponed: Sequence[Sealed] = ()
    settled: Sequence[Settle] = ()
    claims: Sequence[IdempotencyClaim] = ()
    bookmarks: Sequence[SourceOffset] = ()
    ids: Sequence[HeldIds] = ()
    deduplicated: Sequence[Deduplicated] = ()
    at: float = 0.0
    sweep: int = 0
    keys_before: float = 0.0
    requeue_at: float | None = None
    room: int = 0
    keep: kept.KeepRule | None = None
    expire: tuple[float, float] | None = None


def checksum(chunk: int, records: Records) -> int:
    """CRC-32 over a chunk's identity, shape and bytes: SQLite's pages carry none."""
    head = b"%d %d %d " % (chunk, records.count, records.layout)
    if records.names:
        head += "\n".join(records.names).encode()
    if records.envelopes:
        head += records.envelopes
    return zlib.crc32(records.payload, zlib.crc32(records.sizes, zlib.crc32(head)))


def connect(path: Path, *, cache_kib: int = READER_CACHE_KIB) -> sqlite3.Connection:
    """A connection set up as every connection to a journal is, but for the size of its cache."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    try:
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA wal_autocheckpoint=0")
        connection.execute(f"PRAGMA cache_size=-{cache_kib}")
        connection.execute("PRAGMA temp_store=MEMORY")
    except BaseException:
        connection.close()
        raise
    return connection


def why(error: Exception) -> str:
    """Names a fault; SQLite calls it an I/O error where a full disk has no room for its index."""
    code = getattr(error, "sqlite_errorcode", None)
    return "the disk is full" if code == sqlite3.SQLITE_IOERR_SHMSIZE else str(error)


def row_bytes_max(db: sqlite3.Connection) -> int:
    """Bytes of records that a row takes: one append is one row, at most."""
    return db.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) - PAGE_BYTES


class Store:
    """The writer's side: owns the writing connection and the state that moves with each commit.

    Args:
        path: the file; made if it is not there, private in any case.
        invalid: bounds the letters of records that were never accepted.
        keeps: chunks that are processed are kept.

    Attributes:
        meta: the moving row after the last commit.
        dead: the dead letters after it, or shortly before it.
        reusable: bytes of free pages in the file then: the next rows go there first.
        moved: what it did to dead letters that were there before.
        bookmarks: what there is of them after it.
        keys: the idempotency keys that are there after it, expired ones included.
    """

    is_one_statement = True
    """Most commits are one statement, and a transaction by that."""

    def __init__(
        self,
        path: Path,
        invalid: InvalidQuota = InvalidQuota(),  # noqa: B008  immutable
        *,
        keeps: bool = False,
    ) -> None:
        self.path = path
        self._keeps = keeps
        self._invalid = invalid
        self._names = (str(path), f"{path}-wal")  # strings: they are looked up after every commit
        self._files: list[tuple[int, int]] = []
        make_private(path)  # SQLite gives its other files the same mode
        first_page.check(path)
        self.connection = connect(path, cache_kib=WRITER_CACHE_KIB)
        try:
            self.load()
            schema.prepare_commits(self.connection)
        except BaseException:
            self.connection.close()
            raise

    def load(self) -> None:
        """Reads the state that moves with commits from the file."""
        self.id, self.meta = self._open()
        self.dead, self.moved = letters.totals(self.connection), _NOT_MOVED
        self.reusable, self._looked_at = self._reusable_bytes(), 0.0
        self.bookmarks = offsets.totals(self.connection)
        self.keys = _key_totals(self.connection)

    def _open(self) -> tuple[str, Meta]:
        db = self.connection
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if tables == 0:
            self._create()
        elif application != schema.APPLICATION_ID:
            raise JournalUnreadable(path=self.path, problem="this is not a journal of ingestd")
        elif 0 < version < schema.VERSION:
            check_pages(db, self.path)
            schema.carry_over(db)
        elif version != schema.VERSION:
            raise JournalUnreadable(
                path=self.path,
                problem=f"it has version {version}, this ingestd reads version {schema.VERSION}",
            )
        (mode,) = db.execute("PRAGMA journal_mode=WAL").fetchone()  # not so in some kinds of backup
        if mode != "wal":
            raise sqlite3.OperationalError("this file system can't have a database with a WAL")
        db.execute("BEGIN IMMEDIATE")  # a new journal waits for one sync, not for four
        db.execute("DELETE FROM failing WHERE number NOT IN (SELECT number FROM batches)")
        db.execute(sender_ids.SCHEMA)
        db.execute(sender_ids.KEYS_SCHEMA)
        db.execute(first_page.SCHEMA)
        first_page.keep(db)
        db.execute("COMMIT")
        if self._keeps:
            from ingestd.journal.sqlite import kept  # noqa: PLC0415  most journals keep none

            kept.prepare(db)
        counters = ", ".join(schema.COUNTERS)
        row = db.execute(f"SELECT crc, journal, {counters} FROM meta").fetchone()  # noqa: S608
        if row is None:
            raise sqlite3.DatabaseError("the meta row is missing")
        crc, journal, *counters_now = row
        if schema.meta_checksum(journal, counters_now) != crc:
            raise sqlite3.DatabaseError("the checksum of the ledger does not fit")
        if schema.read_identity(db) != journal:
            raise sqlite3.DatabaseError("the journal's id is damaged")
        return journal, meta_of(counters_now)

    def _create(self) -> None:
        db = self.connection
        db.execute(f"PRAGMA page_size={PAGE_BYTES}")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("BEGIN IMMEDIATE")
        schema.create(db, secrets.token_hex(6))
        db.execute("COMMIT")
        # The file's name must survive a power cut as surely as its content.
        sync_folder(self.path.parent)

    def write(self, write: Write, *, hurried: bool = False) -> KeyChange:
        """Applies everything in one transaction and returns once it is synced.

        Args:
            write: everything.
            hurried: another commit follows at once, and may do what need not be done each time.

        Returns:
            The idempotency keys that went.

        Raises:
            sqlite3.Error: nothing was applied; `meta` is unchanged.
        """
        db = self.connection
        if self.is_one_statement and _is_plain(write):
            meta = _advance(self.meta, write, _NOT_MOVED)
            rows = _rows(write, self.id, meta)
            if rows.fits():
                rows.write(db)
                self.meta, self.moved = meta, _NOT_MOVED
                self._look(hurried=hurried)
                return _NO_CHANGE
        gone = _NO_CHANGE
        db.execute("BEGIN IMMEDIATE")
        try:
            write, moved = _move_letters(db, self.meta, write, self._invalid)
            meta = _advance(self.meta, write, moved)
            others = _other_rows(write)
            others.write(db)
            _insert_dead(db, write.settled)
            if write.keep is not None:
                _keep(db, write, write.keep)
            if write.invalid:
                moved = _insert_invalid(db, write.invalid, moved, self._invalid.bytes_max)
            rows = _rows(write, self.id, meta)
            rows.write(db)
            if write.claims or write.sweep:
                gone = change_keys(db, write)
            marked = self.bookmarks
            if write.bookmarks:
                marked = offsets.put(db, write.bookmarks, marked)
            if write.ids:
                sender_ids.put(db, write.ids)
            if write.deduplicated:
                sender_ids.put_keys(db, write.deduplicated)
            self.before_commit(write, rows, others)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        self.meta, self.moved, self.bookmarks = meta, moved, marked
        self._look(hurried=False)
        if write.claims or gone.count:
            self.keys = KeyChange(
                self.keys.count + len(write.claims) - gone.count,
                self.keys.bytes + sum(size_of(claim) for claim in write.claims) - gone.bytes,
            )
        return gone

    def before_commit(
        self, write: Write, rows: schema.CommitRows, others: schema.OtherRows
    ) -> None:
        """Called at the end of each transaction that is no single statement, with all it wrote."""

    def _look(self, *, hurried: bool) -> None:
        """Reads what other processes change as well, and what only says how much room there is."""
        now = time.monotonic()
        if hurried and now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        # Nothing of it decides about the commit, which is done.
        with contextlib.suppress(sqlite3.Error):
            self.dead = letters.totals(self.connection)
            self.reusable = self._reusable_bytes()

    def recovered(self, failed: Future[None]) -> Recovered:
        """Reads what is to be done; `failed` is the journal's."""
        db = self.connection
        failing = {
            number: Failing(seconds, counted)
            for number, seconds, counted in db.execute("SELECT * FROM failing")
        }
        batches, waits = [], {}
        for number, count, attempts, due_at, accepted_at, spans, wait, lineage in db.execute(
            "SELECT number, count, attempts, due_at, accepted_at, spans, wait, lineage"
            " FROM batches ORDER BY number"
        ):
            batches.append(
                Sealed(
                    number,
                    _spans_decoder.decode(spans),
                    count,
                    attempts,
                    due_at,
                    accepted_at,
                    failing.get(number, Failing()),
                    read_lineage(lineage),
                )
            )
            if due_at:
                waits[number] = wait
        sizes: dict[int, ChunkSize] = {}
        for first, last in _runs({span.chunk for batch in batches for span in batch.spans}):
            rows = db.execute(
                "SELECT id, bytes, count FROM chunks WHERE id BETWEEN ? AND ?", (first, last)
            )
            sizes.update((number, ChunkSize(*size)) for number, *size in rows)
        meta = self.meta
        return Recovered(
            self.id, failed, batches, meta.cursor, meta.last_chunk, meta.next_batch, sizes, waits,
            ids=list(sender_ids.stored(db)), keys=list(sender_ids.stored_keys(db)),
        )  # fmt: skip

    def stored_bytes(self) -> int:
        """Bytes of everything but dead letters (see `dead`), for the journal's bound."""
        (damaged,) = self.connection.execute("SELECT total(bytes) FROM damaged").fetchone()
        return self.chunk_bytes() + int(damaged) + self.keys.bytes + self.bookmarks.bytes

    def chunk_bytes(self) -> int:
        """Bytes of the chunks that are there, as triggers keep it: no chunk's row is read."""
        (chunks,) = self.connection.execute("SELECT chunk_bytes FROM meta").fetchone()
        return chunks  # type: ignore[no-any-return]

    def _reusable_bytes(self) -> int:
        (pages,) = self.connection.execute("PRAGMA freelist_count").fetchone()
        return int(pages) * PAGE_BYTES

    def in_place(self) -> bool:
        """Returns True if the next start will find what was written under these names.

        An open file that was deleted takes every commit, and all of it goes with the process.
        """
        try:
            now = [(found.st_dev, found.st_ino) for found in map(os.stat, self._names)]
        except OSError:
            return False
        if not self._files:
            self._files = now
        return now == self._files

    def shrink(self, seconds: float) -> None:
        """Gives the file's free pages back to the disk, if what is left in it is little.

        It is written anew within SQLite, in one transaction, which ends after `seconds` as if
        nothing had been; a crash changes nothing either. Call when this is the only connection.

        Raises:
            sqlite3.Error: it could not be done; the file is as it was.
        """
        db = self.connection
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        free = self._reusable_bytes()
        if free < SHRINK_BYTES or int(pages) * PAGE_BYTES - free > SHRINK_BYTES:
            return
        until = time.monotonic() + seconds
        db.set_progress_handler(lambda: time.monotonic() > until, 1000)
        try:
            db.execute("VACUUM")
        finally:
            db.set_progress_handler(None, 0)
        first_page.keep(db)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def close(self) -> None:
        """Leaves one tidy file where that is possible."""
        self.connection.close()


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Numbers as runs of neighbours, first and last: batches name thousands of small chunks."""
    ordered = sorted(numbers)
    first = 0
    for i, number in enumerate(ordered):
        if i + 1 == len(ordered) or ordered[i + 1] != number + 1:
            yield ordered[first], number
            first = i + 1


def _key_totals(db: sqlite3.Connection) -> KeyChange:
    count, size = db.execute("SELECT count(*), total(bytes) FROM keys").fetchone()
    return KeyChange(count, int(size))


def _move_letters(
    db: sqlite3.Connection, meta: Meta, write: Write, invalid: InvalidQuota
) -> tuple[Write, Moved]:
    """Marked dead letters become the last chunks of this commit; old ones go."""
    moved = Moved()
    if write.requeue_at is not None:
        last = write.chunks[-1].id if write.chunks else meta.last_chunk
        moved = letters.requeue(db, last + 1, write.requeue_at, invalid.check)
        if schema.columns(db, "arrivals"):
            moved = _take_in(db, last + len(moved.chunks) + 1, write, moved)
        if schema.columns(db, "kept"):
            moved = _replay(db, meta, write, moved)
    if write.expire is not None:
        moved = moved._replace(expired=letters.expire(db, *write.expire))
    if moved.chunks:
        write = write._replace(chunks=[*write.chunks, *moved.chunks])
    return write, moved


def _take_in(db: sqlite3.Connection, chunk: int, write: Write, moved: Moved) -> Moved:
    """Records that arrived from other pipelines are taken in."""
    from ingestd.journal.sqlite import moves  # noqa: PLC0415  most journals have no arrivals

    arrived = moves.take(db, chunk, write.requeue_at or write.at, write.room)
    chunks = (*moved.chunks, *arrived.chunks)
    return moved._replace(chunks=chunks, arrived=arrived.records)


def _replay(db: sqlite3.Connection, meta: Meta, write: Write, moved: Moved) -> Moved:
    """Kept chunks that a replay asks for are fed; those beyond the bounds go."""
    from ingestd.journal.sqlite import kept  # noqa: PLC0415  most journals keep none

    last = write.chunks[-1].id if write.chunks else meta.last_chunk
    first = last + len(moved.chunks) + 1
    fed = kept.feed(db, first, write.requeue_at or write.at, write.room, _chunk)
    dropped = kept.drop(db, write.keep or kept.NOTHING)
    return moved._replace(
        chunks=(*moved.chunks, *fed.chunks),
        replayed=fed.records,
        more=bool(fed.looked_at or dropped),
    )


def _keep(db: sqlite3.Connection, write: Write, rule: kept.KeepRule) -> None:
    """Finished chunks are kept, and it is written down which of their records died."""
    from ingestd.journal.sqlite import kept  # noqa: PLC0415  most journals keep none

    for settlement in write.settled:
        kept.leave_out(db, settlement.dead)
    finished = list(_runs([chunk for settle in write.settled for chunk in settle.finished]))
    if finished:
        kept.keep(db, finished, write.at, rule)


def _insert_dead(db: sqlite3.Connection, settled: Sequence[Settle]) -> None:
    for settlement in settled:
        if settlement.dead:
            letters.insert(db, settlement.dead)


def _insert_invalid(
    db: sqlite3.Connection, refused: Sequence[DeadLetter], moved: Moved, bytes_max: int
) -> Moved:
    """Letters of records that were never accepted come, and old ones of them go."""
    letters.insert(db, refused, row_bytes=bytes_max // (4 * letters.SHARES))
    principals = {letter.principal for letter in refused}
    return moved._replace(dropped=letters.keep_within(db, principals, bytes_max))


def meta_of(counters: Sequence[int]) -> Meta:
    """The moving row from its columns, in the order of `schema.COUNTERS`."""
    return Meta(Ledger(*counters[:4]), Cursor(*counters[4:6]), counters[6], counters[7])


def write_meta(db: sqlite3.Connection, journal: str, meta: Meta) -> None:
    """Writes the one moving row, with its checksum."""
    db.execute(
        "UPDATE meta SET accepted=?, processed=?, dead=?, refused=?,"
        " cursor_chunk=?, cursor_record=?, last_chunk=?, next_batch=?, crc=?",
        _meta_row(journal, meta),
    )


def _meta_row(journal: str, meta: Meta) -> tuple[int, ...]:
    counters = (*meta.ledger, *meta.cursor, meta.last_chunk, meta.next_batch)
    return (*counters, schema.meta_checksum(journal, counters))


def _advance(meta: Meta, write: Write, moved: Moved) -> Meta:
    """Computes the one moving row after this commit."""
    # Loops, not sums: a commit under little load has one append, and five empty sums cost more.
    ledger = meta.ledger
    accepted = ledger.accepted - moved.requeued  # what is requeued was accepted once already
    for chunk in write.chunks:
        accepted += chunk.records.count
    processed, dead, next_batch = ledger.processed, ledger.dead - moved.requeued, meta.next_batch
    for settle in write.settled:
        processed += settle.processed
        for letter in settle.dead:
            dead += letter.records
    if write.sealed or write.settled:
        next_batch = max([next_batch, *(batch.number + 1 for batch in _new_batches(write))])
    return Meta(
        Ledger(accepted, processed, dead, ledger.invalid + len(write.invalid) - moved.readmitted),
        write.sealed[-1].cursor if write.sealed else meta.cursor,
        write.chunks[-1].id if write.chunks else meta.last_chunk,
        next_batch,
    )


def _new_batches(write: Write) -> list[Sealed]:
    sealed = [batch for seal in write.sealed for batch in (seal.batch, *seal.more)]
    return [*sealed, *(batch for settle in write.settled for batch in settle.successors)]


def _is_plain(write: Write) -> bool:
    """Tells if a commit has nothing but chunks, batches, and batches that are done."""
    if write.invalid or write.postponed or write.claims or write.bookmarks or write.sweep:
        return False
    if write.ids or write.deduplicated or write.requeue_at is not None or write.expire is not None:
        return False
    if write.keep is not None and write.settled:
        return False
    if any(settle.dead or settle.damaged or settle.successors for settle in write.settled):
        return False
    return not any(_has_failed(seal.batch) for seal in write.sealed)


def _has_failed(batch: Sealed) -> bool:
    return bool(batch.failing.seconds or batch.failing.counted)


def _rows(write: Write, journal: str, meta: Meta) -> schema.CommitRows:
    """The rows of chunks and batches, and the one moving row."""
    batches = _new_batches(write)
    if batches and write.settled:  # one that goes at once has no row: rows come and go in no order
        over = {settle.batch for settle in write.settled}
        batches = [batch for batch in batches if batch.number not in over]
    return schema.CommitRows(
        _meta_row(journal, meta),
        [chunk_row(chunk) for chunk in write.chunks],
        [batch_row(batch, write.at) for batch in batches],
        list(_runs([settle.batch for settle in write.settled])),
        list(_runs([chunk for settle in write.settled for chunk in settle.finished])),
    )


def _other_rows(write: Write) -> schema.OtherRows:
    """The rows of batches beside those that come and go."""
    failing = [b for b in (*_new_batches(write), *write.postponed) if _has_failed(b)]
    return schema.OtherRows(
        [(b.number, *b.failing) for b in failing],
        [(b.attempts, b.due_at, _wait(b, write.at), b.number) for b in write.postponed],
        [(chunk,) for s in write.settled for chunk in s.damaged],
    )


def change_keys(db: sqlite3.Connection, write: Write) -> KeyChange:
    """The expired keys go, bounded, and the new ones come; in that order, so none comes twice."""
    gone = KeyChange()
    if write.sweep:
        # Only the oldest are looked at: this stays cheap however many keys there are.
        gone = _delete_keys(
            db,
            "id IN (SELECT id FROM keys ORDER BY id LIMIT ?) AND at <= ?",
            (write.sweep, write.keys_before),
        )
    for claim in write.claims:
        replaced = _delete_keys(db, "key = ?", (claim.key,))
        if replaced.count:
            gone = KeyChange(
                gone.count + replaced.count,
                gone.bytes + replaced.bytes,
                Counter(gone.owners) + Counter(replaced.owners),
            )
    db.executemany(
        "INSERT INTO keys(key, at, bytes, fingerprint, answer) VALUES(?,?,?,?,?)",
        [(c.key, write.at, size_of(c), c.fingerprint, c.answer) for c in write.claims],
    )
    return gone


def _delete_keys(db: sqlite3.Connection, where: str, parameters: tuple[object, ...]) -> KeyChange:
    query = f"DELETE FROM keys WHERE {where} RETURNING bytes, key"  # noqa: S608
    rows = db.execute(query, parameters).fetchall()
    owners = Counter(principal_of(row[1]) for row in rows)
    return KeyChange(len(rows), sum(row[0] for row in rows), owners)


def key_owners(db: sqlite3.Connection) -> Counter[str]:
    """Counts the idempotency keys of each principal; reads the index of keys alone.

    Raises:
        sqlite3.DatabaseError: something else lies where a key should.
    """
    owners: Counter[str] = Counter()
    for (key,) in db.execute("SELECT key FROM keys"):
        if type(key) is not str:
            raise sqlite3.DatabaseError("a key is no text")
        owners[principal_of(key)] += 1
    return owners


def check_pages(db: sqlite3.Connection, path: Path) -> None:
    """Looks at how the pages of a small file fit together.

    SQLite believes what a page says of its own free space: with one wrong bit there, the next row
    is written over another one, and neither says so. A large file would take too long at a start.

    Raises:
        sqlite3.DatabaseError: they do not.
    """
    if path.stat().st_size > CHECKED_BYTES_MAX:
        return
    (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(str(found))


def find_key(db: sqlite3.Connection, key: str) -> RememberedKey | None:
    """Reads the entry of an idempotency key, expired or not."""
    row = db.execute("SELECT fingerprint, answer, at FROM keys WHERE key = ?", (key,)).fetchone()
    return None if row is None else RememberedKey(*row)


def chunk_row(chunk: Chunk) -> tuple[object, ...]:
    """A chunk as its table has it."""
    records = chunk.records
    crc = checksum(chunk.id, records)
    names = "\n".join(records.names).encode() if records.names else b""
    return (
        chunk.id, chunk.accepted_at, records.count, records.stored_bytes, int(records.layout), crc,
        records.sizes, records.payload, names, records.envelopes,
    )  # fmt: skip


def batch_row(batch: Sealed, now: float) -> tuple[object, ...]:
    """A sealed batch as its table has it, written down at `now`."""
    spans = _spans_encode(batch.spans)
    return (
        batch.number, batch.count, batch.attempts, batch.due_at, batch.accepted_at, spans,
        _wait(batch, now), _lineage_encode(batch.lineage) if batch.lineage else b"",
    )  # fmt: skip


def read_lineage(packed: bytes) -> tuple[int, ...]:
    """The lineage of a batch from its column."""
    return _lineage_decoder.decode(packed) if packed else ()


def _wait(batch: Sealed, now: float) -> float:
    """Seconds until it is due, for a start after which the clock says something else."""
    return max(0.0, batch.due_at - now) if batch.due_at else 0.0


_CHUNK = "SELECT id, accepted_at, count, layout, crc, sizes, payload, {} FROM chunks"
_CHUNKS = {1: "x'', x''", 2: "names, x''", 3: "names, envelopes"}
"""Columns that came later, or what stands for them, by version."""


def _chunk(row: tuple[int, float, int, int, int, bytes, bytes, bytes, bytes]) -> Chunk:
    number, accepted_at, count, layout, crc, sizes, payload, packed, envelopes = row
    try:
        names = tuple(packed.decode().split("\n")) if packed else ()
        records = Records(Layout(layout), count, payload, sizes, names, envelopes)
        whole = checksum(number, records) == crc
    except (ValueError, TypeError, AttributeError):
        records, whole = Records(Layout.SIZED, count, payload, sizes), False
    return Chunk(number, accepted_at, records, damaged=not whole)


def read_chunks(db: sqlite3.Connection, first: int, bytes_max: int) -> list[Chunk]:
    """Chunks from id `first` on: one, then more as long as their bytes stay within the bound.

    At most `READ_CHUNKS`: of small ones more lies beside the payload than in it.
    """
    chunks, size = [], 0
    select = _CHUNK.format(_CHUNKS[schema.VERSION])
    for row in db.execute(f"{select} WHERE id >= ? ORDER BY id LIMIT {READ_CHUNKS}", (first,)):
        chunks.append(_chunk(row))
        size += len(row[5]) + len(row[6]) + len(row[8])
        if size >= bytes_max:
            break
    return chunks


def read_one(db: sqlite3.Connection, number: int, *, version: int = schema.VERSION) -> Chunk | None:
    """The chunk of an id, of a journal of this version or an earlier one; `None` if it is gone."""
    select = _CHUNK.format(_CHUNKS[version])
    row = db.execute(f"{select} WHERE id = ?", (number,)).fetchone()
    return None if row is None else _chunk(row)


def read_sealed(db: sqlite3.Connection) -> Iterator[tuple[int, int, tuple[Span, ...]]]:
    """Reads number, tries and spans of each sealed batch, oldest first."""
    for number, attempts, spans in db.execute(
        "SELECT number, attempts, spans FROM batches ORDER BY number"
    ):
        yield number, attempts, _spans_decoder.decode(spans)


def read_spans(db: sqlite3.Connection, spans: Iterable[Span]) -> Records | None:
    """The records of a batch; `None` if one of its chunks is damaged or gone.

    One chunk is in memory at a time, and of it only what is wanted is kept: a batch may take a
    record out of each of very many chunks.
    """
    parts: list[Records] = []
    chunk: Chunk | None = None
    for span in spans:
        if chunk is None or chunk.id != span.chunk:
            chunk = read_one(db, span.chunk)
        if chunk is None or chunk.damaged or span.first + span.count > chunk.records.count:
            return None
        parts.append(chunk.records.part(span.first, span.count))
    return join(parts)
