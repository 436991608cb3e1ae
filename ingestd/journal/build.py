"""From settings to a journal, and from a data directory to the journals in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.base.errors import ConfigError
from ingestd.journal.dead_letters import InvalidQuota
from ingestd.journal.idempotency import KeyRule
from ingestd.journal.interface import JournalContext
from ingestd.journal.settings import JournalKind, JournalSettings
from ingestd.registry import JOURNALS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from ingestd.base.clock import Clock
    from ingestd.journal.dedupe import Deduplicator
    from ingestd.journal.interface import Journal
    from ingestd.journal.settings import DeadSettings, DedupeSettings
    from ingestd.journal.sqlite.check import SqliteFile


def build_journal(
    settings: JournalSettings,
    dead: DeadSettings,
    *,
    folder: Path,
    clock: Clock,
    on_commit: Callable[[float, int, int], None] = lambda *_: None,
    keys: KeyRule = KeyRule(),  # noqa: B008  immutable
    check: Callable[[bytes], str] = lambda _: "",
) -> Journal:
    """Builds the journal that the settings name; `Journal.open` opens it.

    Args:
        settings: `[journal]`.
        dead: `[dead]`.
        folder: of its files; exists when it is opened.
        clock: gives the time.
        on_commit: called after each commit with (seconds, appends, bytes).
        keys: how long idempotency keys are kept, and how many.
        check: see `InvalidQuota`.

    Raises:
        ConfigError: there is no such journal, or a setting needs a capability that it lacks.
    """
    quota = InvalidQuota(dead.invalid_bytes_max, check)
    context = JournalContext(folder, clock, on_commit, dead.bytes_max, keys, quota)
    kind = JOURNALS.load(settings.kind)
    journal: Journal = (
        kind().build(settings, context, settings.own)
        if isinstance(kind, type) and issubclass(kind, JournalKind)
        else kind(settings, context)
    )
    lacking = " and ".join(_lacking(journal, settings, dead))
    if lacking:
        raise ConfigError(problem=f"a journal of the kind {settings.kind!r} {lacking}")
    return journal


def build_deduplicator(settings: DedupeSettings, clock: Clock) -> Deduplicator | None:
    """Builds the deduplicator of a pipeline; `None` if it has no `dedupe.key`."""
    if not settings.key:
        return None
    from ingestd.journal.dedupe import Deduplicator  # noqa: PLC0415  most pipelines have none

    return Deduplicator(settings, clock)


def _lacking(journal: Journal, settings: JournalSettings, dead: DeadSettings) -> Iterator[str]:
    """Yields each setting that needs a capability which a journal lacks."""
    if dead.age_max and journal.dead_letters is None:
        yield "has no dead letters that could expire: dead.age_max should be 0s"
    if settings.keep and not getattr(journal, "keeps", False):
        yield "keeps no processed records: journal.keep should be 0s"
    free_min = JournalSettings.model_fields["free_min"].default
    if settings.free_min not in (0, free_min) and journal.maintenance is None:
        yield "lies on no disk: journal.free_min should be left out"


def stored_journals(data_dir: Path, only: Sequence[str] = ()) -> dict[str, SqliteFile]:
    """Finds the journals in a data directory by the names of their pipelines, `default` first.

    Args:
        data_dir: as `run` uses it.
        only: these pipelines; empty for all.

    Raises:
        DataDirError: there is none.
        UsageError: a pipeline of `only` has none.
    """
    from ingestd.journal.log.cache import CacheFile  # noqa: PLC0415  no daemon needs it
    from ingestd.journal.sqlite.check import SqliteFile  # noqa: PLC0415
    from ingestd.journal.sqlite.offline import FILE, journals  # noqa: PLC0415

    return {
        name: SqliteFile(path) if path.name == FILE else CacheFile(path)
        for name, path in journals(data_dir, only).items()
    }
