"""Dead letters as a person handles them: chosen by a filter, read, marked, purged, in small steps.

Nothing here touches the ledger: whoever purges deletes rows, whoever wants records fed again marks
them, and the daemon does the rest (see `letters.py`). Every step reads without a lock that anybody
waits for, and then writes at most `STEP` rows in one transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ingestd.journal.beside import transaction
from ingestd.journal.interface import DeadLetter
from ingestd.journal.letters import INCOMPLETE

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator

STEP = 500
"""Rows of one transaction, or of one read."""
STEP_BYTES = 4 << 20
"""No further row goes into a step beyond this."""
_COLUMNS = (
    "id, retry, length(payload), record, reason, error, traceback, {payload}, attempts, first_at,"
    " last_at, records"
)
_CAN_RETRY = f"reason NOT IN ({', '.join(repr(reason) for reason in INCOMPLETE)})"


class Filter(NamedTuple):
    """Which letters are meant; what is empty or `None` does not matter.

    Attributes:
        reasons: one of these.
        since: given up at this time or later, seconds since the epoch.
        until: given up before this time.
        ids: one of these.
        limit: only so many, the oldest ones.
    """

    reasons: tuple[str, ...] = ()
    since: float | None = None
    until: float | None = None
    ids: tuple[int, ...] = ()
    limit: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether every letter is meant."""
        return self == Filter()

    def where(self) -> tuple[str, list[object]]:
        """The condition in SQL and its parameters, without the limit."""
        parts, values = ["1"], list[object]()
        for column, chosen in (("reason", self.reasons), ("id", self.ids)):
            if chosen:
                parts.append(f"{column} IN ({','.join('?' * len(chosen))})")
                values.extend(chosen)
        for condition, moment in (("last_at >= ?", self.since), ("last_at < ?", self.until)):
            if moment is not None:
                parts.append(condition)
                values.append(moment)
        return " AND ".join(parts), values


class Kept(NamedTuple):
    """A letter in the journal.

    Attributes:
        id: its number, never used again.
        marked: it is to be fed again.
        size: bytes of the payload.
        letter: what it says; without its payload and traceback where those were not asked for.
    """

    id: int
    marked: bool
    size: int
    letter: DeadLetter


def letters(db: sqlite3.Connection, chosen: Filter, *, whole: bool) -> Iterator[Kept]:
    """The letters, oldest first; `whole` with payload and traceback.

    No read lasts longer than a step: an open one would keep the daemon from starting its WAL over.
    """
    columns = _COLUMNS.format(payload="payload" if whole else "x''")
    if not whole:
        columns = columns.replace("traceback", "''")
    condition, values = chosen.where()
    last, left = 0, chosen.limit
    while left is None or left > 0:
        step, size = [], 0
        rows = db.execute(
            f"SELECT {columns} FROM dead WHERE {condition} AND id > ? ORDER BY id LIMIT ?",  # noqa: S608
            (*values, last, min(STEP, STEP if left is None else left)),
        )
        for row in rows:
            step.append(Kept(row[0], bool(row[1]), row[2], DeadLetter(*row[3:])))
            size += row[2] if whole else 0
            if size >= STEP_BYTES:
                break
        rows.close()
        if not step:
            return
        yield from step
        last = step[-1].id
        left = None if left is None else left - len(step)


class Counted(NamedTuple):
    """What a filter means at this moment.

    Attributes:
        letters: how many.
        bytes: what they take.
        marked: of these, to be fed again already.
        incomplete: of these, can't be fed again: there is no record in them, or not all of it.
        last: the newest one's id; 0 if there is none.
    """

    letters: int
    bytes: int
    marked: int
    incomplete: int
    last: int


def count(db: sqlite3.Connection, chosen: Filter) -> Counted:
    """How many letters are meant."""
    condition, values = chosen.where()
    row = db.execute(
        f"SELECT count(*), coalesce(sum(bytes), 0), coalesce(sum(retry), 0),"  # noqa: S608
        f" coalesce(sum(NOT ({_CAN_RETRY})), 0), coalesce(max(id), 0)"
        f" FROM (SELECT * FROM dead WHERE {condition} ORDER BY id LIMIT ?)",
        (*values, -1 if chosen.limit is None else chosen.limit),
    ).fetchone()
    return Counted(*row)


def mark(db: sqlite3.Connection, chosen: Filter, last: int) -> int:
    """Marks letters to be fed again, up to the id `last`; how many were not marked before."""
    return _in_steps(db, chosen, last, f"retry = 0 AND {_CAN_RETRY}", _mark)


def purge(db: sqlite3.Connection, chosen: Filter, last: int) -> int:
    """Deletes letters for good, up to the id `last`; marked ones stay. How many it were."""
    return _in_steps(db, chosen, last, "retry = 0", _purge)


def _in_steps(
    db: sqlite3.Connection,
    chosen: Filter,
    last: int,
    also: str,
    change: Callable[[sqlite3.Connection, list[tuple[int]]], int],
) -> int:
    condition, values = chosen.where()
    done = at = 0
    while True:
        ids, size = list[tuple[int]](), 0
        rows = db.execute(
            f"SELECT id, bytes FROM dead WHERE {condition} AND {also} AND id > ? AND id <= ?"  # noqa: S608
            " ORDER BY id LIMIT ?",
            (*values, at, last, STEP),
        )
        for number, letter_size in rows:
            ids.append((number,))
            size += letter_size
            if size >= STEP_BYTES:
                break
        rows.close()
        if not ids:
            return done
        at = ids[-1][0]
        with transaction(db):
            done += change(db, ids)


def _mark(db: sqlite3.Connection, ids: list[tuple[int]]) -> int:
    return db.executemany("UPDATE dead SET retry = 1 WHERE id = ? AND retry = 0", ids).rowcount


def _purge(db: sqlite3.Connection, ids: list[tuple[int]]) -> int:
    # The daemon may have taken some of them back meanwhile: only what is deleted counts.
    gone = db.executemany("DELETE FROM dead WHERE id = ? AND retry = 0", ids).rowcount
    db.execute("UPDATE dead_totals SET purged = purged + ?", (gone,))
    return gone
