"""Bookmarks: in the commit of their records or not at all, bounded, checked, and in a rebuild."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from ingestd.base.append import Append, SourceOffset
from ingestd.base.clock import SystemClock
from ingestd.base.errors import JournalFailed, NeverFits, Overloaded
from ingestd.base.record import InvalidRecord, Records
from ingestd.journal.memory import MemoryJournal
from ingestd.journal.sqlite import check, offsets, repair
from ingestd.journal.sqlite.offline import opened as opened_beside
from tests.daemon.harness import ROOT

if TYPE_CHECKING:
    from pathlib import Path

NOTHING = Records.lines([])
ONE = Records.lines([b"1"])


def mark(key: str, state: bytes) -> SourceOffset:
    return SourceOffset(key, state)


async def test_a_bookmark_outlives_the_process_and_the_last_one_counts(opened) -> None:
    j = (await opened()).journal
    first = j.append(Append(ONE, offset=mark("a", b"1")))
    await j.append(Append(ONE, offset=mark("a", b"2")))
    assert first.done()
    await j.append(Append(NOTHING, offset=mark("b", b"without records")))
    assert await j.offsets.find("c") is None
    used = j.bytes
    await j.close()
    again = (await opened()).journal
    assert await again.offsets.find("a") == mark("a", b"2")
    assert await again.offsets.find("b") == mark("b", b"without records")
    assert again.bytes == used
    assert again.ledger.accepted == 2


async def test_a_bookmark_is_refused_with_its_records(opened) -> None:
    j = (await opened(bytes_max=400)).journal
    await j.append(Append(Records.lines([b"x" * 200])))
    used = j.bytes
    with pytest.raises(Overloaded):
        j.append(Append(Records.lines([b"x" * 300]), offset=mark("a", b"1")))
    with pytest.raises(Overloaded):
        j.append(Append(NOTHING, offset=mark("a", b"1" * 200)))
    with pytest.raises(NeverFits):
        j.append(Append(NOTHING, offset=mark("a", b"1" * 400)))
    assert await j.offsets.find("a") is None
    assert j.bytes == used


async def test_its_bytes_are_counted_once_a_key(opened) -> None:
    j = (await opened()).journal
    for n in range(50):
        await j.append(Append(NOTHING, offset=mark("a", b"x" * n)))
    assert j.bytes == offsets.size_of(mark("a", b"x" * 49))


async def test_no_more_than_so_many_are_kept(opened, monkeypatch) -> None:
    monkeypatch.setattr(offsets, "BOOKMARKS_MAX", 20)
    j = (await opened()).journal
    for n in range(21):
        await j.append(Append(NOTHING, offset=mark(f"k{n}", b"")))
        await j.append(Append(NOTHING, offset=mark("used", b"")))
    assert await j.offsets.find("used")
    assert await j.offsets.find("k20")
    assert await j.offsets.find("k0") is None
    with closing(sqlite3.connect(j.path)) as db:
        count, size = offsets.totals(db)
    assert 10 < count <= 20
    assert j.bytes == size


async def test_the_memory_journal_keeps_them_in_memory() -> None:
    j = MemoryJournal(bytes_max=300, clock=SystemClock())
    await j.open(lambda _: None)
    await j.append(Append(ONE, offset=mark("a", b"1")))
    await j.append(Append(ONE, offset=mark("a", b"2")))
    assert await j.offsets.find("a") == mark("a", b"2")
    assert j.bytes == 4 + offsets.size_of(mark("a", b"2"))
    with pytest.raises(Overloaded):
        j.append(Append(NOTHING, offset=mark("b", b"x" * 200)))
    assert await j.offsets.find("b") is None


async def test_a_journal_from_before_bookmarks_is_opened_and_read(opened, tmp_path: Path) -> None:
    j = (await opened()).journal
    await j.append(Append(ONE, [InvalidRecord(0, "malformed", "x", b"{")]))
    await j.close()
    with closing(sqlite3.connect(j.path)) as db:
        db.execute("DROP TABLE bookmarks")
    with opened_beside(j.path) as db:
        assert check.stat(db)["bookmarks"] == {"rows": 0, "bytes": 0}
        assert list(check.findings(db)) == []
    again = (await opened()).journal
    assert again.ledger.accepted == 1
    await again.append(Append(ONE, offset=mark("a", b"1")))
    assert await again.offsets.find("a")


def overwrite(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE bookmarks SET state = x'00' WHERE key = 'bad'")


async def test_a_damaged_one_is_found_and_a_rebuild_keeps_the_others(opened) -> None:
    j = (await opened()).journal
    await j.append(Append(ONE, offset=mark("bad", b"1")))
    await j.append(Append(ONE, offset=mark("good", b"2")))
    await j.close()
    overwrite(j.path)
    with opened_beside(j.path) as db:
        (finding,) = check.findings(db)
        assert finding.text.startswith("bookmark bad is damaged")
    again = (await opened()).journal
    with pytest.raises(JournalFailed):
        await again.offsets.find("bad")
    assert repair.marked(again.path)
    await again.close()
    repaired = await opened()
    assert repaired.recovered.set_aside
    assert await repaired.journal.offsets.find("bad") is None
    assert await repaired.journal.offsets.find("good") == mark("good", b"2")
    assert repaired.journal.ledger.accepted == 2


async def test_stat_shows_them(opened, tmp_path: Path) -> None:
    j = (await opened()).journal
    await j.append(Append(NOTHING, offset=mark("a", b"1")))
    await j.close()
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "ingestd", "journal", "stat", "--data-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "bookmarks          rows 1  bytes 66" in done.stdout
