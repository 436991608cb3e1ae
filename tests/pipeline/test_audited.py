"""A pipeline whose journal went astray says so while it runs."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

from ingestd.admin.status import status_of
from ingestd.base.append import Append
from ingestd.base.record import Records
from ingestd.journal import maintenance

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


async def test_metrics_and_status_show_rows_that_do_not_add_up(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "AUDIT_SECONDS", 0.01)
    pipeline = await start("jsonl", batch={"age_max": "1d"})
    await pipeline.accept(Append(Records.lines([b"1", b"2", b"3"])))
    assert status_of(pipeline).balanced
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db, db:
        db.execute("UPDATE chunks SET count = 1")
    async with asyncio.timeout(60):
        while status_of(pipeline).unaccounted != 2:
            await asyncio.sleep(0.002)
    assert not status_of(pipeline).balanced
