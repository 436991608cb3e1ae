"""Dead letters as a person handles them: chosen by a filter, read, marked, purged, in small steps.

Nothing here touches the ledger: whoever purges deletes rows, whoever wants records fed again marks
them, and the daemon does the rest (see `letters.py`). Every step reads without a lock that anybody
waits for, and then writes a bounded number of rows in one transaction. A row that is meant in part
is taken apart first; its letters keep their numbers.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from ingestd.journal.beside import transaction
from ingestd.journal.letters import INCOMPLETE, replace, row_of
from ingestd.journal.rows import COLUMNS, Row, split, taken_apart

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from ingestd.journal.interface import DeadLetter

STEP = 500
"""Letters of one transaction, or of one read, about."""
STEP_BYTES = 4 << 20
"""No further row goes into a step beyond this."""
REASONS = (
    "malformed", "too_large", "unfinished", "undecodable", "rejected", "failed", "timeout",
    "crashed", "damaged",
)  # fmt: skip
"""The words that a letter's reason can be."""


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

    def where(self, db: sqlite3.Connection) -> tuple[str, list[object]]:
        """The condition on rows in SQL and its parameters, without the limit."""
        parts, values = ["1"], list[object]()
        if self.reasons:
            parts.append(f"reason IN ({','.join('?' * len(self.reasons))})")
            values.extend(self.reasons)
        if self.ids:
            found = {row.id for number in self.ids if (row := row_of(db, number)) is not None}
            parts.append("id IN (SELECT value FROM json_each(?))")
            values.append(json.dumps(sorted(found)))
        for condition, moment in (("last_at >= ?", self.since), ("last_at < ?", self.until)):
            if moment is not None:
                parts.append(condition)
                values.append(moment)
        return " AND ".join(parts), values

    def meant(self, row: Row, last: int | None = None) -> Collection[int]:
        """The numbers of a row's letters that are meant, up to the number `last`."""
        numbers = row.numbers
        if last is not None:
            numbers = range(numbers.start, min(numbers.stop, last + 1))
        return [n for n in numbers if n in self.ids] if self.ids else numbers


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
    left = chosen.limit
    for row, size in _rows(db, chosen, whole=whole):
        meant = chosen.meant(row)
        for number, own, letter in taken_apart(row, whole=whole):
            if number not in meant:
                continue
            if left == 0:
                return
            left = None if left is None else left - 1
            kept_size = size if row.letters == 1 else own
            yield Kept(number, bool(row.retry), kept_size, letter)


def _rows(
    db: sqlite3.Connection, chosen: Filter, *, whole: bool, also: str = "1", last: int | None = None
) -> Iterator[tuple[Row, int]]:
    """The rows in which letters are meant, and the bytes of each payload, in short reads."""
    condition, values = chosen.where(db)
    columns = ", ".join("x''" if name == "payload" and not whole else name for name in COLUMNS)
    query = (
        f"SELECT length(payload), {columns} FROM dead WHERE {condition} AND {also}"  # noqa: S608
        " AND id > ? AND (? IS NULL OR id - letters < ?) ORDER BY id LIMIT ?"
    )
    at = 0
    while True:
        step, count, size = list[tuple[Row, int]](), 0, 0
        rows = db.execute(query, (*values, at, last, last, STEP))
        for payload_bytes, *found in rows:
            row = Row(*found)
            step.append((row, payload_bytes))
            count += row.letters
            size += payload_bytes if whole else 0
            if count >= STEP or size >= STEP_BYTES:
                break
        rows.close()
        if not step:
            return
        at = step[-1][0].id
        yield from step


class Counted(NamedTuple):
    """What a filter means at this moment.

    Attributes:
        letters: how many.
        bytes: what they take.
        marked: of these, to be fed again already.
        incomplete: of these, can't be fed again: there is no record in them, or not all of it.
        last: the newest one's number; 0 if there is none.
    """

    letters: int
    bytes: int
    marked: int
    incomplete: int
    last: int


def count(db: sqlite3.Connection, chosen: Filter) -> Counted:
    """How many letters are meant."""
    if not chosen.ids and chosen.limit is None:
        return _count_all(db, chosen)
    total, size, marked, incomplete, last = 0, 0, 0, 0, 0
    for row, _ in _rows(db, chosen, whole=False):
        meant = list(chosen.meant(row))
        if chosen.limit is not None:
            meant = meant[: chosen.limit - total]
        if not meant:
            break
        total, last = total + len(meant), meant[-1]
        size += row.size * len(meant) // row.letters
        marked += len(meant) if row.retry else 0
        incomplete += len(meant) if row.reason in INCOMPLETE else 0
    return Counted(total, size, marked, incomplete, last)


def _count_all(db: sqlite3.Connection, chosen: Filter) -> Counted:
    condition, values = chosen.where(db)
    incomplete = f"reason IN ({', '.join(repr(reason) for reason in INCOMPLETE)})"
    row = db.execute(
        "SELECT coalesce(sum(letters), 0), coalesce(sum(bytes), 0),"  # noqa: S608
        " coalesce(sum(letters * retry), 0),"
        f" coalesce(sum(letters * ({incomplete})), 0), coalesce(max(id), 0)"
        f" FROM dead WHERE {condition}",
        values,
    ).fetchone()
    return Counted(*row)


def missing(db: sqlite3.Connection, ids: Sequence[int]) -> list[int]:
    """Those of some numbers that no letter has."""
    return [number for number in ids if row_of(db, number) is None]


class Marked(NamedTuple):
    """What marking did.

    Attributes:
        letters: are to be fed again now, and were not before.
        invalid: were never accepted, and can't be as they are now either: they stay.
    """

    letters: int = 0
    invalid: int = 0


def mark(
    db: sqlite3.Connection, chosen: Filter, last: int, check: Callable[[bytes], str]
) -> Marked:
    """Marks letters to be fed again, up to the number `last`.

    Args:
        db: a connection that writes.
        chosen: which.
        last: the newest one that is meant.
        check: what is wrong with a payload as a record of the pipeline; empty if nothing is. It is
            asked about records that were never accepted.
    """
    marked = invalid = 0
    also = f"retry = 0 AND reason NOT IN ({', '.join(repr(reason) for reason in INCOMPLETE)})"

    def wanted() -> Iterator[_Part]:
        nonlocal invalid
        for row, size in _rows(db, chosen, whole=False, also=also, last=last):
            meant = set(chosen.meant(row, last))
            if not row.record and (there := row_of(db, row.id)) is not None:
                letters = [(n, one) for n, _, one in taken_apart(there) if n in meant]
                meant = {n for n, one in letters if not check(one.payload)}
                invalid += len(letters) - len(meant)
            yield _Part(row, size, meant)

    for step in _in_steps(wanted()):
        with transaction(db):
            marked += sum(_mark(db, part) for part in step)
    return Marked(marked, invalid)


def purge(db: sqlite3.Connection, chosen: Filter, last: int) -> int:
    """Deletes letters for good, up to the number `last`; marked ones stay. How many it were."""
    rows = _rows(db, chosen, whole=False, also="retry = 0", last=last)
    gone = 0
    for step in _in_steps(_Part(row, size, set(chosen.meant(row, last))) for row, size in rows):
        with transaction(db):
            deleted = sum(_purge(db, part) for part in step)
            db.execute("UPDATE dead_totals SET purged = purged + ?", (deleted,))
        gone += deleted
    return gone


class _Part(NamedTuple):
    """A row without its payload, the bytes of that, and the numbers of the letters that are meant.

    The daemon may have taken the row away meanwhile, or taken it apart: then nothing is done.
    """

    row: Row
    size: int
    meant: Collection[int]

    @property
    def is_whole(self) -> bool:
        return len(self.meant) == self.row.letters


def _in_steps(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """As many as one transaction takes."""
    step, letters, size = list[_Part](), 0, 0
    for part in parts:
        if part.meant:
            step.append(part)
            letters += len(part.meant)
            size += part.size
        if letters >= STEP or size >= STEP_BYTES:
            yield step
            step, letters, size = [], 0, 0
    if step:
        yield step


def _mark(db: sqlite3.Connection, part: _Part) -> int:
    if part.is_whole:
        query = "UPDATE dead SET retry = 1 WHERE id = ? AND letters = ? AND retry = 0"
        done = db.execute(query, (part.row.id, part.row.letters)).rowcount
        return part.row.letters if done else 0
    row = _unchanged(db, part)
    if row is None:
        return 0
    chosen, rest = split(row, part.meant)
    replace(db, row, [*(one._replace(retry=1) for one in chosen), *rest])
    return len(part.meant)


def _purge(db: sqlite3.Connection, part: _Part) -> int:
    if part.is_whole:
        query = "DELETE FROM dead WHERE id = ? AND letters = ? AND retry = 0"
        done = db.execute(query, (part.row.id, part.row.letters)).rowcount
        return part.row.letters if done else 0
    row = _unchanged(db, part)
    if row is None:
        return 0
    replace(db, row, split(row, part.meant)[1])
    return len(part.meant)


def _unchanged(db: sqlite3.Connection, part: _Part) -> Row | None:
    row = row_of(db, part.row.id)
    same = row is not None and row._replace(payload=b"") == part.row._replace(payload=b"")
    return row if same else None
