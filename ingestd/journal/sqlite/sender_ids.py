"""The ids that senders gave the last records, in the SQLite file; see `RecentIds`.

One row an append, written in its commit. A row's number counts ids, not rows: it is that of the row
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

    from ingestd.base.append import HeldIds

# As bookmarks: journals of this version that were made before lack it.
SCHEMA = """CREATE TABLE IF NOT EXISTS sender_ids(
    number INTEGER PRIMARY KEY, principal TEXT NOT NULL,
    ids BLOB NOT NULL CHECK (length(ids) % 16 = 0)) STRICT"""


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
