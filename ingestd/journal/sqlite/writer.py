"""Group commit: one thread writes everything that waits in one transaction, with one sync.

The event loop submits operations; the thread takes all there are (bounded by bytes), writes them,
and hands the futures back to the loop in one call. While a commit waits for the disk the next one
gathers, so the more load there is, the more operations share a sync.

A commit can fail in three ways (invariant 3 in `docs/ARCHITECTURE.md`):

* no space, or a store beyond this machine that takes nothing now (`Overloaded`): it was rolled
  back. The appends in it are refused, and so is what was to be done with
  dead letters. Everything else only makes the journal smaller in the end, and is tried again until
  there is space or the journal is closed.
  It is tried alone: appends that come meanwhile are refused at once, so they can't take the space
  that would end the lack of it; what else comes is put behind it, in order.
* keys that another daemon has taken (`KeyTaken`): it was rolled back. The appends that claim them
  are refused, and all others are committed at once without them.
* anything else, a failed sync above all: the journal is poisoned. The kernel may have dropped the
  pages that it could not write and report success next time, so nothing is tried again
  (https://wiki.postgresql.org/wiki/Fsync_Errors).
"""

from __future__ import annotations

import queue
import sqlite3
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from ingestd.base import envelope
from ingestd.base.errors import JournalFailed, KeyTaken, Overloaded
from ingestd.base.rate import STALLED
from ingestd.base.record import Layout, Records, join
from ingestd.journal.dead_letters import DeadTotals, Moved, invalid_letter
from ingestd.journal.idempotency import SWEEP_ROWS, SWEEP_SECONDS
from ingestd.journal.interface import (
    Change,
    Chunk,
    Ledger,
    Place,
    Postpone,
    Seal,
    Settle,
)
from ingestd.journal.sqlite import checkpoint, offsets, repair
from ingestd.journal.sqlite.letters import CHUNK_BYTES
from ingestd.journal.sqlite.store import PAGE_BYTES, KeyChange, Store, Write

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from ingestd.base.append import (
        Append,
        Deduplicated,
        HeldIds,
        IdempotencyClaim,
        SourceOffset,
    )
    from ingestd.base.clock import Clock
    from ingestd.journal.dead_letters import DeadLetter
    from ingestd.journal.sqlite.kept import KeepRule

COMMIT_BYTES = 8 << 20
"""A transaction takes no further append beyond this, so a sync stays short."""
JOIN_BYTES = 64 << 10
"""Appends smaller than this are joined into one chunk, up to `CHUNK_BYTES`."""
FULL_PAUSE = 0.25
"""Seconds between two tries when the disk is full."""
_NO_SPACE = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE})
"""The second one: the index of the WAL could not grow. Neither is a sync that failed."""


class QueuedAppend(NamedTuple):
    """An append that waits for its commit."""

    future: asyncio.Future[Place]
    append: Append


class QueuedChange(NamedTuple):
    """A change of batches that waits for its commit."""

    future: asyncio.Future[None]
    change: Change


class Sweep(NamedTuple):
    """Deletes expired idempotency keys."""

    future: asyncio.Future[None]


class Requeue(NamedTuple):
    """Feeds marked dead letters again, and what arrived from other pipelines.

    Attributes:
        room: bytes that the journal has left for what arrived.
    """

    future: asyncio.Future[Moved]
    room: int


class Expire(NamedTuple):
    """Deletes dead letters given up between two times, as many as one transaction takes."""

    future: asyncio.Future[Moved]
    since: float
    before: float


Op = QueuedAppend | QueuedChange | Sweep | Requeue | Expire
_TRIED_ONCE = frozenset({QueuedAppend, Requeue, Expire})
"""Operations that a full disk refuses: they can be submitted again."""


class Committed(NamedTuple):
    """One commit, as it is reported to the loop.

    Attributes:
        places: where the records of each append among `ops` are; none if it failed.
        keys_gone: idempotency keys that were deleted.
        at: when its records were accepted, seconds since the epoch.
        dead: the dead letters after it; `None` if it failed.
        moved: what it did to dead letters that were there.
        reusable: bytes of free pages in the file after it.
        bookmarks: what there is of them after it; `None` if it failed.
    """

    ops: Sequence[Op]
    chunks: Sequence[Chunk]
    ledger: Ledger
    seconds: float
    error: Exception | None = None
    places: Sequence[Place] = ()
    keys_gone: KeyChange = KeyChange()
    dead: DeadTotals | None = None
    moved: Moved = Moved()
    at: float = 0.0
    reusable: int | None = None
    bookmarks: offsets.OffsetTotals | None = None


class JournalWriter:
    """Owns the journal's writing thread.

    Args:
        store: the opened file; from now on the thread's.
        checkpointer: told what was written; says when the WAL should be started over.
        report: called on the thread with each `Committed`; must only hand it to the loop.
        clock: gives `accepted_at`.
        keys_before: tells before which time idempotency keys go.

    Attributes:
        busy: the thread is at a commit, or at starting the WAL over.
        commits: how many it has begun; both show if it moves.
        claim_bytes: an idempotency key counts for so many in the bound of a commit, and its answer.
        keep: the bounds of finished chunks that are kept; `None` where none are, and while the disk
            is full: a copy would need the space that the commit wants to free.
    """

    keep: KeepRule | None = None
    claim_bytes = 0

    def __init__(
        self,
        store: Store,
        checkpointer: checkpoint.Checkpointer,
        report: Callable[[Committed], None],
        clock: Clock,
        keys_before: Callable[[], float],
    ) -> None:
        self._store = store
        self._checkpointer = checkpointer
        self._report = report
        self._clock = clock
        self._waiting: queue.SimpleQueue[Op | None] = queue.SimpleQueue()
        self._again: list[Op] = []
        self._refused: Exception | None = None
        self._closing = threading.Event()
        self._poison: Exception | None = None
        self._keys_before = keys_before
        self._keys_came = 0
        self._swept_at = 0.0
        self.busy = False
        self.commits = 0
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, op: Op) -> None:
        """Hands an operation over; its future is resolved on the loop."""
        self._waiting.put(op)

    def stop(self) -> None:
        """Writes what was submitted and ends the thread; blocks until then."""
        self._closing.set()
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        open_ = True
        while open_ or self._again:
            ops, open_ = self._gather(open_)
            self.commits += 1
            self.busy = True
            while ops:
                ops = self._commit(ops)
            if self._poison is None and self._checkpointer.ripe():
                self._restart_wal()
            self.busy = False

    def _gather(self, open_: bool) -> tuple[list[Op], bool]:
        """Everything that waits, up to the bound; blocks for the first operation."""
        if self._again:
            self._closing.wait(FULL_PAUSE)
            return self._gather_again(open_)
        ops: list[Op] = []
        size = 0
        while open_ and size < COMMIT_BYTES:
            try:
                op = self._waiting.get(block=not ops)
            except queue.Empty:
                break
            if op is None:
                return ops, False
            ops.append(op)
            if type(op) is QueuedAppend:
                size += len(op.append.records.payload)
                if op.append.claim is not None:
                    size += self.claim_bytes + len(op.append.claim.answer)
        return ops, open_

    def _gather_again(self, open_: bool) -> tuple[list[Op], bool]:
        """The disk is full: what is tried again, and behind it what came and is no append."""
        ops, self._again = self._again, []
        appends: list[Op] = []
        while open_:
            try:
                op = self._waiting.get_nowait()
            except queue.Empty:
                break
            if op is None:
                open_ = False
            else:
                (appends if type(op) in _TRIED_ONCE else ops).append(op)
        if appends:
            self._refuse(appends, self._refused)
        return ops, open_

    def _refuse(self, appends: Sequence[Op], error: Exception | None = None) -> None:
        full = error or Overloaded(what="the disk of the journal", retry_after=STALLED)
        self._report(Committed(appends, (), self._store.meta.ledger, 0.0, full))

    def _commit(self, ops: list[Op]) -> list[Op]:
        """Commits operations; returns those that are left to be committed, without the others."""
        if self._poison is not None:
            self._report(Committed(ops, (), self._store.meta.ledger, 0.0, self._poison))
            return []
        started = time.perf_counter()
        write, places = self._plan(ops)
        try:
            gone = self._store.write(write, hurried=not self._waiting.empty())
        except KeyTaken as error:
            return self._without(ops, error)
        except Exception as error:  # noqa: BLE001  whatever it is, it decides about the journal
            self._failed(ops, error)
            return []
        try:
            if not self._store.in_place():
                raise FileNotFoundError("the file was removed or replaced")
            self._checkpointer.check_disk()
        except OSError as error:
            self._failed(ops, error)
            return []
        seconds = time.perf_counter() - started
        moved = self._store.moved
        chunks = [*write.chunks, *moved.chunks]
        rows = len(write.claims) + len(write.bookmarks) + len(write.ids)
        written = (4 + rows) * PAGE_BYTES
        for chunk in chunks:
            written += chunk.records.held_bytes
        for letter in write.invalid:
            written += len(letter.payload)
        self._checkpointer.wrote(written)
        self._count_keys(write)
        self._report(
            Committed(
                ops,
                chunks,
                self._store.meta.ledger,
                seconds,
                places=places,
                keys_gone=gone,
                dead=self._store.dead,
                moved=moved,
                at=write.at,
                reusable=self._store.reusable,
                bookmarks=self._store.bookmarks,
            )
        )
        return []

    def _without(self, ops: Sequence[Op], taken: KeyTaken) -> list[Op]:
        """Refuses the appends whose keys are taken, at least one; returns the others."""
        refused, others = list[Op](), list[Op]()
        for op in ops:
            claim = op.append.claim if type(op) is QueuedAppend else None
            (others if claim is None or claim.key not in taken.keys else refused).append(op)
        self._refuse(refused, taken)
        return others

    def _count_keys(self, write: Write) -> None:
        self._keys_came = len(write.claims) + (0 if write.sweep else self._keys_came)
        if write.sweep:
            self._swept_at = write.at

    def _sweep(self, ops: Sequence[Op], now: float) -> int:
        """Returns how many of the oldest idempotency keys this commit looks at: usually none."""
        if not self._store.keys.count:
            return 0
        due = abs(now - self._swept_at) >= SWEEP_SECONDS or any(type(op) is Sweep for op in ops)
        return SWEEP_ROWS + 2 * self._keys_came if due else 0

    def _plan(self, ops: Sequence[Op]) -> tuple[Write, list[Place]]:
        now = self._clock.now()
        appends = [op.append for op in ops if type(op) is QueuedAppend]
        sweep = self._sweep(ops, now)
        next_chunk = self._store.meta.last_chunk + 1
        runs, places = _joined(appends, next_chunk)
        refused: list[DeadLetter] = []
        claims: list[IdempotencyClaim] = []
        bookmarks: list[SourceOffset] = []
        ids: list[HeldIds] = []
        deduplicated: list[Deduplicated] = []
        for one in appends:
            for invalid in one.invalid:
                refused.append(invalid_letter(invalid, now, one))  # noqa: PERF401
            if one.claim is not None:
                claims.append(one.claim)
            if one.offset is not None:
                bookmarks.append(one.offset)
            if one.ids is not None:
                ids.append(one.ids)
            if one.deduplicated is not None:
                deduplicated.append(one.deduplicated)
        write = Write(
            [Chunk(number, now, run) for number, run in enumerate(runs, next_chunk)],
            refused,
            claims=claims,
            bookmarks=bookmarks,
            ids=ids,
            deduplicated=deduplicated,
            at=now,
            sweep=sweep,
            keys_before=self._keys_before() if sweep else 0.0,
            keep=self.keep,
        )
        return (write if len(appends) == len(ops) else _with_others(write, ops)), places

    def _failed(self, ops: Sequence[Op], error: Exception) -> None:
        ledger = self._store.meta.ledger
        overloaded = error if isinstance(error, Overloaded) else None
        if overloaded or getattr(error, "sqlite_errorcode", None) in _NO_SPACE:
            refused = [op for op in ops if type(op) in _TRIED_ONCE]
            self._refused = overloaded
            if refused:
                self._refuse(refused, overloaded)
            self._again = [op for op in ops if type(op) not in _TRIED_ONCE]
            self._checkpointer.full()
            self.keep = None
            if not (self._again and self._closing.is_set()):
                return
            ops, self._again = self._again, []
        self._poisoned(error)
        self._report(Committed(ops, (), ledger, 0.0, self._poison))

    def _restart_wal(self) -> None:
        try:
            checkpoint.restart(self._store.connection)
        except sqlite3.Error as error:
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
                return  # the WAL keeps its content; the next round tries again
            self._poisoned(error)
            self._report(Committed((), (), self._store.meta.ledger, 0.0, self._poison))

    def _poisoned(self, error: Exception) -> None:
        if repair.is_damage(error):
            repair.mark(self._store.path)
        problem = f"{type(error).__name__}: {error}"
        failed = error if isinstance(error, JournalFailed) else None
        self._poison = failed or JournalFailed(path=self._store.path, problem=problem)


def _with_others(write: Write, ops: Sequence[Op]) -> Write:
    """Adds what is no append."""
    changes = [op.change for op in ops if type(op) is QueuedChange]
    return write._replace(
        sealed=[change for change in changes if type(change) is Seal],
        postponed=[change.batch for change in changes if type(change) is Postpone],
        settled=[change for change in changes if type(change) is Settle],
        requeue_at=write.at if any(type(op) is Requeue for op in ops) else None,
        room=min((op.room for op in ops if type(op) is Requeue), default=0),
        expire=max(((op.since, op.before) for op in ops if type(op) is Expire), default=None),
    )


def _joined(appends: Sequence[Append], number: int) -> tuple[list[Records], list[Place]]:
    """Small neighbours as one run, large ones in pieces, everything in the order it came in.

    Returns:
        The runs, and where each append's records are if they are the chunks from `number` on.
    """
    chunks: list[Records] = []
    places: list[Place] = []
    group: list[Append] = []
    size = first = 0
    for append in appends:
        run = append.records
        if run.count == 0:
            places.append(Place(0, 0))
            continue
        small = len(run.payload) < JOIN_BYTES and run.layout is Layout.LINES
        if group and (not small or size + len(run.payload) > CHUNK_BYTES):
            chunks.append(_together(group))
            group, size, first = [], 0, 0
        if small:
            places.append(Place(number + len(chunks), first))
            size += len(run.payload)
            if not group or append.envelope is not group[-1].envelope:
                size += len(append.envelope)
            group.append(append)
            first += run.count
            continue
        pieces = _together([append]).pieces(CHUNK_BYTES)
        counts = tuple(piece.count for piece in pieces) if len(pieces) > 1 else ()
        places.append(Place(number + len(chunks), 0, counts))
        chunks += pieces
    if group:
        chunks.append(_together(group))
    return chunks, places


def _together(group: Sequence[Append]) -> Records:
    """The records of some appends as one run, with their envelopes."""
    packed = group[0].envelope
    for one in group:
        if one.envelope is not packed or one.records.envelopes:
            parts = [(one.records.count, one.records.envelopes or one.envelope) for one in group]
            packed = envelope.joined(parts)
            break
    if len(group) == 1:
        return Records(*group[0].records[:5], packed)
    return join([one.records for one in group], packed)
