"""The sink `sqlite`: a file, whose lock makes it slow, and whose table may have no place for it."""

from __future__ import annotations

import sqlite3
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from tests.sinks.contract.adapter import SinkAdapter, Slow

if TYPE_CHECKING:
    from collections.abc import Iterator


class Adapter(SinkAdapter):
    target = "sqlite"
    bad = b"1e999"

    @property
    def path(self) -> str:
        return str(self.folder / "rows.db")

    def options(self) -> dict[str, Any]:
        return {"path": self.path, "table": "t"}

    def stored(self) -> list[int]:
        with closing(sqlite3.connect(self.path)) as db:
            return [n for (n,) in db.execute("SELECT n FROM t")]

    @contextmanager
    def slow(self) -> Iterator[Slow]:
        with closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("BEGIN IMMEDIATE")
            yield Slow(lambda: db.execute("COMMIT"))
