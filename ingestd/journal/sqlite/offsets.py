"""Bookmarks in the SQLite file: how far sources have read their inputs.

A bookmark is put down in the commit of the records that were read up to it, so neither is ever
there without the other. One row an input; each has a checksum, because a wrong one would make its
source leave records out.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, NamedTuple

from ingestd.base.append import SourceOffset

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Awaitable, Callable, Iterator, Sequence

BOOKMARKS_MAX = 100_000
"""So many are kept; then a tenth goes, those that were put down longest ago."""
ROW_BYTES = 64
"""What one takes beside its own bytes, about."""

# Not part of the tables that a journal is created with: older journals of this version lack it.
SCHEMA = """CREATE TABLE IF NOT EXISTS bookmarks(
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, bytes INTEGER NOT NULL,
    crc INTEGER NOT NULL, state BLOB NOT NULL) STRICT"""


class OffsetTotals(NamedTuple):
    """The number of offsets, and the bytes that they count for in the journal's bound."""

    count: int = 0  # type: ignore[assignment]  # hides tuple.count
    bytes: int = 0


class SqliteOffsets:
    """See `ingestd.journal.interface.OffsetStore`.

    Args:
        read: calls a function with the connection that reads, in its thread.
    """

    def __init__(self, read: Callable[..., Awaitable[SourceOffset | None]]) -> None:
        self._read = read

    async def find(self, key: str) -> SourceOffset | None:
        """See `OffsetStore.find`."""
        return await self._read(find, key)


def size_of(bookmark: SourceOffset | None) -> int:
    """Bytes that a bookmark counts for in the journal's bound."""
    return 0 if bookmark is None else len(bookmark.key) + len(bookmark.state) + ROW_BYTES


def checksum(bookmark: SourceOffset) -> int:
    """CRC-32 over whose it is and what it says."""
    return zlib.crc32(bookmark.state, zlib.crc32(bookmark.key.encode()))


def exist(db: sqlite3.Connection) -> bool:
    """Returns True if the journal has the table: one that no daemon opened lately may lack it."""
    found = db.execute("SELECT 1 FROM sqlite_schema WHERE type='table' AND name='bookmarks'")
    return found.fetchone() is not None


def totals(db: sqlite3.Connection) -> OffsetTotals:
    """Counted from the rows."""
    row = db.execute("SELECT count(*), total(bytes) FROM bookmarks").fetchone()
    return OffsetTotals(row[0], int(row[1]))


def put(db: sqlite3.Connection, new: Sequence[SourceOffset], before: OffsetTotals) -> OffsetTotals:
    """Puts bookmarks down, each in place of its former one; what there is then.

    Args:
        db: in a transaction.
        new: in order; the last one of a key counts.
        before: what there was.
    """
    count, size = before
    for bookmark in {bookmark.key: bookmark for bookmark in new}.values():
        for (gone,) in db.execute(
            "DELETE FROM bookmarks WHERE key = ? RETURNING bytes", (bookmark.key,)
        ).fetchall():
            count, size = count - 1, size - gone
        db.execute("INSERT INTO bookmarks(key, bytes, crc, state) VALUES(?,?,?,?)", _row(bookmark))
        count, size = count + 1, size + size_of(bookmark)
    if count > BOOKMARKS_MAX:
        oldest = "SELECT id FROM bookmarks ORDER BY id LIMIT ?"
        excess = count - BOOKMARKS_MAX * 9 // 10
        gone = db.execute(
            f"DELETE FROM bookmarks WHERE id IN ({oldest}) RETURNING bytes",  # noqa: S608
            (excess,),
        ).fetchall()
        count, size = count - len(gone), size - sum(row[0] for row in gone)
    return OffsetTotals(count, size)


def _row(bookmark: SourceOffset) -> tuple[object, ...]:
    return bookmark.key, size_of(bookmark), checksum(bookmark), bookmark.state


def find(db: sqlite3.Connection, key: str) -> SourceOffset | None:
    """The one of a key.

    Raises:
        ValueError: its checksum does not fit.
    """
    row = db.execute("SELECT state, crc FROM bookmarks WHERE key = ?", (key,)).fetchone()
    if row is None:
        return None
    bookmark = SourceOffset(key, row[0])
    if checksum(bookmark) != row[1]:
        raise ValueError("the checksum of a bookmark does not fit")
    return bookmark


def damaged(db: sqlite3.Connection) -> Iterator[str]:
    """The keys of those whose checksum does not fit."""
    for key, state, crc in db.execute("SELECT key, state, crc FROM bookmarks ORDER BY id"):
        if checksum(SourceOffset(key, state)) != crc:
            yield key
