"""The HTTP door: real sockets, real bodies, and every answer it can give."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import re
import shutil
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import structlog

from ingestd.base.errors import AddressError, Draining, JournalFailed, Overloaded
from ingestd.base.record import Layout
from ingestd.http import problem
from ingestd.sources.http.endpoints.loki import LokiSettings
from tests.real_input import real_input
from tests.sources.source_tools import MemoryIntake, ask, connected, serving, until

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CHUNKED = {"Transfer_Encoding": "chunked"}


def chunked(*pieces):
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


@pytest.fixture
def intake():
    return MemoryIntake()


@pytest.fixture(autouse=True)
def nothing_is_logged_as_an_error(caplog):
    """aiohttp writes tracebacks to its loggers; none may come from anything a client does."""
    yield
    assert not [
        record for record in caplog.get_records("call") if record.levelno >= logging.WARNING
    ]


# -- taken ---------------------------------------------------------------------------------------


async def test_lines_are_accepted(intake):
    async with serving(intake) as source:
        reply = await ask(source, b'{"a":1}\n{"a":2}\n')
    assert reply.status == 202
    assert reply.json == {"accepted": 2, "invalid": 0, "errors": []}
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["server"] == "ingestd"
    assert "connection" not in reply.headers
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", reply.headers["date"])
    assert intake.items == [b'{"a":1}', b'{"a":2}']


async def test_the_answer_comes_after_the_acceptance(intake):
    intake.gate.clear()
    async with serving(intake) as source, connected(source) as client:
        client.post(b"1")
        await intake.asked.wait()
        assert intake.waiting
        reading = asyncio.create_task(client.reply())
        await asyncio.sleep(0)
        assert not reading.done()
        intake.gate.set()
        assert (await reading).status == 202


async def test_bad_lines_beside_good_ones_are_kept_and_listed(intake):
    async with serving(intake) as source:
        reply = await ask(source, b"1\nbad\n" + b"x\n" * 150 + b"2\n")
    assert reply.status == 202
    assert (reply.json["accepted"], reply.json["invalid"]) == (2, 151)
    assert len(reply.json["errors"]) == 100
    assert reply.json["errors"][0].keys() == {"index", "reason", "detail"}
    assert reply.json["errors"][0]["index"] == 1
    assert len(intake.refused) == 10  # http.invalid_kept
    assert intake.unkept == 141
    assert intake.refused[0].payload == b"bad"
    assert intake.principals == ["127.0.0.1"]


@pytest.mark.parametrize("kept", [0, 3, 100])
async def test_so_many_invalid_records_of_a_request_are_kept(intake, kept):
    async with serving(intake, invalid_kept=kept) as source:
        reply = await ask(source, b"1\n" + b"x\n" * 120)
    assert reply.json["invalid"] == 120
    assert [one.index for one in intake.refused] == list(range(1, kept + 1))
    assert intake.unkept == 120 - kept


@pytest.mark.parametrize(
    ("good", "invalid", "status"),
    [(1, 200, 202), (1, 201, 400), (200, 201, 400), (201, 201, 202), (5000, 5000, 202)],
)
async def test_a_body_that_is_mostly_invalid_is_refused_whole(intake, good, invalid, status):
    for lines in (b"1\n" * good + b"x\n" * invalid, b"x\n" * invalid + b"1\n" * good):
        async with serving(intake) as source:
            reply = await ask(source, lines)
        assert reply.status == status
        if status == 400:
            assert reply.slug == "mostly-invalid"
            assert len(reply.json["errors"]) == 100
            assert not intake.asked.is_set()
        else:
            assert (reply.json["accepted"], reply.json["invalid"]) == (good, invalid)
            assert len(intake.items) == good
            intake.runs.clear()


async def test_a_large_body_that_is_mostly_invalid_is_refused_before_its_end(intake):
    async with serving(intake) as source:
        reply = await ask(source, b"1\n" + b"x\n" * 99_000)
    assert (reply.status, reply.slug) == (400, "mostly-invalid")
    assert not intake.asked.is_set()


async def test_nothing_acceptable_is_not_stored(intake):
    async with serving(intake) as source:
        reply = await ask(source, b"bad\nworse\n")
    assert (reply.status, reply.slug) == (400, "malformed")
    assert [error["index"] for error in reply.json["errors"]] == [0, 1]
    assert not intake.asked.is_set()


async def test_pipelines_by_name(intake):
    text = MemoryIntake("text", "logs")
    blobs = MemoryIntake("bytes", "blobs")
    async with serving(intake, text, blobs) as source:
        assert (await ask(source, b"a\nb", "/v1/records/logs?x=1")).status == 202
        assert (await ask(source, b"\x00\n\n", "/v1/records/blobs")).status == 202
        assert (await ask(source, b"1", "/v1/records/default")).status == 202
        assert (await ask(source, b"2", "http://localhost/v1/records")).status == 202
        reply = await ask(source, b"1", "/v1/records/secret")
    assert (reply.status, reply.slug) == (404, "unknown-pipeline")
    assert b"logs" not in reply.body
    assert text.items == [b"a", b"b"]
    assert blobs.items == [b"\x00\n\n"]
    assert intake.items == [b"1", b"2"]


async def test_a_json_array_is_one_record_an_element(intake):
    async with serving(intake) as source:
        reply = await ask(source, b'[{"a":\n1}, 2]', Content_Type="application/json")
    assert reply.json["accepted"] == 2
    assert intake.items == [b'{"a":\n1}', b"2"]
    assert intake.runs[0].layout is Layout.SIZED


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [("gzip", gzip.compress), ("deflate", zlib.compress), ("zstd", zstd.compress)],
)
@pytest.mark.parametrize("lines", [1, 400_000])
async def test_compressed_bodies(intake, encoding, pack, lines):
    body = b'{"a":1}\n' * lines
    async with serving(intake, records_max=10**6, inflate_ratio_max=0) as source:
        reply = await ask(source, pack(body), Content_Encoding=encoding)
    assert reply.json["accepted"] == lines
    assert intake.runs[0].payload == body


async def test_chunked_bodies_in_small_pieces(intake):
    body = b'{"a":1}\n' * 50
    async with serving(intake) as source, connected(source) as client:
        client.post(b"", **CHUNKED)
        for at in range(0, len(body), 7):
            client.send(b"%x\r\n%b\r\n" % (len(body[at : at + 7]), body[at : at + 7]))
            await client.writer.drain()
        client.send(b"0\r\n\r\n")
        assert (await client.reply()).json["accepted"] == 50
        client.post(chunked(b"1\n", b"2\n"), **CHUNKED)
        assert (await client.reply()).json["accepted"] == 2


async def test_a_large_body_arrives_as_it_was(intake):
    body = b"".join(b'{"n":%d}\n' % n for n in range(600_000))
    async with serving(intake, records_max=10**6) as source:
        assert (await ask(source, body)).json["accepted"] == 600_000
    assert intake.runs[0].payload == body


@pytest.mark.parametrize("name", ["apache.log", "nginxplus.ndjson"])
@pytest.mark.parametrize(
    ("encoding", "pack"), [("", bytes), ("gzip", gzip.compress), ("zstd", zstd.compress)]
)
async def test_real_data_byte_for_byte(name, encoding, pack):
    data = real_input(name).read_bytes()
    intake = MemoryIntake("text" if name == "apache.log" else "json")
    async with serving(intake) as source:
        headers = {"Content_Encoding": encoding} if encoding else {}
        reply = await ask(source, pack(data), **headers)
    assert reply.json["accepted"] == data.count(b"\n")
    assert b"".join(run.payload for run in intake.runs) == data


async def test_requests_on_one_connection_even_before_their_answers(intake):
    async with serving(intake) as source, connected(source) as client:
        for n in range(100):
            client.post(b"%d" % n)
        replies = [await client.reply() for _ in range(100)]
    assert {reply.status for reply in replies} == {202}
    assert intake.items == [b"%d" % n for n in range(100)]


async def test_http_1_0(intake):
    async with serving(intake) as source, connected(source) as client:
        head = b"POST /v1/records HTTP/1.0\r\nContent-Length: 1\r\n"
        client.send(head + b"Connection: keep-alive\r\n\r\n1")
        assert (await client.reply()).headers["connection"] == "keep-alive"
        client.send(head + b"\r\n2")
        assert (await client.reply()).headers["connection"] == "close"
        assert await client.closed()


# -- refused -------------------------------------------------------------------------------------


async def refused(source, body=b"1", path="/v1/records", **headers):
    reply = await ask(source, body, path, **headers)
    return reply.status, reply.slug


@pytest.mark.parametrize(
    ("headers", "body", "answer"),
    [
        ({"Content_Type": "text/plain"}, b"1", (415, "unsupported-media-type")),
        (
            {"Content_Type": "application/json; charset=utf-16"},
            b"1",
            (415, "unsupported-media-type"),
        ),
        ({"Content_Type": "\xff\xfe"}, b"1", (415, "unsupported-media-type")),
        ({"Content_Encoding": "br"}, b"1", (415, "unsupported-encoding")),
        ({"Content_Encoding": "gzip, gzip"}, b"1", (415, "unsupported-encoding")),
        ({"Content_Encoding": "gzip"}, b"not gzip", (400, "corrupt-encoding")),
        ({"Content_Encoding": "gzip"}, gzip.compress(b"1")[:-1], (400, "corrupt-encoding")),
        ({"Content_Encoding": "gzip"}, gzip.compress(b"1") + b"?", (400, "corrupt-encoding")),
        ({"Content_Encoding": "deflate"}, b"?", (400, "corrupt-encoding")),
        ({"Content_Encoding": "zstd"}, b"not zstd", (400, "corrupt-encoding")),
        ({"Content_Encoding": "gzip"}, b"", (400, "empty")),
        ({}, b"", (400, "empty")),
        ({}, b"x" * 1001, (413, "payload-too-large")),
        (CHUNKED, chunked(b"x" * 600, b"x" * 600), (413, "payload-too-large")),
        ({"Content_Encoding": "gzip"}, gzip.compress(b"1" * 5001), (413, "payload-too-large")),
        ({}, b'"%b"' % (b"x" * 300), (413, "record-too-large")),
        ({}, b"1\n" * 11, (413, "too-many-records")),
        ({"Expect": "a-miracle"}, b"1", (417, "expectation-failed")),
        (CHUNKED, b"what?\r\n", (400, "bad-request")),
        (CHUNKED, b"2\r\n1\n\r\nzz\r\n", (400, "bad-request")),
    ],
)
async def test_refused_bodies(intake, headers, body, answer):
    intake.record_bytes_max = 256
    bounds = {"request_bytes_max": 1000, "decompressed_bytes_max": 5000, "records_max": 10}
    async with serving(intake, **bounds) as source:
        assert await refused(source, body, **headers) == answer
        assert (await ask(source, b"1")).status == 202
    assert intake.items == [b"1"]


async def test_what_the_415s_say(intake):
    async with serving(intake) as source:
        reply = await ask(source, b"1", Content_Encoding="br")
        assert reply.headers["accept-encoding"] == "gzip, deflate, zstd, snappy, identity"
        reply = await ask(source, b"1", Content_Type="text/csv")
        assert "application/x-ndjson" in reply.headers["accept"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
async def test_other_methods_are_405(intake, method):
    async with serving(intake) as source, connected(source) as client:
        client.send(b"%b /v1/records HTTP/1.1\r\nHost: localhost\r\n\r\n" % method.encode())
        reply = await client.reply()
        assert (reply.status, reply.slug) == (405, "method-not-allowed")
        assert reply.headers["allow"] == "POST, OPTIONS"
        client.post(b"1")  # the connection goes on
        assert (await client.reply()).status == 202


async def test_the_answer_to_head_has_no_body(intake):
    async with serving(intake) as source, connected(source) as client:
        client.send(b"HEAD /v1/records HTTP/1.1\r\nHost: localhost\r\n\r\n")
        reply = await client.reply(bodiless=True)
        assert reply.status == 405
        client.post(b"1")
        assert (await client.reply()).status == 202


@pytest.mark.parametrize("path", ["/x", "/v1/record", "/v1/recordsx", "/v2/records", "*", "/%00"])
async def test_other_paths_are_404(intake, path):
    async with serving(intake) as source:
        reply = await ask(source, b"1", path)
        assert (reply.status, reply.slug) in {(404, "not-found"), (400, "bad-request")}
        assert await refused(source, b"1", "/v1/records/") == (404, "unknown-pipeline")
        assert await refused(source, b"1", "/v1/records/a/b") == (404, "unknown-pipeline")


async def test_no_length_is_411(intake):
    async with serving(intake) as source, connected(source) as client:
        client.send(b"POST /v1/records HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await client.reply()).slug == "length-required"


@pytest.mark.parametrize(
    ("head", "answer"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", (400, "bad-request")),
        (b"nonsense\r\n\r\n", (400, "bad-request")),
        (b"POST /v1/records HTTP/1.1\r\n\r\n", (400, "bad-request")),
        (
            b"POST /v1/records HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n",
            (400, "bad-request"),
        ),
        (
            b"POST /v1/records HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
            (400, "bad-request"),
        ),
        (
            (
                b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n"
            ),
            (400, "bad-request"),
        ),
        (b"GET /%b HTTP/1.1\r\n\r\n" % (b"x" * 9000), (431, "headers-too-large")),
        (
            b"GET / HTTP/1.1\r\nHost: localhost\r\nA: %b\r\n\r\n" % (b"x" * 9000),
            (431, "headers-too-large"),
        ),
    ],
)
async def test_what_is_not_http(intake, head, answer):
    async with serving(intake) as source, connected(source) as client:
        client.send(head)
        reply = await client.reply()
        assert (reply.status, reply.slug) == answer
        assert reply.headers["connection"] == "close"
        assert await client.closed()


async def test_a_length_beyond_the_bound_is_refused_before_the_body(intake):
    async with serving(intake, request_bytes_max=1000) as source, connected(source) as client:
        client.post(b"", Content_Length="1001", Expect="100-continue")
        reply = await client.reply()
        assert (reply.status, reply.slug) == (413, "payload-too-large")
        assert reply.headers["connection"] == "close"


async def test_100_continue(intake):
    async with serving(intake) as source, connected(source) as client:
        client.post(b"", Content_Length="2", Expect="100-continue")
        assert (await client.reply()).status == 100
        client.send(b"1\n")
        assert (await client.reply()).status == 202


async def test_a_body_that_does_not_come_is_408(intake):
    async with serving(intake, body_timeout=0.05) as source, connected(source) as client:
        client.post(b"1", Content_Length="1000")
        reply = await client.reply()
        assert (reply.status, reply.slug) == (408, "body-timeout")
        assert reply.headers["connection"] == "close"
    assert not intake.asked.is_set()


async def test_a_client_that_leaves_in_the_middle_stores_nothing(intake):
    seen = []
    async with serving(intake, on_request=lambda *what: seen.append(what)) as source:
        for headers in ({"Content_Length": "1000"}, CHUNKED):
            async with connected(source) as client:
                client.post(b"1\n2\n" if headers is not CHUNKED else b"4\r\n1\n2\n\r\n", **headers)
                await client.writer.drain()
                await until(lambda: source._handler._active)
                client.writer.transport.abort()
            await until(lambda: not source._handler._active)
        assert (await ask(source, b"1")).status == 202
        assert source._handler.ingestion.admission.bytes == 0
    assert intake.items == [b"1"]
    assert [what[2] for what in seen] == [499, 499, 202]


@pytest.mark.parametrize(
    ("error", "answer", "after"),
    [
        (Overloaded(what="the journal", retry_after=2.5), (503, "overloaded"), "3"),
        (Overloaded(what="the journal", retry_after=0.01), (503, "overloaded"), "1"),
        (Draining(), (503, "draining"), "1"),
        (JournalFailed(path="/secret", problem="sync"), (503, "journal-failed"), "10"),
    ],
)
async def test_what_the_pipeline_refuses(intake, error, answer, after):
    async with serving(intake) as source:
        intake.errors.append(error)
        reply = await ask(source, b"1")
        assert (reply.status, reply.slug) == answer
        assert reply.headers["retry-after"] == after
        assert b"secret" not in reply.body
        assert source._handler.ingestion.admission.bytes == 0


async def test_an_error_of_ours_is_500_without_a_traceback(intake):
    async with serving(intake) as source:
        intake.errors.append(ZeroDivisionError("division by zero"))
        with structlog.testing.capture_logs() as logs:
            reply = await ask(source, b"1")
    assert (reply.status, reply.slug) == (500, "internal")
    assert b"division" not in reply.body
    assert [line["event"] for line in logs] == ["request_failed"]


async def test_bytes_in_flight_are_bounded(intake):
    intake.gate.clear()
    async with serving(intake, inflight_bytes_max=1000) as source, connected(source) as first:
        first.post(b'"%b"' % (b"x" * 900))
        await intake.asked.wait()
        reply = await ask(source, b'"%b"' % (b"x" * 200))
        assert (reply.status, reply.slug) == (503, "busy")
        assert 22 <= int(reply.headers["retry-after"]) <= 38  # nothing goes out at all
        chunk = chunked(b'"%b"' % (b"x" * 200))
        assert await refused(source, chunk, **CHUNKED) == (503, "busy")
        packed = gzip.compress(b'"%b"' % (b"x" * 500))
        assert await refused(source, packed, Content_Encoding="gzip") == (503, "busy")
        # What can never fit is not told to come again.
        assert await refused(source, b"x" * 1001) == (413, "payload-too-large")
        intake.gate.set()
        assert (await first.reply()).status == 202
        assert (await ask(source, b'"%b"' % (b"x" * 200))).status == 202
        assert source._handler.ingestion.admission.bytes == 0


async def test_connections_are_bounded(intake):
    async with serving(intake, connections_max=2) as source:
        async with connected(source) as first, connected(source) as second:
            for client in (first, second):
                client.post(b"1")
                assert (await client.reply()).status == 202
            async with connected(source) as third:
                third.post(b"1" * 100_000)
                reply = await third.reply()
                assert (reply.status, reply.slug) == (503, "too-many-connections")
                assert (reply.headers["retry-after"], reply.headers["connection"]) == ("1", "close")
                assert await third.closed()
            first.post(b"1")
            assert (await first.reply()).status == 202
        await until(lambda: source._server.open == 0)
        assert (await ask(source, b"1")).status == 202


@pytest.mark.parametrize("head", [b"", b"POST /v1/rec"])
async def test_idle_connections_are_closed(intake, head, monkeypatch):
    # Where this process had no time for a moment, that is not the client's.
    monkeypatch.setattr("ingestd.http.deadlines.LATE_SECONDS", 0.01)

    async def ends(client):
        client.send(head)
        if head:
            assert (await client.reply()).slug == "header-timeout"
        assert await client.closed()

    async with serving(intake, keepalive_timeout=0.05, header_timeout=0.05) as source:
        async with connected(source) as client:
            await ends(client)
        async with connected(source) as client:
            client.post(b"1")
            assert (await client.reply()).status == 202
            await ends(client)


async def test_keepalive_can_be_switched_off(intake):
    async with serving(intake, keepalive_timeout=0) as source, connected(source) as client:
        client.post(b"1")
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (202, "close")
        assert await client.closed()


# -- names ---------------------------------------------------------------------------------------


async def test_request_ids(intake):
    class Noting(MemoryIntake):
        async def accept(self, append):
            ids.append(structlog.contextvars.get_contextvars()["request_id"])

    ids = []
    async with serving(Noting()) as source, connected(source) as client:
        for given in ("trace-1/a.b:c", "", "x" * 129, "a b", 'a"b', "\xff"):
            client.post(b"1", X_Request_Id=given)
            got = (await client.reply()).headers["x-request-id"]
            assert (got == given) == (given == "trace-1/a.b:c")
            assert got == ids[-1]
        client.post(b"bad")
        ids.append((await client.reply()).headers["x-request-id"])
    assert len(set(ids)) == 7


async def test_what_is_told_about_each_answer(intake):
    seen = []
    async with serving(intake, on_request=lambda *what: seen.append(what)) as source:
        await ask(source, b"1")
        await ask(source, b"bad")
        await ask(source, b"1", "/elsewhere")
    assert [(name, status, slug) for _, name, status, _, slug in seen] == [
        ("default", 202, ""),
        ("default", 400, "malformed"),
        ("", 404, "not-found"),
    ]
    assert all(0 <= seconds < 60 for _, _, _, seconds, _ in seen)


async def test_every_problem_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "HTTP.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d{3}) \|", page, re.MULTILINE)
    assert sorted(rows) == sorted((kind.slug, str(kind.status)) for kind in problem.KINDS)
    assert len({kind.slug for kind in problem.KINDS}) == len(problem.KINDS) >= 26


# -- life ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:0", ":0", "[::1]:0"])
async def test_addresses(intake, listen):
    try:
        async with serving(intake, listen=listen) as source:
            assert source.addresses
            assert all(re.fullmatch(r".+:[1-9]\d*", address) for address in source.addresses)
            for address in source.addresses:
                host, _, port = address.rpartition(":")
                host = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host).strip("[]")
                _, writer = await asyncio.open_connection(host, int(port))
                writer.close()
                await writer.wait_closed()
    except AddressError as error:
        if listen != "[::1]:0":
            raise
        pytest.skip(str(error))


async def test_a_port_that_is_taken(intake):
    async with serving(intake) as source:
        with pytest.raises(AddressError, match=r"http\.listen.*in use"):
            async with serving(intake, listen=source.addresses[0]):
                pass


async def test_a_host_that_does_not_exist(intake):
    with pytest.raises(AddressError, match=r"cannot listen on nowhere\.invalid:0"):
        async with serving(intake, listen="nowhere.invalid:0"):
            pass


async def test_leaving_finishes_what_was_taken(intake):
    intake.gate.clear()
    loop = asyncio.get_running_loop()
    async with (
        serving(intake) as source,
        connected(source) as waits,
        connected(source) as sends,
        connected(source) as idle,
    ):
        idle.post(b'"idle"', "/nowhere")
        await idle.reply()
        waits.post(b'"waits"')
        await intake.asked.wait()
        sends.post(b'"se', Content_Length="7")
        await until(lambda: source._handler._active == 2)
        stopping = asyncio.create_task(source.stop_taking(loop.time() + 60))
        await until(lambda: not source._listener.is_serving())
        with pytest.raises(ConnectionError):
            async with connected(source):
                pass
        idle.post(b'"new"')
        reply = await idle.reply()
        assert (reply.status, reply.slug) == (503, "draining")
        assert (reply.headers["connection"], reply.headers["retry-after"]) == ("close", "1")
        assert not stopping.done()
        sends.send(b'nds"')
        intake.gate.set()
        for client in (waits, sends):
            reply = await client.reply()
            assert (reply.status, reply.headers["connection"]) == (202, "close")
        await stopping
    assert sorted(intake.items) == [b'"sends"', b'"waits"']


async def test_leaving_has_a_deadline(intake):
    loop = asyncio.get_running_loop()
    async with serving(intake) as source, connected(source) as client:
        client.post(b"1", Content_Length="1000")
        await until(lambda: source._handler._active)
        with structlog.testing.capture_logs() as logs:
            await source.stop_taking(loop.time() + 0.02)
        assert logs[0]["event"] == "requests_abandoned"
        start = time.monotonic()
        await source.close()
        assert time.monotonic() - start < 30
        assert await client.closed()


async def test_who_was_let_in_and_has_said_nothing_is_heard(intake):
    """Leaving waits for the first request of a connection: it was let in, so it is served."""
    loop = asyncio.get_running_loop()
    async with serving(intake) as source, connected(source) as client:
        await until(lambda: source._server.open == 1)
        stopping = asyncio.create_task(source.stop_taking(loop.time() + 60))
        await until(lambda: not source._listener.is_serving())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not stopping.done()
        client.post(b"1")
        assert (await client.reply()).status == 202
        await stopping
        client.post(b"2")
        reply = await client.reply()
        assert (reply.slug, reply.headers["connection"]) == ("draining", "close")
    assert intake.items == [b"1"]


async def test_who_waits_to_be_let_in_is_served(intake):
    """The kernel would reset whom it finds in the queue of a socket that is closed."""
    with contextlib.ExitStack() as stack:
        async with serving(intake) as source:
            host, _, port = source.addresses[0].rpartition(":")
            waiting = []
            for _ in range(50):  # nothing is awaited, so the loop can't let anybody in
                sock = stack.enter_context(socket.create_connection((host, int(port))))
                sock.sendall(b"POST")
                waiting.append(sock)
            stopping = asyncio.create_task(
                source.stop_taking(asyncio.get_running_loop().time() + 60)
            )
            await until(lambda: not source._listener.is_serving())
            for sock in waiting:
                sock.sendall(
                    b" /v1/records HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n1"
                )
            await stopping
            for sock in waiting:
                assert sock.recv(12) == b"HTTP/1.1 202"
    assert intake.items == [b"1"] * 50


async def test_a_reader_that_does_not_read_its_answers_is_let_go(intake):
    body = b"x\n" * 100
    request = b"POST /v1/records HTTP/1.1\r\nHost: localhost\r\nContent-Length: 200\r\n\r\n" + body
    async with serving(intake, body_timeout=0.2) as source, connected(source) as client:
        client.reader._transport.pause_reading()

        async def pipeline():
            while source._server.open:
                client.send(request * 500)
                await client.writer.drain()

        sending = asyncio.create_task(pipeline())
        await until(lambda: source._server.open == 0)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


# -- another client ------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not here")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--data-binary", "@{file}"],
        ["-d", '{{"n":1}}'],
        ["--json", '[{{"n":1}}]'],
        ["-T", "{file}", "-X", "POST", "-H", "Expect: 100-continue"],
        ["-T", "-", "-X", "POST", "-H", "Transfer-Encoding: chunked"],
        ["--data-binary", "@{file}.gz", "-H", "Content-Encoding: gzip"],
        ["--http1.0", "--data-binary", "@{file}"],
    ],
)
async def test_curl(intake, tmp_path, arguments):
    file = tmp_path / "records"
    file.write_bytes(b'{"n":1}\n' * 1000)
    (tmp_path / "records.gz").write_bytes(gzip.compress(file.read_bytes()))
    async with serving(intake) as source:
        url = f"http://{source.addresses[0]}/v1/records"
        command = ["curl", "-sS", "--fail-with-body", "-m", "10", url]
        command += [argument.format(file=file) for argument in arguments]
        with file.open("rb") as stdin:
            curl = await asyncio.create_subprocess_exec(
                *command, stdin=stdin, stdout=subprocess.PIPE
            )
            out, _ = await curl.communicate()
    assert curl.returncode == 0, out
    assert set(intake.items) == {b'{"n":1}'}
    assert json.loads(out)["accepted"] == len(intake.items)


async def test_who_is_refused_in_the_middle_of_a_body_gets_to_see_why() -> None:
    """To close with the body unread would reset the connection, and the answer with it."""

    def send(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            client.sendall(b"POST /v1/records/none HTTP/1.1\r\nHost: localhost\r\n")
            client.sendall(b"Content-Length: %d\r\n\r\n" % 8_000_000)
            for _ in range(80):
                client.sendall(b"1" * 100_000)
                time.sleep(0.002)
            return b"".join(iter(lambda: client.recv(65536), b""))

    async with serving(MemoryIntake()) as source:
        port = int(source.addresses[0].rpartition(":")[2])
        answer = await asyncio.to_thread(send, port)
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"Connection: close" in answer


# -- counts of endpoints ---------------------------------------------------------------------------


async def test_an_endpoint_counts_what_it_accepts_and_refuses() -> None:
    intake = MemoryIntake()
    endpoints = {"loki": LokiSettings(pipeline="default")}
    async with serving(intake, endpoints=endpoints) as source:
        counts = source.endpoints()["records"]
        async with connected(source) as client:
            for _ in range(3):  # the later ones go the quick way
                client.post(b"1\n22\n")
                assert (await client.reply()).status == 202
            assert (counts.records, counts.bytes, counts.invalid) == (6, 15, 0)
            client.post(b"1\nnope\n")
            assert (await client.reply()).json["invalid"] == 1
            assert (counts.records, counts.invalid) == (7, 1)
            head = b"POST /v1/records HTTP/1.1\r\nHost: localhost\r\n"
            client.send(head + b"Transfer-Encoding: chunked\r\n\r\n")
            client.send(b"2\r\n1\n\r\n")
            await until(lambda: counts.records == 8)  # of a stream that goes on
            client.send(b"4\r\n333\n\r\n0\r\n\r\n")
            assert (await client.reply()).status == 202
        assert counts.records == 9
        intake.errors += [Overloaded(what="x")] * 2  # the quick way, then the ordinary one
        assert (await ask(source, b"1")).status == 503
        assert (await ask(source, b"nope")).status == 400
        assert counts.refused == {"overloaded": 1, "malformed": 1}
        assert (await ask(source, b"{}", "/loki/api/v1/push")).status == 400
        loki = source.endpoints()["loki"]
        assert (loki.records, sum(loki.refused.values())) == (0, 1)
        assert source.numbers() == {"records": 9, "invalid": 1}
        await source.reload()
        assert source.endpoints()["records"] is counts
