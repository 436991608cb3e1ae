"""Splunk's HTTP Event Collector as its clients see it: a real server, intakes in memory."""

from __future__ import annotations

import base64
import gzip
import json
from time import process_time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestd.base.errors import Overloaded
from ingestd.http.problem import Problem
from ingestd.sources.http.endpoints.base import BodyLimits
from ingestd.sources.http.endpoints.splunk_hec import EventsCodec, RawCodec
from tests.peak import peak
from tests.sources.endpoints.endpoint_tools import KeyIntake, serving_endpoint
from tests.sources.source_tools import MemoryIntake, connected

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ingestd.sources.http.source import HttpSource

TOKEN = "token-of-the-tests-0123456789-abcdef"
TOKENS = {"shop": {"token": TOKEN}}
SUCCESS = (200, {"text": "Success", "code": 0})
CHANNEL = {"X_Splunk_Request_Channel": "fe0ecfad-13d5-401b-847d-77833bd77131"}


async def send(
    source: HttpSource, body: bytes = b"", path: str = "", method: str = "POST", **headers: str
) -> tuple[int, Any]:
    async with connected(source) as client:
        head = [f"{method} /services/collector{path} HTTP/1.1", "Host: localhost"]
        head += [f"{k.replace('_', '-')}: {v}" for k, v in headers.items()]
        head += [f"Content-Length: {len(body)}", "", ""]
        client.send("\r\n".join(head).encode() + body)
        reply = await client.reply(bodiless=method == "HEAD")
        assert reply.headers["content-type"] == "application/json"
        assert reply.status not in {429, 503} or reply.headers["retry-after"]
        return reply.status, json.loads(reply.body or b"null")


A = b'{"time":1.5,"host":"h","sourcetype":"s","event":{"n":1},"fields":{"f":"x"}}'
B = b'{"event":"text"}'


@pytest.mark.parametrize(
    "body", [A + B, A + b"\n" + B + b"\n", b" " + A + b" \r\n\t" + B, b"[" + A + b", " + B + b"]"]
)
async def test_events_become_records_as_they_came(body: bytes) -> None:
    intake = MemoryIntake()
    async with serving_endpoint("splunk_hec", intake) as source:
        for path in ("", "/event", "/event/1.0"):
            intake.runs.clear()
            assert await send(source, body, path) == SUCCESS
            assert intake.items == [A, B]
        zipped = gzip.compress(body)
        assert await send(source, zipped, Content_Encoding="gzip") == SUCCESS
        assert await send(source, b'{"event":\n{"n":1}}' + B) == SUCCESS
        assert intake.items[-2:] == [b'{"event":\n{"n":1}}', B]


@pytest.mark.parametrize(
    ("body", "status", "code", "number", "accepted"),
    [
        (b"", 400, 5, None, 0),
        (b"[]", 400, 5, None, 0),
        (b" \n", 400, 5, None, 0),
        (b"{}", 400, 12, 0, 0),
        (B + b'{"events":1}' + B, 400, 12, 1, 2),
        (B + B + b'{"event":""}' + B, 400, 13, 2, 3),
        (b'{"event":null}', 400, 13, 0, 0),
        (B + b"{" + B, 400, 6, 1, 1),
        (B + b'{"event":1,}' + b"{}" + B, 400, 6, 1, 2),
        (B + b'{"event":1,"index":5}', 400, 6, 1, 1),
        (B + b'{"event":"\xff"}' + B, 400, 6, 1, 2),
        (B + b"," + B, 400, 6, 1, 1),
        (b"[" + B + b" " + B + b"]", 400, 6, 1, 1),
        (b"[" + B + b",]", 400, 6, 1, 1),
        (b"[" + B, 400, 6, 0, 0),
        (b"text", 400, 6, 0, 0),
        (B + b"]", 400, 6, 1, 1),
        (b'{"event":"' + b"x" * 300 + b'"}' + B, 400, 6, 0, 1),
        (b'{"event":' + b"[" * 200 + b"]" * 200 + b"}" + B, 400, 6, 0, 1),
        (b"[" * 100_000, 400, 6, 0, 0),
        (B * 21, 413, 27, None, 0),
        (b"[" + b",".join([B] * 21) + b"]", 413, 27, None, 0),
        (b"[" + b"1," * 100 + b"1]", 400, 6, 0, 0),
    ],
)
async def test_events_that_are_not_good(
    body: bytes, status: int, code: int, number: int | None, accepted: int
) -> None:
    intake = MemoryIntake(record_bytes_max=250, json_depth_max=8)
    async with serving_endpoint("splunk_hec", intake, records_max=20) as source:
        found = await send(source, body)
    told = {} if number is None else {"invalid-event-number": number}
    assert found[0] == status
    assert {key: value for key, value in found[1].items() if key != "text"} == {
        "code": code, **told,
    }  # fmt: skip
    assert intake.items == [B] * accepted
    assert bool(intake.refused) is (accepted > 0)


@pytest.mark.parametrize("body", [b'{"event":"' + b'\\"' * 25_000, b'{\\"}' * 25_000])
def test_texts_without_an_end_take_no_long_time(body: bytes) -> None:
    """The time is linear in them, however many quotes they have."""
    begun = process_time()
    with pytest.raises(Problem) as found:
        CODEC.decode(body, BodyLimits(100_000, 1024**2))
    assert found.value.kind.status == 400
    assert process_time() - begun < 2


async def test_raw_lines_become_events_with_what_the_query_says() -> None:
    intake = MemoryIntake(record_bytes_max=100)
    query = "?sourcetype=s%22&host=h&time=1700000000.5&unknown=x&channel=c"
    async with serving_endpoint("splunk_hec", intake) as source:
        assert await send(source, b'one "1"\r\n\n \xc3\xa9\xff\n{"a":1}', f"/raw{query}") == (
            200, {"text": "Success", "code": 0, "ackId": 0},
        )  # fmt: skip
        metadata = {"sourcetype": 's"', "host": "h", "time": 1700000000.5}
        assert [json.loads(item) for item in intake.items] == [
            {"event": text, **metadata} for text in ('one "1"', " é\ufffd", '{"a":1}')
        ]
        intake.runs.clear()
        assert await send(source, b"one", "/raw/1.0") == SUCCESS
        assert intake.items == [b'{"event":"one"}']
        found = await send(source, b"a\n" + b"x" * 100 + b"\nb\n", "/raw")
        assert found[1] == {"text": "Invalid data format", "code": 6, "invalid-event-number": 1}
        assert [json.loads(item)["event"] for item in intake.items] == ["one", "a", "b"]
        assert (await send(source, b"\n\n", "/raw"))[1] == {"text": "No data", "code": 5}
        assert (await send(source, b"x" * 200, "/raw"))[1]["code"] == 6
        assert (await send(source, b"x", f"/raw?host={'x' * 1025}"))[1]["code"] == 6


async def test_a_time_in_the_query_is_a_number_where_json_has_it_as_one() -> None:
    intake = MemoryIntake()
    times = ["0", "0.5", "1700000000.25", "007", "00.5", "1.", "-1", "1e9"]
    async with serving_endpoint("splunk_hec", intake) as source:
        for time in times:
            assert await send(source, b"line", f"/raw?time={time}") == SUCCESS
    found = [json.loads(item)["time"] for item in intake.items]
    assert found == [0, 0.5, 1700000000.25, *times[3:]]


async def test_acknowledgements_are_true_without_state() -> None:
    intake = MemoryIntake()
    async with serving_endpoint("splunk_hec", intake) as source:
        ids = [(await send(source, B, **CHANNEL))[1]["ackId"] for _ in range(2)]
        ids.append((await send(source, B, "?channel=x"))[1]["ackId"])
        assert len(set(ids)) == 3
        asked = json.dumps({"acks": [*ids, 99]}).encode()
        for path in ("/ack", "/ack/1.0"):
            assert await send(source, asked, path, **CHANNEL) == (
                200, {"acks": {str(one): True for one in (*ids, 99)}},
            )  # fmt: skip
        assert await send(source, asked, "/ack") == (
            400, {"text": "Data channel is missing", "code": 10},
        )  # fmt: skip
        assert (await send(source, b"[1]", "/ack", **CHANNEL))[1]["code"] == 6
        assert len(intake.items) == 3
    async with serving_endpoint("splunk_hec", intake, own={"acks": False}) as source:
        assert await send(source, asked, "/ack", **CHANNEL) == (
            400, {"text": "ACK is disabled", "code": 14},
        )  # fmt: skip
        assert await send(source, B, **CHANNEL) == SUCCESS


async def test_events_go_by_index_and_sourcetype() -> None:
    default, web, audit = MemoryIntake(), MemoryIntake(name="web"), MemoryIntake(name="audit")
    own = {"indexes": {"web-*": "web"}, "sourcetypes": {"audit": "audit", "*": "default"}}
    one = b'{"event":1,"index":"web-1","sourcetype":"audit"}'
    two = b'{"event":2,"index":"other","sourcetype":"audit"}'
    async with serving_endpoint("splunk_hec", default, web, audit, own=own) as source:
        assert await send(source, one + B + two) == SUCCESS
        assert await send(source, b"line", "/raw?index=web-2") == SUCCESS
        assert await send(source, one + b'{"event":""}' + two) == (
            400, {"text": "Event field cannot be blank", "code": 13, "invalid-event-number": 1},
        )  # fmt: skip
        assert [len(intake.items) for intake in (default, web, audit)] == [1, 3, 2]
        audit.errors = [Overloaded(what="the journal", retry_after=3.0)]
        assert await send(source, one + two) == (503, {"text": "Server is busy", "code": 9})


async def test_events_that_come_again_are_accepted_once_if_that_is_asked_for() -> None:
    for deduplicate, counts in ((False, (3, 6, 9)), (True, (3, 3, 4))):
        intake = KeyIntake()
        own = {"deduplicate": deduplicate}
        async with serving_endpoint("splunk_hec", intake, own=own) as source:
            found = []
            for body in (A + B + B, B + B + A, B + b'{"event":2}' + A):
                assert await send(source, body) == SUCCESS
                found.append(len(intake.items))
            assert tuple(found) == counts
            for _ in range(2):
                assert await send(source, b"a\nb\na", "/raw") == SUCCESS
            assert len(intake.items) == counts[-1] + (3 if deduplicate else 6)


async def test_tokens_in_the_ways_of_its_clients() -> None:
    intake = MemoryIntake()
    basic = base64.b64encode(f"anything:{TOKEN}".encode()).decode()
    async with serving_endpoint("splunk_hec", intake, tokens=TOKENS) as source:
        for shown in (f"Splunk {TOKEN}", f"splunk {TOKEN}", f"Basic {basic}", f"Bearer {TOKEN}"):
            assert await send(source, B, Authorization=shown) == SUCCESS
            assert (
                await send(source, path="/event/1.0", method="OPTIONS", Authorization=shown)
            ) == (SUCCESS)
        for headers, path, status, code in (
            ({}, "", 401, 2),
            ({"Authorization": TOKEN}, "", 401, 3),
            ({"Authorization": f"Digest {TOKEN}"}, "", 401, 3),
            ({"Authorization": f"Splunk {TOKEN[1:]}"}, "", 403, 4),
            ({"Authorization": "Basic !"}, "", 403, 4),
            ({}, f"?token={TOKEN}", 400, 16),
            ({}, "/ack", 401, 2),
        ):  # fmt: skip
            found = await send(source, B, path, **headers)
            assert (found[0], found[1]["code"]) == (status, code)
    async with serving_endpoint(
        "splunk_hec", intake, own={"query_token": True}, tokens=TOKENS
    ) as source:
        assert await send(source, B, f"?token={TOKEN}") == SUCCESS
        assert (await send(source, B, "?token=no"))[0] in {401, 403}
    limited = {"shop": {"token": TOKEN, "records_per_second": 1}}
    async with serving_endpoint("splunk_hec", intake, tokens=limited) as source:
        await send(source, B * 50, Authorization=f"Splunk {TOKEN}")
        found = await send(source, B, Authorization=f"Splunk {TOKEN}")
        assert found == (503, {"text": "Server is busy", "code": 9})


async def test_health_and_paths_that_are_not_there() -> None:
    healthy = (200, {"text": "HEC is healthy", "code": 17})
    async with serving_endpoint("splunk_hec", MemoryIntake(), tokens=TOKENS) as source:
        for path in ("/health", "/health/1.0", "/health?token=x"):
            assert await send(source, path=path, method="GET") == healthy
            assert (await send(source, path=path, method="HEAD"))[0] == 200
        assert (await send(source, B, "/other"))[1]["code"] == 404
        assert (await send(source, B, method="GET"))[1]["code"] == 405
        source._handler.draining = True
        assert (await send(source, path="/health", method="GET"))[1]["code"] == 18
        assert (await send(source, B))[1]["code"] == 9


# -- the codec -------------------------------------------------------------------------------------

LIMITS = BodyLimits(100, 100, 5)
CODEC = EventsCodec(lambda index, sourcetype: index or sourcetype or "")


def made(parts: Sequence[Any]) -> Any:
    return sorted((one.pipeline, one.parsed.records.items(), one.notes) for one in parts)


pieces = st.sampled_from(
    [
        A, B, b'{"event":[[[1]]],"index":"a"}', b'{"event":"}{","sourcetype":"b"}', b'{"event":0}',
        b'{"event":"\\"{"}', b'{"event":"\xc3\xa9"}', b'{"event":"\xff"}', b'{"event":{"a":[]}}',
        b'{"index":null,"event":1}', b"{}", b'{"event":""}', b'{"event":[[[[[[]]]]]]}', b"[", b"]",
        b"{", b"}", b'"', b",", b" ", b"\n", b"1", b'{"event":1e5,"event":2}', b"\\",
    ]
)  # fmt: skip


@given(st.lists(pieces, max_size=10), st.sampled_from([(b"", b""), (b"[", b"]")]))
def test_both_ways_read_a_body_alike(some: list[bytes], around: tuple[bytes, bytes]) -> None:
    body = around[0] + (b"," if around[0] else b"").join(some) + around[1]
    cut = CODEC._cut(body, LIMITS)
    if cut:
        assert made(cut) == made(CODEC._walk(body, LIMITS))


@given(st.lists(st.sampled_from([A, B, b'{"event":1,"index":"a"}']), min_size=1, max_size=30))
def test_good_events_are_cut_as_a_whole(some: list[bytes]) -> None:
    for body in (b"".join(some), b"\n".join(some), b"[" + b",".join(some) + b"]"):
        assert sum(one.parsed.records.count for one in CODEC._cut(body, LIMITS) or ()) == len(some)


@pytest.mark.parametrize("around", [(b"", b"", b""), (b"[", b",", b"]")])
def test_many_good_events_with_many_braces_are_all_accepted(around: tuple[bytes, ...]) -> None:
    event = b'{"event":{"a":{"b":[' + b",".join([b'"x"'] * 120) + b"]}}}"
    limits, count = BodyLimits(20_000, 1024**2), 18_000
    body = around[0] + around[1].join([event] * count) + around[2]
    (part,) = CODEC.decode(body, limits)
    assert (part.parsed.records.count, part.parsed.refused, part.notes) == (count, [], None)


@pytest.mark.parametrize(
    "body",
    [b'"' * 2**21, b"[" * 2**21, b"1 " * 2**20, b"[" + b"1," * 2**20 + b"1]", b"\xff" * 2**21],
)
def test_hostile_bodies_take_little_memory(body: bytes) -> None:
    limits = BodyLimits(100_000, 1024**2)
    for codec in (CODEC, RawCodec("", b"")):
        with peak() as most, pytest.raises(Problem):
            codec.decode(body, limits)
        assert most.bytes < 4 * len(body)


def test_raw_lines_that_grow_are_bounded() -> None:
    body = (b"\xff" * 99 + b"\n") * 1000
    with pytest.raises(Problem, match="bytes"):
        RawCodec("", b"").decode(body, BodyLimits(1000, 1024**2, bytes_max=len(body)))


@given(st.one_of(st.binary(max_size=200), st.lists(pieces).map(b"".join)))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    for codec in (CODEC, RawCodec("", b"")):
        try:
            parts = codec.decode(body, LIMITS)
        except Problem as found:
            assert found.kind.status in {400, 413}  # noqa: PT017
            continue
        for part in parts:
            for item in part.parsed.records.items():
                assert json.loads(item)["event"] not in (None, "")
