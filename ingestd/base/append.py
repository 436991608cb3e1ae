"""`Append` and its parts: all that one append puts into a journal together."""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict, deque
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ingestd.base.errors import IdsInFlight

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ingestd.base.record import InvalidRecord, Records

T = TypeVar("T")

WEBHOOK = "webhook"
"""The kind of principal whose keys are the signed ids of deliveries."""


def scoped(principal: str, key: str) -> str:
    """A key as a journal stores it: no principal's key is another one's.

    Args:
        principal: its kind, a space, its name: `token shop`; `anonymous` is one of its own.
        key: what the client calls its request; visible ASCII, no spaces.
    """
    return f"{principal} {key}"


def principal_of(scoped_key: str) -> str:
    """The principal of a stored key; empty for keys of journals that did not tell them apart."""
    return scoped_key.rpartition(" ")[0]


class IdempotencyClaim:
    """Reserves an idempotency key for one request until it is accepted or given up.

    Attributes:
        key: what the client calls the request, `scoped`.
        fingerprint: tells whether another request with this key is the same one.
        answer: what is stored beside the key; set before the append.
        submitted: an append carries it; until that resolves the journal alone ends it.
        forgotten: its holder has given it up.
        replaces: the number of an expired key in the engine of the journal, 0 for none.
    """

    __slots__ = ("answer", "fingerprint", "forgotten", "key", "replaces", "submitted")

    def __init__(self, key: str, fingerprint: bytes) -> None:
        self.key = key
        self.fingerprint = fingerprint
        self.answer = b""
        self.submitted = self.forgotten = False
        self.replaces = 0


# -- ids that senders give their records -----------------------------------------------------------
#
# A client that lost an answer sends its records again, often in other requests than before: mixed
# with new ones, or in another order. So it is the record that has to be recognised. The ids of the
# last records are kept in memory, a journal stores those of an append in its commit and gives them
# back at its start (`Recovered.ids`). They are bounded by their number alone: older ones go, and
# nothing is refused for want of room.

ID_BYTES = 16
HELD_ID_BYTES = 160
"""Memory of an id of a request that is not answered yet: the id itself, and its places in sets."""
IN_FLIGHT_SECONDS = 1.0


class SenderIds(NamedTuple):
    """The ids of the records of a request.

    Attributes:
        each: one a record, `ID_BYTES` long; empty for one without an id. None comes twice.
        known: those that are not empty.
    """

    each: tuple[bytes, ...]
    known: frozenset[bytes]


def sender_id(*parts: bytes) -> bytes:
    """Returns the id of what a sender calls a record, whatever its length.

    Args:
        parts: without NUL.
    """
    return hashlib.blake2b(b"\0".join(parts), digest_size=ID_BYTES).digest()


class HeldIds:
    """Ids of one request, held until its append has resolved or is given up.

    Attributes:
        principal: whose they are; empty for keys of `dedupe.key`, which are everyone's.
        accepted: those of records that were accepted before.
        new: the others.
        kept_max: so many ids of the pipeline are kept.
        submitted: an append carries them; its end is theirs.
        at: when they came, for those that go after a time.
    """

    __slots__ = ("accepted", "at", "kept_max", "new", "principal", "submitted")

    def __init__(
        self, principal: str, accepted: frozenset[bytes], new: frozenset[bytes], kept_max: int
    ) -> None:
        self.principal, self.accepted, self.new = principal, accepted, new
        self.kept_max = kept_max
        self.submitted = False
        self.at = 0.0


class RecentIds:
    """The ids of the last records of one pipeline, each known to its principal alone.

    Args:
        kept_max: so many ids are kept, and the rest of the append that the oldest came in.

    Attributes:
        kept_max: may be replaced.
        count: ids that are kept.
    """

    def __init__(self, kept_max: int) -> None:
        self.kept_max = kept_max
        self.count = 0
        self._kept: defaultdict[str, set[bytes]] = defaultdict(set)
        self._order: deque[tuple[str, frozenset[bytes], float]] = deque()
        self._held: defaultdict[str, set[bytes]] = defaultdict(set)

    def restore(self, stored: Iterable[tuple[str, bytes]], at: float = 0.0) -> None:
        """Takes what a journal has stored: principal and ids of each append, the oldest first."""
        for principal, packed in stored:
            starts = range(0, len(packed), ID_BYTES)
            ids = frozenset(packed[start : start + ID_BYTES] for start in starts)
            self._keep(principal, ids - self._kept[principal], at)

    def forget(self, until: float) -> None:
        """Forgets the ids that came at a time or before it."""
        while self._order and self._order[0][2] <= until:
            self._drop_oldest()

    def hold(self, principal: str, ids: frozenset[bytes]) -> HeldIds:
        """Tells which records were accepted before, and holds the ids of the others.

        The holder hands them to an append, and calls `release` in any case.

        Raises:
            IdsInFlight: another request holds some of them.
        """
        held = self._held.get(principal)
        if held is not None and not held.isdisjoint(ids):
            raise IdsInFlight(retry_after=IN_FLIGHT_SECONDS)
        kept = self._kept.get(principal)
        accepted = ids.intersection(kept) if kept else frozenset[bytes]()
        new = ids - accepted if accepted else ids
        self._held[principal].update(new)
        return HeldIds(principal, accepted, new, self.kept_max)

    def release(self, held: HeldIds) -> None:
        """Ends a hold that no append carries; with one under way, its end is the append's."""
        if not held.submitted:
            self._let_go(held)

    async def follow(self, held: HeldIds | None, placed: asyncio.Future[T]) -> T:
        """Waits for an append; its ids are kept once it is committed, even if the wait ends."""
        if held is None:
            return await placed
        self.submit(held, placed)
        return await asyncio.shield(placed)

    def submit(self, held: HeldIds, placed: asyncio.Future[Any]) -> None:
        """Has an append carry ids, which are kept once it is committed."""
        held.submitted = True
        placed.add_done_callback(partial(self._resolved, held))

    def _resolved(self, held: HeldIds, placed: asyncio.Future[object]) -> None:
        self._let_go(held)
        if not placed.cancelled() and placed.exception() is None:
            self._keep(held.principal, held.new, held.at)

    def _let_go(self, held: HeldIds) -> None:
        ids = self._held[held.principal]
        ids -= held.new
        if not ids:
            del self._held[held.principal]

    def _keep(self, principal: str, ids: frozenset[bytes], at: float) -> None:
        self._kept[principal] |= ids
        self._order.append((principal, ids, at))
        self.count += len(ids)
        # Those of an append go together, once as many as are kept came behind all of them.
        while self._order and self.count - len(self._order[0][1]) >= self.kept_max:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        owner, oldest, _ = self._order.popleft()
        kept = self._kept[owner]
        kept -= oldest
        if not kept:
            del self._kept[owner]
        self.count -= len(oldest)


class Deduplicated(NamedTuple):
    """The keys of an append's records (`dedupe.key`), and those that had come before.

    Attributes:
        keys: the new ones become durable with the records.
        at: when they came, seconds since the epoch.
        kept_from: keys that came before this time may go.
        stored: places of the records that are not left out, among those that were sent.
        left_out: how many were.
    """

    keys: HeldIds
    at: float
    kept_from: float
    stored: Sequence[int]
    left_out: int


# -- delivery of the records of one append --------------------------------------------------------

FAILED_MAX = 100
"""So many failed records are named one by one; the others are counted."""

ERROR_CHARACTERS_MAX = 500
"""Bound of each reported error: a hundred of any size are an answer of any size."""


class FailedRecord(NamedTuple):
    """A record that became a dead letter.

    Attributes:
        index: its place among the records of the append, from 0.
        reason: the dead letter's word.
        error: its line.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index
    reason: str
    error: str


class DeliveryWaiter:
    """Counts outcomes of one append's records; the pipeline updates it on the event loop.

    Args:
        count: the records of the append, at least one.

    Attributes:
        left: of these, not settled yet.
        dead: dead letters now.
        failed: the dead ones one by one, as far as there are not too many.
        done: set when nothing is left.
    """

    __slots__ = ("count", "dead", "done", "failed", "left")

    def __init__(self, count: int) -> None:
        self.count = self.left = count
        self.dead = 0
        self.failed: list[FailedRecord] = []
        self.done = asyncio.Event()

    def settled(self, index: int, records: int) -> None:  # noqa: ARG002 - for those that name each
        """Records from `index` on have their outcome, the dead ones among them."""
        self.left -= records
        if not self.left:
            self.done.set()

    def died(self, index: int, records: int, reason: str, error: str) -> None:
        """Records from `index` on became one dead letter. Comes before they count as settled."""
        self.dead += records
        if len(self.failed) < FAILED_MAX:
            self.failed.append(FailedRecord(index, reason, error[:ERROR_CHARACTERS_MAX]))


# -- how far a source has read its input -----------------------------------------------------------

STATE_BYTES_MAX = 8192
"""Bound of the state that a source keeps of one input."""


class SourceOffset(NamedTuple):
    """A position in one input, stored in the commit of its records in place of the one before.

    Attributes:
        key: names the input; holds nothing that is secret.
        state: what its source needs to go on from there, at most `STATE_BYTES_MAX` bytes.
    """

    key: str
    state: bytes


# -- the append ------------------------------------------------------------------------------------


class Append(NamedTuple):
    """Records with everything that becomes durable together with them; all of it or nothing.

    Attributes:
        records: may be an empty run.
        invalid: records that are never accepted; they become dead letters.
        claim: its key and answer become durable too.
        waiter: is told the outcome of `records`; of this process, so no journal looks at it.
        offset: becomes durable too, in place of the one of its key.
        principal: the sender: a token, a certificate, a webhook, else an address.
        unkept: how many more records were invalid and are counted alone.
        envelope: packed (`ingestd.base.envelope`): of the invalid records, and of `records` where
            these have no envelopes of their own.
        ids: that their sender gave the records; the new ones become durable too.
        deduplicated: set by the pipeline, where it has `dedupe.key`.
    """

    records: Records
    invalid: Sequence[InvalidRecord] = ()
    claim: IdempotencyClaim | None = None
    waiter: DeliveryWaiter | None = None
    offset: SourceOffset | None = None
    principal: str = ""
    unkept: int = 0
    envelope: bytes = b""
    ids: HeldIds | None = None
    deduplicated: Deduplicated | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes that its records take in a journal at most, about."""
        records = self.records
        size = records.stored_bytes
        return size if records.envelopes or not records.count else size + len(self.envelope)


class AppendCounts:
    """Counts of what came from one endpoint or source, in this run.

    Attributes:
        records: that were accepted.
        bytes: their payloads.
        invalid: records that cannot be ones.
        refused: requests, or parts of them, that were refused, by reason.
    """

    __slots__ = ("bytes", "invalid", "records", "refused")

    def __init__(self) -> None:
        self.records = self.bytes = self.invalid = 0
        self.refused: dict[str, int] = {}

    def accepted(self, append: Append) -> None:
        """Counts an append that is durable."""
        self.records += append.records.count
        self.bytes += len(append.records.payload)
        self.invalid += len(append.invalid) + append.unkept

    def refuse(self, reason: str) -> None:
        """Counts a refusal; the reasons are those of a fixed set."""
        self.refused[reason] = self.refused.get(reason, 0) + 1
