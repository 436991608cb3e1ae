"""A pipeline needs the narrow interface alone, and says at the start what a journal lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ingestd.admin.status import stages_of, status_of
from ingestd.base.append import Append
from ingestd.base.clock import SystemClock
from ingestd.base.errors import ConfigError, KeysUnsupported
from ingestd.journal.build import build_journal
from ingestd.journal.memory import MemoryJournal
from ingestd.journal.settings import DeadSettings, JournalSettings
from ingestd.registry import JOURNALS
from tests.pipeline.test_pipeline import numbers

if TYPE_CHECKING:
    from pathlib import Path

METHODS = ("open", "append", "write", "read", "load", "status", "close")


class Bare:
    """The seven methods of a memory journal, and no capability."""

    dead_letters = idempotency = offsets = maintenance = group = None

    def __init__(self, journal: MemoryJournal) -> None:
        for name in METHODS:
            setattr(self, name, getattr(journal, name))


def bare(settings: Any, context: Any) -> Bare:
    return Bare(MemoryJournal(bytes_max=settings.bytes_max, clock=context.clock))


@pytest.fixture
def bare_kind(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(JOURNALS.own, "bare", "tests.pipeline.test_bare_journal:bare")
    return "bare"


async def test_a_pipeline_runs_on_a_journal_without_capabilities(start, tmp_path, bare_kind):
    pipeline = await start(
        "tests.pipeline.recording:Note",
        journal={"kind": bare_kind},
        executor={"kind": "thread", "workers": 1},
        options={"folder": str(tmp_path)},
    )
    assert not hasattr(pipeline.journal, "ledger")
    await pipeline.accept(Append(numbers(0, 60)))
    with pytest.raises(KeysUnsupported):
        await pipeline.begin("key", b"print")
    assert await pipeline.offset("file") is None
    assert status_of(pipeline).balanced
    assert [stage.name for stage in stages_of(pipeline)][-1] == "the journal of default"
    await pipeline.drain(None)
    report = await pipeline.close()
    assert (report.ledger.processed, report.durable, report.balanced) == (60, False, True)


@pytest.mark.parametrize(
    ("journal", "dead", "named"),
    [
        (JournalSettings(kind="memory"), DeadSettings(age_max="1h"), "dead.age_max"),
        (JournalSettings(kind="memory", free_min="1MiB"), DeadSettings(), "journal.free_min"),
    ],
)
def test_a_setting_that_needs_an_absent_capability_is_refused(
    tmp_path: Path, journal: JournalSettings, dead: DeadSettings, named: str
) -> None:
    with pytest.raises(ConfigError, match=f"'memory' .*{named}"):
        build_journal(journal, dead, folder=tmp_path, clock=SystemClock())
    on_disk = journal.model_copy(update={"kind": "sqlite"})
    assert build_journal(on_disk, dead, folder=tmp_path, clock=SystemClock()).dead_letters
