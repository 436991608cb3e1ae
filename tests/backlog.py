"""A journal with many records pending, written with the real store and without its syncs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.base.record import Layout, Records
from ingestd.journal.interface import Chunk
from ingestd.journal.sqlite import checkpoint
from ingestd.journal.sqlite.store import Store, Write

if TYPE_CHECKING:
    from pathlib import Path

COMMIT_BYTES = 16 << 20


def fill(path: Path, *, chunks: int, records: int = 1, size: int = 125) -> None:
    """Makes a journal of `chunks` chunks, each of `records` records of `size` bytes."""
    run = Records(Layout.LINES, records, (b'"' + b"x" * (size - 3) + b'"\n') * records)
    step = min(20_000, max(1, COMMIT_BYTES // (size * records)))
    store = Store(path)
    try:
        store.connection.execute("PRAGMA synchronous=OFF")
        for first in range(1, chunks + 1, step):
            numbers = range(first, min(first + step, chunks + 1))
            store.write(Write([Chunk(n, 1.7e9, run) for n in numbers]))
            checkpoint.restart(store.connection)
        store.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        store.close()
