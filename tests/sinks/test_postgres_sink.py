"""The sink `postgres` with a real server: what is in its tables afterwards, and what is refused."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.errors import HandlerLoadError
from ingestd.base.record import Records, Span
from ingestd.handlers.load import load
from ingestd.handlers.outcome import Job
from ingestd.handlers.runner import HandlerConfig
from ingestd.sinks.postgres import rows as making
from ingestd.sinks.postgres.rows import Column
from ingestd.sinks.postgres.sink import PostgresOptions
from tests.daemon.harness import ROOT, daemon
from tests.sinks.contract.adapter import Worker
from tests.sinks.postgres_server import SECRET, Database

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ingestd.handlers.outcome import Result

psycopg = pytest.importorskip("psycopg", reason="needs psycopg: pip install 'ingestd[postgres]'")


pytestmark = pytest.mark.slow  # a server of PostgreSQL


@pytest.fixture
def database() -> Iterator[Database]:
    one = Database()
    yield one
    one.drop()


class Sink:
    """Workers of the sink, each with options of its own."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def __call__(
        self, *records: Any, batch: int = 1, first: int = 0, form: str = "json",
        lineage: tuple[str, ...] = (), dsn: str = "", **options: Any,
    ) -> Result:  # fmt: skip
        with self.worker(form=form, dsn=dsn, **options) as worker:
            return worker.run(job(*records, batch=batch, first=first, lineage=lineage))

    def worker(self, form: str = "json", dsn: str = "", **options: Any) -> Worker:
        options = {"dsn": dsn or self.database.dsn(), **options}
        worker = Worker(HandlerConfig("postgres", options, form, "thread", "default", b"/x"))
        assert worker.not_ready == ""
        return worker

    def rows(self, table: str = "records", order: str = "_id") -> list[dict[str, Any]]:
        every = f"SELECT coalesce(json_agg(t ORDER BY {order}), '[]') FROM {table} t"
        return json.loads(self.database.sql(every))

    def types(self, table: str = "records") -> dict[str, str]:
        found = self.database.sql(
            "SELECT attname, format_type(atttypid, NULL) FROM pg_attribute"
            f" WHERE attrelid = '{table}'::regclass AND attnum > 0 AND NOT attisdropped"
        )
        return dict(line.split("|") for line in found.splitlines())


@pytest.fixture
def sink(database: Database) -> Sink:
    return Sink(database)


def job(*records: Any, batch: int = 1, first: int = 0, lineage: tuple[str, ...] = ()) -> Job:
    raw = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in records]
    spans = [Span(1, first, len(raw))]
    return Job(f"j-{batch}", 1, Records.sized(raw), spans, "j", 0.0, list(lineage))


def fine(result: Result) -> None:
    assert (result.failure, result.rejections, result.retries) == (None, [], [])


def test_types_are_those_of_the_first_batch(sink: Sink) -> None:
    record = {
        "text": "é\t\\ \n\r\"'", "int": -5, "real": 1.5, "yes": True, "list": [1, "\t\\"],
        "object": {"a": {"b": "\\n"}}, "big": 10**30, "nothing": None, "mixed": 1,
    }  # fmt: skip
    fine(sink(record, record | {"mixed": "x", "real": 2, "int": 2**63 - 1}))
    first, second = sink.rows()
    assert {k: v for k, v in first.items() if k not in {"_id", "_extra"}} == {
        k: v for k, v in record.items() if k != "nothing"
    }
    assert (second["mixed"], second["real"], second["int"]) == ("x", 2, 2**63 - 1)
    assert sink.types() == {
        "_id": "text", "text": "text", "int": "bigint", "real": "double precision",
        "yes": "boolean", "list": "jsonb", "object": "jsonb", "big": "numeric", "mixed": "jsonb",
        "_extra": "jsonb",
    }  # fmt: skip
    assert [row["_id"] for row in (first, second)] == ["j.1.0", "j.1.1"]


def test_new_keys_become_columns_and_what_does_not_fit_is_kept(sink: Sink) -> None:
    with sink.worker() as worker:
        fine(worker.run(job({"a": 1, "b": True})))
        fine(worker.run(job({"a": "x", "b": 1, "c": 1.5}, {"a": 10**30}, [1], batch=2, first=1)))
    rows = sink.rows()
    assert [(row["a"], row["b"], row["c"]) for row in rows] == [
        (1, True, None), (None, None, 1.5), (None, None, None), (None, None, None),
    ]  # fmt: skip
    assert [row["_extra"] for row in rows] == [None, {"a": "x", "b": 1}, {"a": 10**30}, [1]]


def test_what_can_be_no_column_is_kept(sink: Sink) -> None:
    odd = {"": 1, "k" * 64: 2, "é" * 32: 3, "ctid": 4, "_id": 5, "_extra": 6}
    names = {"k" * 63: 7, 'a"b': 8, "A": 9, "a": 10, "%s": 11, "é" * 31: 12, "select": 13}
    fine(sink(odd | names))
    (row,) = sink.rows()
    assert row["_extra"] == odd
    assert {name: row[name] for name in names} == names


def test_there_are_at_most_500_columns_and_nothing_is_left_out(sink: Sink) -> None:
    record = {f"k{n}": n for n in range(1700)}
    fine(sink({"first": 1}, record))
    rows = sink.rows()
    assert len(sink.types()) == making.COLUMNS_MAX + 2
    found = {k: v for k, v in rows[1].items() if v is not None and k not in {"_id", "_extra"}}
    assert found | rows[1]["_extra"] == record


@pytest.mark.parametrize(
    "bad",
    [
        b'{"n":"\\u0000"}', b'{"n":"\\\\\\u0000"}', b'{"\\u0000":1}', b'{"n":["a\\u0000"]}',
        b'{"n":1e999}', b'"\xff"', b'{"n":"\\ud800"}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("columns", ["auto", "json"])
def test_what_cannot_be_stored_costs_itself_alone(sink: Sink, bad: bytes, columns: str) -> None:
    good = {"n": "\\u0000 is six characters"}
    for batch in range(2):  # and again: what was refused is refused, not done
        result = sink(good, bad, good, batch=1, columns=columns)
        assert result.failure is None, batch
        if bad != b'{"n":1e999}' or columns == "auto":
            ((index, reason, error),) = [(r.index, r.reason, r.error) for r in result.rejections]
            assert (index, reason) == (1, "rejected")
            assert error
    count = int(sink.database.sql("SELECT count(*) FROM records"))
    assert count == 3 - len(result.rejections)


def test_the_whole_record_in_one_column(sink: Sink) -> None:
    pretty = b'{\n\t"a": "\\t\\\\ \\n",\r\n "b": 1}'
    fine(sink(pretty, 5, columns="json"))
    assert [row["record"] for row in sink.rows()] == [{"a": "\t\\ \n", "b": 1}, 5]
    fine(sink(b"a\tb\\\xc3\xa9", form="text", table="lines", batch=11))
    result = sink(b"ok", b"\xff", b"\0", form="text", table="lines", batch=12, first=1)
    assert [one.index for one in result.rejections] == [1, 2]
    assert [row["record"] for row in sink.rows("lines")] == ["a\tb\\é", "ok"]
    fine(sink(b"\0\xff\\\n\t", b"", form="bytes", table="blobs", batch=13))
    assert [row["record"] for row in sink.rows("blobs")] == ["\\x00ff5c0a09", "\\x"]
    assert sink.types("blobs")["record"] == "bytea"


# -- tables that are there -------------------------------------------------------------------------

CLICKS = (
    "CREATE TABLE clicks(id int GENERATED ALWAYS AS IDENTITY, usr uuid, at timestamptz,"
    " page int CHECK (page < 100), note varchar(5) DEFAULT 'none', twice int"
    " GENERATED ALWAYS AS (page * 2) STORED); GRANT ALL ON clicks TO writer"
)
ANN = "12345678-1234-1234-1234-123456789abc"


def test_a_table_of_the_users(sink: Sink) -> None:
    sink.database.sql(CLICKS)
    fine(sink({"usr": ANN, "at": "2026-01-31T09:00:00Z", "page": 7}, {"page": None},
              table="clicks", columns="existing"))  # fmt: skip
    first, second = sink.rows("clicks", "id")
    assert (first["usr"], first["at"][:10], first["page"], first["note"], first["twice"]) == (
        ANN, "2026-01-31", 7, "none", 14,
    )  # fmt: skip
    assert second["page"] is None
    assert "_id" not in first
    # Without a column of ids the batch's own name is what tells.
    options: dict[str, Any] = {"table": "clicks", "columns": "existing"}
    fine(sink({"page": 1}, batch=1, **options))
    fine(sink({"page": 1}, batch=2, lineage=("j-1",), **options))
    assert len(sink.rows("clicks", "id")) == 2


BAD_ROWS = [
    ({"usr": "no-uuid"}, "22P02", "usr"),
    ({"page": 2**40}, "22003", "page"),
    ({"note": "abcdefgh"}, "22001", "note"),
    ({"page": 100}, "23514", ""),
    ({"at": "yesterday, or so"}, "22007", "at"),
]


@pytest.mark.parametrize(("bad", "code", "column"), BAD_ROWS)
def test_the_server_names_the_row_that_it_refuses(
    sink: Sink, bad: dict[str, Any], code: str, column: str
) -> None:
    sink.database.sql(CLICKS)
    records = [{"page": n % 100} for n in range(999)]
    records.insert(500, bad)
    for _ in range(2):
        result = sink(*records, table="clicks", columns="existing")
        assert result.failure is None
        ((index, error),) = [(one.index, one.error) for one in result.rejections]
        assert index == 500
        assert code in error
        assert column in error
        assert not [value for value in bad.values() if str(value) in error and value != 100]
    assert sink.database.sql("SELECT count(*) FROM clicks") == "999"


def test_many_bad_rows_among_a_thousand(sink: Sink) -> None:
    sink.database.sql(CLICKS)
    records: list[Any] = [{"page": n % 100} for n in range(1000)]
    bad = set(range(0, 1000, 25))
    for place in bad:
        records[place] = {"usr": "x"}
    for _ in range(2):
        result = sink(*records, table="clicks", columns="existing")
        assert result.failure is None
        assert {one.index for one in result.rejections} == bad
    assert sink.database.sql("SELECT count(*) FROM clicks") == str(1000 - len(bad))


def test_a_constraint_that_names_no_row_is_found_by_halves(sink: Sink) -> None:
    sink.database.sql(
        "CREATE TABLE shops(id int PRIMARY KEY); INSERT INTO shops VALUES (1);"
        "CREATE TABLE sales(_id text PRIMARY KEY, shop int REFERENCES shops);"
        "GRANT ALL ON sales, shops TO writer"
    )
    records = [{"shop": 1} for _ in range(300)]
    records[77] = records[200] = {"shop": 2}
    result = sink(*records, table="sales", columns="existing")
    assert sorted(one.index for one in result.rejections) == [77, 200]
    assert sink.database.sql("SELECT count(*) FROM sales") == "298"


DEFAULTS = (
    "CREATE DOMAIN grade AS int DEFAULT 5; CREATE SEQUENCE numbers;"
    "CREATE TABLE t(_id text PRIMARY KEY, a int NOT NULL DEFAULT 7 CHECK (a < 100),"
    " b text DEFAULT '100%', c int GENERATED BY DEFAULT AS IDENTITY, d grade,"
    " e int NOT NULL DEFAULT nextval('numbers'), n int);"
    "GRANT ALL ON t TO writer; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO writer"
)


@pytest.mark.parametrize("way", ["copy", "known", "upsert"])
def test_a_key_that_a_record_lacks_leaves_its_column_the_default(sink: Sink, way: str) -> None:
    """Whatever its neighbours have, and whichever way the batch takes."""
    sink.database.sql(DEFAULTS)
    if way == "known":
        sink.database.sql("INSERT INTO t(_id, n) VALUES ('j.1.2', -2)")
    options: dict[str, Any] = {"mode": "upsert", "key": ["_id"]} if way == "upsert" else {}
    full = {"a": 1, "b": "x\t", "c": 70, "d": 2, "e": 80, "n": 3}
    records = [full, {"n": 1}, {"n": 2, "b": None}, {"n": 4, "a": 4}, {"n": 5}, full, {}]
    fine(sink(*records, table="t", columns="existing", **options))
    rows = sink.rows("t")
    assert [row["a"] for row in rows] == [1, 7, 7, 4, 7, 1, 7]
    assert [row["d"] for row in rows] == [2, 5, 5, 5, 5, 2, 5]
    assert [row["b"] for row in rows if row["n"] != -2] == (
        ["x\t", "100%", *([None] if way != "known" else []), "100%", "100%", "x\t", "100%"]
    )
    assert len({row["c"] for row in rows}) == len({row["e"] for row in rows}) == 6
    assert [row["n"] for row in rows] == [3, 1, -2 if way == "known" else 2, 4, 5, 3, None]


def test_the_row_that_the_server_refuses_is_found_in_each_group(sink: Sink) -> None:
    sink.database.sql(DEFAULTS)
    records: list[Any] = [{"n": n} | ({"a": n % 100} if n % 3 else {}) for n in range(300)]
    bad = {9: {"n": "x"}, 100: {"n": 1, "a": 100}, 200: {"n": 2**40, "a": 1}, 299: {"a": None}}
    for place, one in bad.items():
        records[place] = one
    for _ in range(2):
        result = sink(*records, table="t", columns="existing")
        assert result.failure is None
        assert {one.index for one in result.rejections} == set(bad)
    good = [record for place, record in enumerate(records) if place not in bad]
    rows = sink.rows("t", "n")
    assert [(row["n"], row["a"]) for row in rows] == [(one["n"], one.get("a", 7)) for one in good]


def test_more_groups_than_copies_and_records_without_any_column(sink: Sink) -> None:
    names = [f"k{n}" for n in range(6)]
    columns = ", ".join(f"{name} int NOT NULL DEFAULT {n}" for n, name in enumerate(names))
    sink.database.sql(f"CREATE TABLE t({columns}); GRANT ALL ON t TO writer")
    records: list[Any] = [
        {name: 10 for bit, name in enumerate(names) if n >> bit & 1} for n in range(64)
    ]
    records[20] = {"k1": "x"}
    for batch, part in enumerate((records, records[:2]), 1):
        result = sink(*part, batch=batch, table="t", columns="existing")
        assert result.failure is None
        assert [one.index for one in result.rejections] == [20] * (len(part) > 20)
    good = [*records[:20], *records[21:], *records[:2]]
    found = sorted(tuple(row[name] for name in names) for row in sink.rows("t", "k0"))
    assert found == sorted(tuple(one.get(name, n) for n, name in enumerate(names)) for one in good)


def test_keys_without_a_column(sink: Sink) -> None:
    columns = "_id text UNIQUE, a int, _extra jsonb"
    sink.database.sql(f"CREATE TABLE t({columns}); ALTER TABLE t OWNER TO writer")
    options: dict[str, Any] = {"table": "t", "columns": "existing"}
    result = sink({"a": 1}, {"a": 2, "b": 3, "c": 4}, 5, **options)
    assert [(one.index, one.error) for one in result.rejections] == [
        (1, "no column holds 'b', 'c'"), (2, "it is no JSON object, so it has no columns"),
    ]  # fmt: skip
    fine(sink({"a": 2, "b": 3}, batch=2, first=3, on_new_column="extra", **options))
    fine(sink({"a": 2, "b": 3}, batch=3, first=4, on_new_column="add", **options))
    assert [(row["a"], row.get("b"), row["_extra"]) for row in sink.rows("t")] == [
        (1, None, None), (2, None, {"b": 3}), (2, 3, None),
    ]  # fmt: skip
    fine(sink({"a": 9, "b": 1, "zzz": 1}, batch=4, first=5, table="t", mapping={"a": "b"}))
    assert [row["a"] for row in sink.rows("t")][-1] == 1


@pytest.mark.parametrize(
    ("table", "options", "says"),
    [
        ("", {"columns": "existing"}, "there is no table"),
        ("CREATE TABLE records(n int)", {}, "no unique column '_id'"),
        ("CREATE TABLE records(_id text)", {"columns": "existing"}, "no unique index on _id"),
        (
            "CREATE TABLE records(n int)",
            {"columns": "existing", "on_new_column": "extra"},
            "_extra",
        ),
        ("CREATE TABLE records(n int)", {"mode": "upsert", "key": ["n"]}, "no unique index on n"),
        ("CREATE TABLE records(n int)", {"mapping": {"m": "n"}}, "has no column 'm'"),
        ("", {"mode": "upsert", "key": ["id"]}, "no record has the key 'id'"),
        ("", {"schema": "nowhere"}, "nowhere"),
    ],
)
def test_a_table_that_cannot_be_used_is_no_records_fault(
    sink: Sink, table: str, options: dict[str, Any], says: str
) -> None:
    if table:
        sink.database.sql(f"{table}; GRANT ALL ON records TO writer")
    result = sink({"n": 1}, **options)
    assert result.failure is not None
    assert result.failure.reason == "blocked"
    assert says in result.failure.error


def test_upsert_replaces_the_row_and_the_last_of_a_batch_counts(sink: Sink) -> None:
    options: dict[str, Any] = {"mode": "upsert", "key": ["user", "day"]}
    fine(sink({"user": "ann", "day": 1, "n": 1}, {"user": "bob", "day": 1, "n": 1},
              {"user": "ann", "day": 1, "n": 2}, **options))  # fmt: skip
    fine(sink({"user": "ann", "day": 1, "n": 3, "more": True}, batch=2, first=3, **options))
    fine(sink({"user": "ann", "day": 1, "n": 1}, batch=1, **options))  # comes again: too late
    result = sink(
        {"user": "cy", "n": 1}, {"user": "dee", "day": 2, "n": 1}, batch=3, first=4, **options
    )
    assert [one.index for one in result.rejections] == [0]
    assert [(row["user"], row["n"], row["more"]) for row in sink.rows(order='"user"')] == [
        ("ann", 3, True), ("bob", 1, None), ("dee", 1, None),
    ]  # fmt: skip


# -- exactly once ----------------------------------------------------------------------------------


def test_records_that_come_again_in_another_batch_are_known_by_their_ids(sink: Sink) -> None:
    """A dead letter that is requeued: its batch was stored, and it has no lineage."""
    fine(sink(*({"n": n} for n in range(10))))
    fine(sink(*({"n": n} for n in range(5, 15)), batch=2, first=5))
    assert [row["n"] for row in sink.rows(order="n")] == list(range(15))


def test_what_was_refused_is_refused_again_by_a_part(sink: Sink) -> None:
    sink.database.sql(CLICKS)
    options: dict[str, Any] = {"table": "clicks", "columns": "existing"}
    records = [{"page": 1}, {"page": 100}, {"page": 3}, {"usr": "x"}]
    assert [one.index for one in sink(*records, **options).rejections] == [1, 3]
    first = sink(*records[:2], batch=2, lineage=("j-1",), **options)
    second = sink(*records[2:], batch=3, first=2, lineage=("j-1",), **options)
    assert [one.index for one in first.rejections] == [1]
    assert [one.index for one in second.rejections] == [1]
    assert [row["page"] for row in sink.rows("clicks", "id")] == [1, 3]


class Proxy:
    """Forwards to the server, and breaks both connections when a client says COMMIT."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.cuts = 0
        self.before_server = False  # whether the server gets that COMMIT
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, function: Any, *args: Any) -> None:
        thread = threading.Thread(target=function, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            self._start(self._up, client, server)
            self._start(self._down, server, client)

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with closing(client), closing(server):
            while data := _received(client):
                if b"COMMIT\0" in data and self.cuts:
                    self.cuts -= 1
                    if not self.before_server:
                        client.shutdown(socket.SHUT_RDWR)  # no answer goes back
                        server.sendall(data)
                        server.settimeout(60)
                        _received(server)  # it has committed
                    # Also under the thread that reads from it.
                    server.shutdown(socket.SHUT_RDWR)
                    return
                server.sendall(data)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        while data := _received(server):
            try:
                client.sendall(data)
            except OSError:
                return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _received(one: socket.socket) -> bytes:
    try:
        return one.recv(65536)
    except OSError:
        return b""


@contextmanager
def proxy(database: Database) -> Iterator[Proxy]:
    one = Proxy(database.server.port)
    try:
        yield one
    finally:
        one.close()


@pytest.mark.parametrize("before_server", [False, True])
def test_a_connection_that_breaks_at_commit(sink: Sink, before_server: bool) -> None:
    with (
        proxy(sink.database) as between,
        sink.worker(dsn=sink.database.dsn(between.port)) as worker,
    ):
        fine(worker.run(job({"n": 0})))
        between.before_server, between.cuts = before_server, 1
        lost = worker.run(job({"n": 1}, {"n": 2}, batch=2, first=1))
        assert lost.failure is not None
        assert lost.failure.reason == "unavailable"
        assert SECRET not in lost.failure.error + lost.failure.traceback
        fine(worker.run(job({"n": 1}, {"n": 2}, batch=2, first=1)))
        between.cuts = 1
        assert worker.run(job({"n": 3}, {"n": 4}, batch=3, first=3)).failure is not None
        fine(worker.run(job({"n": 3}, batch=4, first=3, lineage=("j-3",))))
        fine(worker.run(job({"n": 4}, batch=5, first=4, lineage=("j-3",))))
    assert [row["n"] for row in sink.rows(order="n")] == [0, 1, 2, 3, 4]


def test_a_part_waits_for_the_commit_of_the_whole(sink: Sink) -> None:
    """The connection broke at a COMMIT that takes long, as where a standby is waited for."""
    sink.database.sql(
        "CREATE TABLE t(n int); GRANT ALL ON t TO writer; CREATE FUNCTION slow() RETURNS trigger"
        " LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(2); RETURN NULL; END $$;"
        "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW WHEN (NEW.n = 1) EXECUTE FUNCTION slow()"
    )
    options: dict[str, Any] = {"table": "t", "columns": "existing"}
    fine(sink({"n": 0}, **options))
    with (
        proxy(sink.database) as between,
        sink.worker(dsn=sink.database.dsn(between.port), **options) as worker,
    ):
        between.cuts = 1
        assert worker.run(job({"n": 1}, {"n": 2}, batch=2, first=1)).failure is not None
    fine(sink({"n": 1}, batch=3, first=1, lineage=("j-2",), **options))
    fine(sink({"n": 2}, batch=4, first=2, lineage=("j-2",), **options))
    assert [row["n"] for row in sink.rows("t", "n")] == [0, 1, 2]


def test_a_table_that_was_changed_or_dropped_is_looked_at_again(sink: Sink) -> None:
    with sink.worker() as worker:
        fine(worker.run(job({"a": 1, "b": 1})))
        sink.database.sql("ALTER TABLE records DROP COLUMN b")
        fine(worker.run(job({"a": 2, "b": 2}, batch=2, first=1)))
        sink.database.sql("DROP TABLE records")
        fine(worker.run(job({"a": 3}, batch=3, first=2)))
    assert [row["a"] for row in sink.rows()] == [3]


def test_locks_deadlocks_and_a_server_that_takes_no_writes_pass(sink: Sink) -> None:
    fine(sink({"a": 1}))
    at = f"host={sink.database.server.folder} port={sink.database.server.port} user=ingestd"
    with psycopg.connect(f"{at} dbname={sink.database.name}") as other:
        other.execute("SELECT * FROM records FOR UPDATE")
        result = sink({"b": 1}, batch=2, first=1, lock_timeout="100ms")  # wants to add a column
        assert result.failure is not None
        assert (result.failure.reason, "55P03" in result.failure.error) == ("unavailable", True)
        fine(sink({"a": 2}, batch=3, first=2))  # which needs no such lock
        other.execute("LOCK TABLE records")
        slow = sink({"a": 1}, batch=4, first=3, statement_timeout="100ms")
        assert slow.failure is not None
        assert (slow.failure.reason, "57014" in slow.failure.error) == ("unavailable", True)
    for code in ("40P01", "40001", "53300", "57P01"):
        sink.database.sql(
            "CREATE OR REPLACE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$BEGIN RAISE SQLSTATE '{code}' USING MESSAGE = 'no'; END$$"
        )
        sink.database.sql("CREATE OR REPLACE TRIGGER no BEFORE INSERT ON records FOR EACH ROW"
                          " EXECUTE FUNCTION no()")  # fmt: skip
        failure = sink({"a": 1}, batch=5, first=4).failure
        assert failure is not None
        assert (failure.reason, code in failure.error) == ("unavailable", True)


def test_workers_that_make_one_table_and_its_columns_at_once(sink: Sink) -> None:
    start = threading.Barrier(6)
    results: list[Result] = []

    def work(number: int) -> None:
        with sink.worker() as worker:
            start.wait(60)
            results.extend(
                worker.run(job({f"k{number}": 1, f"n{turn}": 2}, batch=number * 10 + turn,
                               first=number * 10 + turn))
                for turn in range(5)
            )  # fmt: skip

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert [one.failure for one in results] == [None] * 30
    assert len(sink.rows()) == 30


def test_old_rows_of_the_ledger_go(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingestd.sinks.postgres.sink._PRUNE_BATCHES", 2)
    with sink.worker(ledger_age="1h") as worker:
        fine(worker.run(job({"a": 1})))
        sink.database.sql("UPDATE ingestd_batches SET stored_at = now() - interval '2 hours'")
        for batch in range(2, 6):
            fine(worker.run(job({"a": 1}, batch=batch, first=batch)))
    assert sink.database.sql("SELECT id FROM ingestd_batches ORDER BY 1").split() == [
        "j-2", "j-3", "j-4", "j-5",
    ]  # fmt: skip


# -- check, options, rows --------------------------------------------------------------------------


def test_check_looks_at_settings_and_rights(sink: Sink) -> None:
    def told(**options: Any) -> dict[str, str]:
        with sink.worker(**options) as worker:
            return {one.text: one.level for one in worker.check()}

    assert list(told().values()) == ["info"]
    sink.database.sql(
        f"ALTER DATABASE {sink.database.name} SET synchronous_commit = off;"
        "REVOKE CREATE ON SCHEMA public FROM writer;"
        "CREATE UNLOGGED TABLE records(_id text PRIMARY KEY);"
        f"REVOKE TEMP ON DATABASE {sink.database.name} FROM PUBLIC"
    )
    found = told(mode="upsert", key=["a"])
    wrong = " ".join(text for text, level in found.items() if level == "error")
    for part in ("no INSERT right", "no SELECT right", "no UPDATE right", "may not make", "TEMP"):
        assert part in wrong
    assert any("synchronous_commit" in text for text in found)
    assert any("unlogged" in text for text, level in found.items() if level == "warning")
    assert "error" in told(columns="existing", table="nowhere").values()
    sink.database.sql(f"ALTER DATABASE {sink.database.name} SET default_transaction_read_only = on")
    assert any("read-only" in text for text in told())


def test_commits_are_durable_where_the_server_does_not_ask_for_it(sink: Sink) -> None:
    sink.database.sql(f"ALTER DATABASE {sink.database.name} SET synchronous_commit = off")
    sink.database.sql(
        "CREATE TABLE seen(how text); GRANT ALL ON seen TO writer;"
        "CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN INSERT INTO seen"
        " VALUES (current_setting('synchronous_commit')); RETURN NULL; END$$;"
        "CREATE TABLE records(_id text PRIMARY KEY, a bigint, _extra jsonb);"
        "GRANT ALL ON records TO writer; CREATE TRIGGER see AFTER INSERT ON records"
        " FOR EACH STATEMENT EXECUTE FUNCTION see()"
    )
    fine(sink({"a": 1}))
    assert sink.database.sql("SELECT how FROM seen") == "on"


@pytest.mark.parametrize(
    ("dsn", "reason"),
    [
        ("host=127.0.0.1 port=1 password=s3cret connect_timeout=2", "unavailable"),
        ("host=127.0.0.1 port={port} user=nobody-here password=s3cret", "blocked"),
        ("host=127.0.0.1 port={port} user=writer dbname=nowhere password=s3cret", "blocked"),
    ],
)
def test_a_server_that_is_not_there_or_does_not_let_us_in(
    sink: Sink, dsn: str, reason: str
) -> None:
    dsn = dsn.format(port=sink.database.server.port)
    with sink.worker(dsn=dsn) as worker:
        failure = worker.run(job({"a": 1})).failure
        assert failure is not None
        assert failure.reason == reason
        (finding,) = worker.check()
        assert finding.level == "error"
        assert "s3cret" not in failure.error + failure.traceback + finding.text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "needs the option 'dsn'"),
        ({"dsn": "s3cret nonsense"}, "dsn: *** is not a connection string"),
        ({"dsn": "x=y password=s3cret"}, "dsn: *** is not a connection string"),
        ({"dsn": "host=a", "mode": "upsert"}, "key: upsert needs"),
        ({"dsn": "host=a", "mode": "upsert", "key": ["a"], "columns": "json"}, "mode: upsert"),
        ({"dsn": "host=a", "table": "ingestd_batches"}, "is taken"),
        ({"dsn": "host=a", "mapping": {"a": "k", "b": "k"}}, "mapping: two columns"),
        ({"dsn": "host=a", "columns": "some"}, "is not auto, json or existing"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    spec = load("postgres", record_format="json", executor="thread")
    with pytest.raises(HandlerLoadError) as caught:
        spec.check_options(options)
    assert says in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_columns_of_keys() -> None:
    values = [{"b": None, "a": 1}, {"b": "x", "a": 1.5}, 5, {"c": None}]
    assert making.new_columns(values, ["z"], ()) == [
        Column("b", "text"), Column("a", "double precision"),
    ]  # fmt: skip
    assert making.new_columns(values, [f"k{n}" for n in range(making.COLUMNS_MAX - 1)], ()) == [
        Column("b", "text")
    ]
    assert making.new_columns(values, ["a", "b"], ()) == []


# -- the commands of the page ----------------------------------------------------------------------


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ingestd", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=120,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.slow
def test_the_pages_commands(sink: Sink, tmp_path: Path) -> None:
    dsn = ("--handler.options.dsn", sink.database.dsn())
    checked = command("check", "postgres", "--connect", *dsn, cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert "# default: info: PostgreSQL" in checked.stdout
    assert 'handler.options.dsn = "***"' in checked.stdout
    bound = next(one for one in checked.stdout.splitlines() if "batch.records_max" in one)
    assert bound.split("#")[0].split() == ["batch.records_max", "=", "20000"]
    assert bound.endswith("# suits the sink")
    with daemon("postgres", *dsn, cwd=tmp_path) as one:
        found = one.event("sink_checked")
        assert (found["level"], found["finding"][:10]) == ("info", "PostgreSQL")
        assert one.post(b'{"user":"ann","page":1}')[0] == 202
        assert one.until_settled()["processed"] == 1
    assert [(row["user"], row["page"]) for row in sink.rows()] == [("ann", 1)]
    sink.database.sql("REVOKE INSERT ON records FROM writer")
    sink.database.sql("ALTER TABLE records OWNER TO ingestd")
    checked = command("check", "postgres", "--connect", *dsn, cwd=tmp_path)
    assert checked.returncode == 78
    assert "# default: error: the user has no INSERT right" in checked.stdout
    helped = command("run", "postgres", "--help", cwd=tmp_path)
    for option in PostgresOptions.help():
        assert f"--handler.options.{option.name} " in helped.stdout


def test_a_row_that_is_too_large_costs_no_other_record(sink: Sink) -> None:
    wide = {f"k{n}": f"{n:025}" for n in range(495)}
    result = sink({"k1": "a"}, *[{"k1": "b"}] * 9, wide, *[{"k1": "c"}] * 30)
    assert [(one.index, one.error[:17]) for one in result.rejections] == [(10, "row is too big: s")]
    assert len(sink.rows()) == 40


def test_no_key_is_taken_for_a_name_of_the_sinks_own(sink: Sink) -> None:
    odd = {"ingestd_place": 1, "ingestd_place_": 2, "ingestd_part": 3}
    fine(sink(odd))
    fine(sink(odd, odd, batch=2))  # through the temporary table, for the first is there
    assert [{k: row[k] for k in odd} for row in sink.rows()] == [odd, odd]
    with pytest.raises(HandlerLoadError, match="'ingestd_part' is taken"):
        sink(odd, table="ingestd_part")


def test_no_integer_is_rounded(sink: Sink) -> None:
    fine(sink({"mixed": 1.5, "real": 1.5}, {"mixed": 2**53 + 1, "real": 2**53}))
    fine(sink({"real": 2**53 + 1}, {"real": -(10**400)}, {"real": 2**60}, batch=2, first=2))
    assert sink.types()["mixed"] == "numeric"
    assert [row["mixed"] for row in sink.rows()[:2]] == [1.5, 2**53 + 1]
    assert [row["real"] for row in sink.rows()] == [1.5, 2**53, None, None, 2**60]
    lost = [{"real": 2**53 + 1}, {"real": -(10**400)}, None]
    assert [row["_extra"] for row in sink.rows()][2:] == lost


def test_a_number_in_a_text_does_not_depend_on_its_neighbours(sink: Sink) -> None:
    fine(sink({"a": "x"}))
    fine(sink({"a": 1e16}, batch=2, first=1))
    fine(sink({"a": 1e16}, {"a": None}, batch=3, first=2))
    assert [row["a"] for row in sink.rows()] == ["x", "1e16", "1e16", None]


def test_a_batch_that_comes_again_refuses_the_same_whatever_columns_there_are(
    sink: Sink, database: Database
) -> None:
    database.sql("CREATE TABLE t(_id text PRIMARY KEY, a int); GRANT ALL ON t TO writer")
    batch = [{"a": 1}, {"a": 2, "b": 1}]
    first = sink(*batch, table="t", columns="existing")
    database.sql("ALTER TABLE t ADD COLUMN b int")
    again = sink(*batch, table="t", columns="existing")
    assert [one.index for one in first.rejections] == [1]
    assert again.rejections == first.rejections
    assert [row["a"] for row in sink.rows("t")] == [1]
