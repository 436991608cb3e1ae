"""Messages of brokers as records: accepted, and told as finished once their records are settled.

A source of this kind takes messages that its broker keeps until they are acknowledged, and hands
them to a `BrokerIntake`, which tells it when to acknowledge each of them:

1. A message is finished when its record is settled: processed, or a dead letter. So the journal may
   be one that is lost with the machine; what was lost is delivered again.
2. One that can be no record is an invalid dead letter, and finished with the commit of that.
3. One that was accepted before, by its id, is finished when its record is, which may have happened:
   then at once. One of an earlier life is finished at once, for its record is in the journal. Ids
   come from the place of a message in its broker and from its time, so another stream of the same
   name has others. They are stored in the commit of their records.
4. Appends come one after the other, and each has what came meanwhile, up to its bound.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from ingestd.base import envelope
from ingestd.base.append import Append, AppendCounts, DeliveryWaiter, HeldIds
from ingestd.base.bursts import compute_beside, let_loop_go_first
from ingestd.base.errors import ConfigError, IdsInFlight
from ingestd.base.record import InvalidRecord, Records
from ingestd.codecs.lines import parse_canonical, record_fault, too_large
from ingestd.sources.base import accept_patiently, again_after

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ingestd.sources.base import Intake

M = TypeVar("M")

APPEND_BYTES = 4 * 1024**2
"""Payload and envelopes of one append, beside its first message."""
_RUN_BYTES = 16
"""Most bytes that a run of messages with one envelope has beside it."""
HEADERS_MAX = 32
"""Headers of a message that its envelope has, as far as their bytes have room there."""
_THREAD_BYTES = 64 * 1024
"""From this size on messages are checked in a thread."""
_MESSAGES_TOGETHER = 256


class BrokerMessage(NamedTuple, Generic[M]):
    """A message as it was delivered.

    Attributes:
        payload: its record.
        id: `ID_BYTES` that name it for ever.
        envelope: packed, with the name of the attribute that numbers it.
        number: that number: its sequence, its offset.
        token: what its source knows it by.
    """

    payload: bytes
    id: bytes
    envelope: bytes
    number: int
    token: M


class _ReadMessages(NamedTuple, Generic[M]):
    """Messages, read.

    Attributes:
        records: of the good ones.
        good: these, in order.
        refused: the others.
        bad: what these are known by.
    """

    records: Records
    good: Sequence[BrokerMessage[M]]
    refused: list[InvalidRecord]
    bad: list[M]


class _UnsettledMessages(DeliveryWaiter):
    """Tells which messages of an append are settled."""

    __slots__ = ("_forget", "_settled", "ids")

    def __init__(
        self,
        ids: list[bytes],
        settled: Callable[[Sequence[bytes]], None],
        forget: Callable[[DeliveryWaiter], None],
    ) -> None:
        super().__init__(len(ids))
        self.ids = ids
        self._settled = settled
        self._forget = forget

    def settled(self, index: int, records: int) -> None:
        super().settled(index, records)
        self._settled(self.ids[index : index + records])
        if not self.left:
            self._forget(self)


class BrokerIntake(Generic[M]):
    """Accepts messages for one pipeline, see the invariants above. Made on the event loop.

    Args:
        intake: the pipeline.
        principal: whose the ids are: kind and name, a space between them.
        finished: called with what may be acknowledged, each message once for each delivery.
        is_wanted: tells if a message is still this source's, just before it is accepted.
        is_held: tells if it still matters that a message is finished.
        counts: gets what is accepted.

    Attributes:
        failed: fails when nothing can be stored any more; never done otherwise.
    """

    def __init__(
        self,
        intake: Intake,
        principal: str,
        finished: Callable[[Sequence[M]], None],
        *,
        is_wanted: Callable[[M], bool] = lambda _: True,
        is_held: Callable[[M], bool] = lambda _: True,
        counts: AppendCounts | None = None,
    ) -> None:
        self._counts = counts or AppendCounts()
        self._intake = intake
        self._principal = principal
        self._finished = finished
        self._is_wanted = is_wanted
        self._is_held = is_held
        self._unsettled: dict[bytes, M] = {}
        self._delivered_again: dict[bytes, list[M]] = {}
        self._loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[None] = self._loop.create_future()
        self._waiting: list[BrokerMessage[M]] = []
        self._came, self._is_idle = asyncio.Event(), asyncio.Event()
        self._is_idle.set()
        self._thread = ThreadPoolExecutor(
            1, "broker-messages", initializer=compute_beside, initargs=(self._loop,)
        )
        self._task = self._loop.create_task(self._run(), name="broker-append")
        self._task.add_done_callback(self._ended)

    def put(self, messages: Sequence[BrokerMessage[M]]) -> None:
        """Takes messages; they are accepted in order."""
        self._waiting += messages
        self._is_idle.clear()
        self._came.set()

    async def flush(self, deadline: float) -> None:
        """Returns when all that was taken is accepted, or nothing can be any more.

        Args:
            deadline: in the event loop's time; it returns then in any case.
        """
        flushed = self._loop.create_task(self._is_idle.wait())
        ends: set[asyncio.Future[Any]] = {flushed, self._task}
        left = max(0.0, deadline - self._loop.time())
        await asyncio.wait(ends, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        flushed.cancel()

    async def close(self) -> None:
        """Ends; what is not accepted by now is delivered again."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self.failed.done():
            self.failed.exception()  # the daemon leaves for it, or for another reason

    async def _run(self) -> None:
        while True:
            await self._came.wait()
            count = together(self._waiting)
            messages, self._waiting = self._waiting[:count], self._waiting[count:]
            if messages := [one for one in messages if self._is_wanted(one.token)]:
                await self._append(messages)
            if not self._waiting:
                self._came.clear()
                self._is_idle.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.failed.set_exception(error)

    async def _append(self, messages: Sequence[BrokerMessage[M]]) -> None:
        """Accepts messages, at least one; those that were accepted before are left out.

        Raises:
            IngestdError: nothing can be stored any more.
        """
        first: dict[bytes, BrokerMessage[M]] = {}
        again = [one for one in messages if first.setdefault(one.id, one) is not one]
        held = await self._hold(frozenset(first))
        waiter: _UnsettledMessages | None = None
        is_durable = False
        try:
            again += [first[one] for one in held.accepted]
            new = [one for name, one in first.items() if name in held.new]
            read = await self._read(new)
            if read.good:
                ids = [one.id for one in read.good]
                waiter = _UnsettledMessages(ids, self._settled, self._forget)
                for one in read.good:
                    # One that waits has an id so old that it is not known any more.
                    if not self._waits(one):
                        self._unsettled[one.id] = one.token
            if new:
                append = Append(
                    read.records,
                    read.refused,
                    waiter=waiter,
                    principal=self._principal,
                    ids=held,
                )
                await accept_patiently(self._intake, append)
                self._counts.accepted(append)
            is_durable = True
        finally:
            self._intake.recent_ids.release(held)
            if waiter is not None and not is_durable:
                self._intake.stop_waiting(waiter)
                for name in waiter.ids:
                    self._unsettled.pop(name, None)
        known = [one.token for one in again if not self._waits(one)]
        if known or read.bad:
            self._finished([*known, *read.bad])

    def _waits(self, message: BrokerMessage[M]) -> bool:
        """Returns True if a message that came again is finished later, with its record."""
        if message.id not in self._unsettled:
            return False
        before = self._delivered_again.get(message.id, ())
        self._delivered_again[message.id] = [*filter(self._is_held, before), message.token]
        return True

    def _settled(self, ids: Sequence[bytes]) -> None:
        tokens = [self._unsettled.pop(one) for one in ids if one in self._unsettled]
        if self._delivered_again:
            for one in ids:
                tokens += self._delivered_again.pop(one, ())
        self._finished(tokens)

    async def _hold(self, ids: frozenset[bytes]) -> HeldIds:
        while True:
            try:
                return self._intake.recent_ids.hold(self._principal, ids)
            except IdsInFlight as busy:  # another source has them, of the same consumer
                await asyncio.sleep(again_after(busy))

    async def _read(self, messages: Sequence[BrokerMessage[M]]) -> _ReadMessages[M]:
        if sum(len(one.payload) for one in messages) < _THREAD_BYTES:
            return read_messages(messages, self._intake)
        return await self._loop.run_in_executor(self._thread, read_messages, messages, self._intake)

    def _forget(self, waiter: DeliveryWaiter) -> None:
        """The pipeline forgets a waiter when all is settled, and not in the middle of telling."""
        self._loop.call_soon(self._intake.stop_waiting, waiter)


def read_messages(messages: Sequence[BrokerMessage[M]], intake: Intake) -> _ReadMessages[M]:
    """Sorts messages into records and those that can be none; `LINES` where no payload has an LF.

    A line's end behind a value or a line of text is no part of it.

    Args:
        messages: any number.
        intake: says what a record is.
    """
    form, bytes_max, depth_max = intake.format, intake.record_bytes_max, intake.json_depth_max
    if form != "bytes":
        messages = [
            one._replace(payload=one.payload.rstrip(b"\r\n")) if one.payload[-1:] == b"\n" else one
            for one in messages
        ]
    block = b"".join([b"%b\n" % one.payload for one in messages])
    is_lines = block.count(b"\n") == len(messages)
    good: Sequence[BrokerMessage[M]] = messages
    refused: list[InvalidRecord] = []
    bad: list[M] = []
    if not (
        form == "json" and is_lines and messages and parse_canonical(block, bytes_max, depth_max)
    ):
        kept = []
        for place, one in enumerate(messages):
            if not place % _MESSAGES_TOGETHER:
                let_loop_go_first()
            fault = record_fault(one.payload, form, bytes_max, depth_max)
            if not fault:
                kept.append(one)
                continue
            if len(one.payload) > bytes_max:
                invalid = too_large(place, len(one.payload), bytes_max, one.payload)
            else:
                invalid = InvalidRecord(place, "malformed", fault, one.payload)
            own = envelope.numbered(one.envelope, 1, one.number)
            refused.append(invalid._replace(envelope=own))
            bad.append(one.token)
        if len(kept) < len(messages):
            good = kept
            is_lines = all(b"\n" not in one.payload for one in kept)
    payloads = [one.payload for one in good]
    records = Records.lines(payloads) if is_lines else Records.sized(payloads)
    records = records._replace(envelopes=_envelopes(good))
    return _ReadMessages(records, good, refused, bad)


def _envelopes(messages: Sequence[BrokerMessage[M]]) -> bytes:
    """The envelopes of messages; neighbours that differ in their number alone are one run."""
    runs: list[tuple[int, bytes]] = []
    start = 0
    for place in range(1, len(messages) + 1):
        one, last = messages[start], messages[place - 1]
        if place < len(messages):
            following = messages[place]
            if following.envelope == one.envelope and following.number == last.number + 1:
                continue
        count = place - start
        runs.append((count, envelope.numbered(one.envelope, count, one.number)))
        start = place
    return envelope.joined(runs) if runs else b""


@lru_cache(64)
def pack_envelope(
    source: str,
    headers: tuple[tuple[str, str], ...],
    attributes: tuple[tuple[str, str | int], ...],
    numbered: str,
) -> bytes:
    """The envelope of messages that are alike but for their numbers, packed.

    Args:
        source: the name of the source.
        headers: names and values of those that are kept.
        attributes: where the messages are from.
        numbered: the attribute with the number of a message.
    """
    kept = dict(headers)
    return envelope.pack(
        envelope.Envelope(
            source,
            content_type=kept.pop("content-type", ""),
            traceparent=kept.pop("traceparent", ""),
            headers=kept,
            attributes=dict(attributes),
            numbered=numbered,
        )
    )


def keep_headers(headers: Iterable[tuple[str, str | bytes | None]]) -> tuple[tuple[str, str], ...]:
    """The first headers of a message, by names in lower case; long values are cut."""
    kept = []
    for name, value in islice(headers, HEADERS_MAX):
        head = (value or "")[: envelope.VALUE_CHARACTERS_MAX]
        text = head if isinstance(head, str) else head.decode("utf-8", "replace")
        kept.append((name[: envelope.NAME_CHARACTERS_MAX].lower(), text))
    return tuple(kept)


def demand_package(module: str, extra: str) -> None:
    """Refuses a source whose client is not installed.

    Raises:
        ConfigError: it is not.
    """
    if find_spec(module) is None:
        raise ConfigError(problem=f"needs {module}: pip install 'ingestd[{extra}]'")


def together(messages: Sequence[BrokerMessage[M]]) -> int:
    """Counts the messages, from the first on, that are one append."""
    size, envelope_before = 0, b""
    for place, one in enumerate(messages):
        size += len(one.payload) + _RUN_BYTES
        if one.envelope != envelope_before:
            size += len(one.envelope)
            envelope_before = one.envelope
        if size > APPEND_BYTES and place:
            return place
    return len(messages)
