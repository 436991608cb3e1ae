"""From settings to a journal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.journal.disk_space import DiskSpaceGuard, scaled
from ingestd.journal.memory import MemoryJournal
from ingestd.journal.sqlite.journal import SqliteJournal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ingestd.base.clock import Clock
    from ingestd.journal.idempotency import KeyRule
    from ingestd.journal.interface import Journal
    from ingestd.journal.settings import JournalSettings
    from ingestd.journal.sqlite.letters import InvalidQuota


def build_journal(
    settings: JournalSettings,
    *,
    folder: Path,
    clock: Clock,
    on_commit: Callable[[float, int, int], None],
    dead_bytes_max: int,
    keys: KeyRule,
    courtesy: InvalidQuota,
) -> Journal:
    """The journal that the settings name, not opened yet.

    Args:
        settings: `[journal]`.
        folder: where `journal.db` lies; exists.
        clock: where time comes from.
        on_commit: called after each commit with (seconds, appends, bytes).
        dead_bytes_max: bound on what dead letters of accepted records take.
        keys: how long idempotency keys are kept, and how many.
        courtesy: what letters of records that were never accepted may take.
    """
    if settings.kind == "memory":
        return MemoryJournal(
            bytes_max=settings.bytes_max, dead_bytes_max=dead_bytes_max, clock=clock, keys=keys
        )
    path = (folder / "journal.db").resolve()  # SQLite's other files lie beside what a link names
    return SqliteJournal(
        path,
        bytes_max=settings.bytes_max,
        clock=clock,
        on_commit=on_commit,
        dead_bytes_max=dead_bytes_max,
        keys=keys,
        space=DiskSpaceGuard(path.parent, scaled(settings.free_min, path.parent)),
        courtesy=courtesy,
    )
