"""ClickHouse over HTTP: a fake by script, and chdb, the same engine as a library, behind HTTP.

What chdb does is what a server of its version does with a statement, settings and data; the HTTP
part, users and errors of a cluster are the fake's.
"""

from __future__ import annotations

import atexit
import json
import re
import shutil
import tempfile
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.sinks.http_server import Answer, Asked, FakeServer

if TYPE_CHECKING:
    from collections.abc import Callable

PASSWORD = "password-of-the-server"
# Of an HTTP request and not of the engine.
_NO_SETTINGS = {"query", "database", "wait_end_of_query"}


def failed(code: int, text: str) -> Answer:
    """An error as ClickHouse answers it."""
    status = {516: 403, 497: 403, 60: 404, 81: 404, 202: 503, 241: 500, 999: 500}.get(code, 500)
    status = 400 if code in {26, 27, 53, 62, 117} else status
    body = f"Code: {code}. DB::Exception: {text} (version 26.9.2.1)\n".encode()
    return Answer(status, body, (("X-ClickHouse-Exception-Code", str(code)),))


class FakeClickHouse(FakeServer):
    """Answers the questions about a table with its attributes, and takes every insert.

    Attributes:
        inserted: queries and bodies.
    """

    def __init__(self) -> None:
        self.engine, self.definition = "MergeTree", "MergeTree ORDER BY n"
        self.columns = ["n", "_id"]
        self.server_window, self.views = 0, 0
        self.is_there = True
        self.inserted: list[tuple[dict[str, str], bytes]] = []
        super().__init__()

    def answer(self, asked: Asked) -> Answer:
        query = query_of(asked)
        if "query" in query:
            self.inserted.append((query, asked.body))
            return Answer()
        text = asked.body.decode()
        for what, rows in {
            "version()": [{"version": "26.9.2.1"}],
            "system.tables": [{"engine": self.engine, "engine_full": self.definition,
                               "views": str(self.views)}] if self.is_there else [],
            "system.columns": [{"name": name} for name in self.columns],
            "merge_tree_settings": [{"value": str(self.server_window)}],
            "SELECT _id": [],
        }.items():  # fmt: skip
            if what in text:
                return Answer(200, b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        return failed(62, "Syntax error")


def query_of(asked: Asked) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(asked.path).query).items()}


@lru_cache(1)
def _engine() -> Callable[[str], str]:
    """The engine; there is one in a process."""
    try:
        from chdb.session import Session
    except ImportError:
        pytest.skip("needs chdb: pip install -r requirements/sinks.txt")
    folder = tempfile.mkdtemp()
    session = Session(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return lambda statement: str(session.query(statement, "JSONEachRow"))


class ChdbServer(FakeServer):
    """chdb behind HTTP, with a database of its own and one user.

    Attributes:
        sql: runs a statement; JSON lines.
    """

    number = 0

    def __init__(self, definition: str, *, window: int = 1000) -> None:
        self.sql = _engine()
        ChdbServer.number += 1
        self.database = f"d{ChdbServer.number}"
        self.sql(f"CREATE DATABASE {self.database}")
        self.sql(
            f"CREATE TABLE {self.database}.t ({definition}) ENGINE = MergeTree ORDER BY tuple()"
            f" SETTINGS non_replicated_deduplication_window = {window}"
        )
        super().__init__()

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in
                self.sql(f"SELECT * FROM {self.database}.t ORDER BY ALL").splitlines()]  # fmt: skip

    def answer(self, asked: Asked) -> Answer:
        if not asked.headers.get("authorization", "").startswith("Basic "):
            return failed(516, "default: Authentication failed")
        query = query_of(asked)
        settings = ", ".join(
            f"{name} = '{value}'" for name, value in query.items() if name not in _NO_SETTINGS
        )
        try:
            self.sql(f"USE {self.database}")
            body = asked.body.decode()
            if "query" not in query:
                return Answer(200, self.sql(body).encode())
            head, _, form = query["query"].partition(" FORMAT ")
            self.sql(f"{head} SETTINGS {settings} FORMAT {form}\n{body}")
            return Answer()
        except Exception as error:  # its errors have no class of their own in all versions
            found = re.search(r"Code: (\d+)\. DB::Exception: (.*)", str(error), re.DOTALL)
            return failed(int(found[1]), found[2]) if found else failed(1001, str(error))

    def drop(self) -> None:
        self.stop()
        self.sql(f"DROP DATABASE {self.database}")
