"""What a journal is: a few operations, each atomic and durable when its future resolves.

`append` accepts records, `seal` writes a batch down, `settle` and `postpone` write down what became
of it, and `read`/`load` bring records back. `revive` takes dead letters back that a person has
marked, `expire` lets old ones go. `docs/ARCHITECTURE.md` has the invariants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from asyncio import Future
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ingestd.base.append import Append, SourceOffset
    from ingestd.base.clock import Clock
    from ingestd.base.record import InvalidRecord, Records, Span
    from ingestd.base.watchdog import Stage
    from ingestd.journal.disk_space import DiskSpaceGuard
    from ingestd.journal.idempotency import IdempotencyKeys, KeyRule
    from ingestd.journal.sqlite.letters import InvalidQuota


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
    """Where the records of one append lie: from record `first` of chunk `chunk` on.

    Attributes:
        chunk: the first one.
        first: counts from 0.
        counts: how many lie in each chunk from `chunk` on, if there are more than one.
    """

    chunk: int
    first: int
    counts: tuple[int, ...] = ()


class Cursor(NamedTuple):
    """Where the unsealed records begin: record `record` of chunk `chunk`."""

    chunk: int
    record: int


class Failing(NamedTuple):
    """How a sealed batch has been failing.

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
        accepted_at: when its oldest record was accepted.
        failing: how it has been failing.
    """

    number: int
    spans: tuple[Span, ...]
    count: int  # type: ignore[assignment]  # hides tuple.count
    attempts: int = 0
    due_at: float = 0.0
    accepted_at: float = 0.0
    failing: Failing = Failing()


class DeadLetter(NamedTuple):
    """A record that was given up, with the reason.

    Attributes:
        record: its id in the journal, empty for one that was refused at the door.
        reason: a word: malformed, too_large, unfinished (refused at the door); undecodable,
            rejected, failed, timeout, crashed, damaged.
        error: one line.
        traceback: as Python prints it, or empty.
        payload: the record.
        attempts: tries that were made.
        first_at: when it was accepted, seconds since the epoch.
        last_at: when it was given up.
        records: how many records it stands for: 1, or all of a damaged chunk.
        principal: who sent it, of one that was never accepted.
        place: where its record lies in the journal, for who waits for it; not kept.
    """

    record: str
    reason: str
    error: str
    traceback: str
    payload: bytes
    attempts: int
    first_at: float
    last_at: float
    records: int = 1
    principal: str = ""
    place: Place | None = None


def refused_letter(refused: InvalidRecord, now: float, principal: str = "") -> DeadLetter:
    """The dead letter of a record that was never accepted, refused at `now`."""
    return DeadLetter(
        "", refused.reason, refused.detail, "", refused.payload, 0, now, now, principal=principal
    )


class Seal(NamedTuple):
    """Writes a batch down, and that everything before `cursor` is sealed."""

    batch: Sealed
    cursor: Cursor


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


class DeadTotals(NamedTuple):
    """The dead letters that a journal keeps, and those that went over its life.

    Attributes:
        letters: kept now.
        bytes: what they take, with their errors and tracebacks.
        revived: accepted records that were given up and then requeued.
        readmitted: records refused at the door and then accepted after all.
        expired: went because they were older than `dead.age_max`.
        purged: a person deleted them.
        dropped: never accepted, and went because there were too many of those.
        invalid: of `letters`, those whose record was never accepted.
        invalid_bytes: of `bytes`, what those take.
    """

    letters: int = 0
    bytes: int = 0
    revived: int = 0
    readmitted: int = 0
    expired: int = 0
    purged: int = 0
    dropped: int = 0
    invalid: int = 0
    invalid_bytes: int = 0

    @property
    def accepted_bytes(self) -> int:
        """What the letters of accepted records take: `dead.bytes_max` bounds it."""
        return self.bytes - self.invalid_bytes


class Moved(NamedTuple):
    """What one commit did to the dead letters that were there.

    Attributes:
        chunks: the marked ones that are records again, if there were any.
        revived: of these, how many had been accepted: they go from dead to pending.
        readmitted: the others, refused at the door once: accepted for the first time.
        expired: letters that were too old.
        unfit: marked ones that can't be accepted now either: they stay, and are not marked.
        dropped: letters of records that were never accepted, of which there were too many.
    """

    chunks: tuple[Chunk, ...] = ()
    revived: int = 0
    readmitted: int = 0
    expired: int = 0
    unfit: int = 0
    dropped: int = 0


class Ledger(NamedTuple):
    """The numbers of promise 2 over the life of the data directory, after some commit.

    `accepted == processed + dead + pending` always holds. `refused` counts records that the door
    kept as dead letters without accepting them; they are in none of the four.
    """

    accepted: int = 0
    processed: int = 0
    dead: int = 0
    refused: int = 0

    @property
    def pending(self) -> int:
        """What is accepted and not settled, by the counters."""
        return self.accepted - self.processed - self.dead


class Recovered(NamedTuple):
    """What an opened journal holds.

    Attributes:
        batches: sealed and not settled, oldest first.
        cursor: where the unsealed records begin.
        last_chunk: the newest chunk's id; 0 in a new journal.
        next_batch: the first batch number that is free.
        sizes: bytes of each chunk that `batches` name and that is still there.
        waits: by number, seconds until `due_at` when that was written down: it is never longer,
            whatever the clock says now.
        set_aside: where an unreadable journal was moved to, if that happened.
    """

    batches: list[Sealed]
    cursor: Cursor
    last_chunk: int
    next_batch: int
    sizes: dict[int, int]
    waits: dict[int, float]
    set_aside: str = ""


class Closed(NamedTuple):
    """What closing a journal came to.

    Attributes:
        ledger: the counters.
        counted: pending records counted from the rows; `None` if that was not possible.
        written: everything that was submitted was written, or refused.
        gone: its threads have ended; one that the disk holds can't be ended.
    """

    ledger: Ledger
    counted: int | None = None
    written: bool = True
    gone: bool = True


class Journal(Protocol):
    """One pipeline's durable store. All methods are called on the event loop."""

    id: str
    durable: bool
    ledger: Ledger
    bytes: int
    bytes_max: int
    dead_totals: DeadTotals
    dead_bytes_max: int
    failed: Future[None]
    keys: IdempotencyKeys
    space: DiskSpaceGuard | None

    @property
    def letters_full(self) -> bool:
        """Whether the dead letters of accepted records are at their bound."""
        ...

    async def open(self, on_chunk: Callable[[Chunk], None]) -> Recovered:
        """Opens and recovers; from now on each new chunk is announced once it is durable."""
        ...

    def stage(self) -> Stage:
        """Whether its thread is at something, and at what: for whoever watches that it moves."""
        ...

    def append(self, append: Append) -> Future[Place]:
        """Accepts records; resolved with where they are once they are durable.

        Raises:
            Overloaded: the journal's bound, or the disk's.
            NeverFits: it alone is more than the journal may hold.
            JournalFailed: it is poisoned.
        """
        ...

    async def bookmark(self, key: str) -> SourceOffset | None:
        """The last one of that key."""
        ...

    def write(self, change: Change) -> Future[None]:
        """Writes a change down; resolved once it is durable. Changes are written in order."""
        ...

    async def look(self) -> bool:
        """Whether dead letters are marked to be requeued; brings `dead_totals` up to date."""
        ...

    def revive(self) -> Future[Moved]:
        """Takes some of the marked dead letters back, as chunks like any other.

        Raises:
            Overloaded: the disk is full.
            JournalFailed: it is poisoned.
        """
        ...

    def expire(self, before: float, since: float = 0.0) -> Future[Moved]:
        """Deletes some of the letters given up from `since` to `before`, seconds since the epoch.

        Raises:
            Overloaded: the disk is full.
            JournalFailed: it is poisoned.
        """
        ...

    async def read(self, first: int, bytes_max: int) -> list[Chunk]:
        """Chunks from id `first` on, in order: at least one if there is one, then up to the bound.

        Damaged chunks come back marked.
        """
        ...

    async def load(self, spans: Sequence[Span]) -> Records | None:
        """The records of a batch; `None` if one of its chunks is damaged or gone."""
        ...

    async def audit(self) -> int | None:
        """One step of counting: pending records by the counters less those by the rows.

        `None` until all are counted. Where that took more than the start had time for, the first
        count is the start's, and what it finds is damage.

        Raises:
            JournalFailed: the rows can't be read, or the first count found a difference.
        """
        ...

    async def close(self, deadline: float | None = None) -> Closed:
        """Finishes what was submitted, tidies the file up, ends the threads.

        Args:
            deadline: loop time at which it is left as it is, for a disk that does not answer.
        """
        ...
