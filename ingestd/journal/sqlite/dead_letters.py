"""Dead letters for an operator: chosen by a filter, read, marked, purged, in small steps.

Nothing here touches the ledger: purging deletes rows, requeuing marks them, and the daemon does the
rest (see `letters.py`). Every step reads without a lock that others
wait for, and then writes a bounded number of rows in one transaction: of those letters what is
there by then. A row that is meant in part is taken apart first; its letters keep their numbers.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, NamedTuple

from ingestd.journal.dead_letters import (
    INCOMPLETE,
    LetterCounts,
    LetterFilter,
    MarkedLetters,
    StoredLetter,
)
from ingestd.journal.letter_rows import COLUMNS, LetterRow, readable, split, taken_apart
from ingestd.journal.sqlite.letters import MOVING, replace, row_of
from ingestd.journal.sqlite.offline import opened, transaction
from ingestd.journal.sqlite.writer import Expire, Requeue

if TYPE_CHECKING:
    import sqlite3
    from asyncio import Future
    from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
    from pathlib import Path

    from ingestd.journal.dead_letters import DeadLetters, DeadTotals, Moved

STEP = 500
"""Letters of one transaction, or of one read, about."""
STEP_BYTES = 4 << 20
"""No further row goes into a step beyond this."""


class SqliteDeadLetters:
    """See `ingestd.journal.dead_letters.DeadLetters`.

    Args:
        path: of the journal; each call opens it.
    """

    takes_moved = True
    """Letters of other pipelines may be moved into it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def select(
        self, chosen: LetterFilter, *, whole: bool, before: int | None = None
    ) -> Iterator[StoredLetter]:
        """See `DeadLetters.select`."""
        with opened(self.path) as db:
            yield from letters(db, chosen, whole=whole, before=before)

    def count(self, chosen: LetterFilter) -> LetterCounts:
        """See `DeadLetters.count`."""
        with opened(self.path) as db:
            return count(db, chosen)

    def missing(self, ids: Sequence[int]) -> list[int]:
        """See `DeadLetters.missing`."""
        with opened(self.path) as db:
            return missing(db, ids)

    def mark(self, chosen: LetterFilter, last: int, check: Callable[[bytes], str]) -> MarkedLetters:
        """See `DeadLetters.mark`."""
        with opened(self.path, write=True) as db:
            return mark(db, chosen, last, check)

    def edit(self, number: int, before: bytes, after: bytes) -> bool:
        """See `DeadLetters.edit`."""
        with opened(self.path, write=True) as db:
            return edit(db, number, before, after)

    def move(
        self, chosen: LetterFilter, last: int, check: Callable[[bytes], str], target: str
    ) -> MarkedLetters:
        """See `DeadLetters.move`."""
        with opened(self.path, write=True) as db:
            return move(db, chosen, last, check, target=target)

    def finish_moves(self, journals: Callable[[str], DeadLetters]) -> dict[str, int]:
        """See `DeadLetters.finish_moves`."""
        from ingestd.journal.sqlite import moves  # noqa: PLC0415  no daemon moves letters

        moved: dict[str, int] = {}
        with opened(self.path, write=True) as db:
            for target in moves.targets(db):
                other = journals(target)
                if isinstance(other, SqliteDeadLetters) and other.takes_moved:
                    with opened(other.path, write=True) as there:
                        moved[target] = _finish(db, there, target)
        return moved

    def purge(self, chosen: LetterFilter, last: int) -> int:
        """See `DeadLetters.purge`."""
        with opened(self.path, write=True) as db:
            return purge(db, chosen, last)


class SqliteDeadLetterStore(SqliteDeadLetters):
    """See `ingestd.journal.dead_letters.DeadLetterStore`.

    Args:
        path: of the journal.
        bytes_max: bound on the letters of accepted records.
        totals: returns the present ones.
        poll: reads the marks, and brings the totals up to date.
        queue: hands a kind of operation and its parts to the writer.
        room: returns the bytes that the journal has left.
    """

    def __init__(
        self,
        path: Path,
        bytes_max: int,
        *,
        totals: Callable[[], DeadTotals],
        poll: Callable[[], Awaitable[bool]],
        queue: Callable[..., Future[Moved]],
        room: Callable[[], int],
    ) -> None:
        super().__init__(path)
        self.bytes_max = bytes_max
        self.totals = totals
        self._poll = poll
        self._queue = queue
        self._room = room

    @property
    def full(self) -> bool:
        """See `DeadLetterStore.full`."""
        return self.totals().accepted_bytes >= self.bytes_max

    async def poll_marked(self) -> bool:
        """See `DeadLetterStore.poll_marked`."""
        return await self._poll()

    def requeue(self) -> Future[Moved]:
        """See `DeadLetterStore.requeue`."""
        return self._queue(Requeue, self._room())

    def expire(self, before: float, since: float = 0.0) -> Future[Moved]:
        """See `DeadLetterStore.expire`."""
        return self._queue(Expire, since, before)


def _where(db: sqlite3.Connection, chosen: LetterFilter) -> tuple[str, list[object]]:
    """The condition on rows in SQL and its parameters, without the limit."""
    parts, values = ["1"], list[object]()
    if chosen.reasons:
        parts.append(f"reason IN ({','.join('?' * len(chosen.reasons))})")
        values.extend(chosen.reasons)
    if chosen.ids:
        parts.append("id IN (SELECT value FROM json_each(?))")
        values.append(json.dumps(_found(db, chosen.ids)[0]))
    for condition, moment in (("last_at >= ?", chosen.since), ("last_at < ?", chosen.until)):
        if moment is not None:
            parts.append(condition)
            values.append(moment)
    return " AND ".join(parts), values


def _meant(chosen: LetterFilter, row: LetterRow, last: int | None = None) -> Collection[int]:
    """The numbers of a row's letters that are chosen, up to the number `last`."""
    numbers: Sequence[int] = row.numbers
    if last is not None:
        numbers = range(row.numbers.start, min(row.numbers.stop, last + 1))
    if chosen.error:
        errors = {n: letter.error for n, _, letter in taken_apart(row, whole=False)}
        numbers = [n for n in numbers if chosen.error in errors[n]]
    return [n for n in numbers if n in chosen.ids] if chosen.ids else numbers


def letters(
    db: sqlite3.Connection, chosen: LetterFilter, *, whole: bool, before: int | None = None
) -> Iterator[StoredLetter]:
    """The letters, as `DeadLetters.select` gives them.

    No read lasts longer than a step: an open one would keep the daemon from starting its WAL over.
    """
    left, newest = chosen.limit, before is not None
    last = None if before is None else before - 1
    for row, size in _rows(db, chosen, whole=whole, last=last, newest=newest):
        meant = _meant(chosen, row, last)
        parts = taken_apart(row, whole=whole)
        for number, own, letter in reversed(parts) if newest else parts:
            if number not in meant:
                continue
            if left == 0:
                return
            left = None if left is None else left - 1
            kept_size = size if row.letters == 1 else own
            moving = row.retry == MOVING
            yield StoredLetter(number, bool(row.retry), kept_size, letter, moving)


def _rows(
    db: sqlite3.Connection,
    chosen: LetterFilter,
    *,
    whole: bool,
    also: str = "1",
    last: int | None = None,
    newest: bool = False,
) -> Iterator[tuple[LetterRow, int]]:
    """The rows in which letters are meant, and the bytes of each payload, in short reads.

    With `newest` those come first.
    """
    condition, values = _where(db, chosen)
    columns = ", ".join("x''" if name == "payload" and not whole else name for name in COLUMNS)
    query = (
        f"SELECT length(payload), {columns} FROM dead WHERE {condition} AND {also}"  # noqa: S608
        f" AND id > ? AND (? IS NULL OR id - letters < ?) ORDER BY id {'DESC' if newest else ''}"
        " LIMIT ?"
    )
    at = 0
    while True:
        step, count, size = list[tuple[LetterRow, int]](), 0, 0
        rows = db.execute(query, (*values, at, last, last, STEP))
        for payload_bytes, *found in rows:
            row = readable(LetterRow(*found))
            step.append((row, payload_bytes))
            count += row.letters
            size += payload_bytes if whole else 0
            if count >= STEP or size >= STEP_BYTES:
                break
        rows.close()
        if not step:
            return
        if newest:
            last = step[-1][0].numbers.start - 1
        else:
            at = step[-1][0].id
        yield from step


def count(db: sqlite3.Connection, chosen: LetterFilter) -> LetterCounts:
    """Counts the letters that are chosen."""
    if not chosen.ids and chosen.limit is None and not chosen.error:
        return _count_all(db, chosen)
    total, size, marked, incomplete, last = 0, 0, 0, 0, 0
    for row, _ in _rows(db, chosen, whole=False):
        if total == chosen.limit:
            break
        meant = list(_meant(chosen, row))
        if chosen.limit is not None:
            meant = meant[: chosen.limit - total]
        if not meant:
            continue
        total, last = total + len(meant), meant[-1]
        size += row.size * len(meant) // row.letters
        marked += len(meant) if row.retry else 0
        incomplete += len(meant) if row.reason in INCOMPLETE else 0
    return LetterCounts(total, size, marked, incomplete, last)


def _count_all(db: sqlite3.Connection, chosen: LetterFilter) -> LetterCounts:
    condition, values = _where(db, chosen)
    incomplete = f"reason IN ({', '.join(repr(reason) for reason in INCOMPLETE)})"
    row = db.execute(
        "SELECT coalesce(sum(letters), 0), coalesce(sum(bytes), 0),"  # noqa: S608
        " coalesce(sum(letters * (retry != 0)), 0),"
        f" coalesce(sum(letters * ({incomplete})), 0), coalesce(max(id), 0)"
        f" FROM dead WHERE {condition}",
        values,
    ).fetchone()
    return LetterCounts(*row)


def missing(db: sqlite3.Connection, ids: Sequence[int]) -> list[int]:
    """Those of some numbers that no letter has."""
    return _found(db, ids)[1]


def _found(db: sqlite3.Connection, ids: Iterable[int]) -> tuple[list[int], list[int]]:
    """The rows that hold the letters of some numbers, and the numbers that no letter has."""
    rows, absent = list[int](), list[int]()
    first, last = 1, 0
    for number in sorted(ids):
        if number > last:
            query = "SELECT id, letters FROM dead WHERE id >= ? ORDER BY id LIMIT 1"
            found = None if number > sys.maxsize else db.execute(query, (number,)).fetchone()
            last, letters = found or (number, 0)
            first = last - letters + 1
        if number < first:
            absent.append(number)
        elif rows[-1:] != [last]:
            rows.append(last)
    return rows, absent


def mark(
    db: sqlite3.Connection, chosen: LetterFilter, last: int, check: Callable[[bytes], str]
) -> MarkedLetters:
    """Marks letters to be fed again, up to the number `last`.

    Args:
        db: a connection that writes.
        chosen: which.
        last: the newest one that is meant.
        check: what is wrong with a payload as a record of the pipeline; empty if nothing is. It is
            asked about records that were never accepted.
    """
    invalid = 0
    also = f"retry = 0 AND reason NOT IN ({', '.join(repr(reason) for reason in INCOMPLETE)})"

    def wanted() -> Iterator[_Part]:
        nonlocal invalid
        for row, size in _rows(db, chosen, whole=False, also=also, last=last):
            meant = set(_meant(chosen, row, last))
            if not row.record and (there := row_of(db, row.id)) is not None:
                letters = [(n, one) for n, _, one in taken_apart(there) if n in meant]
                meant = {n for n, one in letters if not check(one.payload)}
                invalid += len(letters) - len(meant)
            yield _Part(row, size, meant)

    marked = sum(_change(db, wanted(), mark=1))
    return MarkedLetters(marked, invalid)


def move(
    db: sqlite3.Connection,
    chosen: LetterFilter,
    last: int,
    check: Callable[[bytes], str],
    *,
    target: str,
) -> MarkedLetters:
    """Marks letters to be moved into another pipeline; see `DeadLetters.move`."""
    from ingestd.journal.sqlite import moves  # noqa: PLC0415  no daemon moves letters

    invalid = 0
    also = f"retry = 0 AND reason NOT IN ({', '.join(repr(reason) for reason in INCOMPLETE)})"

    def wanted() -> Iterator[_Part]:
        nonlocal invalid
        for row, size in _rows(db, chosen, whole=True, also=also, last=last):
            if row.reason in INCOMPLETE:  # it can't be read any more
                continue
            meant = set(_meant(chosen, row, last))
            fit = {n for n, _, one in taken_apart(row) if n in meant and not check(one.payload)}
            invalid += len(meant) - len(fit)
            yield _Part(row._replace(payload=b""), size, fit)

    moves.prepare(db)
    marked = 0
    for step in _in_steps(wanted()):
        with transaction(db):
            for part in step:
                before = set(_marked(db, part))
                marked += _change_part(db, part, mark=1)
                moves.claim(db, [n for n in _marked(db, part) if n not in before], target)
    return MarkedLetters(marked, invalid)


def _marked(db: sqlite3.Connection, part: _Part) -> list[int]:
    """The marked rows that lie in the place of one."""
    numbers = part.row.numbers
    query = "SELECT id FROM dead WHERE id BETWEEN ? AND ? AND retry = 1"
    return [number for (number,) in db.execute(query, (numbers[0], numbers[-1]))]


def _finish(db: sqlite3.Connection, there: sqlite3.Connection, target: str) -> int:
    """Steps 2 and 3 of a move, and tidying up after it; returns the number of letters."""
    from ingestd.journal.sqlite import moves  # noqa: PLC0415  no daemon moves letters

    moves.prepare(there)
    moved, rows = 0, [0]
    while rows:
        with transaction(db):
            rows = moves.due(db, target)
            with transaction(there):
                moves.arrive(there, db, rows)
            moved += moves.leave(db, rows)
    with transaction(db), transaction(there):
        moves.tidy(there, db)
    return moved


def edit(db: sqlite3.Connection, number: int, before: bytes, after: bytes) -> bool:
    """Gives a letter another payload and marks it; see `DeadLetters.edit`."""
    with transaction(db):
        found = _found(db, [number])[0]
        row = row_of(db, found[0]) if found else None
        if row is None or row.retry:
            return False
        (one, *_), rest = split(row, [number])
        if one.payload != before:
            return False
        size = one.size + len(after) - len(before)
        replace(db, row, [one._replace(payload=after, size=size, retry=1), *rest])
    return True


def purge(db: sqlite3.Connection, chosen: LetterFilter, last: int, mark: int = 0) -> int:
    """Deletes letters for good, up to the number `last`; marked ones stay. How many it were.

    Args:
        db: a connection that writes.
        chosen: which.
        last: the newest one that is meant.
        mark: they get this mark instead, and the daemon deletes them.
    """
    rows = _rows(db, chosen, whole=False, also="retry = 0", last=last)
    parts = (_Part(row, size, set(_meant(chosen, row, last))) for row, size in rows)
    return sum(_change(db, parts, mark=mark))


class _Part(NamedTuple):
    """A row without its payload, the bytes of that, and the numbers of the letters that are meant.

    Numbers are never used again, so they mean the same letters when the row has gone meanwhile, or
    has been taken apart by the daemon or another command.
    """

    row: LetterRow
    size: int
    meant: Collection[int]


def _change(db: sqlite3.Connection, parts: Iterable[_Part], *, mark: int) -> Iterator[int]:
    """Marks letters, or deletes them (0), in steps of a transaction each; marked ones stay.

    Yields:
        How many each step has changed.
    """
    for step in _in_steps(parts):
        with transaction(db):
            done = sum(_change_part(db, part, mark=mark) for part in step)
            if not mark:
                db.execute("UPDATE dead_totals SET purged = purged + ?", (done,))
        yield done


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


def _change_part(db: sqlite3.Connection, part: _Part, *, mark: int) -> int:
    """Changes what is there now of a part, in the open transaction; returns how many letters."""
    numbers = part.row.numbers
    query = "SELECT id, letters FROM dead WHERE id BETWEEN ? AND ? AND retry = 0"
    done = 0
    for last, letters in db.execute(query, (numbers[0], numbers[-1])).fetchall():
        meant = [number for number in range(last - letters + 1, last + 1) if number in part.meant]
        if len(meant) == letters:
            change = f"UPDATE dead SET retry = {mark}" if mark else "DELETE FROM dead"  # noqa: S608
            db.execute(f"{change} WHERE id = ?", (last,))
        elif meant and (row := row_of(db, last)) is not None:
            chosen, rest = split(row, meant)
            kept = [one._replace(retry=mark) for one in chosen] if mark else []
            replace(db, row, [*kept, *rest])
        done += len(meant)
    return done
