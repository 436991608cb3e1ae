"""Promise 2 is counted from the rows while the journal is open."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from ingestd.base.append import Append
from ingestd.base.errors import JournalFailed
from ingestd.base.record import Records, Span
from ingestd.journal.interface import Cursor, Seal, Sealed, Settle
from ingestd.journal.maintenance import Auditor
from ingestd.journal.sqlite import audit

if TYPE_CHECKING:
    from pathlib import Path


def records(count: int) -> Records:
    return Records.lines([b"%d" % n for n in range(count)])


def write(folder: Path, statement: str) -> None:
    """What a bug or a disk could do; the journal itself stays open."""
    with closing(sqlite3.connect(folder / "journal.db")) as db, db:
        db.execute(statement)


async def test_rows_and_counters_agree_at_every_step_of_a_batch(opened) -> None:
    journal = (await opened()).journal
    assert await journal.maintenance.audit() == 0
    await journal.append(Append(records(10)))
    assert await journal.maintenance.audit() == 0
    await journal.write(Seal(Sealed(1, (Span(1, 0, 4),), 4), Cursor(1, 4)))
    assert await journal.maintenance.audit() == 0
    await journal.write(Settle(1, 4, [], [], [], 0))
    assert await journal.maintenance.audit() == 0
    assert journal.ledger.pending == 6


@pytest.mark.parametrize(
    ("statement", "difference"),
    [
        ("UPDATE chunks SET count = count - 3", 3),
        ("UPDATE chunks SET count = count + 1", -1),
        ("DELETE FROM chunks", 10),
    ],
)
async def test_rows_that_went_astray_are_noticed(
    opened, tmp_path: Path, statement: str, difference: int
) -> None:
    journal = (await opened()).journal
    await journal.append(Append(records(10)))
    auditor = Auditor("default", journal.maintenance)
    await auditor.count()
    assert auditor.difference == 0
    write(tmp_path, statement)
    await auditor.count()
    assert auditor.difference == difference


async def test_it_is_silent_about_what_would_take_long_to_count(
    opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = (await opened()).journal
    for _ in range(3):
        await journal.append(Append(records(1)))
    auditor = Auditor("default", journal.maintenance)
    write(tmp_path, "UPDATE chunks SET count = 2 WHERE id = 2")
    await auditor.count()
    monkeypatch.setattr(audit, "CHUNKS_MAX", 1)
    write(tmp_path, "UPDATE chunks SET count = 1 WHERE id = 2")
    await auditor.count()
    assert auditor.difference == -1  # as it was when it was counted last
    monkeypatch.undo()
    await auditor.count()
    assert auditor.difference == 0


async def test_a_journal_that_cannot_be_read_fails_as_it_does_for_any_reader(
    opened, tmp_path: Path
) -> None:
    journal = (await opened()).journal
    write(tmp_path, "DROP TABLE batches")
    with pytest.raises(JournalFailed):
        await journal.maintenance.audit()
    assert journal.failed.done()
