"""The sink `clickhouse`, with ClickHouse's engine as a library behind HTTP."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.sinks.clickhouse_server import PASSWORD, ChdbServer
from tests.sinks.contract.adapter import SinkAdapter, Slow

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path


class Adapter(SinkAdapter):
    target = "clickhouse"
    secret = PASSWORD
    bad = b'{"n":"no number"}'
    is_slow = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.server = ChdbServer("n Int64, text String, _id String")

    def options(self) -> dict[str, Any]:
        return {
            "url": self.server.url, "table": "t", "database": self.server.database,
            "exactly_once": True, "username": "ingestd", "password": PASSWORD,
        }  # fmt: skip

    def stored(self) -> list[int]:
        return [int(row["n"]) for row in self.server.rows()]

    def down(self) -> AbstractContextManager[object]:
        return self.server.down()

    @contextmanager
    def unusable(self) -> Iterator[None]:
        table = f"{self.server.database}.t"
        self.server.sql(f"RENAME TABLE {table} TO {table}2")
        try:
            yield
        finally:
            if self.server.sql(f"EXISTS TABLE {table}2").strip().endswith("1}"):
                self.server.sql(f"RENAME TABLE {table}2 TO {table}")

    def slow(self) -> AbstractContextManager[Slow]:
        return self.server.slow()

    def close(self) -> None:
        self.server.drop()
