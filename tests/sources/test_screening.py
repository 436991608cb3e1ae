"""Records that do not fit are invalid before they are accepted, and HTTP clients are told."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base import envelope as envelopes
from ingestd.base.append import Append, DeliveryWaiter
from ingestd.base.envelope import Envelope
from ingestd.base.errors import Overloaded
from ingestd.base.record import InvalidRecord, Records
from ingestd.codecs.lines import Parsed
from ingestd.handlers.outcome import Rejection
from ingestd.sources.screening import Router, ScreenedIntake, Sorted, divided, indexes
from tests.sources.endpoints.endpoint_tools import KeyIntake, serving_endpoint
from tests.sources.source_tools import MemoryIntake, ask, connected, serving

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA = b'[{"$ref":"#/components/schemas/default.Click"},{"default.Click":{"type":"object"}}]'


class OddScreen:
    """Rejects records that hold the word bad."""

    schema = SCHEMA

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.asked: list[int] = []

    async def reject(self, records: Records) -> Sequence[Rejection]:
        await asyncio.sleep(0)
        self.asked.append(records.count)
        if self.errors:
            raise self.errors.pop(0)
        items = records.items()
        return [Rejection(i, "undecodable", "is bad") for i, x in enumerate(items) if b"bad" in x]


def screened(**more: Any) -> tuple[MemoryIntake, OddScreen, ScreenedIntake]:
    intake, screen = MemoryIntake(**more), OddScreen()
    return intake, screen, ScreenedIntake(intake, screen)  # type: ignore[arg-type]


GOOD, BAD = b'{"a":1}', b'{"a":"bad"}'


async def test_the_answer_has_each_record_that_does_not_fit() -> None:
    intake, _, one = screened()
    async with serving(one) as source:
        body = b"\n".join([GOOD, BAD, b"{oops", GOOD, BAD, b""])
        reply = await ask(source, body)
        assert reply.status == 202
        assert reply.json["accepted"] == 2
        assert reply.json["invalid"] == 3
        found = [(e["index"], e["reason"], e["detail"]) for e in reply.json["errors"]]
        assert [found[0], found[2]] == [(1, "schema", "is bad"), (4, "schema", "is bad")]
        assert found[1][:2] == (2, "malformed")
    assert intake.items == [GOOD, GOOD]
    assert [(r.reason, r.payload) for r in intake.refused] == [
        ("schema", BAD), ("malformed", b"{oops"), ("schema", BAD),
    ]  # fmt: skip


async def test_nothing_that_fits_is_400_and_nothing_is_kept() -> None:
    intake, _, one = screened()
    async with serving(one) as source:
        reply = await ask(source, BAD)
        assert (reply.status, reply.slug) == (400, "malformed")
        assert reply.json["errors"] == [{"index": 0, "reason": "schema", "detail": "is bad"}]
        strict = await ask(source, GOOD + b"\n" + BAD, Prefer="handling=strict")
        assert (strict.status, strict.slug) == (400, "not-strict")
        assert strict.json["errors"][0]["index"] == 1
        mostly = await ask(source, b"\n".join([GOOD, *[BAD] * 300]))
        assert mostly.slug == "mostly-invalid"
    assert not intake.runs
    assert not intake.refused


async def test_an_overload_is_503_for_the_whole_request() -> None:
    intake, screen, one = screened()
    screen.errors.append(Overloaded(what="x", retry_after=2.0))
    async with serving(one) as source:
        reply = await ask(source, GOOD)
        assert (reply.status, reply.slug) == (503, "overloaded")
        assert reply.headers["retry-after"] == "2"
        assert (await ask(source, GOOD)).status == 202
    assert intake.items == [GOOD]


async def test_quick_requests_are_validated_together_and_a_bad_one_alone_is_refused() -> None:
    intake, screen, one = screened()
    async with serving(one) as source, connected(source) as client:
        client.post(GOOD)  # its head is known from now on
        assert (await client.reply()).status == 202
        for body in (GOOD, BAD, GOOD):
            client.post(body)
        statuses = [(await client.reply()).status for _ in range(3)]
    assert statuses == [202, 400, 202]
    assert intake.items == [GOOD] * 3
    assert len(screen.asked) >= 3


@pytest.mark.slow
async def test_a_stream_is_validated_piece_by_piece() -> None:
    intake, screen, one = screened()
    async with serving(one) as source, connected(source) as client:
        client.post(b"", Transfer_Encoding="chunked")

        async def send(data: bytes, accepted: int) -> None:
            client.send(b"%x\r\n%b\r\n" % (len(data), data))
            async with asyncio.timeout(60):
                while len(intake.items) < accepted:
                    await asyncio.sleep(0.002)

        await send(GOOD + b"\n" + BAD + b"\n", 1)
        screen.errors.append(Overloaded(what="x", retry_after=0.01))
        await send(BAD + b"\n" + GOOD + b"\n", 2)
        client.send(b"0\r\n\r\n")
        reply = await client.reply()
    assert reply.json["accepted"] == 2
    assert [(e["index"], e["reason"]) for e in reply.json["errors"]] == [
        (1, "schema"), (2, "schema"),
    ]  # fmt: skip


async def test_documents_and_compressed_bodies_are_validated() -> None:
    import gzip

    intake, _, one = screened()
    async with serving(one) as source:
        body = gzip.compress(b"[%b,%b]" % (BAD, GOOD))
        reply = await ask(source, body, Content_Type="application/json", Content_Encoding="gzip")
        assert reply.json["errors"][0]["index"] == 0
    assert intake.items == [GOOD]


async def test_an_accept_without_http_keeps_what_does_not_fit_as_invalid() -> None:
    intake, _, one = screened()
    packed = envelopes.numbered(envelopes.pack(Envelope(numbered="line")), 3, 7)
    records = Records.lines([GOOD, BAD, GOOD])._replace(envelopes=packed)
    malformed = InvalidRecord(9, "malformed", "no", b"x")
    await one.accept(Append(records, [malformed], unkept=2))
    assert intake.items == [GOOD, GOOD]
    assert intake.unkept == 2
    bad, other = intake.refused
    assert other == malformed
    assert (bad.index, bad.reason, bad.payload) == (1, "schema", BAD)
    assert envelopes.facts_of(bad.envelope)["attributes"] == {"line": 8}
    (run,) = intake.runs
    assert [envelopes.EnvelopeRuns(run.envelopes, 2).of(i).attributes for i in (0, 1)] == [
        {"line": 7}, {"line": 9},
    ]  # fmt: skip


class Settled(DeliveryWaiter):
    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.places: list[int] = []

    def settled(self, index: int, records: int) -> None:
        super().settled(index, records)
        self.places += range(index, index + records)


async def test_a_waiter_hears_of_each_record_at_its_own_place() -> None:
    intake, _, one = screened()
    waiters: list[Any] = []
    stopped: list[Any] = []
    accept = intake.accept

    async def accepted(append: Append) -> None:
        await accept(append)
        waiters.append(append.waiter)

    intake.accept = accepted  # type: ignore[method-assign]
    intake.stop_waiting = stopped.append  # type: ignore[attr-defined]
    whole = Settled(5)
    await one.accept(Append(Records.lines([GOOD, BAD, GOOD, BAD, GOOD]), waiter=whole))
    assert whole.places == [1, 3]
    (part,) = waiters
    part.died(1, 1, "failed", "no")
    part.settled(1, 2)
    part.settled(0, 1)
    assert whole.places == [1, 3, 2, 4, 0]
    assert (whole.failed[0].index, whole.dead, whole.done.is_set()) == (2, 1, True)
    one.stop_waiting(whole)
    assert stopped == [part]
    alone = Settled(1)
    await one.accept(Append(Records.lines([BAD]), waiter=alone))
    assert (waiters[1], alone.places) == (None, [0])
    intake.errors.append(Overloaded(what="x"))
    with pytest.raises(Overloaded):
        await one.accept(Append(Records.lines([BAD, GOOD]), waiter=Settled(2)))
    assert not one._waiters


@pytest.mark.parametrize(
    ("refused", "unlisted", "first", "expected"),
    [
        ([], 0, 0, [0, 2, 5]),
        ([0], 0, 0, [1, 3, 6]),
        ([1, 2, 6], 0, 0, [0, 4, 8]),
        ([11], 0, 10, [10, 13, 16]),
        ([1, 2], 1, 0, [0]),
        ([9], 3, 0, [0, 2, 5]),
    ],
)
def test_indexes_count_the_invalid_records_in_front(
    refused: list[int], unlisted: int, first: int, expected: list[int]
) -> None:
    invalid = [InvalidRecord(index, "malformed", "", b"") for index in refused]
    parsed = Parsed(Records.lines([b"1"] * 8), invalid, unlisted)
    assert list(indexes([0, 2, 5], parsed, first)) == expected


def test_sized_records_stay_sized() -> None:
    parsed = Parsed(Records.sized([b"1\n", b"2", b"3"]), [])
    found = Sorted({"a": [0], "b": [2]}, {"b": [Rejection(1, "schema", "no")]})
    parts = divided(parsed, found, "a")
    assert parts["a"] == Parsed(Records.sized([b"1\n"]), [])
    assert parts["b"].records == Records.sized([b"3"])
    assert parts["b"].refused == [InvalidRecord(1, "schema", "no", b"2")]


async def test_the_schema_is_in_the_description_of_its_paths() -> None:
    _, _, one = screened()
    other = MemoryIntake(name="other")
    async with serving(one, other) as source, connected(source) as client:  # type: ignore[arg-type]
        client.send(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        document = json.loads((await client.reply()).body)
    schemas = document["components"]["schemas"]
    assert schemas["default"] == {"$ref": "#/components/schemas/default.Click"}
    assert schemas["default.Click"] == {"type": "object"}
    bodies = {
        path: item["post"]["requestBody"]["$ref"].rpartition("/")[2]
        for path, item in document["paths"].items()
        if "post" in item
    }
    assert bodies == {
        "/v1/records": "default", "/v1/records/default": "default", "/v1/records/other": "json",
    }  # fmt: skip
    content = document["components"]["requestBodies"]["default"]["content"]
    record = {"$ref": "#/components/schemas/default"}
    assert record in content["application/json"]["schema"]["anyOf"]


async def test_items_of_elasticsearch_fail_one_by_one() -> None:
    intake = KeyIntake()
    one: Any = ScreenedIntake(intake, OddScreen())
    action = b'{"create":{"_index":"x"}}'
    body = b"\n".join([action, GOOD, action, BAD, action, GOOD, b""])
    async with serving_endpoint("elasticsearch", one, own={"metadata_field": ""}) as source:
        reply = await ask(source, body, "/elastic/_bulk", Content_Type="application/x-ndjson")
        statuses = [item["create"]["status"] for item in reply.json["items"]]
        assert statuses == [201, 400, 201]
        assert reply.json["errors"] is True
        assert reply.json["items"][1]["create"]["error"]["reason"] == "is bad"
        ids = [b'{"create":{"_id":"%d"}}' % n for n in range(3)]
        named = b"\n".join([ids[0], GOOD, ids[1], BAD, ids[2], BAD, b""])
        for _ in range(2):  # those that fit are known, and not accepted twice
            reply = await ask(
                source, named, "/elastic/x/_bulk", Content_Type="application/x-ndjson"
            )
            assert [i["create"]["status"] for i in reply.json["items"]] == [201, 400, 400]
    assert intake.items == [GOOD] * 3
    async with serving_endpoint("splunk_hec", one) as source:
        events = b'{"event":1}{"event":"bad"}{"event":2}'
        reply = await ask(source, events, "/services/collector/event")
        assert (reply.status, reply.json["code"]) == (400, 6)
        assert reply.json["invalid-event-number"] == 1
    assert len(intake.items) == 5


async def test_appends_keep_their_order_whatever_their_size() -> None:
    intake = MemoryIntake()
    one = ScreenedIntake(intake, OddScreen(), Router("/type", {}, "default"))  # type: ignore[arg-type]
    large, small = Records.lines([b"1" * 100] * 5000), Records.lines([b"2"])
    await asyncio.gather(*(one.accept(Append(records)) for records in (large, small, large)))
    assert [items.count for items in intake.runs] == [5000, 1, 5000]
    one.close()
