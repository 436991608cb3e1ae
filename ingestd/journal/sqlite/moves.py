"""Dead letters on their way into another pipeline's journal.

No transaction spans two files, so a move has four steps, and each is safe to repeat:

1. In the source, one transaction marks the letters' rows (`retry = 2`) and names their target in
   `moving`. From then on no other command and no daemon touches them.
2. In the target, one transaction puts their records into `arrivals`, once for each row. The lock of
   the source is held meanwhile: of two commands that finish one move, the second finds it done.
3. In the source, one transaction deletes the rows and counts them as moved.
4. The target's daemon takes arrivals in, in one transaction in which they become chunks and the
   ledger moves. The row stays, empty, and keeps a step 2 that is repeated from doing anything. It
   goes with the next move, as soon as the source does not name it any more.

Whatever is killed in between, the letters are in the source, marked, and the next `dead retry`
repeats what is left; the target has each row at most once. Row numbers of `dead` are never used
again, and the journal's id stands before them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ingestd.base import envelope
from ingestd.base.record import Layout, Records
from ingestd.journal.interface import Chunk
from ingestd.journal.letter_rows import taken_apart
from ingestd.journal.sqlite import first_page, schema
from ingestd.journal.sqlite.letters import CHUNK_BYTES, MOVING, REVIVE_BYTES, replace, row_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    from ingestd.journal.letter_rows import LetterRow

STEP_ROWS = 100
"""Rows of `dead` that one transaction moves, or takes in."""

# The first move of a journal makes them: most journals never need them.
SCHEMA = (
    "CREATE TABLE IF NOT EXISTS moving(row INTEGER PRIMARY KEY, target TEXT NOT NULL) STRICT",
    """CREATE TABLE IF NOT EXISTS arrivals(
    id INTEGER PRIMARY KEY, journal TEXT NOT NULL, row INTEGER NOT NULL, taken INTEGER NOT NULL,
    count INTEGER NOT NULL, names BLOB NOT NULL, sizes BLOB NOT NULL, payload BLOB NOT NULL,
    envelopes BLOB NOT NULL, UNIQUE(journal, row)) STRICT""",
    "CREATE INDEX IF NOT EXISTS arrivals_new ON arrivals(id) WHERE taken = 0",
    """CREATE TABLE IF NOT EXISTS moved(
    one INTEGER PRIMARY KEY CHECK (one = 1), letters INTEGER NOT NULL,
    arrived INTEGER NOT NULL) STRICT""",
    "INSERT OR IGNORE INTO moved VALUES(1, 0, 0)",
)


class Arrived(NamedTuple):
    """Records that came from the dead letters of other pipelines: chunks, and how many."""

    chunks: list[Chunk]
    records: int


def prepare(db: sqlite3.Connection) -> None:
    """Makes the tables where they are absent."""
    if not schema.columns(db, "moved"):
        for statement in SCHEMA:
            db.execute(statement)
        first_page.keep(db)


def totals(db: sqlite3.Connection) -> dict[str, int]:
    """Counts, over the life, the letters that were moved out and the records that came in."""
    if not schema.columns(db, "moved"):
        return {"moved": 0, "arrived": 0}
    letters, arrived = db.execute("SELECT letters, arrived FROM moved").fetchone()
    return {"moved": letters, "arrived": arrived}


def claim(db: sqlite3.Connection, rows: Sequence[int], target: str) -> None:
    """Step 1, in the transaction that is open: these rows of `dead` go to a pipeline."""
    db.executemany("UPDATE dead SET retry = ? WHERE id = ?", [(MOVING, row) for row in rows])
    db.executemany("INSERT INTO moving VALUES(?, ?)", [(row, target) for row in rows])


def targets(db: sqlite3.Connection) -> list[str]:
    """The pipelines that letters are on their way to."""
    if not schema.columns(db, "moved"):
        return []
    return [name for (name,) in db.execute("SELECT DISTINCT target FROM moving ORDER BY target")]


def due(db: sqlite3.Connection, target: str) -> list[int]:
    """Rows that are on their way to a pipeline, as many as one step moves."""
    query = "SELECT row FROM moving WHERE target = ? ORDER BY row LIMIT ?"
    return [row for (row,) in db.execute(query, (target, STEP_ROWS))]


def arrive(db: sqlite3.Connection, source: sqlite3.Connection, rows: Sequence[int]) -> None:
    """Step 2, in transactions that are open in both journals; what has arrived before is there."""
    (journal,) = source.execute("SELECT journal FROM meta").fetchone()
    for number in rows:
        row = row_of(source, number)
        if row is not None and row.retry == MOVING:
            records = _records(row)
            db.execute(
                "INSERT OR IGNORE INTO arrivals(journal, row, taken, count, names, sizes, payload,"
                " envelopes) VALUES(?, ?, 0, ?, ?, ?, ?, ?)",
                (journal, number, records.count, "\n".join(records.names).encode(),
                 records.sizes, records.payload, records.envelopes),
            )  # fmt: skip


def _records(row: LetterRow) -> Records:
    letters = [letter for _, _, letter in taken_apart(row)]
    names = tuple(letter.record for letter in letters)
    return Records.sized([letter.payload for letter in letters])._replace(
        names=names if any(names) else (),
        envelopes=envelope.joined([(1, letter.envelope) for letter in letters]),
    )


def leave(db: sqlite3.Connection, rows: Sequence[int]) -> int:
    """Step 3, in the transaction that is open; returns the number of letters.

    A row that is damaged by now has not arrived: it stays, as the damaged letter that it is.
    """
    gone = 0
    for number in rows:
        row = row_of(db, number)
        if row is not None and row.retry == MOVING:
            gone += row.letters
            db.execute("DELETE FROM dead WHERE id = ?", (number,))
        elif row is not None:
            replace(db, row, [row])
    db.executemany("DELETE FROM moving WHERE row = ?", [(row,) for row in rows])
    db.execute("UPDATE moved SET letters = letters + ?", (gone,))
    return gone


def tidy(db: sqlite3.Connection, source: sqlite3.Connection) -> None:
    """Forgets arrivals that were taken in and whose source has deleted the letters."""
    (journal,) = source.execute("SELECT journal FROM meta").fetchone()
    named = {row for (row,) in source.execute("SELECT row FROM moving")}
    rows = db.execute("SELECT id, row FROM arrivals WHERE taken = 1 AND journal = ?", (journal,))
    gone = [(number,) for number, row in rows if row not in named]
    db.executemany("DELETE FROM arrivals WHERE id = ?", gone)


def waiting(db: sqlite3.Connection) -> bool:
    """Returns True if arrivals are to be taken in."""
    if not schema.columns(db, "arrivals"):
        return False
    found = db.execute("SELECT EXISTS(SELECT 1 FROM arrivals WHERE taken = 0)").fetchone()
    return bool(found[0])


def take(db: sqlite3.Connection, chunk: int, now: float, room: int) -> Arrived:
    """Step 4, in the transaction that is open: arrivals as chunks, which the caller writes.

    Args:
        db: the connection of the journal's writer.
        chunk: the id that the first chunk gets.
        now: when they are accepted, seconds since the epoch.
        room: bytes that the journal has left for them.
    """
    runs, taken, count, size = list[Records](), list[tuple[int]](), 0, 0
    found = db.execute(
        "SELECT id, count, names, sizes, payload, envelopes FROM arrivals WHERE taken = 0"
        " ORDER BY id LIMIT ?",
        (STEP_ROWS,),
    )
    for number, records, packed, sizes, payload, envelopes in found:
        size += len(payload) + len(sizes) + len(envelopes)
        if size > room:
            break
        names = tuple(packed.decode().split("\n")) if packed else ()
        run = Records(Layout.SIZED, records, payload, sizes, names, envelopes)
        runs += run.pieces(CHUNK_BYTES)
        taken.append((number,))
        count += records
        if size >= REVIVE_BYTES:
            break
    found.close()
    if taken:
        db.executemany(
            "UPDATE arrivals SET taken = 1, names = x'', sizes = x'', payload = x'',"
            " envelopes = x'' WHERE id = ?",
            taken,
        )
        db.execute("UPDATE moved SET arrived = arrived + ?", (count,))
    return Arrived([Chunk(n, now, run) for n, run in enumerate(runs, chunk)], count)
