"""The sink `sqlite`: what is in the file afterwards, and that it is there once."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestd.base.errors import HandlerLoadError
from ingestd.base.record import Records, Span
from ingestd.handlers.call import call, close
from ingestd.handlers.context import Context
from ingestd.handlers.load import load
from ingestd.handlers.outcome import Job
from ingestd.sinks.sqlite import SqliteOptions, SqliteSink
from ingestd.sinks.tables import EXTRA, ID, folded, has_extra, keys_of, new_columns, rows_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ingestd.handlers.outcome import Result

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Result]:
    """One call with a batch, in a worker that lives as long as the call."""

    def write(
        items: Sequence[bytes | object],
        *,
        batch: int = 1,
        first: int = 0,
        form: str = "json",
        **opts,
    ) -> Result:
        raw = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in items]
        spec = load("sqlite", record_format=form, executor="thread")
        sink = spec.create(opts, data_dir=str(tmp_path))
        spans = [Span(1, first, len(raw))]
        result = call(spec, sink, Job(f"j-{batch}", 1, Records.sized(raw), spans, "j"))
        assert close(spec, sink) is None
        return result

    return write


def rows(path: Path, table: str = "records") -> list[dict[str, Any]]:
    with closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute(f'SELECT * FROM "{table}" ORDER BY rowid')]


def ledger(path: Path) -> list[tuple[str, int]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT id, records FROM ingestd_batches ORDER BY id").fetchall()


def test_values(tmp_path: Path, write) -> None:
    record = {
        "text": "a\0é\n", "int": 1, "real": 1.5, "yes": True, "no": False, "nothing": None,
        "list": [1, "é"], "object": {"a": {"b": 1}}, "big": 10**30, "edge": 2**63, "min": -(2**63),
    }  # fmt: skip
    assert write([record]).failure is None
    (row,) = rows(tmp_path / "out.db")
    assert row == {
        "_id": "j.1.0", "text": "a\0é\n", "int": 1, "real": 1.5, "yes": 1, "no": 0, "nothing": None,
        "list": '[1,"é"]', "object": '{"a":{"b":1}}', "big": "1" + "0" * 30, "edge": str(2**63),
        "min": -(2**63), "_extra": None,
    }  # fmt: skip
    assert (tmp_path / "out.db").stat().st_mode & 0o777 == 0o600


def test_what_can_be_no_column_is_kept(tmp_path: Path, write) -> None:
    items = [
        {"User": 1, "user": 2}, {"user": 3}, {"_id": 4, "_EXTRA": 5}, {"": 6, "a\0b": 7}, 8, [9],
        None, "x", {"k" * 201: 10}, {'"; DROP TABLE records; --': 11}, {},
    ]  # fmt: skip
    assert write(items).failure is None
    found = rows(tmp_path / "out.db")
    assert [row["User"] for row in found] == [1] + [None] * 10
    assert [row["_extra"] and json.loads(row["_extra"]) for row in found] == [
        {"user": 2}, {"user": 3}, {"_id": 4, "_EXTRA": 5}, {"": 6, "a\0b": 7}, 8, [9],
        None, "x", {"k" * 201: 10}, None, None,
    ]  # fmt: skip
    assert found[6]["_extra"] == "null"
    assert found[9]['"; DROP TABLE records; --'] == 11


def test_a_new_key_becomes_a_new_column(tmp_path: Path, write) -> None:
    write([{"a": 1}])
    write([{"a": 2, "b": 3}], batch=2, first=1)
    write([{"A": 4}], batch=3, first=2)
    assert [(row["a"], row["b"], row["_extra"]) for row in rows(tmp_path / "out.db")] == [
        (1, None, None), (2, 3, None), (None, None, '{"A":4}'),
    ]  # fmt: skip


def test_columns_are_bounded(tmp_path: Path, write) -> None:
    for batch in range(3):
        items = [{f"k{batch}-{i}": i for i in range(400)}]
        assert write(items, batch=batch, first=batch).failure is None
    found = rows(tmp_path / "out.db")
    assert len(found[0]) == 500
    assert len(json.loads(found[2]["_extra"])) == 400
    assert sum(row["_extra"] is not None for row in found) == 2


@pytest.mark.parametrize("first", ["whole", "halves"])
def test_a_batch_that_comes_again_is_there_once(tmp_path: Path, write, first: str) -> None:
    items = [{"n": n} for n in range(10)]
    halves = [{"items": items[:5], "batch": 2}, {"items": items[5:], "batch": 3, "first": 5}]
    whole = [{"items": items}]
    calls = [*whole, *halves] if first == "whole" else [*halves, *whole]
    for one in calls * 2:
        assert write(**one).failure is None
    assert sorted(row["n"] for row in rows(tmp_path / "out.db")) == list(range(10))
    assert ledger(tmp_path / "out.db") == [("j-1", 10), ("j-2", 5), ("j-3", 5)]


def test_a_known_batch_is_skipped_by_its_id_alone(tmp_path: Path, write) -> None:
    write([{"n": 1}])
    with closing(sqlite3.connect(tmp_path / "out.db")) as db, db:
        db.execute("DELETE FROM records")
    assert write([{"n": 1}]).failure is None
    assert rows(tmp_path / "out.db") == []


def test_what_is_rejected_is_rejected_again_when_the_batch_is_known(tmp_path: Path, write) -> None:
    items = [{"n": 1}, b"1e999", {"n": 2}, b'"\xff"']
    for _ in range(2):
        result = write(items)
        assert result.failure is None
        assert [(r.index, r.reason) for r in result.rejections] == [
            (1, "rejected"),
            (3, "rejected"),
        ]
    assert [(row["_id"], row["n"]) for row in rows(tmp_path / "out.db")] == [
        ("j.1.0", 1),
        ("j.1.2", 2),
    ]
    result = write([b"1e999"], batch=2)
    assert (result.failure, len(result.rejections)) == (None, 1)


def test_one_json_column(tmp_path: Path, write) -> None:
    result = write([b'{ "a": 1e999 }', b"\xff", b"5"], columns="json", table="raw")
    assert [r.index for r in result.rejections] == [1]
    assert [tuple(row.values()) for row in rows(tmp_path / "out.db", "raw")] == [
        ("j.1.0", '{ "a": 1e999 }'), ("j.1.2", "5"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "there"), [("text", ["é", b"\xff"]), ("bytes", ["é".encode(), b"\xff"])]
)
def test_text_and_bytes(tmp_path: Path, write, form: str, there: list[object]) -> None:
    assert write(["é".encode(), b"\xff"], form=form).failure is None
    assert [row["record"] for row in rows(tmp_path / "out.db")] == there


def test_a_table_of_the_users_own(tmp_path: Path, write) -> None:
    with closing(sqlite3.connect(tmp_path / "out.db")) as db, db:
        db.execute(
            "CREATE TABLE t(n INTEGER UNIQUE, _id TEXT UNIQUE, twice AS (n * 2), at DEFAULT 'now')"
        )
    assert write([{"n": 1, "twice": 9}, {"n": 2}], table="t").failure is None
    assert rows(tmp_path / "out.db", "t") == [
        {"n": 1, "_id": "j.1.0", "twice": 2, "at": "now", "_extra": '{"twice":9}'},
        {"n": 2, "_id": "j.1.1", "twice": 4, "at": "now", "_extra": None},
    ]
    failed = write([{"n": 3}, {"n": 2}], batch=2, first=2, table="t")
    assert failed.failure is not None
    assert "UNIQUE constraint failed: t.n" in failed.failure.error
    assert len(rows(tmp_path / "out.db", "t")) == 2, "all or nothing"
    assert ledger(tmp_path / "out.db") == [("j-1", 2)]


def test_a_strict_table_of_the_users_own(tmp_path: Path, write) -> None:
    with closing(sqlite3.connect(tmp_path / "out.db")) as db:
        db.execute("CREATE TABLE records(_id TEXT PRIMARY KEY, n INTEGER) STRICT")
    assert write([{"n": 1, "new": "123"}, {"n": 2, "new": 1.5}]).failure is None
    found = [(row["n"], row["new"], row[EXTRA]) for row in rows(tmp_path / "out.db")]
    assert found == [(1, "123", None), (2, 1.5, None)]


def test_no_number_is_rounded_by_a_column_of_the_users(tmp_path: Path, write) -> None:
    with closing(sqlite3.connect(tmp_path / "out.db")) as db:
        db.execute(
            "CREATE TABLE t(_id TEXT PRIMARY KEY, r DOUBLE, n DECIMAL(9), i BIGINT, s VARCHAR(9))"
        )
    numbers = [5, 2**53 + 1, 2**63, 10**30, 0.1 + 0.2, 1.5, 2**60]
    items = [dict.fromkeys("rnis", number) for number in numbers]
    assert write(items, table="t").failure is None
    found = rows(tmp_path / "out.db", "t")
    for row, number in zip(found, numbers, strict=True):
        extra = json.loads(row[EXTRA] or "{}")
        kept = {name: number for name in "rni" if row[name] is None}
        assert extra == kept
        assert all(row[name] == number for name in "rni" if name not in kept)
        assert row["s"] == json.dumps(number)
    assert [row["r"] is None for row in found] == [False, True, False, True, False, False, False]
    assert [row["i"] is None for row in found] == [False, False, True, True, False, False, False]


def test_a_key_that_a_record_lacks_leaves_its_column_the_default(tmp_path: Path, write) -> None:
    with closing(sqlite3.connect(tmp_path / "out.db")) as db:
        db.execute("CREATE TABLE t(_id TEXT UNIQUE, a NOT NULL DEFAULT 7, b DEFAULT 'x', n)")
    items = [{"a": 1, "b": 2, "n": 0}, {"n": 1}, {"b": None, "n": 2}, {"a": 3}, 4, {"n": 5, "b": 1}]
    assert write(items, table="t").failure is None
    assert [(row["a"], row["b"], row["n"]) for row in rows(tmp_path / "out.db", "t")] == [
        (1, 2, 0), (7, "x", 1), (7, None, 2), (3, "x", None), (7, "x", None), (7, 1, 5),
    ]  # fmt: skip


def test_a_table_without_ids_is_refused(tmp_path: Path, write) -> None:
    with closing(sqlite3.connect(tmp_path / "out.db")) as db, db:
        db.execute("CREATE TABLE t(n)")
    result = write([{"n": 1}], table="t")
    assert result.failure is not None
    assert "_id" in result.failure.error
    assert rows(tmp_path / "out.db", "t") == []


def test_a_file_that_was_removed_or_changed_is_opened_anew(tmp_path: Path, batch) -> None:
    path = tmp_path / "deep" / "o.db"
    sink = SqliteSink(SqliteOptions.of(path=path))
    sink(batch([b'{"a":1}']))
    path.unlink()
    sink(batch([b'{"a":2}']))
    assert [row["a"] for row in rows(path)] == [2]
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DROP TABLE records")
        db.execute("DELETE FROM ingestd_batches")
    with pytest.raises(sqlite3.OperationalError):
        sink(batch([b'{"a":3}']))
    sink(batch([b'{"a":3}']))
    sink.close()
    sink.close()
    assert [row["a"] for row in rows(path)] == [3]


def test_what_is_no_database_is_a_failure(tmp_path: Path, write) -> None:
    (tmp_path / "out.db").write_bytes(b"not a database, but a note" * 100)
    result = write([{"a": 1}])
    assert result.failure is not None
    assert "not a database" in result.failure.error


def test_where_it_writes(tmp_path: Path, batch) -> None:
    for context, file in [
        (Context(data_dir=str(tmp_path)), "out.db"),
        (Context("clicks", data_dir=str(tmp_path)), "out-clicks.db"),
    ]:
        sink = SqliteSink(context=context)
        sink(batch([b'{"a":1}']))
        sink.close()
        assert len(rows(tmp_path / file)) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"columns": "all"}, "columns: 'all' is not auto or json"),
        ({"path": ""}, "path: '' is not"),
        ({"path": 5}, "path: 5 is not"),
        ({"table": ""}, "table: '' is not"),
        ({"table": "a\0"}, "is not a name"),
        ({"table": "Ingestd_Batches"}, "is taken"),
        ({"table": "sqlite_master"}, "is taken"),
        ({"tabel": "a"}, "did you mean 'table'?"),
    ],
)
def test_options_that_make_no_sense(options, says) -> None:
    spec = load("sqlite", record_format="json", executor="thread")
    with pytest.raises(HandlerLoadError) as caught:
        spec.create(options)
    assert says in str(caught.value)


def test_many_threads_write_one_file(tmp_path: Path) -> None:
    """All at once into a file that is not there yet, each batch twice, each with its own key."""
    start = threading.Barrier(8)
    failures: list[BaseException] = []

    def work(worker: int) -> None:
        sink = SqliteSink(SqliteOptions.of(path=tmp_path / "o.db"))
        spec = load("sqlite", record_format="json", executor="thread")
        start.wait(60)
        for number in range(12):
            run = Records.lines([b'{"n":%d,"k%d":1}' % (number, worker)] * 5)
            job = Job(f"j-{number}", 1, run, [Span(number, 0, 5)], "j")
            result = call(spec, sink, job)
            if result.failure is not None:
                failures.append(AssertionError(result.failure.error))
        sink.close()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert failures == []
    found = rows(tmp_path / "o.db")
    assert sorted(row["n"] for row in found) == [n for n in range(12) for _ in range(5)]
    assert len({row["_id"] for row in found}) == 60


CHILD = """
import sys
from ingestd.base.record import Records, Span
from ingestd.handlers.batch import Batch
from ingestd.handlers.outcome import Job
from ingestd.sinks.sqlite import SqliteOptions, SqliteSink
sink = SqliteSink(SqliteOptions.of(path=sys.argv[1]))
for number in range(int(sys.argv[2]), 100_000):
    run = Records.lines([b'{"n":%d}' % number] * 20)
    sink(Batch(None, Job(f"j-{number}", 1, run, [Span(number, 0, 20)], "j")))
    print(number, flush=True)
"""


def test_a_killed_process_leaves_whole_batches(tmp_path: Path) -> None:
    done = [0]
    for _ in range(4):
        child = subprocess.Popen(
            # One step back: the batch whose word may have been lost comes again.
            [sys.executable, "-c", CHILD, str(tmp_path / "o.db"), str(max(0, done[-1] - 1))],
            stdout=subprocess.PIPE, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert child.stdout is not None
        done += [int(child.stdout.readline()) for _ in range(15)]
        child.send_signal(signal.SIGKILL)
        done += [int(line) for line in child.stdout]
        child.wait()
        child.stdout.close()
    counts: dict[int, int] = {}
    for row in rows(tmp_path / "o.db"):
        counts[row["n"]] = counts.get(row["n"], 0) + 1
    assert set(counts.values()) == {20}
    assert set(done) <= set(counts)
    assert [name for name, _ in ledger(tmp_path / "o.db")] == sorted(f"j-{n}" for n in counts)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8"))
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text("aAbB\0é_", max_size=3), inner),
    max_leaves=8,
)  # fmt: skip


@given(st.lists(JSON, max_size=5), st.lists(st.sampled_from(["a", "A", "b", "_extra"]), max_size=2))
def test_every_key_is_in_its_column_or_in_extra(values: list[Any], taken: list[str]) -> None:
    keys = keys_of(values)
    columns = [key for key in keys if key in {*taken, *new_columns(keys, taken)} - {ID, EXTRA}]
    extra = has_extra(values, keys, columns)
    made = list(rows_of([str(i) for i in range(len(values))], values, columns, has_extra=extra))
    assert len({folded(key) for key in new_columns(keys, taken)}) == len(new_columns(keys, taken))
    for value, (_, *cells) in zip(values, made, strict=True):
        rest = json.loads(cells[-1]) if extra and cells[-1] is not None else {}
        if not isinstance(value, dict):
            assert rest == value
            continue
        for key, inner in value.items():
            if key not in columns:
                assert rest[key] == inner
                continue
            cell = cells[columns.index(key)]
            if isinstance(inner, dict | list):
                assert json.loads(cell) == inner
            elif isinstance(inner, int) and not -(2**63) <= inner < 2**63:
                assert cell == str(inner)
            else:
                assert cell == inner
        assert set(rest) == set(value) - set(columns)
