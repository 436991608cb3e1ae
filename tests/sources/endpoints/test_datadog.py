"""Datadog's intake of logs as its clients see it: a real server, intakes in memory."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestd.base.errors import Overloaded
from ingestd.http.problem import Problem
from ingestd.sources.http.endpoints.base import BodyLimits
from ingestd.sources.http.endpoints.datadog import LogsCodec, TextCodec
from tests.peak import peak
from tests.sources.endpoints.endpoint_tools import KeyIntake, serving_endpoint
from tests.sources.source_tools import Client, Reply, connected

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from ingestd.sources.http.source import HttpSource

KEY = "0123456789abcdef0123456789abcdef"
LOGS = "/api/v2/logs"
LIMITS = BodyLimits(1000, 1024**2)
BOTH = [{"message": "a", "ddtags": "env:x"}, {"message": "b\n", "service": "s", "n": 1.5}]


async def send(
    source: HttpSource, body: Any, path: str = LOGS, method: str = "POST", **headers: str
) -> Reply:
    async with connected(source) as client:
        return await said(client, body, path, method, **headers)


async def said(client: Client, body: Any, path: str, method: str, **headers: str) -> Reply:
    wire = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers.setdefault("Content_Type", "application/json")
    head = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(wire)}"]
    head += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    client.send("\r\n".join([*head, "", ""]).encode() + wire)
    return await client.reply()


def loads(intake: KeyIntake) -> list[Any]:
    return [json.loads(item) for item in intake.items]


@pytest.mark.parametrize(
    ("path", "status"),
    [(LOGS, 202), ("/v1/input", 200), ("/v1/input/", 200), (f"/v1/input/{KEY}", 200)],
)  # fmt: skip
async def test_logs_become_records_as_they_are(path: str, status: int) -> None:
    intake = KeyIntake()
    plain = json.dumps(BOTH).encode()
    async with serving_endpoint("datadog", intake) as source:
        for body, encoding in (
            (plain, "identity"),
            (gzip.compress(plain), "gzip"),
            (zlib.compress(plain), "deflate"),
            (zstd.compress(plain), "zstd"),
            (zstd.compress(plain), "zstd1"),  # as its API clients call it
        ):
            reply = await send(source, body, path, Content_Encoding=encoding)
            assert (reply.status, reply.body) == (status, b"{}")
        assert loads(intake) == BOTH * 5
        for _ in range(3):  # a head that is known by then
            assert (await send(source, BOTH[0], path)).status == status
        assert loads(intake)[10:] == BOTH[:1] * 3


async def test_a_question_if_it_is_there_is_no_record() -> None:
    intake = KeyIntake()
    async with serving_endpoint("datadog", intake) as source, connected(source) as client:
        await said(client, BOTH, LOGS, "POST")
        for body in (b"{}", b" { }\n", b"[]", b"", b"{}"):
            reply = await said(client, body, LOGS, "POST")
            assert (reply.status, reply.body) == (202, b"{}")
    assert loads(intake) == BOTH


async def test_lines_of_text_and_frames_become_messages() -> None:
    intake = KeyIntake()
    text = "hello\r\n\nworld \xe4".encode() + b"\xff\n"
    frames = b"".join(b"%d %b" % (len(one), one) for one in (b"<1>1 - a\n", b"<1>1 - b\nc\n"))
    query = "?ddtags=env%3Ax&ddsource=heroku&service=&host=h&dd-api-key=secret-of-the-client"
    more = {"ddtags": "env:x", "ddsource": "heroku"}
    async with serving_endpoint("datadog", intake) as source:
        plain, logplex = "text/plain; charset=utf-8", "application/logplex-1"
        assert (await send(source, text, Content_Type=plain)).status == 202
        assert (await send(source, text, LOGS + query, Content_Type=plain)).status == 202
        assert (await send(source, frames, Content_Type=logplex)).status == 202
        assert (await send(source, b"hello\nworld", Content_Type=logplex)).status == 202
        assert (await send(source, frames[:-1], Content_Type=logplex)).status == 202
        assert (await send(source, b" \n", Content_Type=plain)).status == 202
        assert (await send(source, BOTH, LOGS + query)).status == 202
    lines = ["hello", "world \xe4\ufffd"]
    expected: list[Any] = [{"message": line} for line in lines]
    expected += [{"message": line, **more} for line in lines]
    expected += [{"message": "<1>1 - a"}, {"message": "<1>1 - b\nc"}]
    expected += [{"message": "hello"}, {"message": "world"}]
    expected += [{"message": "9 <1>1 - a"}, {"message": "11 <1>1 - b"}, {"message": "c"}]
    expected += [{**more, **one} for one in BOTH]
    assert loads(intake) == expected
    assert not any(b"secret" in item for item in intake.items)


async def test_what_is_no_log_is_kept_beside_those_that_are() -> None:
    intake = KeyIntake(record_bytes_max=100)
    mixed = [{"message": "x" * 200}, {"message": "a"}, "text", 5, {"message": "b"}]
    async with serving_endpoint("datadog", intake) as source:
        for body, query in ((mixed, ""), (mixed, "?ddsource=s")):
            assert (await send(source, body, LOGS + query)).status == 202
            assert [one["message"] for one in loads(intake)] == ["a", "b"]
            found = [(one.index, one.reason) for one in intake.refused]
            assert found == [(0, "too_large"), (2, "malformed"), (3, "malformed")]
            intake.runs.clear()
            intake.refused.clear()
        for body in (["text"], "text", b"{", b"[{]", b"nothing"):
            reply = await send(source, body)
            (error,) = reply.json["errors"]
            assert (reply.status, error["status"], error["title"]) == (
                400,
                "400",
                "Malformed Records",
            )
            reply = await send(source, body, "/v1/input")
            assert reply.json["code"] == reply.status == 400
            assert reply.json["message"].startswith("Malformed Records: ")
    assert not intake.runs


async def test_errors_are_its_own() -> None:
    intake = KeyIntake()
    async with serving_endpoint("datadog", intake, request_bytes_max=1000) as source:
        intake.errors = [Overloaded(what="the journal", retry_after=3.0)]
        reply = await send(source, BOTH)
        assert (reply.status, reply.headers["retry-after"]) == (503, "3")
        assert reply.headers["x-ratelimit-reset"] == "3"
        assert reply.json["errors"][0]["title"] == "Pipeline Overloaded"
        assert (await send(source, b" " * 1001)).json["errors"][0]["status"] == "413"
        reply = await send(source, b"a", Content_Type="image/png")
        assert (reply.status, reply.headers["accept"].split(",")[0]) == (415, "application/json")
        many = "&".join(f"a={n}" for n in range(200))
        assert (await send(source, BOTH, f"{LOGS}?{many}")).status == 400
        assert (await send(source, b"", LOGS, "GET")).json["errors"][0]["status"] == "405"


async def test_keys_in_header_query_and_path(capsys: pytest.CaptureFixture[str]) -> None:
    intake = KeyIntake()
    tokens = {"shop": {"token": KEY}, "web": {"token": KEY[::-1], "pipelines": "other"}}
    other = KeyIntake("other")
    async with serving_endpoint("datadog", intake, other, tokens=tokens) as source:
        for path, headers in (
            (LOGS, {"DD_API_KEY": KEY}),
            (f"{LOGS}?dd-api-key={KEY}", {}),
            (f"/v1/input/{KEY}", {}),
            (f"/v1/input/{KEY}?service=s", {}),
            ("/v1/input/anything", {"DD_API_KEY": KEY}),
            ("/v1/input", {"DD_API_KEY": KEY}),
            ("/v1/input/", {"DD_API_KEY": KEY}),
        ):
            assert (await send(source, BOTH, path, **headers)).status in {200, 202}, path
        for path, headers, status in (
            (LOGS, {}, 401),
            ("/v1/input/", {}, 401),
            ("/v1/input", {"Authorization": f"Bearer {KEY}"}, 403),
            (LOGS, {"DD_API_KEY": "wrong"}, 403),
            ("/v1/input/wrong", {}, 403),
            (f"/v1/input/{KEY}", {"DD_API_KEY": "wrong"}, 403),  # that in the header counts
            (LOGS, {"DD_API_KEY": KEY[::-1]}, 403),
        ):
            reply = await send(source, BOTH, path, **headers)
            assert reply.status == status, path
            assert KEY.encode() not in reply.body
        probe = "/api/v1/validate"
        assert (await send(source, b"", probe, "GET", DD_API_KEY=KEY)).json == {"valid": True}
        assert (await send(source, b"", f"{probe}?dd-api-key={KEY}", "GET")).status == 200
        reply = await send(source, b"", probe, "GET", DD_API_KEY="wrong")
        assert (reply.status, reply.json) == (403, {"errors": ["Forbidden"]})
    assert len(intake.items) == 14
    logged = capsys.readouterr().out
    assert "request_refused" in logged
    assert KEY not in logged
    assert not any(KEY.encode() in run.payload for run in intake.runs)


# -- the codecs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "attributes", "slug"),
    [
        (b"a\n" * 500_000, {}, "too-many-records"),
        (b"\n" * 500_000 + b"a\n" * 900, {"ddtags": b"0" * 50_000}, "payload-too-large"),
        (b"0 " * 500_000, {}, "too-many-records"),
        (b"\xff" * 12_000_000, {}, "payload-too-large"),
    ],
)  # fmt: skip
def test_what_a_text_takes_is_bounded(body: bytes, attributes: Any, slug: str) -> None:
    with peak() as most, pytest.raises(Problem) as caught:
        TextCodec(attributes, "", framed=True).decode(body, LIMITS)
    assert caught.value.kind.slug == slug
    assert most.bytes < 3 * len(body) + 1024**2


def test_all_that_are_no_logs_are_counted_with_attributes_too() -> None:
    body = json.dumps([{"a": 1}] * 150 + [1] * 150).encode()
    for attributes in ({}, {"service": b'"web"'}):
        (part,) = LogsCodec(attributes, "").decode(body, LIMITS)
        assert (part.parsed.records.count, part.parsed.invalid) == (150, 150)


def test_what_attributes_add_is_bounded() -> None:
    codec = LogsCodec({"ddtags": b'"%b"' % (b"x" * 50_000)}, "")
    with peak() as most, pytest.raises(Problem) as caught:
        codec.decode(json.dumps([{"a": 1}] * 900).encode(), LIMITS)
    assert caught.value.kind.slug == "payload-too-large"
    assert most.bytes < 1024**2


@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=9), max_size=5
    )
)
def test_every_line_of_any_text_is_there(lines: list[str]) -> None:
    body = "\n".join(lines).encode()
    for framed in (False, True):
        parts = TextCodec({}, "", framed=framed).decode(body, LIMITS)
        found = [
            json.loads(item)["message"] for part in parts for item in part.parsed.records.items()
        ]
        assert found == [line for line in lines if line.encode().strip()] or framed


@given(st.binary(max_size=30), st.booleans())
def test_any_bytes_are_records_or_a_problem(body: bytes, more: bool) -> None:
    attributes = {"ddtags": b'"a"'} if more else {}
    for codec in (
        LogsCodec(attributes, ""), TextCodec(attributes, "", framed=True)
    ):  # fmt: skip
        for wire in (body, b"[{}," + body + b"]", b'{"a":1,' + body + b"}", b"3 " + body):
            try:
                parts = codec.decode(wire, LIMITS)
            except Problem:
                continue
            assert all(
                isinstance(json.loads(item), dict)
                for part in parts
                for item in part.parsed.records.items()
            )
