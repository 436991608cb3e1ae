"""Journals of earlier versions, made by the ingestd that had them, are carried over in place.

`version-1.db.gz` is one journal; `upgrade/` has a whole data directory for each version, as a
daemon left it that was killed: records that wait, a sealed batch that failed, dead letters (one of
them marked, one never accepted), a record that was requeued, a key, and the position of a download.
"""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from contextlib import closing
from pathlib import Path

import pytest

from ingestd.__main__ import main
from ingestd.base.append import Append, SourceOffset
from ingestd.base.errors import DataDirError, KeyReused
from ingestd.base.record import Records, Span
from ingestd.host.data_dir import DataDir, FileLock
from ingestd.journal.dead_letters import LetterFilter
from ingestd.journal.interface import Ledger
from ingestd.journal.sqlite import check, dead_letters, schema
from ingestd.journal.sqlite.offline import opened as opened_beside
from ingestd.journal.sqlite.repair import repair
from ingestd.sources.fetch.position import from_offset
from tests.daemon.harness import Daemon

pytestmark = pytest.mark.slow

MADE = Path(__file__).with_name("version-1.db.gz")
ID = "15c8523a3962"
TABLES = "SELECT name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%' ORDER BY name"


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    path = tmp_path / "journal.db"
    path.write_bytes(gzip.decompress(MADE.read_bytes()))
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
    renew_keys(path)
    return path


def renew_keys(path: Path) -> None:
    """Sets the time of the keys to that of the test: they live for a day."""
    with closing(sqlite3.connect(path)) as db, db:
        assert db.execute("UPDATE keys SET at = ?", (time.time(),)).rowcount == 1


async def check_all(j) -> None:
    """All that was in it is in it."""
    assert not j.recovered.set_aside
    assert j.journal.id == ID
    assert j.journal.ledger == Ledger(accepted=8, processed=1, dead=2, invalid=3)
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
    assert (moved.requeued, moved.readmitted) == (1, 1)
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
NEW_COLUMNS = {2: ("dead", "facts"), 3: ("chunks", "envelopes")}
"""By version: a table and a column that came with it."""
ROWS = (
    "SELECT id, record, reason, payload, retry FROM dead", "SELECT count, payload FROM chunks",
    "SELECT number, count, attempts, due_at, accepted_at, spans FROM batches",
    "SELECT key, at, answer FROM keys", "SELECT key, state FROM bookmarks",
    "SELECT accepted, processed, dead, refused, cursor_chunk, cursor_record FROM meta",
)  # fmt: skip


def rows(path: Path) -> list[object]:
    with closing(sqlite3.connect(path)) as db:
        return [db.execute(query).fetchall() for query in ROWS]


def kill_in_the_middle(path: Path, folder: Path) -> int:
    """Carries a copy over, killed within SQLite's own steps, until one run comes through.

    Returns:
        How often it was killed; the file in `folder` is carried over then.
    """
    (version,) = sqlite3.connect(path).execute("PRAGMA user_version").fetchone()
    before = rows(path)
    killed, steps, gap = 0, 1, 1
    while True:
        for left in folder.iterdir():
            left.unlink()
        shutil.copy(path, folder / "journal.db")
        command = [sys.executable, "-c", CARRY, str(folder / "journal.db"), str(steps)]
        done = subprocess.run(command, timeout=120)
        with closing(sqlite3.connect(folder / "journal.db")) as db:
            (now,) = db.execute("PRAGMA user_version").fetchone()
            assert now in (version, schema.VERSION)
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            for since, (table, column) in NEW_COLUMNS.items():
                assert (column in schema.columns(db, table)) is (now >= since)
        assert rows(folder / "journal.db") == before
        if done.returncode == 0:
            assert now == schema.VERSION
            return killed
        assert done.returncode == -signal.SIGKILL
        killed += 1
        steps, gap = steps + gap, gap * 2


async def test_a_kill_at_any_point_leaves_one_version_or_the_other(
    opened, earlier: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copies"
    copy.mkdir()
    assert kill_in_the_middle(earlier, copy) >= 4
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
    assert j.journal.ledger == Ledger(accepted=8, processed=1, dead=2, invalid=3)
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


# -- whole data directories ------------------------------------------------------------------------

UPGRADE = Path(__file__).with_name("upgrade")
VERSIONS = [1, 2]
HANDLER = """
import json, ingestd
def store(batch: ingestd.Batch[dict]) -> None:
    with open("calls", "a") as calls:
        for i, record in enumerate(batch):
            line = [record["n"], batch.id, batch.ids[i], batch.attempt, batch.lineage]
            line += [batch.accepted_at.timestamp(), batch.envelope(i).source]
            print(json.dumps(line), file=calls)
"""


def unpack(version: int, folder: Path) -> Path:
    with tarfile.open(UPGRADE / f"data-version-{version}.tar.gz") as made:
        made.extraction_filter = getattr(tarfile, "data_filter", None)  # from 3.11.4 on
        made.extractall(folder)
    return folder / "journal.db"


@pytest.mark.parametrize("version", VERSIONS)
async def test_what_an_earlier_daemon_left_is_all_there(opened, tmp_path, version: int) -> None:
    path = unpack(version, tmp_path)
    renew_keys(path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (version,)
        ((key, state),) = db.execute("SELECT key, state FROM bookmarks").fetchall()
        ((name, fingerprint),) = db.execute("SELECT key, fingerprint FROM keys").fetchall()
    before = rows(path)
    j = await opened()
    assert not j.recovered.set_aside
    assert j.journal.ledger == Ledger(accepted=16, processed=8, dead=2, invalid=1)
    (batch,) = j.recovered.batches
    assert (batch.number, batch.count, batch.lineage) == (3, 4, ())
    assert from_offset(await j.journal.offsets.find(key)).records == 3
    assert SourceOffset(key, state) == await j.journal.offsets.find(key)
    stored = await j.journal.idempotency.begin(name, fingerprint)
    assert b'"accepted":4' in stored
    chunks = await j.journal.read(5, 1 << 20)
    assert [chunk.records.envelopes for chunk in chunks] == [b"", b""]
    assert (await j.journal.close()).counted == 6
    assert rows(path) == before
    with opened_beside(path) as db:
        assert list(check.findings(db)) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_an_earlier_data_directory_is_worked_off_after_kills_amid_the_carrying_over(
    tmp_path: Path, version: int
) -> None:
    path, copy = unpack(version, tmp_path / "made"), tmp_path / "data"
    copy.mkdir()
    assert kill_in_the_middle(path, copy) >= 4
    (identity, first) = (
        sqlite3.connect(path)
        .execute("SELECT journal, batches.accepted_at FROM meta, batches")
        .fetchone()
    )
    (tmp_path / "lib.py").write_text(HANDLER)
    flags = ["--data-dir", "data", "--dead.age_max", "0s", "--batch.records_max", "4"]
    with Daemon("lib:store", *flags, cwd=tmp_path) as daemon:
        assert daemon.post(b'{"n": 14}')[0] == 202
        deadline = time.monotonic() + 60
        while (
            status := daemon.request("GET", "/v1/status", admin=True)[2]["pipelines"]["default"]
        )["pending"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert status["balanced"]
        # The marked letter was requeued, and its record is done.
        assert (status["accepted"], status["processed"], status["dead"]) == (17, 16, 1)
        daemon.terminate()
        assert daemon.wait() == 0
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert sorted(call[0] for call in calls) == [4, 5, 6, 7, 8, 13, 14, 102]
    sealed = [call for call in calls if call[1] == f"{identity}-3"]
    assert [call[0] for call in sealed] == [5, 6, 7, 8]
    assert {(call[3], tuple(call[4]), call[5]) for call in sealed} == {(2, (), round(first, 6))}
    names = {call[0]: call[2] for call in calls}
    assert names[4] == f"{identity}.2.3"
    assert names[13] == f"{identity}.5.1"
    assert {call[0]: call[6] for call in calls if call[6]} == {14: "http"}
    with opened_beside(copy / "journal.db") as db:
        assert list(check.findings(db)) == []
        kept = dead_letters.letters(db, LetterFilter(), whole=True)
        assert [one.letter.reason for one in kept] == ["malformed", "rejected"]


@pytest.mark.parametrize("version", VERSIONS)
async def test_an_earlier_directory_that_is_damaged_is_rebuilt(opened, tmp_path, version) -> None:
    path = unpack(version, tmp_path)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE meta SET next_batch = -3")
    assert Path(repair(path, 2e9)).exists()
    j = await opened()
    assert not j.recovered.set_aside
    assert j.journal.ledger == Ledger(accepted=16, processed=8, dead=2, invalid=1)
    assert [(batch.number, batch.count) for batch in j.recovered.batches] == [(3, 4)]
    assert j.journal.dead_totals.letters == 3
    assert (await j.journal.close()).counted == 6


async def test_the_ledger_of_version_2_keeps_its_own_checksum(opened, tmp_path) -> None:
    """Carrying it over must not vouch for counters that were damaged before."""
    path = unpack(2, tmp_path)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE meta SET processed = processed + 1")
    assert (await opened()).recovered.set_aside


async def test_the_commands_refuse_a_journal_of_version_2_that_is_in_use(opened, tmp_path) -> None:
    path = unpack(2, tmp_path)
    held = FileLock(path, of=path)
    with pytest.raises(DataDirError, match="another ingestd"), opened_beside(path):
        pass
    held.close()
    with opened_beside(path) as db:
        assert dead_letters.count(db, LetterFilter()).letters == 3
