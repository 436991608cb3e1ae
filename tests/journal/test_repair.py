"""What a repair keeps: the journal's id, the batches' numbers, and every old file."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from ingestd.base.append import Append
from ingestd.base.clock import SystemClock
from ingestd.base.record import Records, Span
from ingestd.journal.dead_letters import DeadLetter
from ingestd.journal.interface import Chunk, Cursor, Ledger, Seal, Sealed, Settle
from ingestd.journal.sqlite import check, repair, schema
from ingestd.journal.sqlite.journal import SqliteJournal
from ingestd.journal.sqlite.offline import opened as opened_beside
from ingestd.journal.sqlite.store import Store, Write
from tests.faults.tools import mounted, needs


async def work(j) -> None:
    """Ten records: two done, one dead, three sealed, four waiting."""
    await j.append(Append(Records.lines([b"%d" % n for n in range(6)])))
    await j.append(Append(Records.lines([b"%d" % n for n in range(6, 10)])))
    await j.write(Seal(Sealed(1, (Span(1, 0, 3),), 3), Cursor(1, 3)))
    await j.write(Seal(Sealed(2, (Span(1, 3, 3),), 3), Cursor(2, 0)))
    letter = DeadLetter(f"{j.id}.1.0", "failed", "no", "", b"0", 1, 1.0, 2.0)
    await j.write(Settle(1, 2, [letter], [], [], 0))


@pytest.mark.parametrize("change", [-1, 3, 2**40])
@pytest.mark.parametrize("counter", schema.COUNTERS)
async def test_one_damaged_counter_costs_no_name(
    opened, tmp_path: Path, counter: str, change: int
) -> None:
    j = (await opened()).journal
    await work(j)
    await j.close()
    path = tmp_path / "journal.db"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"UPDATE meta SET {counter} = {counter} * {1 if change > 0 else -1} + {change}")
    again = await opened()
    assert again.recovered.set_aside
    assert again.journal.id == j.id
    (batch,) = again.recovered.batches
    assert (batch.number, batch.spans) == (2, (Span(1, 3, 3),))
    assert again.recovered.cursor == Cursor(2, 0)
    assert again.recovered.next_batch > 3
    assert again.recovered.last_chunk > 2
    assert again.journal.ledger.pending == 7
    assert again.journal.dead_totals.letters == 1
    assert (await again.journal.close()).counted == 7
    with opened_beside(path) as db:
        assert list(check.findings(db)) == []


@pytest.mark.parametrize("table", ["meta", "identity"])
async def test_either_copy_of_the_id_is_enough(opened, tmp_path: Path, table: str) -> None:
    j = (await opened()).journal
    await work(j)
    await j.close()
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db, db:
        db.execute(f"UPDATE {table} SET journal = 'wrong'")
    again = await opened()
    assert again.recovered.set_aside
    assert again.journal.id == j.id
    assert again.journal.ledger == Ledger(accepted=10, processed=2, dead=1)


async def test_a_folder_that_is_named_like_a_repaired_journal(tmp_path: Path) -> None:
    folder = tmp_path / "journal.db.repaired-1" / "data.repaired-x"
    folder.mkdir(parents=True)
    path = folder / "journal.db"
    for life in range(2):
        path.write_bytes(b"no journal %d" % life * 1000)
        journal = SqliteJournal(
            path, bytes_max=1 << 30, clock=SystemClock(), on_commit=lambda *_: None
        )
        recovered = await journal.open(lambda _: None)
        aside = Path(recovered.set_aside)
        assert aside.parent == folder
        assert aside.read_bytes() == b"no journal %d" % life * 1000
        await journal.close()
    kept = sorted(p.read_bytes()[:12] for p in folder.glob("journal.db.damaged-*"))
    assert kept == [b"no journal 0", b"no journal 1"]


async def test_what_was_set_aside_before_is_not_written_over(opened, tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    aside = tmp_path / "journal.db.damaged-19700101T000001Z"
    await (await opened()).journal.close()
    repair.repair(path, 1.0)
    first = aside.read_bytes()
    # A crash left the new file beside the old name that was used already.
    (tmp_path / "journal.db.repaired-19700101T000001Z").write_bytes(path.read_bytes())
    assert repair.finish(path) == f"{aside}+"
    assert aside.read_bytes() == first


@needs("mount", root=True)
def test_a_repair_without_space_leaves_what_space_there_was(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=3m", "tmpfs") as disk:
        with closing(Store(tmp_path / "journal.db")) as store:
            chunks = [Chunk(n, 1.0, Records.lines([b"0" * 60_000])) for n in range(1, 31)]
            store.write(Write(chunks))
        path = Path(shutil.copy(tmp_path / "journal.db", disk))
        before = {one.name: one.stat().st_size for one in disk.iterdir()}
        with pytest.raises(sqlite3.OperationalError, match="full"):
            repair.repair(path, 2e9)
        assert {one.name: one.stat().st_size for one in disk.iterdir()} == before
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        assert Path(repair.repair(path, 2e9)).stat().st_size == before["journal.db"]
