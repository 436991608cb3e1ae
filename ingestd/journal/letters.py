"""Dead letters in the SQLite file: what is counted of them, and how they come back or go.

A person marks letters (`retry = 1`) with `ingestd dead retry`, from another process, which never
touches the ledger. The daemon's committer takes the marked ones back: in one transaction they
become a chunk, their rows go and the ledger moves. So there is no moment at which a record is in
both places or in neither, whoever crashes.

`dead_totals` is kept by triggers, because two processes delete letters: it is exact after every
commit, and reading it costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.base.record import Records
from ingestd.journal.interface import Chunk, DeadLetter, DeadTotals, Moved

if TYPE_CHECKING:
    import sqlite3

REVIVE_RECORDS = 1000
"""How many letters one transaction takes back, or lets expire."""
REVIVE_BYTES = 4 << 20
"""No further letter is taken back in a transaction beyond this."""
LETTER_BYTES = 128
"""What a letter takes beside its texts, about: its row, and its place in the index."""

INCOMPLETE = ("damaged", "too_large", "unfinished")
"""Reasons of letters that hold no record or only its beginning: these can't be fed again."""

SCHEMA = (
    """CREATE TABLE dead(
    id INTEGER PRIMARY KEY AUTOINCREMENT, record TEXT NOT NULL, records INTEGER NOT NULL,
    reason TEXT NOT NULL, error TEXT NOT NULL, traceback TEXT NOT NULL,
    attempts INTEGER NOT NULL, first_at REAL NOT NULL, last_at REAL NOT NULL,
    retry INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL, payload BLOB NOT NULL) STRICT""",
    "CREATE INDEX dead_retry ON dead(id) WHERE retry = 1",
    """CREATE TABLE dead_totals(
    one INTEGER PRIMARY KEY CHECK (one = 1), letters INTEGER NOT NULL, bytes INTEGER NOT NULL,
    revived INTEGER NOT NULL, readmitted INTEGER NOT NULL, expired INTEGER NOT NULL,
    purged INTEGER NOT NULL) STRICT""",
    "INSERT INTO dead_totals VALUES(1, 0, 0, 0, 0, 0, 0)",
    """CREATE TRIGGER dead_came AFTER INSERT ON dead BEGIN
    UPDATE dead_totals SET letters = letters + 1, bytes = bytes + new.bytes; END""",
    """CREATE TRIGGER dead_went AFTER DELETE ON dead BEGIN
    UPDATE dead_totals SET letters = letters - 1, bytes = bytes - old.bytes; END""",
)
_INSERT = (
    "INSERT INTO dead(record, records, reason, error, traceback, attempts, first_at, last_at,"
    " bytes, payload) VALUES(?,?,?,?,?,?,?,?,?,?)"
)


def letter_bytes(payload: bytes, error: str, traceback: str = "") -> int:
    """What a letter counts for: a bound that counted payloads only could be passed by errors."""
    return LETTER_BYTES + len(payload) + len(error) + len(traceback)


def insert(db: sqlite3.Connection, letters: list[DeadLetter]) -> None:
    """Adds letters, in the transaction that is open."""
    db.executemany(_INSERT, [_row(letter) for letter in letters])


def _row(letter: DeadLetter) -> tuple[object, ...]:
    size = letter_bytes(letter.payload, letter.error, letter.traceback)
    return (
        letter.record, letter.records, letter.reason, letter.error, letter.traceback,
        letter.attempts, letter.first_at, letter.last_at, size, letter.payload,
    )  # fmt: skip


def totals(db: sqlite3.Connection) -> DeadTotals:
    """What there is, and what has gone over the life of the journal."""
    row = db.execute(
        "SELECT letters, bytes, revived, readmitted, expired, purged FROM dead_totals"
    ).fetchone()
    return DeadTotals(*row)


def look(db: sqlite3.Connection) -> tuple[DeadTotals, bool]:
    """The totals, and whether letters are marked. Two lookups, however many letters there are."""
    marked = db.execute("SELECT EXISTS(SELECT 1 FROM dead WHERE retry = 1)").fetchone()[0]
    return totals(db), bool(marked)


def revive(db: sqlite3.Connection, chunk: int, now: float) -> Moved:
    """Takes marked letters out, oldest first, in the transaction that is open.

    Args:
        db: the connection of the journal's writer.
        chunk: the id that their chunk gets.
        now: when they are accepted, seconds since the epoch: nothing of their past stays.

    Returns:
        Their chunk, which the caller writes, and how the ledger moves.
    """
    ids, payloads, accepted, size = [], [], 0, 0
    rows = db.execute(
        "SELECT id, record != '', payload FROM dead WHERE retry = 1 ORDER BY id LIMIT ?",
        (REVIVE_RECORDS,),
    )
    for number, was_accepted, payload in rows:
        ids.append((number,))
        payloads.append(payload)
        accepted += was_accepted
        size += len(payload)
        if size >= REVIVE_BYTES:
            break
    rows.close()
    if not ids:
        return Moved()
    db.executemany("DELETE FROM dead WHERE id = ?", ids)
    readmitted = len(ids) - accepted
    db.execute(
        "UPDATE dead_totals SET revived = revived + ?, readmitted = readmitted + ?",
        (accepted, readmitted),
    )
    return Moved(Chunk(chunk, now, Records.sized(payloads)), accepted, readmitted)


def expire(db: sqlite3.Connection, before: float) -> int:
    """Deletes the oldest letters that were given up before `before`, and says how many.

    Ids grow with time, so it looks no further than the first letter that is young enough. What a
    person has marked to be fed again stays.
    """
    old = []
    rows = db.execute("SELECT id, last_at, retry FROM dead ORDER BY id LIMIT ?", (REVIVE_RECORDS,))
    for number, last_at, marked in rows:
        if last_at >= before:
            break
        if not marked:
            old.append((number,))
    rows.close()
    if old:
        db.executemany("DELETE FROM dead WHERE id = ?", old)
        db.execute("UPDATE dead_totals SET expired = expired + ?", (len(old),))
    return len(old)
