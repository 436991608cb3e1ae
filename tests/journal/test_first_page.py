"""The first page of a journal's file may be damaged: what is on the others is read all the same."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from ingestd.base.append import Append
from ingestd.base.record import Records, Span
from ingestd.journal.interface import Cursor, Ledger, Seal, Sealed, Settle
from ingestd.journal.sqlite.store import PAGE_BYTES

if TYPE_CHECKING:
    from pathlib import Path

PLACES = [0, 16, 18, 19, 20, 30, 100, 103, 108]
"""Each of them alone kept SQLite from reading anything, or let it see a part of the file."""


async def work(j) -> None:
    await j.append(Append(Records.lines([b"%d" % n for n in range(20_000)])))
    await j.write(Seal(Sealed(1, (Span(1, 0, 5),), 5), Cursor(1, 5)))
    await j.write(Seal(Sealed(2, (Span(1, 5, 5),), 5), Cursor(1, 10)))
    await j.write(Settle(1, 5, [], [], [], 0))


async def everything_is_there(opened, path: Path, before: bytes, journal: str) -> None:
    j = await opened()
    assert j.journal.id == journal
    assert j.journal.ledger == Ledger(accepted=20_000, processed=5)
    assert [(batch.number, batch.count) for batch in j.recovered.batches] == [(2, 5)]
    items = [item for chunk in await j.journal.read(1, 1 << 30) for item in chunk.records.items()]
    assert items == [b"%d" % n for n in range(20_000)]
    assert (await j.journal.close()).counted == 19_995
    for aside in path.parent.glob("journal.db.damaged-*"):
        assert aside.read_bytes() == before
        aside.unlink()


async def test_a_wrong_byte_of_it_costs_nothing(opened, tmp_path: Path) -> None:
    j = (await opened()).journal
    await work(j)
    await j.close()
    path = tmp_path / "journal.db"
    for place in PLACES:
        raw = bytearray(path.read_bytes())
        raw[place] ^= 0x88
        path.write_bytes(raw)
        await everything_is_there(opened, path, bytes(raw), j.id)


@pytest.mark.parametrize("how", ["new", "made smaller"])
async def test_without_it_nothing_is_lost(opened, tmp_path: Path, how: str) -> None:
    j = (await opened()).journal
    await work(j)
    if how == "made smaller":
        with closing(sqlite3.connect(tmp_path / "journal.db")) as db:
            db.executescript(
                "CREATE TABLE much(x); INSERT INTO much VALUES(zeroblob(4000000));"
                "DROP TABLE much; VACUUM"
            )
    await j.close()
    if how == "made smaller":  # which moves tables
        await (await opened()).journal.close()
    path = tmp_path / "journal.db"
    raw = path.read_bytes()
    raw = bytes(PAGE_BYTES) + raw[PAGE_BYTES:]
    path.write_bytes(raw)
    await everything_is_there(opened, path, raw, j.id)


async def test_a_backup_without_a_log_of_commits_is_a_journal(opened, tmp_path: Path) -> None:
    """As `VACUUM INTO` makes it: such a file is written without a WAL until it is told to."""
    j = (await opened()).journal
    await work(j)
    await j.close()
    path = tmp_path / "journal.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("VACUUM INTO ?", (str(tmp_path / "backup"),))
    (tmp_path / "backup").rename(path)
    j = (await opened()).journal
    await j.append(Append(Records.lines([b"1"])))
    assert not j.failed.done()
    assert (await j.close()).counted == 19_996
