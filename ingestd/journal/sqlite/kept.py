"""Processed chunks that are kept for a while (`journal.keep`), and their replay.

A chunk whose last record is settled is copied into `kept` in the commit that deletes it, so it is
in one of the two tables and never in both. What is in `kept` is settled: no number of the ledger
counts it, and losing it loses no record. So the oldest ones go whenever they are too old, too many,
or in the way of new records: `journal.bytes_max` and `journal.free_min` bound both together.

A replay is a row of `replays`: a range of kept chunks, conditions, and the last chunk that it has
fed. One transaction feeds some chunks as new ones, moves that number on and the ledger with it. So
a kill at any moment repeats nothing and leaves nothing out.

Two kinds of records are not fed: those that were given up are dead letters, which have a way back
of their own (`unprocessed` has their places), and replays themselves are not kept (`replaying` has
their chunks), else a second replay would feed a record twice.

Without `journal.keep` a commit does nothing of this.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from ingestd.base import envelope
from ingestd.base.record import Records, select
from ingestd.base.record import Span as _Span
from ingestd.journal.interface import Chunk, KeptTotals
from ingestd.journal.sqlite import first_page, schema

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Sequence

    from ingestd.codecs.pointer import Where
    from ingestd.journal.dead_letters import DeadLetter

ROW_BYTES = 128
"""What a kept chunk takes beside its records, about; the triggers below count it in."""
FEED_BYTES = 512 << 10
"""A transaction feeds no further chunk beyond this: other records wait for it."""
FEED_CHUNKS = 64
"""Chunks that one transaction looks at."""
PENDING_BYTES = 32 << 20
"""Nothing is fed while the journal holds more: new records would wait behind it."""
DROP_CHUNKS = 256
"""Kept chunks that one transaction drops, at most."""
REPLAYS_MAX = 100
"""Replays that are remembered; the oldest that have ended go first."""

# The first start with `journal.keep` makes them. `kept` has the columns of `chunks` first.
SCHEMA = (
    """CREATE TABLE IF NOT EXISTS kept(
    id INTEGER PRIMARY KEY, accepted_at REAL NOT NULL, count INTEGER NOT NULL,
    bytes INTEGER NOT NULL, layout INTEGER NOT NULL, crc INTEGER NOT NULL,
    sizes BLOB NOT NULL, payload BLOB NOT NULL, names BLOB NOT NULL, envelopes BLOB NOT NULL,
    settled_at REAL NOT NULL) STRICT""",
    """CREATE TABLE IF NOT EXISTS kept_totals(
    one INTEGER PRIMARY KEY CHECK (one = 1), chunks INTEGER NOT NULL, records INTEGER NOT NULL,
    bytes INTEGER NOT NULL, replayed INTEGER NOT NULL) STRICT""",
    "INSERT OR IGNORE INTO kept_totals VALUES(1, 0, 0, 0, 0)",
    """CREATE TRIGGER IF NOT EXISTS kept_came AFTER INSERT ON kept BEGIN
    UPDATE kept_totals SET chunks = chunks + 1, records = records + new.count,
        bytes = bytes + new.bytes + 128; END""",
    """CREATE TRIGGER IF NOT EXISTS kept_went AFTER DELETE ON kept BEGIN
    UPDATE kept_totals SET chunks = chunks - 1, records = records - old.count,
        bytes = bytes - old.bytes - 128;
    DELETE FROM unprocessed WHERE chunk = old.id; END""",
    """CREATE TABLE IF NOT EXISTS unprocessed(
    chunk INTEGER NOT NULL, first INTEGER NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY(chunk, first)) STRICT, WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS replaying(id INTEGER PRIMARY KEY) STRICT",
    """CREATE TABLE IF NOT EXISTS replays(
    id INTEGER PRIMARY KEY AUTOINCREMENT, asked_at REAL NOT NULL, since REAL NOT NULL,
    until REAL NOT NULL, conditions TEXT NOT NULL, last INTEGER NOT NULL, fed INTEGER NOT NULL,
    records INTEGER NOT NULL, damaged INTEGER NOT NULL, state TEXT NOT NULL) STRICT""",
)


class KeepRule(NamedTuple):
    """Bounds of what is kept.

    Attributes:
        bytes_max: of the kept chunks, with what they take beside their records.
        before: chunks that were settled before this time go, seconds since the epoch.
    """

    bytes_max: int
    before: float


NOTHING = KeepRule(0, 0.0)
"""The rule of a journal that keeps no chunks."""


class Fed(NamedTuple):
    """Records that a replay has fed: chunks, and how many."""

    chunks: Sequence[Chunk] = ()
    records: int = 0
    looked_at: int = 0


class Replay(NamedTuple):
    """A replay, as the table has it.

    Attributes:
        id: its number.
        asked_at: when it was asked for, seconds since the epoch.
        since: only chunks that were accepted then or later.
        until: only those that were accepted before.
        conditions: of `Where`.
        last: the newest kept chunk when it was asked for.
        fed: everything up to this chunk is through.
        records: that were fed.
        damaged: records that could not be read.
        state: `running`, `done` or `stopped`.
    """

    id: int
    asked_at: float
    since: float
    until: float
    conditions: tuple[str, ...]
    last: int
    fed: int
    records: int
    damaged: int
    state: str


def prepare(db: sqlite3.Connection) -> None:
    """Makes the tables where they are absent."""
    if not exist(db):
        for statement in SCHEMA:
            db.execute(statement)
        first_page.keep(db)


def exist(db: sqlite3.Connection) -> bool:
    """Returns True if the journal has the tables."""
    return bool(schema.columns(db, "replays"))


def totals(db: sqlite3.Connection) -> KeptTotals:
    """Reads what is kept now, and what was fed again over the life."""
    if not exist(db):
        return KeptTotals()
    query = "SELECT chunks, records, bytes, replayed FROM kept_totals"
    return KeptTotals(*db.execute(query).fetchone())


# -- keeping, in the commits of the journal --------------------------------------------------------


def keep(
    db: sqlite3.Connection, finished: Iterable[tuple[int, int]], now: float, rule: KeepRule
) -> None:
    """Copies finished chunks, in the transaction that deletes them; the oldest ones go for them.

    Args:
        db: the connection of the journal's writer.
        finished: runs of ids, first and last.
        now: seconds since the epoch.
        rule: the bounds.
    """
    for run in finished:
        db.execute(
            "INSERT INTO kept SELECT *, ? FROM chunks WHERE id BETWEEN ? AND ?"
            " AND id NOT IN (SELECT id FROM replaying)",
            (now, *run),
        )
        again = "SELECT id FROM replaying WHERE id BETWEEN ? AND ?"
        db.execute(f"DELETE FROM unprocessed WHERE chunk IN ({again})", run)  # noqa: S608
        db.execute("DELETE FROM replaying WHERE id BETWEEN ? AND ?", run)
    drop(db, rule)


def leave_out(db: sqlite3.Connection, letters: Iterable[DeadLetter]) -> None:
    """Remembers the places of records that are given up."""
    places = [(one.place.chunk, one.place.first, one.records) for one in letters if one.place]
    db.executemany("INSERT OR IGNORE INTO unprocessed VALUES(?, ?, ?)", places)


def drop(db: sqlite3.Connection, rule: KeepRule) -> int:
    """Drops the oldest kept chunks beyond the bounds, a bounded number; returns how many."""
    excess, gone = totals(db).bytes - rule.bytes_max, list[tuple[int]]()
    rows = db.execute("SELECT id, bytes, settled_at FROM kept ORDER BY id LIMIT ?", (DROP_CHUNKS,))
    for number, size, settled_at in rows:
        if excess <= 0 and settled_at >= rule.before:
            break
        excess -= size + ROW_BYTES
        gone.append((number,))
    rows.close()
    db.executemany("DELETE FROM kept WHERE id = ?", gone)
    return len(gone)


def due(db: sqlite3.Connection, rule: KeepRule) -> bool:
    """Returns True if kept chunks are to be dropped, or a replay is to be fed."""
    if not exist(db):
        return False
    oldest = db.execute("SELECT settled_at FROM kept ORDER BY id LIMIT 1").fetchone()
    if oldest is not None and (oldest[0] < rule.before or totals(db).bytes > rule.bytes_max):
        return True
    running = "SELECT EXISTS(SELECT 1 FROM replays WHERE state = 'running')"
    return bool(db.execute(running).fetchone()[0])


# -- replay ----------------------------------------------------------------------------------------


def feed(
    db: sqlite3.Connection,
    chunk: int,
    now: float,
    room: int,
    read: Callable[[Any], Chunk],
) -> Fed:
    """Feeds some kept chunks of the oldest replay, in the transaction that is open.

    Args:
        db: the connection of the journal's writer.
        chunk: the id that the first new chunk gets; the caller writes them.
        now: when they are accepted, seconds since the epoch.
        room: bytes that the journal has left for them.
        read: makes a chunk of a row of `kept`.
    """
    running = next(iter(replays(db, state="running")), None)
    if running is None:
        return Fed()
    from ingestd.codecs.pointer import Where  # noqa: PLC0415  no start needs it

    journal, pending = db.execute("SELECT journal, chunk_bytes FROM meta").fetchone()
    if pending:
        room = min(room, PENDING_BYTES - pending)
    try:
        where = Where(running.conditions)
    except ValueError:  # they are damaged, and without them it would feed what nobody asked for
        db.execute("UPDATE replays SET state = 'stopped' WHERE id = ?", (running.id,))
        return Fed(looked_at=1)
    chunks, fed, looked_at, damaged, size = list[Chunk](), running.fed, 0, 0, 0
    rows = db.execute(
        "SELECT id, accepted_at, count, layout, crc, sizes, payload, names, envelopes FROM kept"
        " WHERE id > ? AND id <= ? ORDER BY id LIMIT ?",
        (running.fed, running.last, FEED_CHUNKS),
    )
    for row in rows:
        size += len(row[5]) + len(row[6]) + len(row[8])
        if size > room or (size > FEED_BYTES and looked_at):
            break
        fed, looked_at = row[0], looked_at + 1
        if not running.since <= row[1] < running.until:
            continue
        found = read(row)
        if found.damaged:
            damaged += found.records.count
        elif (records := _chosen(db, found, where)) is not None:
            chunks.append(Chunk(chunk + len(chunks), now, _marked(records, f"{journal}.{fed}")))
    else:
        if looked_at < FEED_CHUNKS:
            db.execute("UPDATE replays SET state = 'done' WHERE id = ?", (running.id,))
    rows.close()
    count = sum(one.records.count for one in chunks)
    db.execute(
        "UPDATE replays SET fed = ?, records = records + ?, damaged = damaged + ? WHERE id = ?",
        (fed, count, damaged, running.id),
    )
    db.executemany("INSERT INTO replaying VALUES(?)", [(one.id,) for one in chunks])
    db.execute("UPDATE kept_totals SET replayed = replayed + ?", (count,))
    return Fed(chunks, count, looked_at)


def _chosen(db: sqlite3.Connection, chunk: Chunk, where: Where) -> Records | None:
    """The records of a kept chunk that were processed and meet the conditions; `None` for none."""
    query = "SELECT first, count FROM unprocessed WHERE chunk = ?"
    dead = {
        n for first, count in db.execute(query, (chunk.id,)) for n in range(first, first + count)
    }
    records = chunk.records
    if not dead and not where:
        return records
    items = records.items()
    wanted = [n for n, item in enumerate(items) if n not in dead and where.holds(item)]
    if not wanted:
        return None
    spans = select([_Span(chunk.id, 0, records.count)], wanted)
    envelopes = envelope.joined(
        [(span.count, envelope.part(records.envelopes, *span[1:])) for span in spans]
    )
    return Records.sized([items[n] for n in wanted])._replace(envelopes=envelopes)


def _marked(records: Records, origin: str) -> Records:
    """Records with the mark of a replay in their envelopes, and ids of their new place."""
    packed = envelope.with_attribute(records.envelopes, records.count, "replayed", origin)
    return records._replace(names=(), envelopes=packed)


def replays(db: sqlite3.Connection, *, state: str = "") -> list[Replay]:
    """Reads the replays, the oldest first; only those in a state, if one is given."""
    rows = db.execute("SELECT * FROM replays WHERE ? IN ('', state) ORDER BY id", (state,))
    return [Replay._make((*row[:4], _conditions(row[4]), *row[5:])) for row in rows]


def _conditions(written: str) -> tuple[str, ...]:
    """The conditions of a replay; damaged ones become one that is none."""
    try:
        found = json.loads(written)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        return ("",)
    return tuple(found)


def within(db: sqlite3.Connection, since: float, until: float) -> tuple[int, int]:
    """Counts the kept records that were accepted in a time, and finds the newest kept chunk."""
    (records,) = db.execute(
        "SELECT coalesce(sum(count), 0) FROM kept WHERE accepted_at >= ? AND accepted_at < ?",
        (since, until),
    ).fetchone()
    (last,) = db.execute("SELECT coalesce(max(id), 0) FROM kept").fetchone()
    return records, last


def ask(
    db: sqlite3.Connection, now: float, since: float, until: float, conditions: Sequence[str]
) -> int:
    """Asks for a replay, in the transaction that is open; returns its number."""
    _, last = within(db, since, until)
    db.execute(
        "INSERT INTO replays(asked_at, since, until, conditions, last, fed, records, damaged,"
        " state) VALUES(?, ?, ?, ?, ?, 0, 0, 0, 'running')",
        (now, since, until, json.dumps(conditions), last),
    )
    (number,) = db.execute("SELECT max(id) FROM replays").fetchone()
    db.execute("DELETE FROM replays WHERE id <= ? AND state != 'running'", (number - REPLAYS_MAX,))
    return int(number)


def stop(db: sqlite3.Connection) -> int:
    """Stops all replays, in the transaction that is open; returns how many."""
    return db.execute("UPDATE replays SET state = 'stopped' WHERE state = 'running'").rowcount
