"""The examples in docs/EXACTLY_ONCE.md are run; its tables name what there is."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from ingestd.base.record import Records, Span
from ingestd.handlers.call import call, close
from ingestd.handlers.load import load
from ingestd.handlers.outcome import Job
from ingestd.prove.verdict import FoundRows, ProofReport, lines

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "EXACTLY_ONCE.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.DOTALL))

# What psycopg is to the example, on SQLite: the same statements, the same transaction.
PSYCOPG = """
import contextlib, sqlite3

class Cursor(contextlib.closing):
    def __init__(self, db): self.db, self.rowcount = db, -1; super().__init__(self)
    def __enter__(self): return self
    def close(self): pass
    def execute(self, sql, values):
        self.rowcount = self.db.execute(sql.replace("%s", "?"), values).rowcount
    def executemany(self, sql, rows): self.db.executemany(sql.replace("%s", "?"), rows)

class connect:
    closed = False
    def __init__(self, dsn, connect_timeout):
        self.db = sqlite3.connect(dsn, check_same_thread=False)
        self.db.execute("CREATE TABLE IF NOT EXISTS batches (id text PRIMARY KEY)")
        self.db.execute("CREATE TABLE IF NOT EXISTS clicks (id text PRIMARY KEY, usr text)")
    def transaction(self): return self.db
    def cursor(self): return Cursor(self.db)
    def close(self):
        self.closed = True
        self.db.close()
"""


@pytest.mark.parametrize(
    ("module", "option", "column"),
    [("clicks_sqlite", "path", "user"), ("clicks_postgres", "dsn", "usr")],
)
def test_examples(tmp_path: Path, monkeypatch, module: str, option: str, column: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *filter(None, sys.path)])
    (tmp_path / "psycopg.py").write_text(PSYCOPG)
    (tmp_path / f"{module}.py").write_text(BLOCKS[module])
    spec = load(f"{module}:Store", record_format="json", executor="thread")
    users = [f"u{n}" for n in range(6)]
    raw = [json.dumps({"user": user}).encode() for user in users]
    # Whole, whole again, then in halves under other ids; a new worker each time.
    for number, first, count in [(1, 0, 6), (1, 0, 6), (2, 0, 3), (3, 3, 3), (3, 3, 3)]:
        handler = spec.create({option: "db"})
        run = Records.lines(raw[first : first + count])
        job = Job(f"j-{number}", 1, run, [Span(1, first, count)], "j")
        assert call(spec, handler, job).failure is None
        assert close(spec, handler) is None
    with closing(sqlite3.connect("db")) as db:
        found = db.execute(f"SELECT id, {column} FROM clicks ORDER BY id").fetchall()
        assert found == [(f"j.1.{n}", user) for n, user in enumerate(users)]
        assert db.execute("SELECT count(*) FROM batches").fetchone() == (3,)
    for name in (module, "psycopg"):
        sys.modules.pop(name, None)


def test_every_example_is_run() -> None:
    assert PAGE.count("```python") == len(BLOCKS) == 2


def test_flags_and_report_are_those_of_the_program() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "ingestd", "prove", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    flags = re.compile(r"^ *\|? ?`?(--\w[\w-]*)", re.MULTILINE)
    tables = [set(flags.findall(part)) for part in PAGE.split("| flag |")[1:]]
    helps = []
    for title in ("the proof:", "the proof of --journal jetstream:"):
        text = run.stdout[run.stdout.index(f"\n{title}") :].partition("\n\n")[0]
        helps.append(set(flags.findall(text)))
    assert [*tables[:-1], tables[-1] - {"--kills"}] == [helps[0], helps[1] - {"--kills"}]
    ledger = {"accepted": 1, "processed": 1, "dead": 0, "pending": 0, "balanced": True}
    found = FoundRows(1, 1, 0, 0, 0, 0, 0)
    told = lines(ProofReport(True, 1, 2, 2, 0, 1, 0, found, 0.1, 0.1, ledger, 0))
    shown = re.search(r"```\n(kills .*?)```", PAGE, re.DOTALL)
    assert shown
    words = re.compile(r"[\d.,]+")
    assert [words.sub("#", line) for line in told] == [
        words.sub("#", line) for line in shown[1].splitlines()
    ]
