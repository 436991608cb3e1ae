"""Shows what is in a journal, looks for faults, and sets damaged chunks aside.

Everything but `set_aside` only reads, and can do so while a daemon runs: what belongs together is
read in one snapshot, and no snapshot lasts longer than it must.
"""

from __future__ import annotations

import sqlite3
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ingestd.base.errors import DataDirError
from ingestd.base.record import Span
from ingestd.host.data_dir import FileLock
from ingestd.journal import letter_rows
from ingestd.journal.dead_letters import DeadLetter
from ingestd.journal.sqlite import kept, letters, moves, offsets, repair, schema, sender_ids
from ingestd.journal.sqlite.dead_letters import SqliteDeadLetters
from ingestd.journal.sqlite.offline import PendingRecord, opened, pending, transaction
from ingestd.journal.sqlite.store import meta_of, read_chunks, read_lineage, write_meta

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ingestd.journal.dead_letters import DeadLetters

STEP_BYTES = 4 << 20
"""How much of the chunks one read brings."""
DAMAGED = "the journal's copy is damaged: its checksum does not fit"
_spans = msgspec.msgpack.Decoder(tuple[Span, ...])
_encode = msgspec.msgpack.Encoder().encode
_SIZE = "SELECT count(*) AS rows, CAST(total(bytes) AS INTEGER) AS bytes FROM {}"
_PENDING = """
    SELECT (SELECT coalesce(sum(count), 0) FROM batches)
         + (SELECT coalesce(sum(count), 0) FROM chunks, meta WHERE chunks.id >= cursor_chunk)
         - (SELECT cursor_record FROM meta)
         * (SELECT count(*) FROM chunks, meta WHERE chunks.id = cursor_chunk)"""


class Finding(NamedTuple):
    """Something that is not as it should be.

    Attributes:
        text: for people, one line.
        chunk: the chunk, where one is damaged and nothing else is wrong with it.
    """

    text: str
    chunk: int | None = None


def stat(db: sqlite3.Connection) -> dict[str, Any]:
    """The numbers of a journal, from one snapshot; bytes are of payloads and texts."""
    db.execute("BEGIN")
    try:
        meta = _row(db, "SELECT * FROM meta")
        chunks = _row(db, _SIZE.format("chunks"))
        damaged = _row(db, _SIZE.format("damaged"))
        marks = offsets.totals(db) if offsets.exist(db) else offsets.OffsetTotals()
        (pending,) = db.execute(_PENDING).fetchone()
        batches = _row(
            db, "SELECT count(*) AS rows, coalesce(sum(count), 0) AS records FROM batches"
        )
        dead = _row(db, "SELECT * FROM dead_totals")
        moved = moves.totals(db)
        held = kept.totals(db)
        (marked,) = db.execute(
            "SELECT coalesce(sum(letters), 0) FROM dead WHERE retry = 1"
        ).fetchone()
        (oldest,) = db.execute(
            "SELECT min(at) FROM (SELECT min(accepted_at) AS at FROM batches UNION ALL"
            " SELECT accepted_at FROM (SELECT accepted_at FROM chunks, meta"
            " WHERE id >= cursor_chunk ORDER BY id LIMIT 1))"
        ).fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
    finally:
        db.execute("COMMIT")
    by_ledger = meta["accepted"] - meta["processed"] - meta["dead"]
    return {
        "journal": meta["journal"],
        "version": version,
        **{name: meta[name] for name in ("accepted", "processed", "dead")},
        "invalid": meta["refused"],
        "pending": pending,
        "balanced": pending == by_ledger,
        "chunks": chunks,
        "batches": batches,
        "dead_letters": {
            "rows": dead["letters"],
            "bytes": dead["bytes"],
            "marked": marked,
            "never_accepted": {"rows": dead["invalid"], "bytes": dead["invalid_bytes"]},
            "requeued": dead["revived"],
            **{name: dead[name] for name in ("readmitted", "expired", "purged", "dropped")},
            **moved,
        },
        "kept": held._asdict(),
        "damaged": damaged,
        "bookmarks": {"rows": marks.count, "bytes": marks.bytes},
        "oldest_pending_at": oldest,
        "cursor": {"chunk": meta["cursor_chunk"], "record": meta["cursor_record"]},
        "last_chunk": meta["last_chunk"],
        "next_batch": meta["next_batch"],
    }


def _row(db: sqlite3.Connection, query: str) -> dict[str, Any]:
    cursor = db.execute(query)
    names = [column[0] for column in cursor.description]
    return dict(zip(names, cursor.fetchone(), strict=True))


def findings(db: sqlite3.Connection) -> Iterator[Finding]:
    """Everything that is wrong; nothing for a journal that is well."""
    for check in (_file, _places, _checksums, _bookmarks, _sender_ids, _letters):
        try:
            yield from check(db)
        except (sqlite3.DatabaseError, msgspec.MsgspecError, TypeError) as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
            if code & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}:
                raise
            yield Finding(f"the file can't be read: {error}")


def _file(db: sqlite3.Connection) -> Iterator[Finding]:
    """SQLite's own check of its pages, tables and indexes."""
    for (text,) in db.execute("PRAGMA integrity_check(20)").fetchall():
        if text != "ok":
            yield Finding(f"SQLite's integrity check: {' '.join(str(text).split())}")


def _checksums(db: sqlite3.Connection) -> Iterator[Finding]:
    """Each chunk's checksum; in short reads, so one that is settled meanwhile is passed by."""
    first = 1
    while chunks := read_chunks(db, first, STEP_BYTES):
        for chunk in chunks:
            if chunk.damaged:
                text = f"chunk {chunk.id} is damaged: the checksum of its {chunk.records.count}"
                yield Finding(f"{text} records does not fit", chunk.id)
        first = chunks[-1].id + 1


def _sender_ids(db: sqlite3.Connection) -> Iterator[Finding]:
    """They can be read; a wrong one would be no record's."""
    for _ in chain(sender_ids.stored(db), sender_ids.stored_keys(db)):
        yield from ()


def _bookmarks(db: sqlite3.Connection) -> Iterator[Finding]:
    """Each bookmark's checksum; a journal that was last open in an older ingestd has none."""
    if offsets.exist(db):
        for key in offsets.damaged(db):
            yield Finding(f"bookmark {key} is damaged: its checksum does not fit")


def _letters(db: sqlite3.Connection) -> Iterator[Finding]:
    """Each row that holds several dead letters, read one by one."""
    for row in letters.groups(db):
        if letter_rows.readable(row) is not row:
            numbers = f"{row.numbers[0]} to {row.numbers[-1]}"
            yield Finding(f"the dead letters {numbers} can't be told apart any more")


def _places(db: sqlite3.Connection) -> Iterator[Finding]:
    """Batches, cursor and ledger against the chunks, in one snapshot."""
    db.execute("BEGIN")
    try:
        meta = _row(db, "SELECT * FROM meta")
        batches, unread = [], []
        for number, count, spans, lineage in db.execute(
            "SELECT number, count, spans, lineage FROM batches"
        ):
            batches.append((number, count, _spans.decode(spans)))
            try:
                read_lineage(lineage)
            except msgspec.MsgspecError:
                unread.append(number)
        # Only of those that something names: of all there may be millions.
        named = {span.chunk for _, _, spans in batches for span in spans} | {meta["cursor_chunk"]}
        counts = {chunk: count for chunk in named for count in _count(db, chunk)}
        last, size = db.execute(
            "SELECT coalesce(max(id), 0), coalesce(sum(bytes), 0) FROM chunks"
        ).fetchone()
        (pending,) = db.execute(_PENDING).fetchone()
        dead = db.execute(
            "SELECT coalesce(sum(letters), 0), coalesce(sum(bytes), 0),"
            " coalesce(sum(letters) FILTER (WHERE record = ''), 0) FROM dead"
        ).fetchone()
        totals = letters.totals(db)
        journal = schema.read_identity(db)
        (given_up,) = db.execute(
            "SELECT coalesce(sum(records), 0) FROM dead WHERE record != ''"
        ).fetchone()
    finally:
        db.execute("COMMIT")
    yield from _identity(meta, journal)
    yield from _batches(meta, counts, batches)
    for number in unread:
        yield Finding(f"the batches that batch {number} was split from can't be read")
    if last > meta["last_chunk"]:
        yield Finding(f"chunk {last} is newer than the last one that was written down")
    if meta["cursor_record"] > counts.get(meta["cursor_chunk"], meta["cursor_record"]):
        yield Finding(f"the cursor stands beyond the end of chunk {meta['cursor_chunk']}")
    by_ledger = meta["accepted"] - meta["processed"] - meta["dead"]
    if pending != by_ledger:
        yield Finding(f"the ledger says {by_ledger} pending, the rows say {pending}")
    # A journal that was last open in an older ingestd keeps no sum.
    if meta.get("chunk_bytes", size) != size:
        yield Finding(f"the chunks' bytes are summed up as {meta['chunk_bytes']}, they are {size}")
    if tuple(dead) != (totals.letters, totals.bytes, totals.invalid):
        yield Finding(f"{totals.letters} dead letters are counted, there are {dead[0]}")
    if given_up > meta["dead"]:
        yield Finding(f"dead letters of {given_up} records, the ledger says {meta['dead']}")


def _identity(meta: dict[str, Any], journal: str) -> Iterator[Finding]:
    counters = [meta[name] for name in schema.COUNTERS]
    if schema.meta_checksum(str(meta["journal"]), counters) != meta["crc"]:
        yield Finding("the ledger is damaged: its checksum does not fit")
    if journal != meta["journal"]:
        yield Finding(f"the journal's id is {meta['journal']} in one place, {journal} in another")


def _count(db: sqlite3.Connection, chunk: int) -> Iterator[int]:
    for (count,) in db.execute("SELECT count FROM chunks WHERE id = ?", (chunk,)):
        yield count


def _batches(
    meta: dict[str, Any], counts: dict[int, int], batches: list[tuple[int, int, tuple[Span, ...]]]
) -> Iterator[Finding]:
    cursor = (meta["cursor_chunk"], meta["cursor_record"])
    taken: list[tuple[int, int, int, int]] = []
    for number, count, spans in batches:
        if number >= meta["next_batch"]:
            yield Finding(f"batch {number} has a number that is still to be given")
        if sum(span.count for span in spans) != count:
            yield Finding(f"batch {number} says {count} records, its spans say something else")
        for span in spans:
            end = span.first + span.count
            if span.chunk not in counts:
                yield Finding(f"batch {number} names chunk {span.chunk}, which is not there")
            elif span.first < 0 or span.count < 1 or end > counts[span.chunk]:
                yield Finding(f"batch {number} names records that chunk {span.chunk} has not")
            elif (span.chunk, end) > cursor:
                yield Finding(
                    f"batch {number} names records of chunk {span.chunk} after the cursor"
                )
            taken.append((span.chunk, span.first, end, number))
    taken.sort()
    for (chunk, _, end, one), (other_chunk, first, _, other) in pairwise(taken):
        if chunk == other_chunk and first < end:
            yield Finding(f"batches {one} and {other} name the same records of chunk {chunk}")


def set_aside(db: sqlite3.Connection, chunk: int, now: float) -> int:
    """Keeps a damaged chunk in the table `damaged`; its unsettled records become dead letters.

    The same as the daemon does, in one transaction. A sealed batch keeps its number with what is
    left of it: whether its sink has seen it or not, the others of it get there once.

    Args:
        db: the only connection that is open on the journal.
        chunk: its id.
        now: seconds since the epoch.

    Returns:
        How many records became dead letters.
    """
    with transaction(db):
        meta = _row(db, "SELECT * FROM meta")
        count, accepted_at = db.execute(
            "SELECT count, accepted_at FROM chunks WHERE id = ?", (chunk,)
        ).fetchone()
        lost = [(span, attempts) for span, attempts in _sealed_in(db, chunk)]
        if chunk >= meta["cursor_chunk"]:
            first = meta["cursor_record"] if chunk == meta["cursor_chunk"] else 0
            if first < count:
                lost.append((Span(chunk, first, count - first), 0))
        records = sum(span.count for span, _ in lost)
        letters.insert(
            db,
            [
                DeadLetter(
                    f"{meta['journal']}.{chunk}.{span.first}", "damaged", DAMAGED, "", b"",
                    attempts, accepted_at, now, span.count,
                )
                for span, attempts in lost
            ],
        )  # fmt: skip
        counters = {name: meta[name] for name in schema.COUNTERS}
        if chunk == meta["cursor_chunk"]:
            counters |= {"cursor_chunk": chunk + 1, "cursor_record": 0}
        counters["dead"] += records
        write_meta(db, meta["journal"], meta_of(list(counters.values())))
        db.execute("INSERT OR IGNORE INTO damaged SELECT * FROM chunks WHERE id = ?", (chunk,))
        db.execute("DELETE FROM chunks WHERE id = ?", (chunk,))
    return records


def _sealed_in(db: sqlite3.Connection, chunk: int) -> list[tuple[Span, int]]:
    """Takes a chunk's records out of the batches; the spans, with the tries that were made."""
    taken = []
    rows = db.execute("SELECT number, attempts, spans FROM batches ORDER BY number").fetchall()
    for number, attempts, packed in rows:
        spans = _spans.decode(packed)
        left = tuple(span for span in spans if span.chunk != chunk)
        if left == spans:
            continue
        taken += [(span, attempts) for span in spans if span.chunk == chunk]
        if left:
            db.execute(
                "UPDATE batches SET spans = ?, count = ? WHERE number = ?",
                (_encode(left), sum(span.count for span in left), number),
            )
        else:
            db.execute("DELETE FROM batches WHERE number = ?", (number,))
    return taken


def all_set_aside(db: sqlite3.Connection) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Reads the chunks that were set aside: the facts of each, and its payload as it is."""
    for (chunk,) in db.execute("SELECT id FROM damaged ORDER BY id").fetchall():
        facts = _row(db, f"SELECT * FROM damaged WHERE id = {int(chunk)}")  # noqa: S608
        facts["names"] = bytes(facts["names"]).decode(errors="replace").split()
        yield facts, facts.pop("payload")


# -- the whole file, for commands ------------------------------------------------------------------


class SqliteFile:
    """A journal on disk as a command handles it, beside its daemon or without one. It blocks.

    Args:
        path: the file; each call opens it.

    Raises:
        JournalUnreadable: it is no journal, or another version's.
        DataDirError: it can't be opened, read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.dead_letters: DeadLetters = SqliteDeadLetters(path)

    def stat(self) -> dict[str, Any]:
        """Returns its numbers by name."""
        with opened(self._path) as db:
            facts = stat(db)
        for name, suffix in (("file_bytes", ""), ("wal_bytes", "-wal")):
            path = self._path.with_name(self._path.name + suffix)
            facts[name] = path.stat().st_size if path.exists() else 0
        return facts

    def pending(self) -> Iterator[PendingRecord]:
        """Reads the pending records, and takes none; see `offline.pending`."""
        yield from pending(self._path)

    def kept_within(self, since: float, until: float) -> int:
        """Counts the kept records that were accepted in a time."""
        with opened(self._path) as db:
            return kept.within(db, since, until)[0] if kept.exist(db) else 0

    def replay(self, now: float, since: float, until: float, conditions: Sequence[str]) -> int:
        """Asks for a replay of the kept records of a time; returns its number."""
        with opened(self._path, write=True) as db, transaction(db):
            return kept.ask(db, now, since, until, conditions)

    def replays(self) -> list[kept.Replay]:
        """Reads the replays, the oldest first."""
        with opened(self._path) as db:
            return kept.replays(db) if kept.exist(db) else []

    def stop_replays(self) -> int:
        """Stops all replays; returns how many."""
        with opened(self._path, write=True) as db, transaction(db):
            return kept.stop(db) if kept.exist(db) else 0

    def findings(self) -> Iterator[Finding]:
        """Looks for faults, and yields each as it is found."""
        try:
            with opened(self._path) as db:
                yield from findings(db)
        except DataDirError as error:
            if not repair.is_damage(error.__cause__ or error):
                raise
            yield Finding(str(error))

    def lock(self) -> FileLock:
        """Keeps daemons away until it is closed.

        Raises:
            DataDirError: one runs.
        """
        return FileLock(self._path, of=self._path)

    def repair(self, found: Sequence[Finding], now: float) -> Iterator[str]:
        """Sets damaged chunks aside, or builds the file anew; yields a line for each thing done.

        Args:
            found: its faults; at least one.
            now: seconds since the epoch.
        """
        chunks = [finding.chunk for finding in found if finding.chunk is not None]
        if len(chunks) == len(found):
            with opened(self._path, write=True) as db:
                for chunk in chunks:
                    records = set_aside(db, chunk, now)
                    yield f"chunk {chunk} is set aside, its {records} records are dead letters"
            return
        try:
            yield f"built anew; the old file is {repair.repair(self._path, now)}"
        except Exception as error:
            raise DataDirError(path=self._path, problem=str(error)) from error

    def set_aside(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Reads the chunks that were set aside: the facts of each, and its payload."""
        with opened(self._path) as db:
            (journal,) = db.execute("SELECT journal FROM meta").fetchone()
            for facts, payload in all_set_aside(db):
                yield {"journal": journal, **facts}, payload
