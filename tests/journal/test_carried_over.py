"""A journal of version 1, made by the ingestd that had it, is carried over in place."""

from __future__ import annotations

import gzip
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from ingestd.__main__ import main
from ingestd.base.append import Append
from ingestd.base.errors import DataDirError, KeyReused
from ingestd.base.record import Records, Span
from ingestd.host.data_dir import DataDir
from ingestd.journal.dead_letters import LetterFilter
from ingestd.journal.interface import Ledger
from ingestd.journal.sqlite import check, dead_letters, schema
from ingestd.journal.sqlite.offline import opened as opened_beside
from ingestd.journal.sqlite.repair import repair

MADE = Path(__file__).with_name("version-1.db.gz")
ID = "15c8523a3962"
TABLES = "SELECT name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%' ORDER BY name"


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    path = tmp_path / "journal.db"
    path.write_bytes(gzip.decompress(MADE.read_bytes()))
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
    return path


async def check_all(j) -> None:
    """All that was in it is in it."""
    assert not j.recovered.set_aside
    assert j.journal.id == ID
    assert j.journal.ledger == Ledger(accepted=8, processed=1, dead=2, refused=3)
    (batch,) = j.recovered.batches
    assert (batch.number, batch.attempts, batch.spans) == (2, 3, (Span(1, 3, 1), Span(2, 0, 1)))
    assert (await j.journal.load(batch.spans)).items() == [b"4", b"5"]
    chunks = await j.journal.read(2, 1 << 20)
    assert [chunk.records.items() for chunk in chunks] == [[b"5", b"6"], [b'{\n"a":1}', b"8"]]
    assert (await j.journal.offsets.find("file")).state == b"state"
    assert await j.journal.idempotency.begin("key-1", b"f" * 32) == b'{"accepted":4}'
    with pytest.raises(KeyReused):
        await j.journal.idempotency.begin("key-1", b"g" * 32)
    totals = j.journal.dead_totals
    assert (totals.letters, totals.invalid) == (5, 3)
    assert await j.journal.dead_letters.poll_marked()  # two are marked


async def test_nothing_changes_but_the_version(opened, earlier: Path) -> None:
    j = await opened()
    await check_all(j)
    moved = await j.journal.dead_letters.requeue()
    assert (moved.revived, moved.readmitted) == (1, 1)
    assert j.chunks[-1].records.items() == [b"7", b"1"]
    assert j.chunks[-1].records.names == ("", f"{ID}.1.0")
    assert (await j.journal.close()).counted == 7
    with opened_beside(earlier) as db:
        assert list(check.findings(db)) == []
        kept = dead_letters.letters(db, LetterFilter(), whole=True)
        assert [one.letter.reason for one in kept] == [
            "malformed", "too_large", "rejected",
        ]  # fmt: skip


async def test_its_tables_are_those_of_a_new_one(opened, earlier: Path, tmp_path: Path) -> None:
    await (await opened()).journal.close()
    with closing(sqlite3.connect(earlier)) as db:
        carried = db.execute(TABLES).fetchall()
    earlier.unlink()
    await (await opened()).journal.close()
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db:
        assert db.execute(TABLES).fetchall() == carried
        assert db.execute("PRAGMA user_version").fetchone() == (schema.VERSION,)


async def test_the_commands_open_it_too_unless_an_earlier_daemon_runs(
    opened, earlier: Path
) -> None:
    held = DataDir(earlier.parent)
    with pytest.raises(DataDirError, match="another ingestd"), opened_beside(earlier):
        pass
    held.close()
    with opened_beside(earlier) as db:
        assert dead_letters.count(db, LetterFilter()).letters == 5
    await check_all(await opened())


async def test_the_lock_is_that_of_the_folder_whatever_its_name(earlier: Path) -> None:
    """A data directory may lie in a folder that is called like ours of the named pipelines."""
    folder = earlier.parent / "pipelines" / "clicks"
    folder.mkdir(parents=True)
    path = earlier.rename(folder / "journal.db")
    held = DataDir(folder)
    with pytest.raises(DataDirError, match="another ingestd"), opened_beside(path):
        pass
    held.close()
    (earlier.parent / "lock").write_text("of something else")
    with opened_beside(path) as db:
        assert dead_letters.count(db, LetterFilter()).letters == 5
    assert (earlier.parent / "lock").read_text() == "of something else"


CARRY = """
import os, signal, sqlite3, sys
from ingestd.journal.sqlite import store
steps = int(sys.argv[2])
connect = store.connect
def counted(path, **options):
    db = connect(path, **options)
    def tick():
        global steps
        steps -= 1
        if steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0
    db.set_progress_handler(tick, 40)
    return db
store.connect = counted
store.Store(__import__("pathlib").Path(sys.argv[1])).close()
"""


async def test_a_kill_at_any_point_leaves_one_version_or_the_other(
    opened, earlier: Path, tmp_path: Path
) -> None:
    """Killed within SQLite's own steps, until one run comes through; the file is whole."""
    copy = tmp_path / "copies"
    copy.mkdir()
    killed, steps = 0, 1
    while True:
        for path in copy.iterdir():
            path.unlink()
        shutil.copy(earlier, copy / "journal.db")
        done = subprocess.run(  # noqa: ASYNC221  nothing else turns
            [sys.executable, "-c", CARRY, str(copy / "journal.db"), str(steps)], timeout=30
        )
        with closing(sqlite3.connect(copy / "journal.db")) as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            columns = schema.columns(db, "dead")
            assert ("facts" in columns) is (version == 2)
            assert db.execute("SELECT count(*) FROM dead").fetchone() == (5,)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        killed += 1
        steps = steps * 2 + 1
    assert killed >= 4
    for path in copy.iterdir():
        shutil.copy(path, tmp_path / path.name)
    await check_all(await opened())


async def test_a_damaged_one_is_rebuilt_in_this_version(opened, earlier: Path) -> None:
    with closing(sqlite3.connect(earlier)) as db, db:
        db.execute("UPDATE meta SET next_batch = -3")
    aside = repair(earlier, 2e9)
    assert Path(aside).exists()
    j = await opened()
    assert not j.recovered.set_aside
    assert j.journal.id == ID
    assert j.journal.ledger == Ledger(accepted=8, processed=1, dead=2, refused=3)
    assert j.recovered.next_batch > 100_000
    assert [batch.number for batch in j.recovered.batches] == [2]
    assert j.journal.dead_totals.letters == 5
    assert (await j.journal.close()).counted == 5


async def test_tables_that_can_not_even_be_named_are_damage(
    opened, earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SQLite quotes what it found there, and that is no UTF-8."""
    raw = earlier.read_bytes()
    at = raw.index(b"CREATE TABLE chunks")
    earlier.write_bytes(raw[:at] + b"CREATE \xc1\xc1BLE" + raw[at + 12 :])
    with pytest.raises(DataDirError), opened_beside(earlier):
        pass
    assert main(["journal", "verify", "--data-dir", str(earlier.parent)]) == 1
    assert "Traceback" not in capsys.readouterr().err
    j = await opened()
    assert j.recovered.set_aside
    await j.journal.append(Append(Records.lines([b"1"])))
