"""Loki's push API as its clients see it: a real server, intakes in memory; and the codec alone."""

from __future__ import annotations

import gzip
import json
from base64 import b64encode
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import cramjam
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ingestd.base.errors import Overloaded
from ingestd.codecs import loki
from ingestd.codecs.loki import PushFault, TooManyEntries, read_json, read_labels
from ingestd.codecs.protobuf import FieldBudget, WireFault
from ingestd.http import body as http_body
from ingestd.http.problem import Problem
from ingestd.sources.http.endpoints.base import BodyLimits
from ingestd.sources.http.endpoints.loki import (
    LokiEndpoint,
    LokiSettings,
    ProtobufPushCodec,
    PushCodec,
)
from tests.peak import peak
from tests.sources.endpoints.endpoint_tools import KeyIntake, serving_endpoint
from tests.sources.source_tools import Client, Reply, connected

if TYPE_CHECKING:
    from ingestd.sources.http.source import HttpSource

TOKEN = "token-of-the-tests-0123456789-abcdef"
PUSH = "/loki/api/v1/push"
JSON = "application/json"
LIMITS = BodyLimits(100_000, 1024**2)


def push(*streams: tuple[dict[str, str], list[Any]]) -> bytes:
    return json.dumps({"streams": [{"stream": s, "values": v} for s, v in streams]}).encode()


def record(time: int, line: str, labels: dict[str, str], **more: Any) -> dict[str, Any]:
    return {"timestamp": str(time), "line": line, "labels": labels, **more}


def varint(number: int) -> bytes:
    out = b""
    number &= 2**64 - 1
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def written(labels: dict[str, str]) -> str:
    return "{" + ", ".join(f"{name}={json.dumps(value)}" for name, value in labels.items()) + "}"


def entry(time: str, line: str, metadata: dict[str, str] | None = None) -> bytes:
    seconds, nanos = divmod(int(time), 10**9)
    pairs = [
        field(3, field(1, k.encode()) + field(2, v.encode())) for k, v in (metadata or {}).items()
    ]
    at = field(1, seconds) + field(2, nanos)
    return field(1, at) + field(2, line.encode()) + b"".join(pairs)


def proto(*streams: tuple[dict[str, str] | str, list[Any]]) -> bytes:
    """A push as `push` makes it, in protobuf."""
    return b"".join(
        field(
            1,
            field(1, (labels if isinstance(labels, str) else written(labels)).encode())
            + b"".join(field(2, entry(*value)) for value in values)
            + field(3, 2**63),  # the hash of the stream, which is skipped
        )
        for labels, values in streams
    )


def snappy(body: bytes) -> bytes:
    return bytes(cramjam.snappy.compress_raw(body))


class Asked(Reply):
    @property
    def text(self) -> str:
        assert self.headers["content-type"] == "text/plain; charset=utf-8"
        return self.body.decode()


async def send(
    source: HttpSource, body: bytes, path: str = PUSH, method: str = "POST", **headers: str
) -> Any:
    async with connected(source) as client:
        return Asked(*await said(client, body, path, method, **headers))


async def said(client: Client, body: bytes, path: str, method: str, **headers: str) -> Reply:
    headers.setdefault("Content_Type", JSON)
    head = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    head += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    client.send("\r\n".join([*head, "", ""]).encode() + body)
    return await client.reply(bodiless=method == "HEAD")


def loads(intake: KeyIntake) -> list[Any]:
    return [json.loads(item) for item in intake.items]


async def test_entries_become_records_with_the_labels_of_their_stream() -> None:
    intake = KeyIntake()
    web, jobs = {"app": "web", "level": "info"}, {"app": "jobs"}
    meta = {"trace_id": "0242ac", "user": "ä\n"}
    body = push(
        (web, [["1760000000000000001", "first"], ["1760000000000000002", 'a "quoted"\n\tline ä']]),
        (jobs, [["-5", "", meta], ["7", "no metadata", {}], ["8", "none"]]),
        ({}, []),
        ({}, [["9", "without labels"]]),
    )
    async with serving_endpoint("loki", intake) as source:
        for headers in (
            {},
            {"Content_Encoding": "gzip"},
            {"Content_Type": f"{JSON}; charset=utf-8"},
        ):
            wire = gzip.compress(body) if "Content_Encoding" in headers else body
            reply = await send(source, wire, X_Scope_OrgID="team-a", **headers)
            assert (reply.status, reply.body) == (204, b"")
            assert "content-type" not in reply.headers
    expected = [
        record(1760000000000000001, "first", web, tenant="team-a"),
        record(1760000000000000002, 'a "quoted"\n\tline ä', web, tenant="team-a"),
        record(-5, "", jobs, metadata=meta, tenant="team-a"),
        record(7, "no metadata", jobs, tenant="team-a"),
        record(8, "none", jobs, tenant="team-a"),
        record(9, "without labels", {}, tenant="team-a"),
    ]
    assert loads(intake) == expected * 3
    assert list(json.loads(intake.items[2])) == [
        "timestamp",
        "line",
        "labels",
        "metadata",
        "tenant",
    ]


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Type": "application/x-protobuf"},
        {"Content_Type": "application/x-protobuf", "Content_Encoding": "snappy"},
        {"Content_Type": ""},
    ],
)
async def test_entries_in_protobuf_become_the_same_records(headers: dict[str, str]) -> None:
    intake = KeyIntake(record_bytes_max=1000)
    web = {"app": "web", "path": 'C:\\temp\n"\u00e4"'}
    meta = {"trace_id": "0242ac", "user": "\u00e4\n"}
    streams: Any = [
        (web, [["1760000000000000001", 'a "quoted"\n\tline \u00e4'], ["2", "x", meta], ["-5", ""]]),
        ({}, []),
        ("", [["9", "without labels"]]),
    ]
    async with serving_endpoint("loki", intake) as source:
        reply = await send(source, snappy(proto(*streams)), X_Scope_OrgID="a", **headers)
        assert (reply.status, reply.body) == (204, b"")
        assert loads(intake) == [
            record(1760000000000000001, 'a "quoted"\n\tline \u00e4', web, tenant="a"),
            record(2, "x", web, metadata=meta, tenant="a"),
            record(-5, "", web, tenant="a"),
            record(9, "without labels", {}, tenant="a"),
        ]
        intake.runs.clear()
        body = proto(({"a": "b"}, [["1", "x" * 2000], ["2", "y"], ["3", "z", {"m": "n" * 2000}]]))
        reply = await send(source, snappy(body), **headers)
        assert reply.text.startswith("2 of 3 entries were not accepted; entry 0: ")
        assert [one["line"] for one in loads(intake)] == ["y"]
        assert [one.reason for one in intake.refused] == ["too_large"] * 2


async def test_a_stream_whose_labels_are_none_costs_no_other_one() -> None:
    intake = KeyIntake()
    kind = {"Content_Type": "application/x-protobuf"}
    body = proto(('{a="b"', [["1", "x"], ["2", "y"]]), ({"a": "b"}, [["3", "z"]]))
    async with serving_endpoint("loki", intake) as source:
        reply = await send(source, snappy(body), **kind)
        assert reply.status == 400
        assert reply.text == "2 of 3 entries were not accepted; entry 0: labels are not in braces\n"
        assert loads(intake) == [record(3, "z", {"a": "b"})]
        kept = [json.loads(one.payload) for one in intake.refused]
        assert kept == [record(1, "x", '{a="b"'), record(2, "y", '{a="b"')]  # type: ignore[arg-type]
        reply = await send(source, snappy(proto(('{a!="b"}', [["1", "x"]]))), **kind)
        assert reply.text == "Malformed Records: record 0: labels are malformed at character 2\n"


PROTO = proto(({"a": "b"}, [["1", "x", {"c": "d"}], ["2", "y"]]))


@pytest.mark.parametrize(
    ("wire", "why"),
    [
        (PROTO, "snappy"),
        (snappy(PROTO)[:-1], "snappy body is not valid"),
        (varint(len(PROTO) + 1) + snappy(PROTO)[1:], "snappy body is not valid"),
        (varint(2**31) + snappy(PROTO)[1:], "its length is not that of its content"),
        (snappy(PROTO[:-1]), "a field is cut off"),
        (snappy(PROTO[:3]), "a field is cut off"),
        (snappy(PROTO[:1]), "a field is cut off"),
        (snappy(field(1, field(2, b"\x0a\xff\xff"))), "a field is cut off"),
        (snappy(field(1, field(2, field(1, b"\x08\x80")))), "a field is cut off"),
        (snappy(field(1, field(2, field(1, b"\x09\x80")))), "a field is cut off"),
        (snappy(field(1, b"\x0b\x0c")), "a field has the wire type 3"),
        (snappy(b"\x02\x00"), "a field has the number 0"),
        (snappy(b"\x08" + b"\xff" * 12), "more than 64 bits"),
    ],
)
async def test_what_is_no_push_in_protobuf_is_400(wire: bytes, why: str) -> None:
    intake = KeyIntake()
    async with serving_endpoint("loki", intake) as source:
        reply = await send(source, wire, Content_Type="application/x-protobuf")
        assert reply.status == 400
        assert why in reply.text
    assert not intake.runs


async def test_protobuf_is_snappy_and_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = {"Content_Type": "application/x-protobuf"}
    async with serving_endpoint("loki", KeyIntake()) as source:
        reply = await send(source, gzip.compress(PROTO), Content_Encoding="gzip", **kind)
        assert (reply.status, "comes as a snappy block" in reply.text) == (415, True)
        assert (await send(source, snappy(b""), **kind)).status == 204
        monkeypatch.setattr(http_body, "has_snappy", lambda: False)
        reply = await send(source, snappy(PROTO), **kind)
        assert reply.status == 415
        assert "pip install 'ingestd[snappy]'" in reply.text
        assert (await send(source, push(({}, [["1", "x"]])))).status == 204


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("", {}),
        ("{}", {}),
        (' { a = "b" , c="d", } ', {"a": "b", "c": "d"}),
        (r'{a="\\\"\n\t\x41\101\u00e4\U0001F600"}', {"a": '\\"\n\tAA\u00e4\U0001f600'}),
        (r'{a="\ud83d\ude00"}', {"a": "\U0001f600"}),
        (r"{a='b\'c', d=`e\n\f`}", {"a": "b'c", "d": r"e\n\f"}),
        (r'{"a.b\n"="c", d:e_1="}"}', {"a.b\n": "c", "d:e_1": "}"}),
    ],
)
def test_labels_in_a_text(text: str, labels: dict[str, str]) -> None:
    assert read_labels(text) == labels


@pytest.mark.parametrize(
    "text",
    [
        "{", "}", "a", "{a}", "{a=}", "{a=b}", '{a="b}', '{a="b"', '{a=~"b"}', '{a="b" c="d"}',
        r'{a="\q"}', r'{a="\x4"}', r'{a="\Uffffffff"}', '{1a="b"}', '{a="b\n"}', r'{a="\777"}',
        r'{a="\ud800"}', r'{a="\udc00\ud800"}',
    ],
)  # fmt: skip
def test_what_are_no_labels(text: str) -> None:
    with pytest.raises(ValueError, match="labels "):
        read_labels(text)


async def test_a_tenant_belongs_to_its_own_requests() -> None:
    intake = KeyIntake()
    body = push(({"a": "b"}, [["1", "x"]]))
    async with serving_endpoint("loki", intake) as source, connected(source) as client:
        for tenant in ("one", "", "two", "one"):
            headers = {"X_Scope_OrgID": tenant} if tenant else {}
            assert (await said(client, body, PUSH, "POST", **headers)).status == 204
        assert [one.get("tenant") for one in loads(intake)] == ["one", None, "two", "one"]
        for bad in ("a|b", "x" * 151, "a/b"):
            reply = await send(source, body, X_Scope_OrgID=bad)
            assert reply.status == 400
            assert "X-Scope-OrgID has up to 150" in reply.text


async def test_a_push_without_entries_succeeds() -> None:
    intake = KeyIntake()
    async with serving_endpoint("loki", intake) as source:
        for body in (b'{"streams": []}', push(({"a": "b"}, []))):
            assert (await send(source, body)).status == 204
    assert not intake.runs


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "malformed"),
        (b"[]", "Expected `object`, got `array`"),
        (b"{}", "missing required field `streams`"),
        (b'{"streams": {}}', "Expected `array`, got `object`"),
        (b'{"streams": [{"labels": "{}", "entries": []}]}', "missing required field `values`"),
        (push(({}, [["1", "x"]]))[:-1], "truncated"),
        (push(({}, [["1"]])), "at least length 2"),
        (push(({}, [["1", "x", {}, 1]])), "at most length 3"),
        (push(({}, [[1, "x"]])), "a string of nanoseconds"),
        (push(({}, [["1.5", "x"]])), "a string of nanoseconds"),
        (push(({}, [["", "x"]])), "a string of nanoseconds"),
        (push(({}, [["1", 5]])), "nanoseconds since the epoch, a line"),
        (push(({}, [["1", ["x"]]])), "nanoseconds since the epoch, a line"),
        (push(({}, [["1", "x", ["a"]]])), "Expected `object`, got `array`"),
        (push(({}, [["1", "x", "y"]])), "Expected `object`, got `str`"),
        (b'{"streams": [{"stream": [], "values": []}]}', "Expected `object`, got `array`"),
        (b'{"streams": [{"stream": {}, "values": [["1", "a\\q"]]}]}', "invalid escaped character"),
        (b'{"streams": [{"stream": {}, "values": [["1", ' + b"[" * 200_000, "malformed"),
    ],
)
async def test_what_is_no_push_is_400_in_plain_text(body: bytes, why: str) -> None:
    intake = KeyIntake()
    async with serving_endpoint("loki", intake) as source:
        reply = await send(source, body)
        assert reply.status == 400
        assert reply.text.startswith("Malformed Records: the push is malformed: ")
        assert why in reply.text
        assert reply.text.endswith("\n")
    assert not intake.runs


async def test_labels_and_metadata_that_are_no_texts_become_some() -> None:
    intake = KeyIntake()
    odd: Any = {"n": 1, "f": 1.5, "t": True, "o": {"a": [1]}, "s": "\u00e4"}
    async with serving_endpoint("loki", intake) as source:
        assert (await send(source, push((odd, [["1", "x", odd]])))).status == 204
    texts = {"n": "1", "f": "1.5", "t": "true", "o": '{"a": [1]}', "s": "\u00e4"}
    assert loads(intake) == [record(1, "x", texts, metadata=texts)]


async def test_bytes_that_are_not_utf_8_are_replaced() -> None:
    intake = KeyIntake()
    async with serving_endpoint("loki", intake) as source:
        body = push(({"a": "?"}, [["1", "b?c"]])).replace(b"?", b"\xff")
        assert (await send(source, body)).status == 204
    assert loads(intake) == [record(1, "b\ufffdc", {"a": "\ufffd"})]


async def test_a_record_that_is_too_large_costs_no_other_one() -> None:
    intake = KeyIntake(record_bytes_max=300)
    entries: list[Any] = [[str(n), "x" * (400 if n % 3 == 1 else 10)] for n in range(9)]
    entries.append(["9", "long metadata", {"a": "\n" * 400}])
    async with serving_endpoint("loki", intake) as source:
        reply = await send(source, push(({"a": "b"}, entries)))
        assert reply.status == 400
        assert reply.text.startswith("4 of 10 entries were not accepted; entry 1: ")
        assert "more than record_bytes_max = 300" in reply.text
        assert [int(one["timestamp"]) for one in loads(intake)] == [0, 2, 3, 5, 6, 8]
        assert [one.index for one in intake.refused] == [1, 4, 7, 9]
        # 413 makes Fluent Bit send it again, as often as it may.
        reply = await send(source, push(({"a": "b"}, entries[1:2])))
        assert reply.status == 400
        assert reply.text.startswith("Record Too Large: ")
        reply = await send(source, push(({"a": "b" * 400}, [["1", ""]])))
        assert reply.status == 400


async def test_overload_is_the_whole_push_and_errors_are_plain_text() -> None:
    intake = KeyIntake()
    slow = TOKEN[::-1]
    tokens = {"shop": {"token": TOKEN}, "slow": {"token": slow, "records_per_second": 1}}
    body = push(({}, [[str(n), "x"] for n in range(9)]))
    async with serving_endpoint("loki", intake, tokens=tokens, request_bytes_max=1000) as source:
        reply = await send(source, body)
        assert reply.status == 401
        assert reply.text == "Unauthorized: a token is needed; the request has none\n"
        assert "bearer" in reply.headers["www-authenticate"].lower()
        shown = {"Authorization": f"Bearer {TOKEN}"}
        intake.errors = [Overloaded(what="the journal", retry_after=3.0)]
        reply = await send(source, body, **shown)
        assert (reply.status, reply.headers["retry-after"]) == (503, "3")
        assert reply.text.startswith("Pipeline Overloaded: ")
        assert (await send(source, body, **shown)).status == 204
        basic = {"Authorization": "Basic " + b64encode(f"slow:{slow}".encode()).decode()}
        assert (await send(source, body, **basic)).status == 204
        reply = await send(source, body, **basic)
        assert (reply.status, reply.text[:17]) == (429, "Too Many Requests")
        assert int(reply.headers["retry-after"]) > 0
    async with serving_endpoint("loki", intake, request_bytes_max=1000) as source:
        assert (await send(source, b" " * 1001)).status == 413
        reply = await send(source, body, Content_Type="text/plain")
        assert (reply.status, reply.headers["accept"][:16]) == (415, "application/json")
        assert (await send(source, body, Content_Encoding="br")).text.startswith("Unsupported")
        for path, method, status in (
            ("/loki/api/v1/other", "POST", 404), ("/loki/", "GET", 404), (PUSH, "GET", 405)
        ):  # fmt: skip
            reply = await send(source, b"", path, method)
            assert (reply.status, ":" in reply.text) == (status, True)


async def test_the_probe_of_clients() -> None:
    async with serving_endpoint("loki", KeyIntake(), tokens={"a": {"token": TOKEN}}) as source:
        reply = await send(source, b"", "/ready", "GET")
        assert (reply.status, reply.text) == (200, "ready\n")
        assert (await send(source, b"", "/ready", "HEAD")).status == 200


async def test_the_same_entry_is_accepted_once_if_asked_for() -> None:
    intake = KeyIntake(record_bytes_max=300)
    one, two, big = ["1", "x"], ["2", "x"], ["3", "x" * 400]

    async def lines_of(*values: list[str], labels: str = "b", **headers: str) -> list[str]:
        seen = len(intake.items)
        await send(source, push(({"a": labels}, list(values))), **headers)
        return [one["timestamp"] for one in loads(intake)[seen:]]

    async with serving_endpoint("loki", intake, own={"deduplicate": True}) as source:
        assert await lines_of(one, two, one) == ["1", "2"]
        assert await lines_of(["4", "x"], two, big) == ["4"]
        assert len(intake.refused) == 1
        assert await lines_of(one, two) == []
        assert await lines_of(one, labels="c") == ["1"]
        assert await lines_of(one, X_Scope_OrgID="other") == ["1"]
        assert await lines_of(["1", "y"]) == ["1"]
    intake = KeyIntake()
    async with serving_endpoint("loki", intake) as source:
        assert await lines_of(one, one) == ["1", "1"]
        assert await lines_of(one) == ["1"]


ROUTES = {"label": "app", "routes": {"pay": "audit", "noise": "noise"}, "deduplicate": True}


async def test_a_label_chooses_the_pipeline_and_each_part_is_told() -> None:
    default, audit, noise = KeyIntake(), KeyIntake("audit"), KeyIntake("noise")
    body = push(
        ({"app": "pay"}, [["1", "p1"], ["2", "p2"]]),
        ({"app": "web"}, [["3", "w"]]),
        ({}, [["4", "none"]]),
        ({"app": "pay", "b": "c"}, [["5", "p3"]]),
    )
    async with serving_endpoint("loki", default, audit, noise, own=ROUTES) as source:
        audit.errors = [Overloaded(what="the journal", retry_after=2.0)]
        reply = await send(source, body)
        assert (reply.status, reply.headers["retry-after"]) == (503, "2")
        assert reply.text.endswith("; 2 other entries were accepted\n")
        assert [one["line"] for one in loads(default)] == ["w", "none"]
        assert not audit.items
        assert (await send(source, body)).status == 204  # the client sends all of it again
        assert [one["line"] for one in loads(default)] == ["w", "none"]
        assert [one["line"] for one in loads(audit)] == ["p1", "p2", "p3"]
        assert not noise.items


async def test_a_part_that_may_not_be_sent_is_told_last() -> None:
    default, audit, noise = KeyIntake(), KeyIntake("audit"), KeyIntake("noise")
    tokens = {"a": {"token": TOKEN, "pipelines": "default noise"}}
    body = push(*(({"app": app}, [["1", app]]) for app in ("pay", "web", "noise")))
    shown = {"Authorization": f"Bearer {TOKEN}"}
    async with serving_endpoint("loki", default, audit, noise, own=ROUTES, tokens=tokens) as source:
        noise.errors = [Overloaded(what="the journal", retry_after=2.0)]
        assert (await send(source, body, **shown)).status == 503
        reply = await send(source, body, **shown)
        assert (reply.status, len(default.items), len(noise.items)) == (403, 1, 1)
        assert reply.text == "a may not send here; 2 other entries were accepted\n"


def test_settings_that_lead_nowhere_are_found() -> None:
    def found(**own: Any) -> list[tuple[str, str]]:
        formats: Any = {"default": "json", "text": "text"}
        return list(LokiEndpoint.check(LokiSettings(**own), formats))

    assert found(label="a", routes={"b": "default"}) == []
    assert [key for key, _ in found(label="a")] == ["label"]
    assert [key for key, _ in found(routes={"b": "default"})] == ["label"]
    assert found(label="a", routes={"b": "none", "c": "text"}) == [
        ("routes.b", "there is no pipeline 'none'"),
        ("routes.c", "'text' has the format text, not json"),
    ]


# -- the codec -------------------------------------------------------------------------------------


def decoded(body: bytes, limits: BodyLimits = LIMITS, tenant: str = "") -> list[Any]:
    parts = PushCodec(LokiSettings(), tenant).decode(body, limits)
    return [json.loads(item) for part in parts for item in part.parsed.records.items()]


def test_a_body_with_many_commas_is_read_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    body = push(({"a": "b"}, [["1", "a,b,c"], ["2", "d", {"e": "f"}]]), ({}, [["3", "g"]] * 5))
    expected = decoded(body)
    assert len(expected) == 7
    monkeypatch.setattr(loki, "_COMMAS_SURE", 1)
    assert decoded(body) == expected
    with pytest.raises(TooManyEntries):
        list(read_json(body, 6, 1000))
    for wrong in (b'{"streams":{"a":1,"b":2}}', b'{"streams":[{"values":{"a":1,"b":2}}]}'):
        with pytest.raises(PushFault):
            list(read_json(wrong, 6, 1000))


@pytest.mark.parametrize(
    ("body", "slug"),
    [
        (b'{"streams":[' + b'{"values":[]},' * 210_000 + b"1]}", "too-many-records"),
        (b'{"streams":[{"values":[' + b'["1",""],' * 110_000 + b"1]}]}", "too-many-records"),
        (b'{"streams":[{"values":[[' + b"0," * 1_000_000 + b"1]]}]}", "malformed"),
        (b'{"streams":[' + b"0," * 1_000_000 + b"1]}", "malformed"),
        (
            b'{"streams":[{"stream":{'
            + b",".join(b'"%d":""' % n for n in range(210_000))
            + b'},"values":[]}]}',
            "malformed",
        ),
        (
            b'{"streams":[{"stream":{"a":"' + b"x" * 100_000 + b'"},"values":['
            + b'["1",""],' * 990 + b'["1",""]]}]}',
            "payload-too-large",
        ),
        (b'{"streams":[{"values":[["1","' + b"\xff" * 12_000_000 + b'"]]}]}', "payload-too-large"),
    ],
)  # fmt: skip
def test_what_a_body_takes_is_bounded(body: bytes, slug: str) -> None:
    with peak() as most, pytest.raises(Problem) as caught:
        decoded(body, LIMITS._replace(records_max=1000))
    assert caught.value.kind.slug == slug
    assert most.bytes < 2 * len(body) + 8 * 1024**2


labels = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)
entries = st.lists(
    st.tuples(st.integers(-(2**63), 2**63 - 1).map(str), st.text(max_size=20))
    | st.tuples(st.integers(0, 2**63 - 1).map(str), st.text(max_size=20), labels),
    max_size=5,
)


@settings(max_examples=50)
@given(st.lists(st.tuples(labels, entries), max_size=4), st.sampled_from(["", "a'b"]))
def test_every_entry_of_any_push_is_there(streams: list[Any], tenant: str) -> None:
    expected = [
        {
            "timestamp": time,
            "line": line,
            "labels": stream,
            **({"metadata": more[0]} if more and more[0] else {}),
            **({"tenant": tenant} if tenant else {}),
        }
        for stream, values in streams
        for time, line, *more in values
    ]
    assert decoded(push(*streams), tenant=tenant) == expected
    with patch.object(loki, "_COMMAS_SURE", 0):  # as a body with many commas
        assert decoded(push(*streams), tenant=tenant) == expected


PIECES = [
    b'{"streams":[',
    b'{"stream":{"a":"b"},"values":[',
    b'["1","x"]',
    b",",
    b"]}",
    b"]}",
    b"{}",
]


@settings(max_examples=50)
@given(st.lists(st.tuples(labels, entries), max_size=4))
def test_every_entry_in_protobuf_is_there(streams: list[Any]) -> None:
    named = [
        ({f"n{n}": v for n, v in enumerate(stream.values())}, values) for stream, values in streams
    ]
    parts = ProtobufPushCodec(LokiSettings(), "").decode(proto(*named), LIMITS)
    found = [json.loads(item) for part in parts for item in part.parsed.records.items()]
    assert found == decoded(push(*named))


ENTRY = entry("1760000000123456789", "a line", {"name": "value", "b": ""})


@given(st.integers(0, len(ENTRY) - 1), st.integers(0, 255), st.integers(0, 60), st.integers(0, 9))
def test_usual_entries_are_read_like_any_other(at: int, to: int, cut: int, size_max: int) -> None:
    wire = bytearray(ENTRY)
    for body in (ENTRY, ENTRY[:cut], bytes([*wire[:at], to, *wire[at + 1 :]])):
        for most in (1000, size_max):
            try:
                found: Any = loki._read_entry(
                    body, 0, len(body), loki._PushBounds(most, FieldBudget(99))
                )
            except WireFault:
                found = WireFault
            try:
                assert (
                    loki._entry(body, 0, len(body), loki._PushBounds(most, FieldBudget(99)))
                    == found
                )
            except WireFault:
                assert found is WireFault


def test_lengths_of_metadata_have_more_than_one_byte() -> None:
    start = entry("1760000000123456789", "a line")
    for tail in (
        b"\x1a\x80\x0a\x0a" + b"n" * 10 + b"\x12\x72" + b"v" * 0x72,
        b"\x1a\x85\x0a\x81" + b"n" * 0x81 + b"\x12\x00",
    ):
        with pytest.raises(Problem, match="cut off"):
            ProtobufPushCodec(LokiSettings(), "").decode(field(1, field(2, start + tail)), LIMITS)
    for length in (127, 128, 1280):
        name, text = "n" * length, "v" * length
        wire = proto(({"app": "web"}, [["1760000000123456789", "x", {name: text}]]))
        (part,) = ProtobufPushCodec(LokiSettings(), "").decode(wire, LIMITS)
        assert json.loads(part.parsed.records.items()[0])["metadata"] == {name: text}


@given(st.binary(max_size=60) | st.binary(max_size=9).map(lambda body: PROTO[:20] + body))
def test_any_protobuf_is_records_or_a_problem(body: bytes) -> None:
    for wire in (body, field(1, body), field(1, field(2, body)), field(1, field(1, body))):
        try:
            parts = ProtobufPushCodec(LokiSettings(), "").decode(wire, LIMITS)
        except Problem:
            continue
        assert all(json.loads(one) for part in parts for one in part.parsed.records.items())


@given(st.text(max_size=12), st.lists(st.sampled_from("{}a=\"'`,\\x ")).map("".join))
def test_any_text_is_labels_or_a_fault(value: str, text: str) -> None:
    for one in (text, "{" + text + "}", value, '{a="' + value + '"}'):
        try:
            json.dumps(read_labels(one)).encode()
        except ValueError:
            continue
    assert read_labels(written({"a": value})) == {"a": value}


@pytest.mark.parametrize(
    ("body", "slug"),
    [
        (field(1, field(2, field(2, b"\1" * 7_000_000))), "payload-too-large"),
        (field(1, field(2, field(2, b"\xff" * 7_000_000))), "payload-too-large"),
        (field(1, field(2, field(2, b"a" * 7_000_000 + b"\xf0\x9f\x98\x80"))), "record-too-large"),
        (field(1, b"") * 300_000, "too-many-records"),
        (field(1, field(2, b"") * 300_000), "too-many-records"),
        (field(1, field(1, b"x" * 2_000_000)), "malformed"),
        (field(1, field(2, field(3, field(1, b"a")) * 40_000)), "too-many-records"),
        (field(5, b"x") * 70_000, "too-many-records"),
        (field(1, field(1, b'{a="%b"}' % bytes(99_999)) + field(2, b"") * 99), "payload-too-large"),
    ],
)  # fmt: skip
def test_what_a_protobuf_takes_is_bounded(body: bytes, slug: str) -> None:
    codec = ProtobufPushCodec(LokiSettings(), "")
    with peak() as most, pytest.raises(Problem) as caught:
        codec.decode(body, LIMITS._replace(records_max=1000, bytes_max=LIMITS.bytes_max // 2))
    assert caught.value.kind.slug == slug
    assert most.bytes < 2 * len(body) + 20 * 1024**2


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=9), max_size=12).map(b"".join))
@example(b'{"streams":[{"stream":{"a":"b"},"values":[["1","x"],["1","x"]]}]}')
def test_any_bytes_are_records_or_a_problem(body: bytes) -> None:
    try:
        found = decoded(body)
    except Problem:
        found = None
    with patch.object(loki, "_COMMAS_SURE", 0):
        try:
            assert decoded(body) == found
        except Problem:
            assert found is None
    assert all(one.keys() >= {"timestamp", "line", "labels"} for one in found or ())


def test_few_entries_in_protobuf_are_read_at_once() -> None:
    codec = ProtobufPushCodec(LokiSettings(), "")
    for count in (1, 300, 301):
        parts = codec.decode_quickly(proto(({"a": "b"}, [["1", "x"]] * count)), LIMITS)
        assert (parts is None) == (count > 300)
    assert codec.decode_quickly(proto(({"a": "b" * 9000}, [["1", "x"]] * 200)), LIMITS) is None
    with pytest.raises(Problem):
        codec.decode_quickly(PROTO[:-1], LIMITS)
