"""Dead letters: the records that were given up, and those that were never accepted.

`DeadLetterStore` is the capability of a journal that operators and the daemon can handle them in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from asyncio import Future
    from collections.abc import Callable, Collection, Iterator, Sequence

    from ingestd.base.append import Append
    from ingestd.base.record import InvalidRecord
    from ingestd.journal.interface import Chunk, Place

INCOMPLETE = ("damaged", "too_large", "unfinished")
"""Reasons of letters that hold no record or only its beginning: these can't be requeued."""
REASONS = (
    "malformed", "too_large", "unfinished", "schema", "unrouted", "undecodable", "rejected",
    "failed", "timeout", "crashed", "damaged",
)  # fmt: skip
"""All reasons. The first five are those of records that were never accepted."""


class DeadLetter(NamedTuple):
    """A record that was given up, with the reason.

    Attributes:
        record: its id in the journal, empty for one that was never accepted.
        reason: one of `REASONS`.
        error: one line.
        traceback: as Python prints it, or empty.
        payload: the record.
        attempts: tries that were made.
        first_at: when it was accepted, seconds since the epoch.
        last_at: when it was given up.
        records: how many records it stands for: 1, or all of a damaged chunk.
        principal: the sender of one that was never accepted.
        place: of its record in the journal, for clients that wait for it; not kept.
        envelope: of the record, packed (`ingestd.base.envelope`).
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
    envelope: bytes = b""


def invalid_letter(invalid: InvalidRecord, now: float, append: Append) -> DeadLetter:
    """Makes the dead letter of an append's record that was found invalid at `now`."""
    return DeadLetter(
        "", invalid.reason, invalid.detail, "", invalid.payload, 0, now, now,
        principal=append.principal, envelope=invalid.envelope or append.envelope,
    )  # fmt: skip


class InvalidQuota(NamedTuple):
    """Bounds the letters of records that were never accepted.

    Attributes:
        bytes_max: of all of them together; each principal may take a quarter of it.
        check: tells in one line the fault of a payload as a record, empty if it has none. It is
            asked about a letter that is to be requeued, because its record was never accepted.
    """

    bytes_max: int = 64 << 20
    check: Callable[[bytes], str] = lambda _: ""


class DeadTotals(NamedTuple):
    """The dead letters that a journal keeps, and those that went over its life.

    Attributes:
        letters: kept now.
        bytes: of them, with their errors and tracebacks.
        requeued: accepted records that were given up and then requeued.
        readmitted: invalid records that were accepted after all.
        expired: went because they were older than `dead.age_max`.
        purged: an operator deleted them.
        dropped: never accepted, and went because there were too many of those.
        invalid: of `letters`, those whose record was never accepted.
        invalid_bytes: of `bytes`, those of these.
    """

    letters: int = 0
    bytes: int = 0
    requeued: int = 0
    readmitted: int = 0
    expired: int = 0
    purged: int = 0
    dropped: int = 0
    invalid: int = 0
    invalid_bytes: int = 0

    @property
    def accepted_bytes(self) -> int:
        """The bytes of the letters of accepted records: `dead.bytes_max` bounds them."""
        return self.bytes - self.invalid_bytes


class Moved(NamedTuple):
    """The effect of one commit on the dead letters that were there.

    Attributes:
        chunks: the marked ones that are records again, if there were any.
        requeued: of these, how many had been accepted: they go from dead to pending.
        readmitted: the others: accepted for the first time.
        expired: letters that were too old.
        unfit: marked ones that can't be accepted now either: they stay, and are not marked.
        dropped: letters of records that were never accepted, of which there were too many.
        arrived: records of `chunks` that came from the dead letters of other pipelines.
        replayed: records of `chunks` that were kept and are fed again.
        more: there may be more to do at once.
    """

    chunks: tuple[Chunk, ...] = ()
    requeued: int = 0
    readmitted: int = 0
    expired: int = 0
    unfit: int = 0
    dropped: int = 0
    arrived: int = 0
    replayed: int = 0
    more: bool = False


class LetterFilter(NamedTuple):
    """Chooses dead letters; a field that is empty or `None` does not matter.

    Attributes:
        reasons: one of these.
        since: given up at this time or later, seconds since the epoch.
        until: given up before this time.
        ids: one of these.
        limit: only so many, the oldest ones.
        error: a part of its error.
    """

    reasons: tuple[str, ...] = ()
    since: float | None = None
    until: float | None = None
    ids: Collection[int] = ()
    limit: int | None = None
    error: str = ""

    @property
    def is_open(self) -> bool:
        """Returns True if it chooses every letter."""
        return not self.ids and self == LetterFilter(ids=self.ids)


class StoredLetter(NamedTuple):
    """A letter in the journal.

    Attributes:
        id: its number, never used again.
        marked: it is to be requeued, or on its way into another pipeline.
        size: bytes of the payload.
        letter: its fields; without payload and traceback where those were not asked for.
        is_moving: it is on its way into another pipeline: the next `dead retry` finishes that.
    """

    id: int
    marked: bool
    size: int
    letter: DeadLetter
    is_moving: bool = False


class LetterCounts(NamedTuple):
    """The letters that a filter chooses at this moment.

    Attributes:
        letters: how many.
        bytes: of them.
        marked: of these, to be requeued already.
        incomplete: of these, can't be requeued: there is no record in them, or not all of it.
        last: the newest one's number; 0 if there is none.
    """

    letters: int
    bytes: int
    marked: int
    incomplete: int
    last: int


class MarkedLetters(NamedTuple):
    """The result of marking.

    Attributes:
        letters: are to be requeued now, and were not before.
        invalid: were never accepted, and can't be as they are now either: they stay.
    """

    letters: int = 0
    invalid: int = 0


class DeadLetters(Protocol):
    """Dead letters as an operator handles them, in any process, beside the daemon or without one.

    Every call blocks, and works in short steps.

    Raises:
        DataDirError: the journal can't be opened, read or written.
    """

    def select(
        self, chosen: LetterFilter, *, whole: bool, before: int | None = None
    ) -> Iterator[StoredLetter]:
        """Reads letters, oldest first.

        Args:
            chosen: which.
            whole: with payload and traceback.
            before: only those with smaller numbers, and the newest first.
        """
        ...

    def count(self, chosen: LetterFilter) -> LetterCounts:
        """Counts letters."""
        ...

    def missing(self, ids: Sequence[int]) -> list[int]:
        """Returns those of some numbers that no letter has."""
        ...

    def mark(self, chosen: LetterFilter, last: int, check: Callable[[bytes], str]) -> MarkedLetters:
        """Marks letters to be requeued, up to the number `last`; the daemon requeues them.

        Args:
            chosen: which.
            last: the newest one.
            check: see `InvalidQuota`.
        """
        ...

    def edit(self, number: int, before: bytes, after: bytes) -> bool:
        """Gives a letter another payload and marks it to be requeued.

        Args:
            number: of the letter.
            before: its payload, as it was read.
            after: the new one, a record of the pipeline.

        Returns:
            False if it has gone, is marked, or has another payload by now; nothing was changed.
        """
        ...

    def move(
        self, chosen: LetterFilter, last: int, check: Callable[[bytes], str], target: str
    ) -> MarkedLetters:
        """Marks letters to be moved into another pipeline, up to the number `last`.

        Args:
            chosen: which.
            last: the newest one.
            check: tells the fault of a payload as a record of that pipeline.
            target: its name.
        """
        ...

    def finish_moves(self, journals: Callable[[str], DeadLetters]) -> dict[str, int]:
        """Moves the letters that are marked for it, also those of commands that were killed.

        Args:
            journals: gives the dead letters of a pipeline, of a journal of the same kind.

        Returns:
            The number of letters for each pipeline.
        """
        ...

    def purge(self, chosen: LetterFilter, last: int) -> int:
        """Deletes letters up to the number `last`, but no marked ones; returns how many."""
        ...


class DeadLetterStore(DeadLetters, Protocol):
    """Dead letters as the daemon handles them, on its event loop."""

    @property
    def full(self) -> bool:
        """Returns True if the letters of accepted records are at their bound."""
        ...

    def totals(self) -> DeadTotals:
        """Returns the present totals."""
        ...

    async def poll_marked(self) -> bool:
        """Returns True if letters are marked, or have arrived; brings the totals up to date."""
        ...

    def requeue(self) -> Future[Moved]:
        """Takes back some of the marked letters, and of those that arrived, as chunks.

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
