"""What the admin server shows, and of whom it asks it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ingestd.pipeline import Pipeline


NEAR = 0.8
"""The part of a bound from which on it counts as near."""


class JournalStatus(msgspec.Struct, frozen=True):
    """How full the journal is.

    Attributes:
        bytes: used.
        bytes_max: `journal.bytes_max`.
        poisoned: a sync failed; nothing is accepted any more.
    """

    bytes: int
    bytes_max: int
    poisoned: bool


class QueueStatus(msgspec.Struct, frozen=True):
    """What of the journal is in memory.

    Attributes:
        chunks: how many.
        bytes: their payloads.
        bytes_max: `queue.bytes_max`.
    """

    chunks: int
    bytes: int
    bytes_max: int


class BatchesStatus(msgspec.Struct, frozen=True):
    """Where the batches are.

    Attributes:
        sealed: written down, and not yet with a worker.
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
    """Whether the handler works.

    Attributes:
        state: `down` when it has failed for everything lately.
        down_since: when that began, UTC.
        error: the newest failure in one line.
    """

    state: Literal["up", "down"] = "up"
    down_since: str | None = None
    error: str = ""


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
    """

    kept: int = 0
    bytes: int = 0
    bytes_max: int = 0
    invalid_kept: int = 0
    invalid_bytes: int = 0
    invalid_bytes_max: int = 0
    dropped: int = 0


class PipelineStatus(msgspec.Struct, frozen=True):
    """One pipeline. The first five count records over the life of the data directory.

    Attributes:
        accepted: durable in the journal at some time.
        processed: the handler is done with them.
        dead: accepted, then given up.
        pending: accepted and not settled.
        refused: kept as dead letters without being accepted; in none of the four above.
        balanced: whether `accepted == processed + dead + pending`; the rows are counted, too, once
            a minute.
        journal: how full it is.
        queue: what is in memory.
        batches: where they are.
        oldest_pending_seconds: age of the oldest pending record; 0 if there is none.
        bounds_near: the settings whose bound is near or reached (`journal.bytes_max`, …).
        dead_letters: those that are kept.
        executor: what the handler runs in: `process`, `thread` or `async`.
        handler: whether it works.
        dispatch_stopped: why no batch is given to the handler; empty while batches are.
    """

    accepted: int
    processed: int
    dead: int
    pending: int
    refused: int
    balanced: bool
    journal: JournalStatus
    queue: QueueStatus
    batches: BatchesStatus
    oldest_pending_seconds: float
    bounds_near: list[str]
    dead_letters: DeadLettersStatus = DeadLettersStatus()
    executor: str = ""
    handler: HandlerStatus = HandlerStatus()
    dispatch_stopped: str = ""


class Status(msgspec.Struct, frozen=True):
    """The whole daemon: the body of `/v1/status`.

    Attributes:
        state: where in its life it is.
        version: of ingestd.
        uptime_seconds: since it was started.
        pipelines: by name.
    """

    state: Literal["starting", "running", "draining"]
    version: str
    uptime_seconds: float
    pipelines: dict[str, PipelineStatus]


class AdminView(Protocol):
    """Who answers. All are called on the event loop and return at once."""

    def alive(self) -> tuple[bool, str]:
        """Whether everything that could move moves, and in a few words what does not."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Whether records are taken, and in a few words why not (or that they are)."""
        ...

    def status(self) -> Status:
        """How the daemon is doing now."""
        ...


def bounds_near(used: Mapping[str, tuple[float, float]]) -> list[str]:
    """The settings whose bound is near or reached, in the order given.

    Args:
        used: by the setting's dotted name: what is in use, and the bound, in the same unit.
    """
    return [name for name, (use, bound) in used.items() if use >= NEAR * bound]


# -- status of a pipeline --------------------------------------------------------------------------


def status_of(pipeline: Pipeline) -> PipelineStatus:
    """Where a pipeline stands now."""
    state, settings = pipeline.state(), pipeline.settings
    load = pipeline.dispatcher.queue.waiting_load
    space = pipeline.journal.space
    if space is not None:
        space.check()
    return PipelineStatus(
        accepted=state.accepted,
        processed=state.processed,
        dead=state.dead,
        pending=state.pending,
        refused=state.refused,
        balanced=state.accepted == state.processed + state.dead + state.pending
        and not state.unaccounted,
        journal=JournalStatus(
            bytes=state.journal_bytes,
            bytes_max=state.journal_bytes_max,
            poisoned=pipeline.journal.failed.done(),
        ),
        queue=QueueStatus(
            chunks=state.queue_chunks,
            bytes=state.queue_bytes,
            bytes_max=settings.queue.bytes_max,
        ),
        batches=BatchesStatus(
            sealed=pipeline.dispatcher.queue.ahead,
            running=state.lanes_busy,
            waiting_retry=state.batches_waiting,
            waiting_records=load.records,
            waiting_bytes=load.bytes,
        ),
        handler=_handler(pipeline),
        dead_letters=DeadLettersStatus(
            kept=state.letters,
            bytes=state.letters_bytes,
            bytes_max=state.letters_bytes_max,
            invalid_kept=state.letters_invalid,
            invalid_bytes=state.letters_invalid_bytes,
            invalid_bytes_max=settings.dead.invalid_bytes_max,
            dropped=state.dropped,
        ),
        executor=pipeline.dispatcher.executor,
        dispatch_stopped=pipeline.stopped,
        oldest_pending_seconds=round(state.oldest_pending_seconds, 3),
        bounds_near=bounds_near(
            {
                "journal.bytes_max": (state.journal_bytes, state.journal_bytes_max),
                "dead.bytes_max": (state.letters_bytes, state.letters_bytes_max),
                "journal.free_min": (space.free_min, space.free) if space else (0, 1),
                "queue.bytes_max": (state.queue_bytes, settings.queue.bytes_max),
                "queue.chunks_max": (state.queue_chunks, settings.queue.chunks_max),
                "retry.waiting_records_max": (load.records, settings.retry.waiting_records_max),
                "retry.waiting_bytes_max": (load.bytes, settings.retry.waiting_bytes_max),
            }
        ),
    )


def _handler(pipeline: Pipeline) -> HandlerStatus:
    since = pipeline.dispatcher.failures.down_since
    if not since:
        return HandlerStatus()
    at = datetime.fromtimestamp(since, UTC).isoformat(timespec="seconds")
    return HandlerStatus("down", at.replace("+00:00", "Z"), pipeline.dispatcher.failures.last_error)
