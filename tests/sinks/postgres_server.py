"""A PostgreSQL for the tests of the sink: one a process, with a database for each test."""

from __future__ import annotations

import atexit
import itertools
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from ingestd.prove.servers import free_port
from tests.postgres import Postgres

SECRET = "hunter-2-is-nowhere"
_numbers = itertools.count(1)


@lru_cache(1)
def server() -> Postgres:
    """The server, with a user `writer` who may log in and has no rights."""
    folder = Path(tempfile.mkdtemp(prefix="ingestd-sink-postgres-"))
    port = free_port()
    try:
        one = Postgres(folder, port=port, durable=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    one.start()
    one.sql("CREATE ROLE writer LOGIN", "postgres")

    def end() -> None:
        one.stop()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    return one


class Database:
    """A database of the server, in which the user `writer` may make tables."""

    def __init__(self) -> None:
        self.server = server()
        self.name = f"test{next(_numbers)}"
        self.server.sql(f"CREATE DATABASE {self.name}", "postgres")
        self.sql("GRANT CREATE ON SCHEMA public TO writer")

    def dsn(self, port: int = 0) -> str:
        at = port or self.server.port
        return f"postgresql://writer:{SECRET}@127.0.0.1:{at}/{self.name}"

    def sql(self, statement: str) -> str:
        return self.server.sql(statement, self.name)

    def drop(self) -> None:
        self.server.sql(f"DROP DATABASE IF EXISTS {self.name} WITH (FORCE)", "postgres")
