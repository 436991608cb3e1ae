"""A pipeline as the admin server shows it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ingestd.admin.view import (
    BatchesStatus,
    DeadLettersStatus,
    HandlerStatus,
    JournalStatus,
    PipelineStatus,
    QueueStatus,
    bounds_near,
)

if TYPE_CHECKING:
    from ingestd.pipeline import Pipeline


def status_of(pipeline: Pipeline) -> PipelineStatus:
    """Where a pipeline stands now."""
    state, settings = pipeline.state(), pipeline.settings
    load = pipeline.line.waiting_load
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
            sealed=pipeline.line.ahead,
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
        executor=pipeline.executor,
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
    since = pipeline.failures.down_since
    if not since:
        return HandlerStatus()
    at = datetime.fromtimestamp(since, UTC).isoformat(timespec="seconds")
    return HandlerStatus("down", at.replace("+00:00", "Z"), pipeline.failures.last_error)
