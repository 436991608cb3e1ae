"""The SQLite journal: the event loop's face of the store, its committer and its checkpointer.

Three threads, each with a connection of its own and an owner that ends it: the committer writes,
the checkpointer tidies, the reader brings back what is not in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import random
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from ingestd.base.clock import Ages
from ingestd.base.errors import DataDirError, JournalFailed, KeyTaken, NeverFits, Overloaded
from ingestd.base.files import tighten
from ingestd.base.rate import Rate, wait_for_room
from ingestd.host.data_dir import FileLock
from ingestd.journal.dead_letters import DeadTotals, InvalidQuota
from ingestd.journal.disk_space import DiskSpaceGuard, scaled
from ingestd.journal.idempotency import IdempotencyKeys, KeyRule, RememberedKey, size_of
from ingestd.journal.interface import (
    Change,
    Chunk,
    Closed,
    JournalStatus,
    KeptTotals,
    Ledger,
    Place,
    Recovered,
    Settle,
)
from ingestd.journal.sqlite import offsets, repair, schema
from ingestd.journal.sqlite.audit import Count, Difference, SqliteMaintenance
from ingestd.journal.sqlite.checkpoint import Checkpointer
from ingestd.journal.sqlite.dead_letters import SqliteDeadLetterStore
from ingestd.journal.sqlite.letters import poll_marked
from ingestd.journal.sqlite.store import (
    Store,
    check_pages,
    connect,
    find_key,
    key_owners,
    read_chunks,
    read_spans,
    row_bytes_max,
    why,
)
from ingestd.journal.sqlite.writer import (
    JOIN_BYTES,
    Committed,
    Expire,
    JournalWriter,
    Op,
    QueuedAppend,
    QueuedChange,
    Requeue,
    Sweep,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ingestd.base.append import Append, IdempotencyClaim
    from ingestd.base.clock import Clock
    from ingestd.base.record import Records, Span
    from ingestd.journal.interface import JournalContext, JournalGroup
    from ingestd.journal.settings import JournalSettings
    from ingestd.journal.sqlite import kept


log = structlog.get_logger(__name__)

T = TypeVar("T")
_NOWHERE = Place(0, 0)
KEEP_SHARE = 0.8
"""The part of `journal.bytes_max` that records and kept chunks may take together."""
KEEP_FREE = 1.25
"""Kept chunks go while less than this many times `journal.free_min` is free."""
SHRINK_SECONDS = 1.0
"""How long making the file smaller may take when it is closed."""


class SqliteJournal:
    """See `ingestd.journal.interface.Journal`.

    Args:
        path: the file; its directory exists and is locked, and it is locked itself while open.
        bytes_max: bound on the bytes of chunks and of accepted records' dead letters.
        clock: gives `accepted_at`.
        on_commit: called on the loop after each commit with (seconds, operations, bytes).
        dead_bytes_max: bound on the bytes of these dead letters; `None` for `bytes_max`.
        keys: how long idempotency keys are kept, and how many.
        space: watches the disk; without one only a failed commit tells that it is full.
        invalid: bounds the letters of records that were never accepted.
        keep: seconds for which processed chunks are kept; 0 for none.
        keep_bytes_max: bound on the bytes of these.
    """

    keeps = synced = True
    group: JournalGroup | None = None
    store_letters: type[SqliteDeadLetterStore] = SqliteDeadLetterStore

    def __init__(
        self,
        path: Path,
        *,
        bytes_max: int,
        clock: Clock,
        on_commit: Callable[[float, int, int], None],
        dead_bytes_max: int | None = None,
        keys: KeyRule = KeyRule(),  # noqa: B008  immutable
        space: DiskSpaceGuard | None = None,
        invalid: InvalidQuota = InvalidQuota(),  # noqa: B008  immutable
        keep: float = 0.0,
        keep_bytes_max: int = 0,
    ) -> None:
        self.path = path
        self._invalid = invalid
        self._locks = contextlib.ExitStack()
        self.bytes_max = bytes_max
        self.dead_letters = self.store_letters(
            path,
            bytes_max if dead_bytes_max is None else dead_bytes_max,
            totals=lambda: self.dead_totals,
            poll=self._poll_marked,
            queue=self._queue,
            room=self._room,
        )
        self.id = ""
        self.ledger = Ledger()
        self.bytes = 0
        self.dead_totals = DeadTotals()
        self._bookmarks = offsets.OffsetTotals()
        self._commits = self._unanswered = 0
        self.refusing = ""
        bounds = ("journal.bytes_max", *["journal.free_min"] * (space is not None))
        self.refused = dict.fromkeys(bounds, 0)
        self._gathered: list[Op] = []
        self._clock = clock
        self._on_commit = on_commit
        self.idempotency = IdempotencyKeys(keys, clock, find=self._find_key, sweep=self._sweep)
        self.offsets = offsets.SqliteOffsets(self._read)
        self.maintenance = SqliteMaintenance(space, partial(self._read, self._step))
        self.space = space
        self._keep, self._keep_bytes_max, self._ages = keep, keep_bytes_max, Ages(clock)
        self.kept = KeptTotals()
        self._sweeping: asyncio.Future[None] | None = None
        self._written = False
        self._counted: int | None = None
        self._drained = Rate(clock.monotonic())

    async def open(self, on_chunk: Callable[[Chunk], None]) -> Recovered:
        """See `Journal.open`.

        Raises:
            JournalUnreadable: the file is another program's or another version's.
            DataDirError: it can't be opened or created.
            JournalFailed: the disk can't be read or is full; another start may succeed.
        """
        self._loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[None] = self._loop.create_future()
        self._on_chunk = on_chunk
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="journal-read")
        try:
            recovered = await self._loop.run_in_executor(self._reader, self._open)
        except BaseException:
            self._reader.shutdown()
            self._locks.close()
            raise
        self._committer.start()
        return recovered

    def _open(self) -> Recovered:
        set_aside = ""
        self._count, self._adds_up = Count(), False
        try:
            repair.finish(self.path)
            self._lock()
            try:
                store, recovered = self._open_store()
            except Exception as error:
                if not repair.is_damage(error):
                    raise
                set_aside = repair.repair(self.path, self._clock.now())
                self._count = Count()
                self._lock()  # the new file; the old one's is kept until the end
                store, recovered = self._open_store()
            self.id, self.ledger, self.bytes = store.id, store.meta.ledger, store.stored_bytes()
            self._row_bytes_max = row_bytes_max(store.connection)
            self._dead_are(store.dead)
            self._bookmarks = store.bookmarks
            self.idempotency.opened(self._key_owners)
            if self.space is not None:
                self.space.reusable = store.reusable
                if self.space.low(self._clock.monotonic()):
                    free, free_min = self.space.free, self.space.free_min
                    self._refusing("journal.free_min", free=free, free_min=free_min)
            self._reading = connect(self.path)
        except (sqlite3.Error, OSError) as error:
            if is_passing(error):
                raise JournalFailed(path=self.path, problem=why(error)) from error
            raise DataDirError(path=self.path, problem=why(error)) from error
        self._store = store
        self._checkpointer = Checkpointer(self.path, synced=self.synced)
        self._committer = JournalWriter(
            store, self._checkpointer, self._report, self._clock, self._keys_before
        )
        self.kept = _kept_totals(store.connection) or KeptTotals()
        self._committer.keep = self._keep_rule()
        return recovered._replace(set_aside=set_aside)

    def _lock(self) -> None:
        """Holds the file, under whichever name another daemon finds it.

        Raises:
            DataDirError: another one does.
        """
        for suffix in ("-wal", "-shm"):
            tighten(self.path.with_name(self.path.name + suffix))
        self._locks.callback(FileLock(self.path, of=self.path).close)

    def _keys_before(self) -> float:
        """Idempotency keys from before this time go."""
        return self.idempotency.ages.before(self.idempotency.rule.kept)

    def _open_store(self) -> tuple[Store, Recovered]:
        """Opens it, and reads as much as tells whether it is whole.

        Of the chunks that is one step of the count: all of them if they are few. `audit` goes on
        with it, so a long backlog does not delay the start.
        """
        if repair.marked(self.path):
            raise sqlite3.DatabaseError("damage was met in an earlier life")
        store = Store(self.path, self._invalid, keeps=self._keep > 0)
        try:
            check_pages(store.connection, self.path)
            recovered = store.recovered(self.failed)
            _check_numbers(store, recovered)
            self._key_owners = key_owners(store.connection)
            self._step(store.connection)
        except BaseException:
            store.close()
            raise
        return store, recovered

    def _step(self, db: sqlite3.Connection) -> int | None:
        """One step of the count; the first one that comes to its end must find nothing."""
        found = self._count.step(db)
        if found is None:
            return None
        if not self._adds_up and found != Difference(0, 0):
            raise sqlite3.DatabaseError("the rows do not add up to the ledger")
        self._adds_up = True
        return found.records

    def status(self) -> JournalStatus:
        """See `Journal.status`."""
        return JournalStatus(
            self.ledger,
            self.bytes,
            self.bytes_max,
            self.dead_totals,
            self._committer.busy,
            self._committer.commits,
            self.failed.done(),
            self._unanswered,
            self.kept,
            self.refusing,
            self.refused,
        )

    def append(self, append: Append) -> asyncio.Future[Place]:
        """See `Journal.append`."""
        if self.failed.done():
            raise JournalFailed(path=self.path, problem="an earlier commit failed")
        records, claim = append.records, append.claim
        size = append.stored_bytes
        if claim is not None:
            size += size_of(claim)
        whole = size + offsets.size_of(append.offset)
        if whole > self.bytes_max:
            raise NeverFits(size=whole, what="journal.bytes_max", bound=self.bytes_max)
        if len(records.payload) + len(records.sizes) > self._row_bytes_max:
            # SQLite would refuse the commit with all that is in it, each time it is tried.
            raise NeverFits(size=size, what="a row of the journal", bound=self._row_bytes_max)
        if self.bytes + whole > self.bytes_max:
            self._refusing("journal.bytes_max", used=self.bytes, bytes_max=self.bytes_max)
            raise self._full("the journal", self.bytes + whole, self.bytes_max)
        if self.space is not None and self.space.low(self._clock.monotonic()):
            free, free_min = self.space.free, self.space.free_min
            self._refusing("journal.free_min", free=free, free_min=free_min)
            what = f"the disk of the journal ({self.space.left.shortage})"
            raise self._full(what, free_min - free, 0)
        if self.refusing:
            log.info("records_accepted_again", path=str(self.path), after=self.refusing)
            self.refusing = ""
        self.bytes += size
        future: asyncio.Future[Place] = self._loop.create_future()
        self._submit(QueuedAppend(future, append))
        if size >= JOIN_BYTES:
            self._hand_over()  # worth a commit by itself
        if claim is not None:
            claim.submitted = True
        return future

    def _refusing(self, bound: str, **facts: int) -> None:
        """Says once that a bound is reached, until something is taken again; counts."""
        self.refused[bound] += 1
        if self.refusing != bound:
            self.refusing = bound
            log.warning("records_refused", path=str(self.path), bound=bound, **facts)

    def _submit(self, op: Op) -> None:
        """Hands an operation to the committer, with all others of this turn of the loop.

        Each hand-over wakes its thread, which wants the interpreter from the loop's and may commit
        what little there is: more time goes into that than into small appends themselves.
        """
        if not self._gathered:
            self._loop.call_soon(self._hand_over)
        self._gathered.append(op)
        self._unanswered += 1

    def _queue(self, kind: Callable[..., Op], *parts: object) -> asyncio.Future[Any]:
        """Submits an operation of a kind, which begins with its future."""
        future = self._loop.create_future()
        self._submit(kind(future, *parts))
        return future

    def _hand_over(self) -> None:
        gathered, self._gathered = self._gathered, []
        for op in gathered:
            self._committer.submit(op)

    def _full(self, what: str, used: float, bound: float) -> Overloaded:
        rate = self._drained.per_second(self._clock.monotonic())
        return Overloaded(what=what, retry_after=wait_for_room(used, bound, rate, random.random))

    def write(self, change: Change) -> asyncio.Future[None]:
        """See `Journal.write`."""
        return self._queue(QueuedChange, change)

    def _dead_are(self, totals: DeadTotals) -> None:
        """The dead letters after some commit, ours or another process's."""
        if totals == self.dead_totals:
            return  # as after nearly every commit
        self.bytes += totals.accepted_bytes - self.dead_totals.accepted_bytes
        self.dead_totals = totals

    def _room(self) -> int:
        """Returns the bytes of records that may come without being asked for by a source."""
        if self.space is not None and self.space.low(self._clock.monotonic()):
            return 0
        return max(0, self.bytes_max - self.bytes)

    def _keep_rule(self) -> kept.KeepRule | None:
        """The bounds of kept chunks now: the journal's own and the disk's go before theirs."""
        if not self._keep:
            return None
        from ingestd.journal.sqlite import kept  # noqa: PLC0415  most journals keep none

        bytes_max = min(self._keep_bytes_max, int(KEEP_SHARE * self.bytes_max) - self.bytes)
        if self.space is not None:
            self.space.low(self._clock.monotonic())
            short = int(self.space.free_min * KEEP_FREE) - self.space.free
            if short > 0:
                bytes_max = min(bytes_max, self.kept.bytes - short)
        return kept.KeepRule(max(0, bytes_max), self._ages.before(self._keep))

    async def _poll_marked(self) -> bool:
        commits = self._commits
        rule = self._committer.keep = self._keep_rule()
        totals, self.kept, marked = await self._read(_polled, rule)
        if commits == self._commits:  # else a commit has told something newer meanwhile
            self._dead_are(totals)
        return marked

    async def _find_key(self, key: str) -> RememberedKey | None:
        return await self._read(find_key, key)

    def _sweep(self) -> None:
        """Asks for expired keys to go, where no commit of an append will do it by the way."""
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = self._loop.create_future()
            self._sweeping.add_done_callback(lambda future: future.exception())
            self._submit(Sweep(self._sweeping))

    async def read(self, first: int, bytes_max: int) -> list[Chunk]:
        """See `Journal.read`."""
        return await self._read(read_chunks, first, bytes_max)

    async def load(self, spans: Sequence[Span]) -> Records | None:
        """See `Journal.load`."""
        return await self._read(read_spans, spans)

    async def _read(self, function: Callable[..., T], *args: object) -> T:
        """Calls a function with the reading connection, in the reader's thread."""
        call = partial(function, self._reading, *args)
        try:
            return await self._loop.run_in_executor(self._reader, call)
        except (sqlite3.Error, ValueError, TypeError) as error:
            # Rows that can't be read: the next start repairs the file, or finds the disk better.
            if repair.is_damage(error):
                repair.mark(self.path)
            failed = JournalFailed(path=self.path, problem=f"{type(error).__name__}: {error}")
            if not self.failed.done():
                self.failed.set_exception(failed)
            raise failed from error

    def _report(self, committed: Committed) -> None:
        """On the committer's thread: everything else happens on the loop."""
        try:
            self._loop.call_soon_threadsafe(self._committed, committed)
        except RuntimeError:
            pass  # the loop is gone: no future is awaited any more, and what was written is written

    def _committed(self, committed: Committed) -> None:
        error = committed.error
        self.ledger = committed.ledger
        self._tables_changed(committed)
        self._commits += 1
        self._unanswered -= len(committed.ops)
        for op in committed.ops:
            self._account(op, applied=error is None)
            if type(op) is QueuedAppend and op.append.claim is not None:
                self._claim_ended(op.append.claim, committed)
        if committed.dead is not None:
            self._dead_are(committed.dead)
        for chunk in committed.chunks:
            self.bytes += chunk.records.stored_bytes
            self._on_chunk(chunk)
        self._resolve(committed)
        if isinstance(error, JournalFailed) and not self.failed.done():
            self.failed.set_exception(error)
        if error is None and committed.ops:
            size = sum(len(chunk.records.payload) for chunk in committed.chunks)
            self._on_commit(committed.seconds, len(committed.ops), size)

    def _resolve(self, committed: Committed) -> None:
        """Resolves the futures of its operations."""
        places = iter(committed.places)
        for op in committed.ops:
            place = next(places, _NOWHERE) if type(op) is QueuedAppend else _NOWHERE
            if op.future.done():
                continue
            if committed.error is not None:
                op.future.set_exception(committed.error)
            elif isinstance(op, QueuedAppend):
                op.future.set_result(place)
            elif isinstance(op, Requeue | Expire):
                op.future.set_result(committed.moved)
            else:
                op.future.set_result(None)

    def _claim_ended(self, claim: IdempotencyClaim, committed: Committed) -> None:
        applied = committed.error is None
        if not applied:
            self.bytes -= size_of(claim)
        taken = isinstance(committed.error, KeyTaken)
        self.idempotency.resolved(claim, at=committed.at, applied=applied, taken=taken)

    def _tables_changed(self, committed: Committed) -> None:
        if committed.keys_gone.count:
            self.idempotency.gone(committed.keys_gone.owners)
            self.bytes -= committed.keys_gone.bytes
        if committed.bookmarks is not None and committed.bookmarks is not self._bookmarks:
            self.bytes += committed.bookmarks.bytes - self._bookmarks.bytes
            self._bookmarks = committed.bookmarks
        if self.space is not None and committed.reusable is not None:
            self.space.reusable = committed.reusable

    def _account(self, op: Op, *, applied: bool) -> None:
        """Without dead letters that are there now: `_dead_are` counts those."""
        if type(op) is QueuedAppend:
            self.bytes -= op.append.stored_bytes  # if it is applied, its chunks count
        elif applied and type(op) is QueuedChange and type(op.change) is Settle:
            self.bytes -= op.change.finished_bytes
            self._drained.add(op.change.finished_bytes, self._clock.monotonic())

    async def close(self, deadline: float | None = None) -> Closed:
        """See `Journal.close`."""
        self._hand_over()
        self._written, self._counted = False, None
        closing = self._loop.run_in_executor(self._reader, self._close, deadline)
        left = None if deadline is None else max(0.0, deadline - self._loop.time())
        done, _ = await asyncio.wait({closing}, timeout=left)
        self._reader.shutdown(wait=bool(done))
        if done:
            closing.result()
        # What the committer reported last came before this call's own result.
        return Closed(self.ledger, self._counted, self._written, bool(done))

    def _close(self, deadline: float | None) -> None:
        self._committer.stop()
        self._written = True
        self._checkpointer.stop()
        try:
            self._counted = self._count_at_last(deadline)
        except (sqlite3.Error, TypeError):
            pass  # a poisoned journal may not even be readable
        self._reading.close()
        try:
            self._store.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._store.shrink(SHRINK_SECONDS)
        except sqlite3.Error:
            pass  # the WAL is recovered at the next start, and a file may be large
        self._store.close()
        self._checkpointer.close()
        self._locks.close()

    def _count_at_last(self, deadline: float | None) -> int | None:
        """Pending records by the rows, if half of the time that is left is enough for that."""
        now = self._loop.time()
        until = math.inf if deadline is None else now + (deadline - now) / 2
        count = Count()
        while (found := count.step(self._reading)) is None:
            if self._loop.time() > until:
                return None
        return self._store.meta.ledger.pending - found.records


def _polled(
    db: sqlite3.Connection, rule: kept.KeepRule | None
) -> tuple[DeadTotals, KeptTotals, bool]:
    """The totals, and whether there is something to requeue, to take in, to feed or to drop."""
    totals, due = poll_marked(db)
    held = _kept_totals(db)
    if schema.columns(db, "arrivals"):
        from ingestd.journal.sqlite import moves  # noqa: PLC0415  most journals have none

        due |= moves.waiting(db)
    if held is not None:
        from ingestd.journal.sqlite import kept  # noqa: PLC0415  most journals keep none

        due |= kept.due(db, rule or kept.NOTHING)
    return totals, held or KeptTotals(), due


def _kept_totals(db: sqlite3.Connection) -> KeptTotals | None:
    """The totals of what is kept; `None` if the journal has never kept anything."""
    if not schema.columns(db, "kept"):
        return None
    from ingestd.journal.sqlite import kept  # noqa: PLC0415  most journals keep none

    return kept.totals(db)


def _check_numbers(store: Store, recovered: Recovered) -> None:
    """Looks for damage in the one row that everything hangs on."""
    numbers: tuple[int, ...] = (
        *store.meta.ledger,
        *store.meta.cursor,
        *store.meta[2:],
        *store.dead,
        store.stored_bytes(),
    )
    numbers += tuple(batch.count - 1 for batch in recovered.batches)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise sqlite3.DatabaseError("a number of the journal is none, or negative")


def is_passing(error: Exception) -> bool:
    """Returns True if another start may succeed: the disk is full, or did not do as told."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL} or (
        isinstance(error, OSError) and error.errno in {errno.EIO, errno.ENOSPC, errno.EDQUOT}
    )


def options_of(settings: JournalSettings, context: JournalContext, path: Path) -> dict[str, Any]:
    """The arguments of a `SqliteJournal` beside its path, from `[journal]` and surroundings."""
    return {
        "bytes_max": settings.bytes_max,
        "clock": context.clock,
        "on_commit": context.on_commit,
        "dead_bytes_max": context.dead_bytes_max,
        "keys": context.keys,
        "space": DiskSpaceGuard(path.parent, scaled(settings.free_min, path.parent)),
        "invalid": context.invalid,
        "keep": settings.keep,
        "keep_bytes_max": settings.keep_bytes_max,
    }


def build(settings: JournalSettings, context: JournalContext) -> SqliteJournal:
    """The journal of a pipeline whose `journal.kind` is `sqlite`, not opened yet."""
    # SQLite's other files lie beside what a link names; a loop of links shows as it is opened.
    path = Path(os.path.realpath(context.folder / "journal.db"))
    return SqliteJournal(path, **options_of(settings, context, path))
