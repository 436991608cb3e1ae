"""Downloads from a real server: whole, broken, changed, refused, repeated; each line once."""

from __future__ import annotations

import asyncio
import gzip
import ssl
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from aiohttp import web

from ingestd.base.errors import InputIncomplete, JournalFailed, Overloaded
from ingestd.sources.fetch import appends
from tests.fetch.tools import (
    Intake,
    answers,
    fetch,
    fetching,
    lines,
    packed,
    send_part,
    serving,
)
from tests.sources.source_tools import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

BODY = lines(0, 500)
ITEMS = BODY.splitlines()
TAGGED = {"ETag": '"v1"'}


async def reason_of(intake: Intake, url: str, **more: Any) -> str:
    """Why a URL was given up."""
    async with fetching(intake, url, **more) as source, asyncio.timeout(60):
        with pytest.raises(InputIncomplete):
            await source.wait_finished()
        (download,) = source._downloads
    return download.reason


# -- bodies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "headers", "encoding"),
    [
        ("/x", {}, None),
        ("/x", {"Content_Encoding": "gzip"}, "gzip"),
        ("/x", {"Content_Encoding": "zstd"}, "zstd"),
        ("/x.gz", {"Content_Type": "text/plain"}, "gzip"),
        ("/x.ndjson.zst", {"Content_Type": "application/octet-stream"}, "zstd"),
        ("/x", {"Content_Type": "application/gzip"}, "gzip"),
    ],
)
async def test_a_download(path: str, headers: dict[str, str], encoding: str | None) -> None:
    body = packed(BODY, encoding) if encoding else BODY
    intake = Intake()
    async with serving(answers(body, **headers)) as server:
        source = await fetch(intake, server.url + path)
    assert intake.items == ITEMS
    assert intake.position.done
    assert intake.position.offset == len(BODY)
    assert (source.totals.records, source.totals.refused) == (500, 0)
    assert (source.totals.done, source.totals.bytes, source.totals.left) == (1, len(body), 0)


async def test_so_many_bad_lines_are_counted_and_some_of_them_kept() -> None:
    intake = Intake()
    async with serving(answers(b"1\n" + b"x\n" * 100_000)) as server:
        source = await fetch(intake, server.url)
    assert (source.totals.records, source.totals.refused) == (1, 100_000)
    assert intake.items == [b"1"]
    assert len(intake.refused) < 50_000
    assert len(intake.refused) + intake.unkept == 100_000


async def test_bad_lines_are_kept_and_the_last_one_needs_no_lf() -> None:
    intake = Intake(record_bytes_max=50)
    async with serving(answers(b'\xef\xbb\xbf1\r\n\n{\n"%s"\n2' % (b"x" * 60))) as server:
        await fetch(intake, server.url)
    assert intake.items == [b"1", b"2"]
    assert [(one.index, one.reason) for one in intake.refused] == [(1, "malformed"),
                                                                   (2, "too_large")]  # fmt: skip


async def test_nothing_and_blank_lines_are_done_too() -> None:
    for body in (b"", b"\n\n"):
        intake = Intake()
        async with serving(answers(body)) as server:
            await fetch(intake, server.url)
            await fetch(intake, server.url)
        assert intake.items == []
        assert intake.position.done
        assert len(server.asked) == 1


async def test_an_empty_body_that_says_it_is_gzip() -> None:
    async with serving(answers(b"", Content_Encoding="gzip")) as server:
        await fetch(Intake(), server.url)


async def test_a_great_deal_comes_out_of_little_within_bounds() -> None:
    intake = Intake("text", record_bytes_max=100)
    bomb = gzip.compress(b"x" * 50_000_000 + b"\n")
    async with serving(answers(bomb)) as server:
        await fetch(intake, server.url + "/bomb.gz")
        (refused,) = intake.refused
        assert refused.reason == "too_large"
        reason = await reason_of(Intake(), server.url + "/x.gz", decompressed_bytes_max=1_000_000)
        assert reason == "it is larger than fetch.decompressed_bytes_max"
        reason = await reason_of(Intake(), server.url + "/x.gz", response_bytes_max=10_000)
        assert reason == "it is larger than fetch.response_bytes_max"


async def test_what_was_accepted_before_a_bound_stays() -> None:
    intake = Intake()

    async def two(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(BODY)
        await until(lambda: intake.items)
        await response.write(BODY)
        return response

    async with serving(two) as server:
        reason = await reason_of(intake, server.url, decompressed_bytes_max=len(BODY) + 1)
    assert reason == "it is larger than fetch.decompressed_bytes_max"
    assert intake.items == ITEMS
    assert not intake.position.done


# -- broken in the middle --------------------------------------------------------------------------


def breaking(body: bytes, *, ranges: bool, headers: dict[str, str], every: int = 5000) -> Any:
    """Sends so much of what was asked for, and leaves; as a server with or without ranges."""

    async def handle(request: web.Request) -> web.StreamResponse:
        start = 0
        named = dict(headers)
        status = 200
        if ranges and request.headers.get("If-Range") == headers.get("ETag", "-"):
            start = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            named["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            status = 206
            size = every
        else:
            size = every * handle.times  # type: ignore[attr-defined]
        handle.times += 1  # type: ignore[attr-defined]
        rest = body[start:]
        response = web.StreamResponse(status=status, headers=named)
        response.content_length = len(rest)
        await response.prepare(request)
        await response.write(rest[:size])
        if size < len(rest):
            assert request.transport is not None
            request.transport.close()
        return response

    handle.times = 1  # type: ignore[attr-defined]
    return handle


@pytest.mark.parametrize("attempts", [3])
async def test_a_body_that_is_cut_again_and_again_goes_on_with_ranges(attempts: int) -> None:
    intake = Intake()
    async with serving(breaking(BODY, ranges=True, headers=TAGGED)) as server:
        await fetch(intake, server.url, attempts_max=attempts)
    assert intake.items == ITEMS
    ranges = [one.headers.get("range") for one in server.asked]
    assert ranges[0] is None
    assert all(ranges[1:])
    assert len(ranges) > attempts + 1
    assert all(one.headers["if-range"] == '"v1"' for one in server.asked[1:])
    # It was cut within lines, and asked for from their beginnings.
    starts = [int(one.removeprefix("bytes=").removesuffix("-")) for one in ranges[1:] if one]
    assert all(BODY[start - 1 : start] == b"\n" for start in starts)


@pytest.mark.parametrize("headers", [TAGGED, {"ETag": 'W/"v1"'}, {}])
@pytest.mark.parametrize("encoding", ["identity", "gzip", "zstd"])
async def test_without_ranges_what_was_accepted_is_passed_over(
    headers: dict[str, str], encoding: str
) -> None:
    intake = Intake()
    body, more = BODY, {}
    if encoding != "identity":
        body, more = packed(BODY, encoding, parts=20), {"Content-Encoding": encoding}
    step = len(body) // 6
    handler = breaking(body, ranges=False, headers={**headers, **more}, every=step)
    async with serving(handler) as server:
        await fetch(intake, server.url)
    assert intake.items == ITEMS
    assert len(server.asked) > 3


async def test_a_restart_goes_on_at_the_exact_line() -> None:
    intake = Intake()
    one_part = breaking(BODY, ranges=True, headers=TAGGED)

    async def handle(request: web.Request) -> web.StreamResponse:
        if len(server.asked) in (2, 4, 6):  # which ends a life
            return web.Response(status=404)
        return await one_part(request)

    async with serving(handle) as server:
        for _ in range(3):
            await reason_of(intake, server.url)
            assert intake.position.offset == sum(len(item) + 1 for item in intake.items)
            assert intake.position.records == len(intake.items)
        await fetch(intake, server.url)
    assert intake.items == ITEMS
    assert len(server.asked) > 4


async def test_a_chunked_body_that_does_not_end() -> None:
    intake = Intake()

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(b"1\n2\n3")
        assert request.transport is not None
        request.transport.close()
        return response

    async with serving(handle) as server:
        reason = await reason_of(intake, server.url)
    assert reason.startswith("the body was cut short (3 tries without progress")
    assert intake.items == [b"1", b"2"]
    assert intake.refused == []


async def test_a_body_that_ends_with_its_connection() -> None:
    """Whether it was whole can't be told: a last line without LF is not taken for a whole one."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n1\n2\n34")
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    intake = Intake()
    async with server:
        await fetch(intake, f"http://127.0.0.1:{port}/")
    assert intake.items == [b"1", b"2"]
    assert [(one.reason, one.payload) for one in intake.refused] == [("unfinished", b"34")]


@pytest.mark.parametrize(
    ("encoding", "damage"),
    [("gzip", "cut"), ("zstd", "cut"), ("gzip", "wrong checksum"), ("gzip", "appended"),
     ("zstd", "appended")],
)  # fmt: skip
async def test_compressed_data_that_is_not_whole(encoding: str, damage: str) -> None:
    wire = packed(BODY, encoding, parts=5)
    wire = {
        "cut": wire[:-5],
        "wrong checksum": wire[:-8] + bytes(byte ^ 0x55 for byte in wire[-8:]),
        "appended": wire + b"something else",
    }[damage]
    intake = Intake()
    async with serving(answers(wire, Content_Encoding=encoding)) as server:
        reason = await reason_of(intake, server.url)
        assert f"the {encoding} body is not valid" in reason
        assert len(server.asked) == 4, "one with progress, three without"
    assert intake.items == ITEMS[: len(intake.items)]
    assert len(intake.items) >= 400 - 1
    assert not intake.position.done


async def test_a_range_that_is_not_what_was_asked_for() -> None:
    """Then all of it is asked for, and what was accepted is passed over."""
    intake = Intake()

    async def handle(request: web.Request) -> web.StreamResponse:
        if "Range" in request.headers:
            headers = {**TAGGED, "Content-Range": f"bytes 0-{len(BODY) - 1}/{len(BODY)}"}
            return web.Response(status=206, body=BODY, headers=headers)
        if len(intake.items) > 0:
            return web.Response(body=BODY, headers=TAGGED)
        return await send_part(request, BODY, 5000, **TAGGED)

    async with serving(handle) as server:
        await fetch(intake, server.url)
    assert intake.items == ITEMS
    assert [("range" in one.headers) for one in server.asked] == [False, True, False]


async def test_a_server_that_sends_parts_only() -> None:
    intake = Intake()

    async def handle(request: web.Request) -> web.StreamResponse:
        if "Range" not in request.headers:
            return await send_part(request, BODY, 5000, **TAGGED)
        start = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        part = BODY[start : start + 7000]
        place = f"bytes {start}-{start + len(part) - 1}/{len(BODY)}"
        return web.Response(status=206, body=part, headers={**TAGGED, "Content-Range": place})

    async with serving(handle) as server:
        await fetch(intake, server.url)
    assert intake.items == ITEMS


async def test_cut_behind_the_last_line() -> None:
    intake = Intake()

    async def handle(request: web.Request) -> web.StreamResponse:
        if "Range" not in request.headers:
            response = web.StreamResponse(headers=TAGGED)
            response.enable_chunked_encoding()
            await response.prepare(request)
            await response.write(BODY)
            assert request.transport is not None
            request.transport.close()
            return response
        return web.Response(status=416, headers={"Content-Range": f"bytes */{len(BODY)}"})

    async with serving(handle) as server:
        await fetch(intake, server.url)
    assert intake.items == ITEMS
    assert intake.position.done


# -- versions --------------------------------------------------------------------------------------


async def test_what_is_done_is_only_fetched_again_if_it_changed() -> None:
    intake = Intake()
    tag = '"v1"'

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304)
        body = BODY if tag == '"v1"' else lines(1000, 1010)
        return web.Response(body=body, headers={"ETag": tag})

    async with serving(handle) as server:
        await fetch(intake, server.url)
        await fetch(intake, server.url)
        assert intake.items == ITEMS
        assert [one.headers.get("if-none-match") for one in server.asked] == [None, '"v1"']
        tag = '"v2"'
        with structlog.testing.capture_logs() as logs:
            await fetch(intake, server.url)
    assert intake.items == ITEMS + lines(1000, 1010).splitlines()
    (changed,) = [line for line in logs if line["event"] == "resource_changed"]
    assert changed["records_accepted"] == 500
    assert intake.position.etag == '"v2"'


async def test_last_modified_alone_and_a_server_that_ignores_conditions() -> None:
    intake = Intake()
    headers = {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
    async with serving(answers(BODY, Last_Modified=headers["Last-Modified"])) as server:
        await fetch(intake, server.url)
        await fetch(intake, server.url)
    assert server.asked[1].headers["if-modified-since"] == headers["Last-Modified"]
    assert intake.items == ITEMS


async def test_without_validators_what_is_done_is_never_asked_for_again() -> None:
    intake = Intake()
    async with serving(answers(BODY)) as server:
        await fetch(intake, server.url)
        await fetch(intake, server.url)
    assert len(server.asked) == 1
    assert intake.items == ITEMS


@pytest.mark.parametrize("tagged", [True, False])
async def test_a_resource_that_changes_in_the_middle_begins_anew(tagged: bool) -> None:
    """By its validators; without any, by what stands where accepted bytes stood."""
    intake = Intake()
    new = lines(1000, 1500)

    async def handle(request: web.Request) -> web.StreamResponse:
        if len(server.asked) == 1:
            return await send_part(request, BODY, 9000, **(TAGGED if tagged else {}))
        return web.Response(body=new, headers={"ETag": '"v2"'} if tagged else {})

    async with serving(handle) as server:
        with structlog.testing.capture_logs() as logs:
            await fetch(intake, server.url)
    old = len(intake.items) - 500
    assert 0 < old < 500
    assert intake.items == ITEMS[:old] + new.splitlines()
    assert [one for one in logs if one["event"] == "resource_changed"]
    assert intake.position.offset == len(new)


async def test_a_resource_that_always_changes_and_never_comes_whole_is_given_up() -> None:
    intake = Intake()

    async def handle(request: web.Request) -> web.StreamResponse:
        number = len(server.asked)
        body = lines(number * 1000, number * 1000 + 500)
        return await send_part(request, body, 9000 - 200 * number, ETag=f'"{number}"')

    async with serving(handle) as server:
        reason = await reason_of(intake, server.url)
    assert "3 tries without progress" in reason
    assert len(server.asked) <= 8


async def test_polls() -> None:
    intake = Intake()
    tag = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.headers.get("If-None-Match") == f'"{tag}"':
            return web.Response(status=304)
        if tag == 2:
            return web.Response(status=404)
        return web.Response(body=lines(tag * 10, tag * 10 + 10), headers={"ETag": f'"{tag}"'})

    async with serving(handle) as server, fetching(intake, server.url, every="5ms") as source:
        ended = asyncio.ensure_future(source.wait_finished())
        await until(lambda: len(server.asked) > 3)
        assert len(intake.items) == 10
        tag = 1
        await until(lambda: len(intake.items) == 20)
        tag = 2  # given up for this round only
        seen = len(server.asked)
        await until(lambda: len(server.asked) > seen + 3)
        tag = 3
        await until(lambda: len(intake.items) == 30)
        assert not ended.done()
        ended.cancel()
    assert intake.items == lines(0, 20).splitlines() + lines(30, 40).splitlines()


# -- refusals and waits ----------------------------------------------------------------------------


async def test_retry_after_is_waited_for() -> None:
    intake = Intake()
    times = []

    async def handle(_: web.Request) -> web.StreamResponse:
        times.append(time.monotonic())
        if len(times) == 1:
            return web.Response(status=503, headers={"Retry-After": "1"})
        if len(times) == 2:
            return web.Response(status=429, headers={"Retry-After": "86400"})
        return web.Response(body=BODY)

    async with serving(handle) as server:
        await fetch(intake, server.url, retry_after_max="1s")
    assert intake.items == ITEMS
    assert times[1] - times[0] >= 0.99
    assert 0.99 <= times[2] - times[1] < 60


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (403, 1), (503, 3), (429, 3)])
async def test_what_is_refused_is_given_up(status: int, tries: int) -> None:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status)

    async with serving(handle) as server:
        reason = await reason_of(Intake(), server.url)
        assert reason.startswith(f"the server answered {status}")
        assert len(server.asked) == tries


async def test_silence_is_ended_and_tried_again() -> None:
    intake = Intake()

    async def handle(request: web.Request) -> web.StreamResponse:
        if len(server.asked) == 1:
            await asyncio.sleep(300)
        if "Range" in request.headers:
            return await breaking(BODY, ranges=True, headers=TAGGED, every=10**6)(request)
        response = web.StreamResponse(headers=TAGGED)
        response.content_length = len(BODY)
        await response.prepare(request)
        await response.write(BODY[:5000])
        await asyncio.sleep(300)
        return response

    async with serving(handle) as server:
        with structlog.testing.capture_logs() as logs:
            short = {"silence_timeout": "100ms", "connect_timeout": "100ms"}
            await fetch(intake, server.url, **short, attempts_max=1000)
    assert intake.items == ITEMS
    # Each for the first time: a machine that stands still may be silent more often.
    reasons = dict.fromkeys(line["reason"] for line in logs if line["event"] == "url_postponed")
    assert list(reasons) == [
        "no answer within fetch.silence_timeout", "no byte came within fetch.silence_timeout",
    ]  # fmt: skip


async def all_that_is_held(source: Any) -> int:
    """The bytes that a source has read, once it reads no more."""
    before = -1
    while before != source.totals.bytes:
        before = source.totals.bytes
        await asyncio.sleep(0.1)
    return before


async def test_silence_is_not_our_own_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline that takes nothing for longer than the deadline does not end the download."""
    intake = Intake()
    intake.gate.clear()
    loop = asyncio.get_running_loop()
    now = loop.time
    async with serving(answers(BODY * 400)) as server:
        more = {"silence_timeout": "10m", "inflight_bytes_max": 100_000}
        async with fetching(intake, server.url, **more) as source:
            await until(lambda: intake.asked)
            await all_that_is_held(source)
            monkeypatch.setattr(loop, "time", lambda: now() + 3600)
            await asyncio.sleep(0.1)
            assert len(server.asked) == 1
            intake.gate.set()
            await source.wait_finished()
        assert len(server.asked) == 1
    assert intake.items == ITEMS * 400


async def test_nobody_listens() -> None:
    async with serving(answers(BODY)) as server:
        url = server.url
    reason = await reason_of(Intake(), url)
    assert reason.startswith("no connection: Connection refused")


async def test_something_that_is_not_http() -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"220 mail.example ESMTP\r\n" * 3)
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        reason = await reason_of(Intake(), f"http://127.0.0.1:{port}/")
    assert reason.startswith("the answer is not HTTP")


# -- redirects, headers, TLS -----------------------------------------------------------------------


async def test_redirects_are_followed_and_bounded() -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        left = int(request.path.removeprefix("/"))
        if left:
            return web.Response(status=302 + 5 * (left % 2), headers={"Location": f"/{left - 1}"})
        return web.Response(body=BODY)

    async with serving(handle) as server:
        intake = Intake()
        await fetch(intake, server.url + "/3", redirects_max=3)
        assert intake.items == ITEMS
        assert server.paths == ["/3", "/2", "/1", "/0"]
        reason = await reason_of(Intake(), server.url + "/4", redirects_max=3)
        assert reason == "more than 3 redirects"


async def test_headers_and_credentials_stay_with_their_origin() -> None:
    async with serving(answers(BODY)) as other:

        async def handle(request: web.Request) -> web.StreamResponse:
            if request.path == "/here":
                raise web.HTTPFound("/there")
            raise web.HTTPFound(other.url + "/elsewhere")

        async with serving(handle) as server:
            url = server.url.replace("://", "://ada:hunter2@") + "/here"
            await fetch(Intake(), url, headers={"X-Key": "secret", "user-agent": "mine"})
    for one in server.asked:
        assert one.headers["authorization"] == "Basic YWRhOmh1bnRlcjI="
        assert one.headers["x-key"] == "secret"
        assert one.headers["user-agent"] == "mine"
    (one,) = other.asked
    assert not {"authorization", "x-key"} & set(one.headers)
    assert one.headers["user-agent"].startswith("ingestd/")
    assert "cookie" not in one.headers


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, ssl.SSLContext]]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    done = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        capture_output=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip("openssl can't make a certificate here")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return cert, context


async def test_a_certificate_that_nobody_vouches_for(certificate: Any) -> None:
    async with serving(answers(BODY), ssl=certificate[1]) as server:
        reason = await reason_of(Intake(), server.url)
        assert reason.startswith("its certificate is not valid: self")
        assert server.asked == []


# -- many ------------------------------------------------------------------------------------------


async def test_so_many_at_once_and_no_more() -> None:
    running: dict[str, int] = {}
    most: dict[str, int] = {}
    came = 0
    together = [asyncio.Event() for _ in range(6)]  # each of three requests, and the last one

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal came
        for key in ("all", request.host):
            running[key] = running.get(key, 0) + 1
            most[key] = max(most.get(key, 0), running[key])
        came += 1
        mine = together[(came - 1) // 3]
        if came % 3 == 0 or came == 16:
            mine.set()
        await mine.wait()
        await asyncio.sleep(0.02)
        for key in ("all", request.host):
            running[key] -= 1
        return web.Response(body=b"1\n")

    async with serving(handle) as one, serving(handle, host="127.0.0.2") as two:
        urls = [f"{server.url}/{n}" for n in range(8) for server in (one, two)]
        intake = Intake()
        source = await fetch(intake, *urls, concurrency=3, concurrency_per_host=2)
    assert len(intake.items) == 16
    assert source.totals.done == source.totals.total == 16
    assert most["all"] == 3
    assert most[one.url.removeprefix("http://")] == 2
    assert most[two.url.removeprefix("http://")] == 2


async def test_one_that_waits_does_not_hold_a_place() -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        if request.path == "/bad":
            return web.Response(status=503, headers={"Retry-After": "100"})
        return web.Response(body=BODY)

    async with serving(handle) as server:
        intake = Intake()
        urls = [server.url + "/bad", server.url + "/good"]
        async with fetching(intake, *urls, concurrency=1) as source:
            await until(lambda: source.totals.done == 1)
    assert intake.items == ITEMS


async def test_some_are_given_up_and_the_others_are_whole() -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        return web.Response(body=BODY) if request.path == "/good" else web.Response(status=404)

    intake = Intake()
    async with serving(handle) as server:
        urls = [f"{server.url}/bad?token=hunter2", f"{server.url}/good"]
        with structlog.testing.capture_logs() as logs:
            async with fetching(intake, *urls) as source:
                with pytest.raises(InputIncomplete, match="1 of 2 URLs were given up"):
                    await source.wait_finished()
    assert intake.items == ITEMS
    (last,) = [line for line in logs if line["event"] == "urls_given_up"]
    assert last["urls"] == [f"{server.url}/bad?…: the server answered 404 Not Found"]
    assert source.numbers() == {"retries": 0, "urls_given_up": 1}
    assert "hunter2" not in str(logs)


# -- the pipeline ----------------------------------------------------------------------------------


async def test_a_full_pipeline_makes_the_download_wait_and_no_append_overtakes_another() -> None:
    intake = Intake()
    intake.errors = [Overloaded(what="x", retry_after=0.001) for _ in range(20)]
    async with serving(answers(BODY * 50)) as server:
        await fetch(intake, server.url, inflight_bytes_max=50_000)
    assert intake.items == ITEMS * 50


async def test_what_is_held_is_bounded() -> None:
    intake = Intake()
    intake.gate.clear()
    async with (
        serving(answers(BODY * 2000)) as server,
        fetching(intake, server.url, inflight_bytes_max=300_000) as source,
    ):
        await until(lambda: intake.asked)
        assert await all_that_is_held(source) < 3_000_000 < len(BODY * 2000)


async def test_the_numbers_of_lines_count_in_an_append(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a blank line each short record has more of them than it has bytes."""
    monkeypatch.setattr(appends, "APPEND_BYTES", 10**6)
    intake = Intake()
    intake.gate.clear()
    async with (
        serving(answers(b"1\n\n" * 360_000)) as server,
        fetching(intake, server.url) as source,
        asyncio.timeout(300),
    ):
        await until(lambda: source.totals.bytes == 1_080_000, 300)
        intake.gate.set()
        await source.wait_finished()
    assert len(intake.items) == 360_000
    # A piece that was read, of at most 512 KiB, is never parted.
    assert max(run.count for run in intake.runs) <= 512 * 1024 / 3


async def test_a_journal_that_failed_ends_everything() -> None:
    intake = Intake()
    intake.errors = [JournalFailed(path="x", problem="y")]
    async with serving(answers(BODY * 100)) as server:
        urls = [f"{server.url}/{n}" for n in range(5)]
        async with fetching(intake, *urls, inflight_bytes_max=1000) as source:
            with pytest.raises(JournalFailed):
                async with asyncio.timeout(60):
                    await source.wait_finished()


async def test_stopping_keeps_whole_lines_and_their_position() -> None:
    intake = Intake()
    more = asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        if "Range" in request.headers:
            return await breaking(BODY, ranges=True, headers=TAGGED, every=10**6)(request)
        response = web.StreamResponse(headers=TAGGED)
        response.content_length = len(BODY)
        await response.prepare(request)
        await response.write(BODY[:5000])
        await more.wait()
        return response

    async with serving(handle) as server:
        async with fetching(intake, server.url) as source:
            await until(lambda: intake.items)
            await source.stop_taking(asyncio.get_running_loop().time() + 60)
        assert intake.refused == []
        assert intake.position.offset == BODY[:5000].rfind(b"\n") + 1
        await fetch(intake, server.url)
        more.set()
    assert intake.items == ITEMS
