"""Dead letters in the SQLite file: what is counted of them, and how they come back or go.

A person marks letters (`retry = 1`) with `ingestd dead retry`, from another process, which never
touches the ledger. The daemon's committer takes the marked ones back: in one transaction they
become chunks, their rows go and the ledger moves. So there is no moment at which a record is in
both places or in neither, whichever crashes. Their ids go with them (`Records.names`).

Letters of records that were never accepted have a bound of their own, each
principal has a share of it, and beyond either the oldest ones go.

`dead_totals` and `invalid` are kept by triggers, because two processes delete letters: they are
exact after every commit, and reading them costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.base import envelope
from ingestd.base.record import Records
from ingestd.journal.dead_letters import DeadTotals, Moved
from ingestd.journal.interface import Chunk
from ingestd.journal.letter_rows import (
    COLUMNS,
    ROW_BYTES,
    LetterRow,
    packed,
    readable,
    split,
    taken_apart,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from ingestd.journal.dead_letters import DeadLetter

MOVING = 2
"""The value of `dead.retry` of letters that are on their way into another pipeline (`moves.py`)."""
REVIVE_RECORDS = 1000
"""How many letters one transaction takes back, about; or how many rows it lets expire."""
REVIVE_BYTES = 4 << 20
"""No further row is taken back in a transaction beyond this."""
CHUNK_BYTES = 256 << 10
"""The size of a chunk, about: a batch that is tried again reads the chunks that it lies in."""
EXPIRE_BYTES = 64 << 20
"""No further row expires in a transaction beyond this."""
SHARES = 4
"""The part of their bound that one principal may take."""
DROP_ROWS = 1000
"""Most rows that one look for old letters to drop reads."""

# The column of requeued letters has the name of the first version.
_TOTALS = ", ".join(DeadTotals._fields).replace("requeued", "revived")
_ROW = f"SELECT {', '.join(COLUMNS)} FROM dead"  # noqa: S608
_INSERT = f"INSERT INTO dead({', '.join(COLUMNS)}) VALUES({','.join('?' * len(COLUMNS))})"


def insert(
    db: sqlite3.Connection, letters: Iterable[DeadLetter], *, row_bytes: int = ROW_BYTES
) -> None:
    """Adds letters, in the transaction that is open; what belongs together lies in one row.

    Args:
        db: the connection of the journal's writer.
        letters: of one settlement, or the refused ones of one commit.
        row_bytes: no row takes a further payload beyond this.
    """
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'dead'").fetchone()
    db.executemany(_INSERT, packed(letters, 0 if row is None else row[0], row_bytes=row_bytes))


def totals(db: sqlite3.Connection) -> DeadTotals:
    """Reads the totals of the letters that are there, and of those that have gone."""
    return DeadTotals(*db.execute(f"SELECT {_TOTALS} FROM dead_totals").fetchone())  # noqa: S608


def poll_marked(db: sqlite3.Connection) -> tuple[DeadTotals, bool]:
    """The totals, and whether letters are marked. Two lookups, however many letters there are."""
    marked = db.execute("SELECT EXISTS(SELECT 1 FROM dead WHERE retry = 1)").fetchone()[0]
    return totals(db), bool(marked)


def replace(db: sqlite3.Connection, row: LetterRow, parts: Sequence[LetterRow]) -> None:
    """Puts the parts of a row in its place, in the transaction that is open."""
    db.execute("DELETE FROM dead WHERE id = ?", (row.id,))
    db.executemany(_INSERT, parts)


def row_of(db: sqlite3.Connection, number: int) -> LetterRow | None:
    """The row whose last letter has a number."""
    found = db.execute(f"{_ROW} WHERE id = ?", (number,)).fetchone()
    return None if found is None else readable(LetterRow(*found))


def groups(db: sqlite3.Connection) -> Iterator[LetterRow]:
    """The rows that hold several letters, each in a read of its own; damaged ones as they are."""
    last = 0
    query = f"{_ROW} WHERE id > ? AND letters > 1 ORDER BY id LIMIT 1"
    while found := db.execute(query, (last,)).fetchone():
        row = LetterRow(*found)
        yield row
        last = row.id


def requeue(db: sqlite3.Connection, chunk: int, now: float, check: Callable[[bytes], str]) -> Moved:
    """Takes marked letters out, oldest first, in the transaction that is open.

    A letter whose record was never accepted, and still can't be, stays and is not marked any more.

    Args:
        db: the connection of the journal's writer.
        chunk: the id that the first of their chunks gets.
        now: when they are accepted, seconds since the epoch: of their past only the ids stay.
        check: see `InvalidQuota`.

    Returns:
        Their chunks, which the caller writes, and how the ledger moves.
    """
    names, payloads, size, unfit = list[str](), list[bytes](), 0, 0
    envelopes = list[tuple[int, bytes]]()
    rows = list[tuple[LetterRow, list[LetterRow]]]()
    found = db.execute(f"{_ROW} WHERE retry = 1 ORDER BY id LIMIT ?", (REVIVE_RECORDS,))
    for values in found:
        row = LetterRow(*values)
        if (damaged := readable(row)) is not row:
            rows.append((row, [damaged]))
            unfit += 1
            continue
        letters = taken_apart(row)
        bad = {n for n, _, letter in letters if not letter.record and check(letter.payload)}
        rows.append((row, [part._replace(retry=0) for part in split(row, bad)[0]]))
        unfit += len(bad)
        names += [letter.record for n, _, letter in letters if n not in bad]
        payloads += [letter.payload for n, _, letter in letters if n not in bad]
        envelopes += [(1, letter.envelope) for n, _, letter in letters if n not in bad]
        size += len(row.payload)
        if size >= REVIVE_BYTES or len(payloads) >= REVIVE_RECORDS:
            break
    found.close()
    for row, stay in rows:
        replace(db, row, stay)
    if not payloads:
        return Moved(unfit=unfit)
    requeued = sum(1 for name in names if name)
    readmitted = len(names) - requeued
    db.execute(
        "UPDATE dead_totals SET revived = revived + ?, readmitted = readmitted + ?",
        (requeued, readmitted),
    )
    records = Records.sized(payloads)._replace(
        names=tuple(names) if requeued else (), envelopes=envelope.joined(envelopes)
    )
    chunks = [Chunk(n, now, part) for n, part in enumerate(records.pieces(CHUNK_BYTES), chunk)]
    return Moved(tuple(chunks), requeued, readmitted, unfit=unfit)


def expire(db: sqlite3.Connection, since: float, before: float) -> int:
    """Deletes the oldest letters that were given up before `before`, and says how many.

    Ids grow with time, so it looks no further than the first letter that is young enough. What a
    person has marked to be fed again stays, and so does what was given up before `since`, when
    the clock was wrong.
    """
    old, letters, size = [], 0, 0
    rows = db.execute(
        "SELECT id, last_at, retry, letters, bytes FROM dead ORDER BY id LIMIT ?",
        (REVIVE_RECORDS,),
    )
    for number, last_at, marked, count, row_bytes in rows:
        if last_at >= before or size >= EXPIRE_BYTES:
            break
        if not marked and last_at >= since:
            old.append((number,))
            letters += count
            size += row_bytes
    rows.close()
    if old:
        db.executemany("DELETE FROM dead WHERE id = ?", old)
        db.execute("UPDATE dead_totals SET expired = expired + ?", (letters,))
    return letters


def keep_within(db: sqlite3.Connection, principals: Collection[str], bytes_max: int) -> int:
    """Drops letters that were never accepted until each share and their bound are kept.

    Args:
        db: the connection of the journal's writer, in a transaction.
        principals: whose letters have become more.
        bytes_max: of all of them.

    Returns:
        How many letters went, the oldest ones first.
    """
    dropped = 0
    for principal in principals:
        row = db.execute("SELECT bytes FROM invalid WHERE principal = ?", (principal,)).fetchone()
        if row is not None and row[0] > bytes_max // SHARES:
            dropped += _drop(db, principal, row[0] - bytes_max // SHARES)
    for _ in range(1 + len(principals)):
        over = totals(db).invalid_bytes - bytes_max
        if over <= 0:
            break
        most = db.execute("SELECT principal FROM invalid ORDER BY bytes DESC LIMIT 1").fetchone()
        dropped += _drop(db, most[0], over)
    if dropped:
        db.execute("UPDATE dead_totals SET dropped = dropped + ?", (dropped,))
    return dropped


def _drop(db: sqlite3.Connection, principal: str, size: int) -> int:
    """Deletes the oldest letters of a principal, of so many bytes; marked ones stay."""
    gone, letters = [], 0
    rows = db.execute(
        "SELECT id, bytes, letters FROM dead WHERE record = '' AND principal = ? AND retry = 0"
        " ORDER BY id LIMIT ?",
        (principal, DROP_ROWS),
    )
    for number, row_bytes, count in rows:
        if size <= 0:
            break
        gone.append((number,))
        size -= row_bytes
        letters += count
    rows.close()
    db.executemany("DELETE FROM dead WHERE id = ?", gone)
    return letters
