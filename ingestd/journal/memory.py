"""The memory journal: as fast as memory, and gone with the process.

It keeps every promise but the first: "accepted" means "in this process's memory". What a crash or
a drain that runs out of time leaves behind is lost; the daemon then says so and leaves with 75.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

from ingestd.base.append import principal_of
from ingestd.base.errors import NeverFits, Overloaded
from ingestd.base.rate import Rate, wait_for_room
from ingestd.base.record import Records, Span, join
from ingestd.journal.dead_letters import DeadLetter, DeadTotals, invalid_letter
from ingestd.journal.idempotency import IdempotencyKeys, KeyRule, RememberedKey, size_of
from ingestd.journal.interface import (
    Change,
    Chunk,
    Closed,
    JournalStatus,
    Ledger,
    Place,
    Recovered,
    Settle,
)
from ingestd.journal.letter_rows import letter_bytes
from ingestd.journal.sqlite import offsets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ingestd.base.append import Append, IdempotencyClaim, SourceOffset
    from ingestd.base.clock import Clock
    from ingestd.journal.interface import JournalContext
    from ingestd.journal.settings import JournalSettings

SWEEP_EACH = 4
"""Expired keys that may go with each new one."""
DEAD_MAX = 10_000
"""Dead letters kept, as far as `dead.bytes_max` allows. Older ones go first, counted as expired:
no command can see or purge them, and they are gone with the process anyway."""


class MemoryOffsets:
    """See `ingestd.journal.interface.OffsetStore`: within the life of the process."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, SourceOffset] = OrderedDict()

    async def find(self, key: str) -> SourceOffset | None:
        """See `OffsetStore.find`."""
        return self._kept.get(key)

    def keep(self, offset: SourceOffset) -> int:
        """Keeps an offset in place of the one of its key; returns how many bytes more that is."""
        more = offsets.size_of(offset) - offsets.size_of(self._kept.pop(offset.key, None))
        self._kept[offset.key] = offset
        if len(self._kept) > offsets.BOOKMARKS_MAX:
            more -= offsets.size_of(self._kept.popitem(last=False)[1])
        return more


_BOUND = "journal.bytes_max"


class MemoryJournal:
    """See `ingestd.journal.interface.Journal`.

    Args:
        bytes_max: bound on the bytes of chunks.
        dead_bytes_max: bound on the bytes of dead letters; `None` for `bytes_max`.
        clock: gives `accepted_at`.
        keys: how long idempotency keys are kept, and how many; they are gone with the process too.
    """

    dead_letters = None
    """No operator reaches those that it keeps; older ones go first, so that newer ones fit."""
    maintenance = group = None

    def __init__(
        self,
        *,
        bytes_max: int,
        clock: Clock,
        dead_bytes_max: int | None = None,
        keys: KeyRule = KeyRule(),  # noqa: B008  immutable
    ) -> None:
        self.id = secrets.token_hex(6)
        self.bytes_max = bytes_max
        self.bytes = 0
        self.ledger = Ledger()
        self.dead: deque[DeadLetter] = deque()
        self.dead_totals = DeadTotals()
        self.dead_bytes_max = bytes_max if dead_bytes_max is None else dead_bytes_max
        self._clock = clock
        self.idempotency = IdempotencyKeys(keys, clock, find=self._find_key, sweep=self._sweep)
        self._kept: OrderedDict[str, tuple[RememberedKey, int]] = OrderedDict()
        self.offsets = MemoryOffsets()
        self._refusing = ""
        self._refused = {_BOUND: 0}
        self._drained = Rate(clock.monotonic())
        self._chunks: dict[int, Chunk] = {}
        self._last = 0

    async def open(self, on_chunk: Callable[[Chunk], None]) -> Recovered:
        """See `Journal.open`."""
        self._loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[None] = self._loop.create_future()
        self._on_chunk = on_chunk
        return Recovered(self.id, self.failed)

    def status(self) -> JournalStatus:
        """See `Journal.status`."""
        return JournalStatus(
            self.ledger, self.bytes, self.bytes_max, self.dead_totals,
            refusing=self._refusing, refused=self._refused,
        )  # fmt: skip

    def append(self, append: Append) -> asyncio.Future[Place]:
        """See `Journal.append`."""
        records, claim = append.records, append.claim
        if not records.envelopes:
            records = records._replace(envelopes=append.envelope)
        size = append.stored_bytes
        whole = size + size_of(claim) + offsets.size_of(append.offset)
        if whole > self.bytes_max:
            raise NeverFits(size=whole, what="journal.bytes_max", bound=self.bytes_max)
        used = self.bytes + whole
        if used > self.bytes_max:
            rate = self._drained.per_second(self._clock.monotonic())
            after = wait_for_room(used, self.bytes_max, rate, random.random)
            self._refusing = _BOUND
            self._refused[_BOUND] += 1
            raise Overloaded(what="the journal", retry_after=after)
        self._refusing = ""
        now = self._clock.now()
        if claim is not None:
            self._keep_key(claim, now)
        if append.offset is not None:
            self.bytes += self.offsets.keep(append.offset)
        self._keep_letters([invalid_letter(one, now, append) for one in append.invalid])
        self.ledger = self.ledger._replace(
            accepted=self.ledger.accepted + records.count,
            invalid=self.ledger.invalid + len(append.invalid),
        )
        if records.count:
            self._last += 1
            self.bytes += size
            chunk = Chunk(self._last, now, records)
            self._chunks[chunk.id] = chunk
            self._on_chunk(chunk)
        placed: asyncio.Future[Place] = self._loop.create_future()
        placed.set_result(Place(self._last, 0))
        return placed

    def _keep_key(self, claim: IdempotencyClaim, now: float) -> None:
        self._sweep()
        self._forget_key(claim.key)  # an expired one
        size = size_of(claim)
        self._kept[claim.key] = RememberedKey(claim.fingerprint, claim.answer, now), size
        self.bytes += size
        claim.submitted = True
        self.idempotency.resolved(claim, at=now, applied=True)

    async def _find_key(self, key: str) -> RememberedKey | None:
        kept = self._kept.get(key)
        return None if kept is None else kept[0]

    def _sweep(self) -> None:
        """The oldest keys that have expired go, a bounded number."""
        before = self.idempotency.ages.before(self.idempotency.rule.kept)
        for key in list(itertools.islice(self._kept, SWEEP_EACH)):
            if self._kept[key][0].at > before:
                break
            self._forget_key(key)

    def _forget_key(self, key: str) -> None:
        gone = self._kept.pop(key, None)
        if gone is not None:
            self.bytes -= gone[1]
            self.idempotency.gone({principal_of(key): 1})

    def write(self, change: Change) -> asyncio.Future[None]:
        """See `Journal.write`; batches are in the memory of the pipeline already."""
        if isinstance(change, Settle):
            self._settle(change)
        future: asyncio.Future[None] = self._loop.create_future()
        future.set_result(None)
        return future

    def _settle(self, settlement: Settle) -> None:
        self._keep_letters(settlement.dead)
        self.ledger = self.ledger._replace(
            processed=self.ledger.processed + settlement.processed,
            dead=self.ledger.dead + sum(letter.records for letter in settlement.dead),
        )
        for chunk in settlement.finished:
            del self._chunks[chunk]
        self.bytes -= settlement.finished_bytes
        self._drained.add(settlement.finished_bytes, self._clock.monotonic())

    def _keep_letters(self, letters: Sequence[DeadLetter]) -> None:
        """Keeps dead letters, the newest ones within the bounds."""
        size, expired = self.dead_totals.bytes, self.dead_totals.expired
        for letter in letters:
            self.dead.append(letter)
            size += _size(letter)
        while self.dead and (len(self.dead) > DEAD_MAX or size > self.dead_bytes_max):
            old = self.dead.popleft()
            size -= _size(old)
            expired += 1
        self.dead_totals = DeadTotals(len(self.dead), size, expired=expired)

    async def read(self, first: int, bytes_max: int) -> list[Chunk]:
        """See `Journal.read`."""
        chunks, size = [], 0
        for number in range(first, self._last + 1):
            if number in self._chunks:
                chunks.append(self._chunks[number])
                size += len(chunks[-1].records.payload)
                if size >= bytes_max:
                    break
        return chunks

    async def load(self, spans: Sequence[Span]) -> Records | None:
        """See `Journal.load`."""
        return join([self._chunks[s.chunk].records.part(s.first, s.count) for s in spans])

    async def close(self, deadline: float | None = None) -> Closed:  # noqa: ARG002
        """See `Journal.close`; there are no rows to count."""
        return Closed(self.ledger, durable=False)


def _size(letter: DeadLetter) -> int:
    return letter_bytes(letter.payload, letter.error, letter.traceback) + len(letter.envelope)


def build(settings: JournalSettings, context: JournalContext) -> MemoryJournal:
    """The journal of a pipeline whose `journal.kind` is `memory`, not opened yet."""
    return MemoryJournal(
        bytes_max=settings.bytes_max,
        dead_bytes_max=context.dead_bytes_max,
        clock=context.clock,
        keys=context.keys,
    )
