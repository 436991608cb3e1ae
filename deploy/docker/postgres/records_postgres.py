"""Records become rows of PostgreSQL, each exactly once (docs/EXACTLY_ONCE.md says why)."""

from __future__ import annotations

import psycopg

from ingestd import Batch


class Store:
    """One connection a worker, opened with the first batch, and again where it broke."""

    def __init__(self, *, dsn: str) -> None:
        self.dsn = dsn
        self.db: psycopg.Connection | None = None

    def __call__(self, batch: Batch[bytes]) -> None:
        if self.db is None or self.db.closed:
            self.db = psycopg.connect(self.dsn, connect_timeout=10)
        rows = [(name, record.decode()) for name, record in zip(batch.ids, batch, strict=True)]
        with self.db.transaction(), self.db.cursor() as cursor:
            cursor.execute("INSERT INTO batches VALUES (%s) ON CONFLICT DO NOTHING", [batch.id])
            if cursor.rowcount:
                cursor.executemany(
                    "INSERT INTO records VALUES (%s, %s) ON CONFLICT (id) DO NOTHING", rows
                )

    def close(self) -> None:
        if self.db is not None:
            self.db.close()
