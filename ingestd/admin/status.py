"""Status of the daemon and its pipelines, for `/v1/status`, health and metrics."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from ingestd.base.watchdog import Stage
from ingestd.execution.dispatch_control import PAUSED
from ingestd.handlers.outcome import class_named

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ingestd.pipeline import Pipeline
    from ingestd.source_group import RunningSource


NEAR = 0.8
"""The part of a bound from which on it counts as near."""


class JournalUsage(msgspec.Struct, frozen=True):
    """Usage of the journal.

    Attributes:
        bytes: used.
        bytes_max: `journal.bytes_max`.
        poisoned: a sync failed; nothing is accepted any more.
        disk_free: bytes that count as free on its disk; `None` for a journal without one.
        disk_free_min: with less, no record is accepted.
        logs: with `journal.jetstream.adopt`: the logs of all daemons of the group, each with its
            owner and state, and with its numbers where these are known.
    """

    bytes: int
    bytes_max: int
    poisoned: bool
    disk_free: int | None = None
    disk_free_min: int | None = None
    logs: list[dict[str, Any]] | None = None


class QueueStatus(msgspec.Struct, frozen=True):
    """Chunks of the journal in memory.

    Attributes:
        chunks: how many.
        bytes: their payloads.
        bytes_max: `queue.bytes_max`.
    """

    chunks: int
    bytes: int
    bytes_max: int


class BatchesStatus(msgspec.Struct, frozen=True):
    """Counts of batches by state.

    Attributes:
        sealed: not yet with a worker.
        running: with a worker.
        waiting_retry: waiting for a retry.
        waiting_records: what these hold.
        waiting_bytes: of the journal, with what they take in memory.
    """

    sealed: int
    running: int
    waiting_retry: int
    waiting_records: int = 0
    waiting_bytes: int = 0


class HandlerStatus(msgspec.Struct, frozen=True):
    """State of the handler.

    Attributes:
        state: `down` when it has failed for everything lately; `blocked` when it says that an
            operator has to act, as with a table or a right that is missing.
        down_since: when that began, UTC.
        error: the newest failure in one line.
        down_since_seconds: the same, since the epoch; 0 while it works.
    """

    state: Literal["up", "down", "blocked"] = "up"
    down_since: str | None = None
    error: str = ""
    down_since_seconds: float = 0.0

    @property
    def is_blocked(self) -> bool:
        """Tells if it waits for an operator."""
        return self.state == "blocked"


class DeadLettersStatus(msgspec.Struct, frozen=True):
    """The dead letters that are kept: what `ingestd dead` shows.

    Attributes:
        kept: how many, all of them.
        bytes: what those of accepted records take, with their errors and tracebacks.
        bytes_max: `dead.bytes_max`.
        invalid_kept: of `kept`, those of records that were never accepted.
        invalid_bytes: what these take.
        invalid_bytes_max: `dead.invalid_bytes_max`.
        dropped: of these, how many went because there were too many, over the life of the journal.
        requeued: records that were dead and are fed again.
        readmitted: records that were invalid and then accepted after all.
        expired: those that became too old.
        purged: those that an operator deleted.
    """

    kept: int = 0
    bytes: int = 0
    bytes_max: int = 0
    invalid_kept: int = 0
    invalid_bytes: int = 0
    invalid_bytes_max: int = 0
    dropped: int = 0
    requeued: int = 0
    readmitted: int = 0
    expired: int = 0
    purged: int = 0


class KeptStatus(msgspec.Struct, frozen=True):
    """Processed records that are kept for a replay (`journal.keep`).

    Attributes:
        records: how many.
        bytes: of them.
        bytes_max: `journal.keep_bytes_max`.
        replayed: records that were fed again, over the life of the journal; they are accepted
            anew, and count in `accepted` each time.
    """

    records: int = 0
    bytes: int = 0
    bytes_max: int = 0
    replayed: int = 0


class PipelineStatus(msgspec.Struct, frozen=True):
    """One pipeline. The first five count records over the life of the data directory.

    Attributes:
        accepted: durable in the journal at some time.
        processed: the handler is done with them.
        dead: accepted, then given up.
        pending: accepted and not settled.
        invalid: kept as dead letters without being accepted; in none of the four above.
        balanced: whether `accepted == processed + dead + pending`; the rows are counted, too, once
            a minute.
        journal: how full it is.
        queue: what is in memory.
        batches: where they are.
        oldest_pending_seconds: age of the oldest pending record; 0 if there is none.
        bounds_near: the settings whose bound is near or reached (`journal.bytes_max`, …).
        bounds_used: the part of each bound that is in use.
        refusing: for each bound that refuses records: whether it does, until some are accepted.
        appends_refused: how many appends it has refused in this run.
        dead_letters: those that are kept.
        kept: processed records that are kept.
        executor: what the handler runs in: `process`, `thread` or `async`.
        workers: how many there are now.
        handler: whether it works.
        dispatch_stopped: why no batch is given to the handler; empty while batches are.
        paused: a person paused it: records are accepted, and no batch is given to the handler.
        paused_since: when that began, UTC.
        throttled: `executor.batches_per_second` or `executor.records_per_second` holds a batch
            back now.
        deduplicated: records that `dedupe.key` left out since the start; in none of those above.
        unaccounted: pending by the counters less pending by the journal's rows; not 0 is an error.
    """

    accepted: int
    processed: int
    dead: int
    pending: int
    invalid: int
    balanced: bool
    journal: JournalUsage
    queue: QueueStatus
    batches: BatchesStatus
    oldest_pending_seconds: float
    bounds_near: list[str]
    dead_letters: DeadLettersStatus = DeadLettersStatus()
    kept: KeptStatus = KeptStatus()
    executor: str = ""
    workers: int = 0
    handler: HandlerStatus = HandlerStatus()
    dispatch_stopped: str = ""
    paused: bool = False
    paused_since: str | None = None
    throttled: bool = False
    deduplicated: int = 0
    unaccounted: int = 0
    bounds_used: dict[str, float] = {}
    refusing: dict[str, bool] = {}
    appends_refused: dict[str, int] = {}

    @property
    def dead_ever(self) -> int:
        """Records given up: a counter must not go back when some are fed again."""
        return self.dead + self.dead_letters.requeued

    @property
    def invalid_ever(self) -> int:
        """Invalid records, those too that were accepted later."""
        return self.invalid + self.dead_letters.readmitted

    @property
    def is_stopped(self) -> bool:
        """Tells if no batch is given to the handler, because something is wrong."""
        return self.dispatch_stopped not in {"", PAUSED}


class SourceStatus(msgspec.Struct, frozen=True):
    """One source.

    Attributes:
        kind: of the source, as in `source.kind`.
        state: `ended` when an input was read to its end and is accepted, `incomplete` when some
            of it was given up.
        records: accepted in this run, of an input that is read; `None` for a server.
        invalid: never accepted, because they cannot be records; `None` for a server.
        bytes: read; `None` for a server.
    """

    kind: str
    state: Literal["running", "ended", "incomplete"]
    records: int | None = None
    invalid: int | None = None
    bytes: int | None = None


class Status(msgspec.Struct, frozen=True):
    """The whole daemon: the body of `/v1/status`.

    Attributes:
        state: where in its life it is.
        version: of ingestd.
        uptime_seconds: since it was started.
        pipelines: by name.
        sources: by name; none before they are started.
    """

    state: Literal["starting", "running", "draining"]
    version: str
    uptime_seconds: float
    pipelines: dict[str, PipelineStatus]
    sources: dict[str, SourceStatus] = {}


class AdminView(Protocol):
    """Interface of the daemon for the admin server; calls are on the event loop and never wait.

    Attributes:
        pipelines: those that are open, by name.
    """

    @property
    def pipelines(self) -> Mapping[str, Pipeline]: ...  # noqa: D102 - see the class

    def alive(self) -> tuple[bool, str]:
        """Returns True if no stage hangs, and in a few words the one that does."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Returns True if records are accepted, with the reason in a few words."""
        ...

    def status(self) -> Status:
        """The status of the daemon."""
        ...

    def effective_settings(self) -> Iterable[tuple[str, object, str]]:
        """Key, value and origin of each setting in effect; secrets are masked."""
        ...


def bounds_near(used: Mapping[str, tuple[float, float]]) -> list[str]:
    """The settings whose bound is near or reached, in the order given.

    Args:
        used: by the setting's dotted name: what is in use, and the bound, in the same unit.
    """
    return [name for name, (use, bound) in used.items() if use >= NEAR * bound]


# -- status of a pipeline --------------------------------------------------------------------------


def status_of(pipeline: Pipeline) -> PipelineStatus:
    """The status of a pipeline now: the one value that `/v1/status` and the metrics are made of."""
    settings, journal = pipeline.settings, pipeline.journal.status()
    group = pipeline.journal.group
    ledger, letters = journal.ledger, journal.dead_letters
    throttled_by = pipeline.dispatcher.throttled_by
    oldest, waiting = pipeline.unsettled.oldest, pipeline.dispatcher.queue.waiting_load
    difference = pipeline.auditor.difference
    age = 0.0 if oldest is None else asyncio.get_running_loop().time() - oldest
    space = pipeline.auditor.free_space()
    used = {
        "journal.bytes_max": (journal.bytes, journal.bytes_max),
        "dead.bytes_max": (letters.accepted_bytes, settings.dead.bytes_max),
        "queue.bytes_max": (pipeline.budget.bytes, settings.queue.bytes_max),
        "queue.chunks_max": (pipeline.queue.qsize(), settings.queue.chunks_max),
        "retry.waiting_records_max": (waiting.records, settings.retry.waiting_records_max),
        "retry.waiting_bytes_max": (waiting.bytes, settings.retry.waiting_bytes_max),
    }
    if space is not None:
        used["journal.free_min"] = space.free_min, space.free
    return PipelineStatus(
        accepted=ledger.accepted,
        processed=ledger.processed,
        dead=ledger.dead,
        pending=ledger.pending,
        invalid=ledger.invalid,
        balanced=not difference
        and ledger.accepted == ledger.processed + ledger.dead + ledger.pending,
        journal=JournalUsage(
            bytes=journal.bytes,
            bytes_max=journal.bytes_max,
            poisoned=journal.poisoned,
            disk_free=space.free if space else None,
            disk_free_min=space.free_min if space else None,
            logs=None if group is None else group.states,
        ),
        queue=QueueStatus(
            chunks=pipeline.queue.qsize(),
            bytes=pipeline.budget.bytes,
            bytes_max=settings.queue.bytes_max,
        ),
        batches=BatchesStatus(
            sealed=pipeline.dispatcher.queue.ahead,
            # What is dispatched beyond that lies ready before the workers.
            running=min(pipeline.dispatcher.running, pipeline.dispatcher.workers),
            waiting_retry=pipeline.dispatcher.queue.waiting,
            waiting_records=waiting.records,
            waiting_bytes=waiting.bytes,
        ),
        handler=_handler(pipeline),
        dead_letters=DeadLettersStatus(
            kept=letters.letters,
            bytes=letters.accepted_bytes,
            bytes_max=settings.dead.bytes_max,
            invalid_kept=letters.invalid,
            invalid_bytes=letters.invalid_bytes,
            invalid_bytes_max=settings.dead.invalid_bytes_max,
            dropped=letters.dropped,
            requeued=letters.requeued,
            readmitted=letters.readmitted,
            expired=letters.expired,
            purged=letters.purged,
        ),
        kept=KeptStatus(
            journal.kept.records,
            journal.kept.bytes,
            settings.journal.keep_bytes_max if settings.journal.keep else 0,
            journal.kept.replayed,
        ),
        executor=pipeline.dispatcher.executor,
        workers=pipeline.dispatcher.workers,
        dispatch_stopped=pipeline.dispatcher.stopped,
        paused=pipeline.dispatcher.control.paused_since > 0,
        paused_since=_utc(pipeline.dispatcher.control.paused_since),
        deduplicated=pipeline.deduplicator.left_out if pipeline.deduplicator else 0,
        unaccounted=difference,
        oldest_pending_seconds=round(age, 3),
        bounds_near=bounds_near(used)
        + ["journal.kind"] * bool(space and space.refusal)
        + [throttled_by] * bool(throttled_by),
        throttled=bool(throttled_by),
        bounds_used={
            name: round(use / bound, 4) if bound else 1.0 for name, (use, bound) in used.items()
        },
        refusing={bound: bound == journal.refusing for bound in journal.refused},
        appends_refused=dict(journal.refused),
    )


def status_of_source(running: RunningSource) -> SourceStatus:
    """The state of a source now."""
    counts = running.source.counts()
    if counts is None:
        return SourceStatus(running.configured.kind, running.state)
    return SourceStatus(
        running.configured.kind, running.state, counts.records, counts.invalid, counts.bytes
    )


def without_error_texts(status: Status) -> Status:
    """Returns the status with the kinds of handlers' errors; their texts may quote records."""
    replace = msgspec.structs.replace
    pipelines = {
        name: replace(one, handler=replace(one.handler, error=_kind_of(one.handler.error)))
        for name, one in status.pipelines.items()
    }
    return replace(status, pipelines=pipelines)


def _kind_of(error: str) -> str:
    if not error:
        return ""
    kind = class_named(error) or "an error"
    return f"{kind} (its text is in the log, and here for a token of [admin.tokens.NAME])"


def _handler(pipeline: Pipeline) -> HandlerStatus:
    failures = pipeline.dispatcher.failures
    since = failures.down_since
    if not since:
        return HandlerStatus()
    state: Literal["down", "blocked"] = "blocked" if failures.blocked else "down"
    return HandlerStatus(state, _utc(since), failures.last_error, since)


def _utc(at: float) -> str | None:
    """`2026-05-01T12:00:00Z`; `None` for 0."""
    text = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
    return text.replace("+00:00", "Z") if at else None


def stages_of(pipeline: Pipeline) -> Iterator[Stage]:
    """The stages of a pipeline, for the watchdog: each that could go on waits for nothing else.

    A full queue, busy workers, a commit that has to wait are good reasons to rest.
    """
    if pipeline.is_closing:
        return
    journal = pipeline.journal.status()
    reader, consumed = pipeline.reader, pipeline.settlements.next_batch + pipeline.batcher.chunks
    for stage in (
        Stage("pump", reader.could_give and not pipeline.queue.full(), reader.given),
        Stage("consumer", pipeline.could_cut, consumed),
        pipeline.dispatcher.stage(),
        Stage("journal", journal.busy, journal.commits),
    ):
        yield stage._replace(name=f"the {stage.name} of {pipeline.name}")
