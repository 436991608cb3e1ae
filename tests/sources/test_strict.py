"""Heads and JSON texts that were taken for something else: request lines, lengths, escapes."""

from __future__ import annotations

import asyncio

import pytest

from ingestd.codecs.lines import json_fault
from ingestd.http.protocol import HEAD_BYTES_MAX
from ingestd.sources.http.decode import DocumentCodec
from ingestd.sources.http.endpoints.records import codec_of
from ingestd.sources.http.headers import parse_prefer
from tests.sources.source_tools import MemoryIntake, ask, connected, serving


async def answered(source, head: bytes, body: bytes = b"1") -> tuple[int, str]:
    """Status and the kind of problem, of one request on a connection of its own."""
    async with connected(source) as client:
        client.send(head + b"\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\n\r\n" + body)
        reply = await client.reply()
        return reply.status, reply.slug if reply.status >= 400 else ""


@pytest.mark.parametrize(
    "line",
    [
        b"POST  /v1/records HTTP/1.1",
        b"POST /v1/records  HTTP/1.1",
        b"POST   /v1/records    HTTP/1.1",
        b"\r\nPOST  /v1/records HTTP/1.1",
        b"POST /v1/records#part HTTP/1.1",
        b"POST /v1/records?a#part HTTP/1.1",
        b"POST http://127.0.0.1/v1/records#part HTTP/1.1",
        b"POST ftp://127.0.0.1/v1/records HTTP/1.1",
        b"POST file:///v1/records HTTP/1.1",
        b"POST http://user@127.0.0.1/v1/records HTTP/1.1",
    ],
)
async def test_request_lines_that_are_400(line):
    intake = MemoryIntake()
    async with serving(intake) as source:
        assert await answered(source, line) == (400, "bad-request")
    assert not intake.runs


@pytest.mark.parametrize(
    "line",
    [
        b"POST /v1/records HTTP/1.1",
        b"\r\nPOST /v1/records HTTP/1.1",
        b"POST /v1/records?a=1%20%202 HTTP/1.1",
        b"POST http://127.0.0.1/v1/records HTTP/1.1",
        b"POST HTTP://127.0.0.1:80/v1/records HTTP/1.1",
        b"POST https://localhost/v1/records?x HTTP/1.1",
    ],
)
async def test_request_lines_that_are_taken(line):
    async with serving(MemoryIntake()) as source:
        assert await answered(source, line) == (202, "")


async def test_a_spaced_request_line_in_pieces_is_400():
    async with serving(MemoryIntake()) as source, connected(source) as client:
        for piece in (b"POST ", b" /v1/rec", b"ords HTTP/1.1\r\n", b"Host: 127.0.0.1\r\n\r\n"):
            client.send(piece)
            await client.writer.drain()
            await asyncio.sleep(0.01)
        assert (await client.reply()).slug == "bad-request"


async def test_two_spaces_elsewhere_are_nobodys_business():
    async with serving(MemoryIntake()) as source, connected(source) as client:
        client.send(
            b"POST /v1/records HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a  b\r\nContent-Length: 8\r\n\r\n"
        )
        client.send(b'{"a":  1}'[:8])
        assert (await client.reply()).slug == "malformed"
        # A head of which a part came with the request before it.
        first = b"POST /v1/records HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\n\r\n1"
        client.send(first + b"POST /v1/records HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a")
        assert (await client.reply()).status == 202
        client.send(b"  b  HTTP/1.1\r\nContent-Length: 1\r\n\r\n2")
        assert (await client.reply()).status == 202


async def test_a_head_is_bounded_also_if_it_comes_at_once():
    async with serving(MemoryIntake()) as source:
        for size, status in ((HEAD_BYTES_MAX // 2, 202), (HEAD_BYTES_MAX + 8000, 431)):
            async with connected(source) as client:
                lines = b"".join(b"X-%d: %b\r\n" % (n, b"y" * 4000) for n in range(size // 4000))
                client.send(
                    b"POST /v1/records HTTP/1.1\r\nHost: 127.0.0.1\r\n" + lines
                    + b"Content-Length: 1\r\n\r\n1"
                )  # fmt: skip
                assert (await client.reply()).status == status


async def test_a_large_body_behind_a_small_head_is_no_large_head():
    async with serving(MemoryIntake()) as source:
        assert (await ask(source, b"1\n" * HEAD_BYTES_MAX)).status == 202


# -- numbers of clients --------------------------------------------------------------------------


async def test_thousands_of_digits_are_no_error_of_ours():
    async with serving(MemoryIntake()) as source:
        reply = await ask(source, b"1", Content_Length="0" * 5000 + "1")
        assert (reply.status, reply.slug) == (400, "bad-request")
        reply = await ask(source, b"bad", Prefer="wait=" + "1" * 5000)
        assert (reply.status, reply.slug) == (400, "malformed")
        assert (await ask(source, b"1", Content_Length="00001")).status == 202


@pytest.mark.parametrize(
    ("wait", "seconds"),
    [("9" * 5000, 60), ("0" * 5000, 0), ("0" * 5000 + "7", 7), ("59", 59), ("61", 60), ("100", 60),
     ("", None), ("-1", None), ("1.5", None), ("\u0665", None)],
)  # fmt: skip
def test_any_number_of_digits_is_a_wait(wait, seconds):
    assert parse_prefer([f"wait={wait}"], 60.0).wait == seconds


# -- what is said of JSON ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b'"\\ud800"', "lone surrogate \\ud800 (byte 1)"),
        (b'{"a": "x\\uDBFFy"}', "lone surrogate \\uDBFF (byte 8)"),
        (b'["\\ud800", 1]', "lone surrogate"),
        (b'"\\ud800\\n"', "surrogate"),
        (b'"\\udc00"', "surrogate"),
        (b'"\\\\\\ud800"', "lone surrogate \\ud800 (byte 3)"),
        (b'"\\u12"', "\\u without four digits (byte 1)"),
        (b'"\\u12G4"', "invalid"),
        (b'"abc', "truncated"),
        (b'"\\ud800', "truncated"),
        (b'"\\ud800\\', "truncated"),
        (b'"\\ud800\\u', "truncated"),
        (b'"\\u12', "truncated"),
        (b'"\\\\ud800', "truncated"),
        (b'{"a": 1', "truncated"),
    ],
)
def test_the_right_reason(value, said):
    assert said in json_fault(value)


def test_escapes_that_are_good():
    assert not json_fault(b'"\\ud83d\\ude00 \\\\ud800 \\u0041"')


# -- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "application/cloudevents+json",
        "application/vnd.x+json; charset=utf-8",
        "Application/LD+JSON",
    ],
)
async def test_types_that_end_in_json_are_json(kind):
    assert type(codec_of(kind, "json")) is DocumentCodec
    intake = MemoryIntake()
    async with serving(intake) as source:
        assert (await ask(source, b"[1, 2]", Content_Type=kind)).json["accepted"] == 2
        for other in ("text/x+json", "application/json-seq", "application/+json2"):
            assert (await ask(source, b"[1]", Content_Type=other)).status == 415
