"""`Journal`: a few operations, each atomic and durable when its future resolves.

`append` accepts records, `write` writes down a change of batches, `read` and `load` bring records
back. What only some journals can do is a capability, `None` where it is absent; a setting that
needs an absent one is refused at the start (`build.py`). `docs/ARCHITECTURE.md` has the invariants.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from asyncio import Event, Future
    from collections.abc import Callable, Mapping, MutableMapping, Sequence
    from pathlib import Path

    from ingestd.base.append import Append, SourceOffset
    from ingestd.base.clock import Clock
    from ingestd.base.record import Records, Span
    from ingestd.journal.dead_letters import DeadLetter, DeadLetterStore, DeadTotals, InvalidQuota
    from ingestd.journal.idempotency import IdempotencyKeys, KeyRule


class Chunk(NamedTuple):
    """The records that one commit put into the journal together.

    Attributes:
        id: from 1, in the order of commits, never used again.
        accepted_at: seconds since the epoch.
        records: what it holds; a damaged chunk reads back with its count and no payload.
        damaged: its checksum did not fit.
    """

    id: int
    accepted_at: float
    records: Records
    damaged: bool = False


class Place(NamedTuple):
    """The place of the records of one append: from record `first` of chunk `chunk` on.

    Attributes:
        chunk: the first one.
        first: counts from 0.
        counts: how many lie in each chunk from `chunk` on, if there are more than one.
    """

    chunk: int
    first: int
    counts: tuple[int, ...] = ()


class Cursor(NamedTuple):
    """The beginning of the unsealed records: record `record` of chunk `chunk`."""

    chunk: int
    record: int


class Failing(NamedTuple):
    """The failures of a sealed batch so far.

    Attributes:
        seconds: for how long; only time in which the daemon ran.
        counted: tries that count against it.
    """

    seconds: float = 0.0
    counted: int = 0


class Sealed(NamedTuple):
    """A sealed batch, without its payload.

    Attributes:
        number: unique and growing within the journal; with the journal's id it is the batch's id.
        spans: which records, in order.
        count: how many.
        attempts: tries that have been made.
        due_at: not to be tried before this, seconds since the epoch; 0 for at once.
        accepted_at: see `SealedBatch`.
        failing: its failures.
        lineage: see `SealedBatch`.
    """

    number: int
    spans: tuple[Span, ...]
    count: int  # type: ignore[assignment]  # hides tuple.count
    attempts: int = 0
    due_at: float = 0.0
    accepted_at: float = 0.0
    failing: Failing = Failing()
    lineage: tuple[int, ...] = ()


class Seal(NamedTuple):
    """Writes a batch down, and that everything before `cursor` is sealed.

    Attributes:
        batch: the batch.
        cursor: stands behind its last record, and behind those of `more`.
        more: other batches, where records go into several at once.
    """

    batch: Sealed
    cursor: Cursor
    more: Sequence[Sealed] = ()


class Postpone(NamedTuple):
    """Writes down a batch's new attempts and due time."""

    batch: Sealed


class Settle(NamedTuple):
    """Writes down all that one result changes.

    Attributes:
        batch: the batch that goes, by number.
        processed: how many of its records are done.
        dead: the dead letters that come.
        successors: batches that replace it, each with its own number.
        finished: chunks that hold no unsettled record any more.
        finished_bytes: the sum of their bytes.
        damaged: chunks that can't be read; each is kept aside before it goes.
    """

    batch: int
    processed: int
    dead: Sequence[DeadLetter]
    successors: Sequence[Sealed]
    finished: Sequence[int]
    finished_bytes: int
    damaged: Sequence[int] = ()


Change = Seal | Postpone | Settle
"""A change of the state of batches, which one commit writes whole or not at all."""


class Ledger(NamedTuple):
    """The numbers of promise 2 over the life of the data directory, after some commit.

    `accepted == processed + dead + pending` always holds. `invalid` counts records that were never
    accepted and kept as dead letters; they are in none of the four.
    """

    accepted: int = 0
    processed: int = 0
    dead: int = 0
    invalid: int = 0

    @property
    def pending(self) -> int:
        """Records that are accepted and not settled, by the counters."""
        return self.accepted - self.processed - self.dead


class JournalContext(NamedTuple):
    """The surroundings that a journal is built with, beside `[journal]`.

    Attributes:
        folder: of its files; exists.
        clock: gives the time.
        on_commit: called after each commit with (seconds, appends, bytes).
        dead_bytes_max: bound on the dead letters of accepted records.
        keys: how long idempotency keys are kept, and how many.
        invalid: bound on the letters of records that were never accepted.
    """

    folder: Path
    clock: Clock
    on_commit: Callable[[float, int, int], None]
    dead_bytes_max: int
    keys: KeyRule
    invalid: InvalidQuota


class ChunkSize(NamedTuple):
    """Records of a chunk, and the bytes that it takes in the journal."""

    bytes: int
    records: int


class Recovered(NamedTuple):
    """An opened journal, and all that is in it.

    Attributes:
        journal: the journal's own id, the first part of the ids of its batches and records.
        failed: gets `JournalFailed` when the journal is poisoned.
        batches: sealed and not settled, oldest first.
        cursor: where the unsealed records begin.
        last_chunk: the newest chunk's id; 0 in a new journal.
        next_batch: the first batch number that is free.
        sizes: of each chunk that `batches` name and that is still there.
        waits: by number, seconds until `due_at` when that was written down: it is never longer,
            whatever the clock says now.
        set_aside: where an unreadable journal was moved to, if that happened.
        ids: that senders gave the last records: principal and ids, packed, of each append.
        keys: of `dedupe.key`: when they came, seconds since the epoch, and the keys, packed.
    """

    journal: str
    failed: Future[None]
    batches: Sequence[Sealed] = ()
    cursor: Cursor = Cursor(1, 0)
    last_chunk: int = 0
    next_batch: int = 1
    sizes: Mapping[int, ChunkSize] = MappingProxyType({})
    waits: Mapping[int, float] = MappingProxyType({})
    set_aside: str = ""
    ids: Sequence[tuple[str, bytes]] = ()
    keys: Sequence[tuple[float, bytes]] = ()


class KeptTotals(NamedTuple):
    """Processed chunks that are kept (`journal.keep`), some time within the last second.

    Attributes:
        chunks: how many.
        records: in them.
        bytes: of them.
        replayed: records that were fed again, over the life of the journal.
    """

    chunks: int = 0
    records: int = 0
    bytes: int = 0
    replayed: int = 0


class JournalStatus(NamedTuple):
    """The numbers of a journal after some commit.

    Attributes:
        ledger: the counters.
        bytes: of all that it holds.
        bytes_max: its bound.
        dead_letters: those that it keeps, and those that went.
        busy: its thread is at something.
        commits: how many it has begun; with `busy` this shows if it moves.
        poisoned: it takes and writes nothing any more.
        unanswered: operations that were submitted, and of which the event loop knows no end yet.
        kept: processed chunks that are kept.
        refusing: the setting of the bound that refused the last append; empty if it was taken.
        refused: appends that each such bound has refused in this life.
    """

    ledger: Ledger
    bytes: int
    bytes_max: int
    dead_letters: DeadTotals
    busy: bool = False
    commits: int = 0
    poisoned: bool = False
    unanswered: int = 0
    kept: KeptTotals = KeptTotals()
    refusing: str = ""
    refused: Mapping[str, int] = MappingProxyType({})


class Closed(NamedTuple):
    """The end of a journal.

    Attributes:
        ledger: the counters.
        counted: pending records counted from the rows; `None` if that was not possible.
        written: everything that was submitted was written, or refused.
        gone: its threads have ended; one that the disk holds can't be ended.
        durable: the next start finds the pending records.
    """

    ledger: Ledger
    counted: int | None = None
    written: bool = True
    gone: bool = True
    durable: bool = True


class Journal(Protocol):
    """The durable store of one pipeline. All methods are called on the event loop."""

    @property
    def dead_letters(self) -> DeadLetterStore | None:
        """Dead letters that operators read, requeue and purge."""

    @property
    def idempotency(self) -> IdempotencyKeys | None:
        """Idempotency keys, durable in the commit of their records."""

    @property
    def offsets(self) -> OffsetStore | None:
        """The offsets of sources, durable in the commit of their records."""

    @property
    def maintenance(self) -> Maintenance | None:
        """Counting of rows, and the space of a disk."""

    @property
    def group(self) -> JournalGroup | None:
        """The journals of other daemons beside it, which it may adopt."""

    async def open(self, on_chunk: Callable[[Chunk], None]) -> Recovered:
        """Opens and recovers; from now on each new chunk is announced once it is durable."""
        ...

    def append(self, append: Append) -> Future[Place]:
        """Accepts records; resolved with their place once they are durable.

        Raises:
            Overloaded: the journal's bound, or the disk's.
            NeverFits: it alone is more than the journal may hold.
            JournalFailed: it is poisoned.
        """
        ...

    def write(self, change: Change) -> Future[None]:
        """Writes a change down; resolved once it is durable. Changes are written in order."""
        ...

    async def read(self, first: int, bytes_max: int) -> list[Chunk]:
        """Reads chunks from id `first` on, in order: one if there is one, then up to the bound.

        Damaged chunks come back marked.
        """
        ...

    async def load(self, spans: Sequence[Span]) -> Records | None:
        """Reads the records of a batch; `None` if one of its chunks is damaged or gone."""
        ...

    def status(self) -> JournalStatus:
        """Returns the present numbers; asks no disk."""
        ...

    async def close(self, deadline: float | None = None) -> Closed:
        """Finishes what was submitted, tidies the file up, ends the threads.

        Args:
            deadline: loop time at which it is left as it is, for a disk that does not answer.
        """
        ...


# -- capabilities ----------------------------------------------------------------------------------


class OffsetStore(Protocol):
    """The offsets of sources; `Append.offset` writes one."""

    async def find(self, key: str) -> SourceOffset | None:
        """Reads the last offset of a key."""
        ...


class FreeSpace(NamedTuple):
    """The free space of a journal's disk.

    Attributes:
        free: bytes that count as free.
        free_min: with less no record is accepted.
        refusal: what else keeps records out at present; empty if nothing does.
    """

    free: int
    free_min: int
    refusal: str = ""

    @property
    def low(self) -> bool:
        """Returns True if no record is accepted."""
        return self.free < self.free_min or self.refusal != ""

    @property
    def shortage(self) -> str:
        """Tells both numbers of bytes in a few words."""
        free, least = (f"{size / 2**20:,.1f} MiB" for size in self[:2])
        return f"{free} are free, journal.free_min is {least}"


class Maintenance(Protocol):
    """Watches what a journal lies on."""

    def free_space(self) -> FreeSpace:
        """Asks the disk now."""
        ...

    async def audit(self) -> int | None:
        """Counts one step: pending records by the counters less those by the rows.

        `None` until all are counted. Where that took more than the start had time for, the first
        count is the start's, and a difference that it finds is damage.

        Raises:
            JournalFailed: the rows can't be read, or the first count found a difference.
        """
        ...


class JournalGroup(Protocol):
    """The journals that daemons have side by side, and the adoption of those without a daemon.

    Attributes:
        states: of each journal as it was last looked at, for the status.
    """

    states: list[dict[str, Any]]

    async def run(
        self,
        pipelines: MutableMapping[str, Any],
        build: Callable[[Path, str, object], Any],
        stop: Event,
    ) -> None:
        """Looks for journals without a daemon until it is stopped, and has them processed here.

        Args:
            pipelines: those that are open, by name; one that works on an adopted journal is put
                in while it is open. At a stop it stays, for the daemon to drain and close.
            build: builds such a pipeline, not opened yet, from its folder, the name of the
                journal and the table of its settings.
            stop: ends it, after what it is just opening.
        """
        ...
