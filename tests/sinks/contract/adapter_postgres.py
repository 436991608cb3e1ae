"""The sink `postgres`, with a real server, which is stopped, locked, or takes a right away."""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.sinks.contract.adapter import SinkAdapter, Slow
from tests.sinks.postgres_server import SECRET, Database

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Adapter(SinkAdapter):
    target = "postgres"
    secret = SECRET
    can_be_killed = True
    bad = b'{"n":5,"text":"\\u0000"}'

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if importlib.util.find_spec("psycopg") is None:
            pytest.skip("needs psycopg: pip install 'ingestd[postgres]'")
        self.database = Database()

    def options(self) -> dict[str, Any]:
        return {"dsn": self.database.dsn()}

    def stored(self) -> list[int]:
        return [int(n) for n in self.database.sql("SELECT n FROM records").split()]

    @contextmanager
    def down(self) -> Iterator[None]:
        self.database.server.stop()
        try:
            yield
        finally:
            self.database.server.start()

    def kill(self) -> None:
        self.database.server.kill()
        self.database.server.start()

    @contextmanager
    def unusable(self) -> Iterator[None]:
        self.database.sql("REVOKE CREATE ON SCHEMA public FROM writer")
        try:
            yield
        finally:
            self.database.sql("GRANT CREATE ON SCHEMA public TO writer")

    @contextmanager
    def slow(self) -> Iterator[Slow]:
        import psycopg

        self.database.sql(
            "CREATE TABLE records(_id text PRIMARY KEY, n bigint, text text, _extra jsonb)"
        )
        self.database.sql("GRANT ALL ON records TO writer")
        at = f"host={self.database.server.folder} port={self.database.server.port} user=ingestd"
        with psycopg.connect(f"{at} dbname={self.database.name}") as db:
            db.execute("LOCK TABLE records IN EXCLUSIVE MODE")
            yield Slow(db.commit)

    def close(self) -> None:
        self.database.drop()
