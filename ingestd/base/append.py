"""`Append` and its parts: all that one append puts into a journal together."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ingestd.base.record import InvalidRecord, Records

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
    """Reserves an idempotency key for one request until its append has resolved or is given up.

    Attributes:
        key: what the client calls the request, `scoped`.
        fingerprint: tells whether another request with this key is the same one.
        answer: what is stored beside the key; set before the append.
        submitted: an append carries it; from then on the journal ends it.
    """

    __slots__ = ("answer", "fingerprint", "key", "submitted")

    def __init__(self, key: str, fingerprint: bytes) -> None:
        self.key = key
        self.fingerprint = fingerprint
        self.answer = b""
        self.submitted = False


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

    def settled(self, records: int) -> None:
        """So many more have their outcome, the dead ones among them."""
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
    """

    records: Records
    invalid: Sequence[InvalidRecord] = ()
    claim: IdempotencyClaim | None = None
    waiter: DeliveryWaiter | None = None
    offset: SourceOffset | None = None
    principal: str = ""
    unkept: int = 0
    envelope: bytes = b""

    @property
    def stored_bytes(self) -> int:
        """Bytes that its records take in a journal at most, about."""
        records = self.records
        size = records.stored_bytes
        return size if records.envelopes or not records.count else size + len(self.envelope)
