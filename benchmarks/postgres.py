"""The sink `postgres` beside COPY and INSERT: `python -m benchmarks.postgres --rows 300000`.

All three put the same rows into the same table (the one that the sink made, with its primary key)
of one server that syncs its commits, in turns:

* `copy`: psql's own COPY of a file that lies ready in COPY's own format, in one transaction.
* `sink`: the sink as the daemon's workers call it, with JSON lines in batches that suit it:
  decoded, checked, with its ledger, a transaction a batch.
* `insert`: psycopg's `executemany` of an INSERT with values that lie ready, a transaction for as
  many rows. It sends the statements without waiting for each answer (libpq's pipeline mode).
* `insert_each`: the same with psycopg2, if it is installed, which waits for each answer, as DB-API
  drivers without such a mode do.

Prints one line of JSON: rows a second of each round, and the sink's median by that of the others.
Needs the extra `postgres`; starts a PostgreSQL of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psycopg

try:
    import psycopg2  # type: ignore[import-untyped]
except ImportError:
    psycopg2 = None

from ingestd.base.record import Records, Span
from ingestd.handlers.outcome import Job
from ingestd.handlers.runner import HandlerConfig, Runner
from ingestd.sinks.postgres.sink import PostgresSink
from tests.postgres import Postgres

if TYPE_CHECKING:
    from collections.abc import Iterator

BATCH = PostgresSink.BATCH.records_max or 0


def rows(count: int) -> Iterator[dict[str, Any]]:
    for n in range(count):
        yield {
            "at": f"2026-01-31T09:{n // 60 % 60:02}:{n % 60:02}.{n % 1000:03}Z",
            "user": f"u{n % 997}",
            "path": f"/shop/items/{n}?ref=front page", "status": 200 + n % 3, "ms": n % 250 / 8,
        }  # fmt: skip


def jobs(records: list[dict[str, Any]], turn: int) -> list[Job]:
    encode = msgspec.json.encode
    made = []
    for first in range(0, len(records), BATCH):
        lines = Records.lines([encode(one) for one in records[first : first + BATCH]])
        made.append(Job(f"j{turn}-{first}", 1, lines, [Span(1, first, lines.count)], "j"))
    return made


def seconds(function: Any, *args: Any) -> float:
    began = time.perf_counter()
    function(*args)
    return time.perf_counter() - began


def sink(dsn: str, waiting: list[Job], workers: int) -> float:
    """Time for all jobs, with as many workers as there are in the daemon."""
    with ExitStack() as closing:
        ready = []
        for number in range(workers):
            config = HandlerConfig("postgres", {"dsn": dsn}, "json", "thread", "p", b"/x")
            ready.append(Runner(config))
            ready[number].prepare()
            closing.callback(ready[number].close)

        def work(runner: Runner) -> None:
            while waiting:
                result = runner.run(waiting.pop(0))
                assert result.failure is None, result.failure

        threads = [threading.Thread(target=work, args=(runner,)) for runner in ready]

        def all_of_them() -> None:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        return seconds(all_of_them)


def insert(dsn: str, values: list[tuple[Any, ...]], columns: str) -> None:
    marks = ", ".join(["%s"] * len(values[0]))
    with psycopg.connect(dsn) as db:
        for first in range(0, len(values), BATCH):
            with db.transaction(), db.cursor() as cursor:
                statement = f"INSERT INTO records({columns}) VALUES({marks})"
                cursor.executemany(statement, values[first : first + BATCH])  # type: ignore[arg-type]


def insert_each(dsn: str, values: list[tuple[Any, ...]], columns: str) -> None:
    marks = ", ".join(["%s"] * len(values[0]))
    db = psycopg2.connect(dsn)
    for first in range(0, len(values), BATCH):
        with db, db.cursor() as cursor:
            statement = f"INSERT INTO records({columns}) VALUES({marks})"
            cursor.executemany(statement, values[first : first + BATCH])
    db.close()


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4)
    arguments = parser.parse_args()
    records = list(rows(arguments.rows))
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-postgres-") as folder:
        server = Postgres(Path(folder), durable=True)
        server.start()
        try:
            server.sql("CREATE DATABASE ingestd", "postgres")
            dsn = f"host={folder} user=ingestd dbname=ingestd"
            sink(dsn, jobs(records[:1], -1), 1)  # makes the table
            ids = [f"j.1.{n}" for n in range(len(records))]
            columns = '_id, "at", "user", "path", "status", "ms"'
            values = [(name, *one.values()) for name, one in zip(ids, records, strict=True)]
            lines = Path(folder, "rows.copy")
            lines.write_text("".join("\t".join(map(str, row)) + "\n" for row in values))
            lines.chmod(0o644)
            copy = f"\\copy records({columns}) FROM '{lines}'"
            runs = {
                "copy": lambda _: seconds(server.sql, copy),
                "sink": lambda turn: sink(dsn, jobs(records, turn), arguments.workers),
                "insert": lambda _: seconds(insert, dsn, values, columns),
            }
            if psycopg2 is not None:
                runs["insert_each"] = lambda _: seconds(insert_each, dsn, values, columns)
            for turn in range(arguments.rounds):
                for name, run in runs.items():
                    server.sql("TRUNCATE records; CHECKPOINT")
                    took = run(turn)
                    assert server.sql("SELECT count(*) FROM records") == str(len(records))
                    rates.setdefault(name, []).append(len(records) / took)
        finally:
            server.stop()
    middle = {name: statistics.median(found) for name, found in rates.items()}
    facts = {
        "rows": len(records), "workers": arguments.workers,
        "rows_per_second": {name: [round(one) for one in found] for name, found in rates.items()},
    } | {
        f"sink/{name}": round(middle["sink"] / rate, 2)
        for name, rate in middle.items() if name != "sink"
    }  # fmt: skip
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
