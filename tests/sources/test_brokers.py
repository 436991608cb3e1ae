"""Messages of brokers as records: which are accepted, and when they are finished."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.append import AppendCounts, DeliveryWaiter, sender_id
from ingestd.base.envelope import EnvelopeRuns
from ingestd.base.errors import JournalFailed, Overloaded
from ingestd.base.record import Layout, Span
from ingestd.journal.interface import Place
from ingestd.sources import brokers
from ingestd.sources.brokers import (
    BrokerIntake,
    BrokerMessage,
    keep_headers,
    pack_envelope,
    read_messages,
    together,
)
from ingestd.waiters import DeliveryWaiters
from tests.sources.source_tools import MemoryIntake

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ingestd.base.append import Append


class Pipe(MemoryIntake):
    """An intake that keeps ids and waiters, as a pipeline does."""

    def __init__(self, form: Any = "json", **more: Any) -> None:
        super().__init__(form, **more)
        self.appends: list[Append] = []
        self.waiters = DeliveryWaiters()

    async def accept(self, append: Append) -> None:
        placed = asyncio.get_running_loop().create_future()
        if not self.errors:
            placed.set_result(None)
            await self.recent_ids.follow(append.ids, placed)
        await super().accept(append)
        self.appends.append(append)
        if append.waiter is not None:
            self.waiters.add(Place(len(self.appends), 0), append.waiter)

    def stop_waiting(self, waiter: DeliveryWaiter) -> None:
        self.waiters.remove(waiter)


def message(payload: bytes, number: int, envelope: bytes = b"", name: str = "") -> Any:
    place = (name or str(number)).encode()
    return BrokerMessage(payload, sender_id(place), envelope, number, number)


@contextlib.asynccontextmanager
async def reading(pipe: Pipe, **more: Any) -> AsyncIterator[tuple[BrokerIntake[int], list[int]]]:
    finished: list[int] = []
    intake: BrokerIntake[int] = BrokerIntake(pipe, "test one", finished.extend, **more)
    try:
        yield intake, finished
    finally:
        await intake.close()


async def flushed(intake: BrokerIntake[int]) -> None:
    await intake.flush(asyncio.get_running_loop().time() + 60)


async def test_a_message_is_finished_when_its_record_is_settled() -> None:
    pipe, counts = Pipe(), AppendCounts()
    async with reading(pipe, counts=counts) as (intake, finished):
        intake.put([message(b"%d" % n, n) for n in range(10)])
        await flushed(intake)
        assert pipe.items == [b"%d" % n for n in range(10)]
        assert (counts.records, counts.invalid) == (10, 0)
        assert finished == []
        pipe.waiters.settled([Span(1, 3, 2)], [])
        assert finished == [3, 4]
        pipe.waiters.settled([Span(1, 9, 1), Span(1, 0, 3)], [])
        assert finished == [3, 4, 9, 0, 1, 2]
        pipe.waiters.settled([Span(1, 5, 4)], [])
        assert sorted(finished) == list(range(10))
        await asyncio.sleep(0)
        assert len(pipe.waiters) == 0


async def test_a_message_that_is_no_record_is_a_dead_letter_and_finished() -> None:
    pipe = Pipe(record_bytes_max=10)
    async with reading(pipe) as (intake, finished):
        payloads = [b"1", b"{", b'"' + b"x" * 20 + b'"', b"", b"[\n1]", b"2\r\n"]
        intake.put([message(one, n) for n, one in enumerate(payloads)])
        await flushed(intake)
        assert finished == [1, 2, 3]
        assert [one.reason for one in pipe.refused] == ["malformed", "too_large", "malformed"]
        assert pipe.items == [b"1", b"[\n1]", b"2"]


async def test_what_was_accepted_before_is_finished_with_its_record_and_accepted_once() -> None:
    pipe = Pipe()
    async with reading(pipe) as (intake, finished):
        intake.put([message(b"1", 1), message(b"2", 2), message(b"{", 3)])
        await flushed(intake)
        assert finished == [3]
        intake.put([message(b"2", 2), message(b"{", 3), message(b"4", 4), message(b"4", 4)])
        await flushed(intake)
        assert pipe.items == [b"1", b"2", b"4"]
        assert len(pipe.refused) == 1
        assert sorted(finished) == [3, 3]
        pipe.waiters.settled([Span(1, 1, 1)], [])
        assert sorted(finished) == [2, 2, 3, 3]
        intake.put([message(b"2", 2)])
        await flushed(intake)
        assert sorted(finished) == [2, 2, 2, 3, 3]
        pipe.waiters.settled([Span(2, 0, 1)], [])
        assert sorted(finished) == [2, 2, 2, 3, 3, 4, 4]


async def test_only_deliveries_that_are_held_wait_for_a_record_that_is_tried_for_long() -> None:
    pipe, held = Pipe(), {11}
    async with reading(pipe, is_held=held.__contains__) as (intake, finished):
        for number in (1, 10, 11, 12):
            intake.put([message(b"1", number, name="one")])
            await flushed(intake)
        assert finished == []
        pipe.waiters.settled([Span(1, 0, 1)], [])
        assert finished == [1, 11, 12]


async def test_a_record_that_comes_twice_because_its_id_is_forgotten_finishes_both() -> None:
    pipe = Pipe()
    async with reading(pipe) as (intake, finished):
        for number in (1, 2):
            pipe.recent_ids.forget(1.0)
            intake.put([message(b"1", number, name="one")])
            await flushed(intake)
        assert pipe.items == [b"1", b"1"]
        pipe.waiters.settled([Span(1, 0, 1)], [])
        assert finished == [1, 2]
        pipe.waiters.settled([Span(2, 0, 1)], [])
        assert finished == [1, 2]


async def test_other_principals_have_ids_of_their_own() -> None:
    pipe = Pipe()
    other: BrokerIntake[int] = BrokerIntake(pipe, "test two", lambda _: None)
    async with reading(pipe) as (intake, _):
        intake.put([message(b"1", 1)])
        other.put([message(b"1", 1)])
        await flushed(intake)
        await flushed(other)
        assert pipe.items == [b"1", b"1"]
    await other.close()


async def test_an_overload_is_waited_out_in_order() -> None:
    pipe = Pipe()
    pipe.errors = [Overloaded(what="the journal", retry_after=0.001)] * 2
    async with reading(pipe) as (intake, _):
        intake.put([message(b"1", 1)])
        intake.put([message(b"2", 2)])
        await flushed(intake)
        assert pipe.items == [b"1", b"2"]


async def test_a_journal_that_failed_ends_the_source_and_finishes_nothing() -> None:
    pipe = Pipe()
    pipe.errors = [JournalFailed(path="journal.db", problem="gone")]
    async with reading(pipe) as (intake, finished):
        intake.put([message(b"1", 1), message(b"{", 2)])
        with pytest.raises(JournalFailed):
            await intake.failed
        await flushed(intake)
        assert finished == []
        assert pipe.recent_ids.count == 0


async def test_a_message_that_is_not_wanted_any_more_is_left_out() -> None:
    pipe = Pipe()
    async with reading(pipe, is_wanted=lambda number: number != 2) as (intake, finished):
        intake.put([message(b"%d" % n, n) for n in range(4)])
        await flushed(intake)
        assert pipe.items == [b"0", b"1", b"3"]
        assert finished == []


async def test_many_bytes_are_several_appends_and_read_in_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(brokers, "APPEND_BYTES", 200_000)
    pipe = Pipe()
    async with reading(pipe) as (intake, _):
        intake.put([message(b'"%b"' % (b"x" * 70_000), n) for n in range(5)])
        await flushed(intake)
        assert [one.records.count for one in pipe.appends] == [2, 2, 1]


def test_envelopes_number_neighbours_in_one_run() -> None:
    headers = keep_headers([("Content-Type", "a/b"), ("TraceParent", b"00-1"), ("X", b"\xff")])
    one = pack_envelope("in", headers, (("stream", "S"),), "sequence")
    two = pack_envelope("in", (), (("stream", "S"),), "sequence")
    messages = [message(b"1", n, one) for n in (5, 6, 7)] + [message(b"{", 8, one)]
    messages += [message(b"1", 9, one), message(b"1", 10, two)]
    read = read_messages(messages, MemoryIntake())
    assert read.records.layout is Layout.LINES
    runs = EnvelopeRuns(read.records.envelopes, 5)
    assert [runs.of(n).attributes["sequence"] for n in range(5)] == [5, 6, 7, 9, 10]
    first = runs.of(0)
    assert (first.source, first.content_type, first.traceparent) == ("in", "a/b", "00-1")
    assert first.headers == {"x": "\ufffd"}
    assert first.attributes["stream"] == "S"
    (invalid,) = read.refused
    assert EnvelopeRuns(invalid.envelope, 1).of(0).attributes["sequence"] == 8


@pytest.mark.parametrize(
    ("form", "payload", "found"),
    [
        ("text", b"a line", [b"a line"]),
        ("text", b"a line\r\n", [b"a line"]),
        ("text", b"two\nlines", []),
        ("bytes", b"\x00\n", [b"\x00\n"]),
        ("bytes", b"", [b""]),
        ("json", b'{"a":\n1}', [b'{"a":\n1}']),
        ("json", b"1 2", []),
    ],
)
def test_formats(form: Any, payload: bytes, found: list[bytes]) -> None:
    read = read_messages([message(payload, 1)], MemoryIntake(form))
    assert read.records.items() == found
    assert len(read.refused) == 1 - len(found)


def test_a_message_larger_than_an_append_goes_alone() -> None:
    sizes = [5 << 20, 1 << 20, (3 << 20) - 40, 1]
    messages = [message(b"x" * size, n) for n, size in enumerate(sizes)]
    assert together(messages) == 1
    assert together(messages[1:]) == 2
    assert together(messages[3:]) == 1
    assert together([]) == 0


def test_envelopes_of_their_own_count_in_an_append() -> None:
    """A journal refuses for ever what is larger than it may be."""
    messages = [
        message(b"1", n, pack_envelope("k", (("a", f"{n}" * 250),), (), "offset"))
        for n in range(1000, 6000)
    ]
    count = together(messages)
    assert 3000 < count < 5000
    read = read_messages(messages[:count], Pipe())
    assert read.records.stored_bytes <= brokers.APPEND_BYTES
    assert together([message(b"1", n, messages[0].envelope) for n in range(5000)]) == 5000
