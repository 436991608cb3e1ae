"""Ids of the last records, by their senders and by `dedupe.key`, in the SQLite file.

See `RecentIds`. Written in the commit of their records: senders' ids as one row an append, and the
keys of all its appends as one row. A row's number counts ids, not rows: it is that of the row
before and as many more as it has ids. So the rows that are too old are those up to one number, and
they lie together at the beginning of the table.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from ingestd.base.append import ID_BYTES
from ingestd.journal.sqlite import schema

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ingestd.base.append import Deduplicated, HeldIds

# As bookmarks: journals of this version that were made before lack it.
SCHEMA = """CREATE TABLE IF NOT EXISTS sender_ids(
    number INTEGER PRIMARY KEY, principal TEXT NOT NULL,
    ids BLOB NOT NULL CHECK (length(ids) % 16 = 0)) STRICT"""
KEYS_SCHEMA = """CREATE TABLE IF NOT EXISTS dedupe_keys(
    number INTEGER PRIMARY KEY, at REAL NOT NULL,
    keys BLOB NOT NULL CHECK (length(keys) % 16 = 0)) STRICT"""
_OLD_ROWS = 64
"""So many rows are looked at for those that are too old; each commit adds one."""


def put(db: sqlite3.Connection, new: Sequence[HeldIds]) -> None:
    """Stores the ids of some appends; the oldest ones beyond the bound go."""
    (number,) = db.execute("SELECT coalesce(max(number), 0) FROM sender_ids").fetchone()
    rows = []
    for held in new:
        if held.new:
            number += len(held.new)
            rows.append((number, held.principal, b"".join(held.new)))
    db.executemany("INSERT INTO sender_ids VALUES(?,?,?)", rows)
    db.execute("DELETE FROM sender_ids WHERE number <= ?", (number - new[-1].kept_max,))


def stored(db: sqlite3.Connection) -> Iterator[tuple[str, bytes]]:
    """Reads principal and ids of each append, the oldest first.

    Raises:
        sqlite3.DatabaseError: something else lies there.
    """
    if not schema.columns(db, "sender_ids"):
        return
    for principal, ids in db.execute("SELECT principal, ids FROM sender_ids ORDER BY number"):
        if type(principal) is not str or type(ids) is not bytes or len(ids) % ID_BYTES:
            raise sqlite3.DatabaseError("a sender's id is none")
        yield principal, ids


def put_keys(db: sqlite3.Connection, new: Sequence[Deduplicated]) -> None:
    """Stores the keys of some appends; those beyond the bound go, and some that are too old."""
    last = new[-1]
    keys = b"".join(key for one in new for key in one.keys.new)
    if keys:
        db.execute(
            "INSERT INTO dedupe_keys SELECT coalesce(max(number), 0) + ?, ?, ? FROM dedupe_keys",
            (len(keys) // ID_BYTES, last.at, keys),
        )
    db.execute(
        "DELETE FROM dedupe_keys WHERE number <= (SELECT max(number) FROM dedupe_keys) - ?",
        (last.keys.kept_max,),
    )
    db.execute(
        "DELETE FROM dedupe_keys WHERE number IN (SELECT number FROM"
        " (SELECT number, at FROM dedupe_keys ORDER BY number LIMIT ?) WHERE at < ?)",
        (_OLD_ROWS, last.kept_from),
    )


def stored_keys(db: sqlite3.Connection) -> Iterator[tuple[float, bytes]]:
    """Reads when the keys of a commit came, and these, the oldest first.

    Raises:
        sqlite3.DatabaseError: something else lies there.
    """
    if not schema.columns(db, "dedupe_keys"):
        return
    for at, keys in db.execute("SELECT at, keys FROM dedupe_keys ORDER BY number"):
        if type(at) is not float or type(keys) is not bytes or len(keys) % ID_BYTES:
            raise sqlite3.DatabaseError("a key of a record is none")
        yield at, keys
