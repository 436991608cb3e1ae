"""Streams without an end: what comes is accepted at once, and a stream that ends is asked again."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from ingestd.base.errors import InputIncomplete
from tests.fetch.tools import Intake, fetching, serving
from tests.sources.source_tools import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ingestd.sources.fetch.source import FetchSource


def streams(
    *turns: Callable[[web.StreamResponse, web.Request], Awaitable[None]],
    kind: str = "text/event-stream",
    **headers: str,
) -> Any:
    """A handler whose connections take turns; the last one for ever."""
    left = list(turns)

    async def handle(request: web.Request) -> web.StreamResponse:
        turn = left.pop(0) if len(left) > 1 else left[0]
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        response = web.StreamResponse(headers={"Content-Type": kind, **named})
        response.enable_chunked_encoding()
        await response.prepare(request)
        await turn(response, request)
        return response

    return handle


async def hold(response: web.StreamResponse, request: web.Request) -> None:
    await asyncio.sleep(60)


def says(*parts: bytes, drop: Callable[[], bool] | None = None) -> Any:
    """Writes the parts, and ends the body, or only the connection once all of it was read."""

    async def turn(response: web.StreamResponse, request: web.Request) -> None:
        for part in parts:
            await response.write(part)
        if drop:
            await until(drop)
            assert request.transport is not None
            request.transport.close()

    return turn


class Fetched:
    """How much of what servers sent was read.

    Attributes:
        source: that reads it, once it is there.
    """

    source: FetchSource | None = None

    def of(self, *sent: bytes) -> Callable[[], bool]:
        """Tells if all of that was read."""
        size = sum(map(len, sent))
        return lambda: self.source is not None and self.source.totals.bytes >= size


async def test_an_event_is_accepted_as_soon_as_it_is_there() -> None:
    intake = Intake()
    go = asyncio.Event()

    async def turn(response: web.StreamResponse, request: web.Request) -> None:
        await response.write(b"id: 1\ndata: 1\n\ndata: 2")
        await go.wait()
        await response.write(b"\n\n")
        await asyncio.sleep(60)

    async with serving(streams(turn)) as server, fetching(intake, server.url):
        await until(lambda: intake.items == [b"1"])
        assert intake.position.event_id == "1"
        go.set()
        await until(lambda: intake.items == [b"1", b"2"])


@pytest.mark.parametrize("drop", [False, True])
async def test_a_stream_that_ends_goes_on_behind_its_last_event(drop: bool) -> None:
    intake, fetched = Intake(), Fetched()
    first = b"retry: 1\nid: 1\ndata: 1\n\nid: 2\ndata: 2\n\nid: 3\ndata: 3\n"
    second = b"retry: 1\n: nothing\n\n"
    turns = [
        says(first, drop=fetched.of(first) if drop else None),
        says(second, drop=fetched.of(first, second) if drop else None),
        says(b"id: 3\ndata: [3,\ndata: 4]\n\ndata: {\n\n"),
        hold,
    ]
    async with serving(streams(*turns)) as server, fetching(intake, server.url) as fetched.source:
        await until(lambda: len(server.asked) == 4)
    assert intake.items == [b"1", b"2", b"[3,\n4]"]
    assert [(one.index, one.reason) for one in intake.refused] == [(3, "malformed")]
    asked = [one.headers.get("last-event-id") for one in server.asked]
    assert asked == [None, "2", "2", "3"]
    assert not any("range" in one.headers for one in server.asked)


async def test_a_restart_sends_the_last_event_id() -> None:
    intake = Intake()
    turns = [says(b"id: \xc3\xa4\ndata: 1\n\n"), hold]
    async with serving(streams(*turns)) as server:
        async with fetching(intake, server.url):
            await until(lambda: intake.items)
        async with fetching(intake, server.url):
            await until(lambda: len(server.asked) > 1)
            await until(lambda: server.asked[-1].headers.get("last-event-id"))
    sent = server.asked[-1].headers["last-event-id"]
    assert sent.encode("utf-8", "surrogateescape") == b"\xc3\xa4"


async def test_a_server_that_says_no_more_ends_it() -> None:
    intake = Intake()

    async def handle(request: web.Request) -> web.StreamResponse:
        if len(server.asked) > 1:
            return web.Response(status=204)
        return await streams(says(b"retry: 1\ndata: 1\n\n"))(request)

    async with (
        serving(handle) as server,
        fetching(intake, server.url) as source,
        asyncio.timeout(60),
    ):
        await source.wait_finished()
    assert intake.items == [b"1"]


async def test_a_stream_that_is_refused_again_and_again_is_given_up() -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        if len(server.asked) > 1:
            return web.Response(status=503)
        return await streams(says(b"retry: 1\ndata: 1\n\n"))(request)

    async with serving(handle) as server:
        async with fetching(Intake(), server.url) as source, asyncio.timeout(60):
            with pytest.raises(InputIncomplete):
                await source.wait_finished()
        assert len(server.asked) == 4


async def test_a_silent_stream_is_asked_again() -> None:
    intake = Intake()
    more = {"silence_timeout": "300ms", "connect_timeout": "5s"}

    async def silent(response: web.StreamResponse, request: web.Request) -> None:
        await response.write(b"data: 1\n\n")
        await asyncio.sleep(60)

    async with serving(streams(silent)) as server, fetching(intake, server.url, **more):
        await until(lambda: len(intake.items) > 5)  # a stream that speaks is never given up


async def test_compressed_events() -> None:
    intake = Intake("text")
    press = zlib.compressobj(wbits=31)
    parts = [press.compress(b"data: %d\n\n" % n) + press.flush(zlib.Z_SYNC_FLUSH) for n in (1, 2)]

    async def turn(response: web.StreamResponse, request: web.Request) -> None:
        await response.write(parts[0])
        await until(lambda: intake.items == [b"1"])
        await response.write(parts[1])
        await asyncio.sleep(60)

    async with (
        serving(streams(turn, Content_Encoding="gzip")) as server,
        fetching(intake, server.url),
    ):
        await until(lambda: intake.items == [b"1", b"2"])


async def test_streams_take_no_place_from_downloads() -> None:
    intake = Intake()

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.path == "/file":
            return web.Response(body=b"17\n")
        return await streams(hold)(request)

    async with serving(handle) as server:
        urls = [f"{server.url}/{n}" for n in range(4)] + [server.url + "/file"]
        async with fetching(intake, *urls, concurrency=1, concurrency_per_host=1):
            await until(lambda: intake.items == [b"17"])
            await until(lambda: len(server.asked) == 5)


# -- lines -----------------------------------------------------------------------------------------


async def test_lines_are_followed() -> None:
    intake, fetched = Intake(), Fetched()
    sent = (b"1\n2\n", b"3\n4", b"5", b"6\n7")
    turns = [says(sent[0]), says(sent[1], sent[2]), says(sent[3], drop=fetched.of(*sent)),
             says(b"8\n"), hold]  # fmt: skip
    kind = "application/x-ndjson"
    async with (
        serving(streams(*turns, kind=kind)) as server,
        fetching(intake, server.url, follow=True) as fetched.source,
    ):
        await until(lambda: len(server.asked) == 5)
    # 45 was at the proper end of a body; of 7 nobody knows how it went on.
    assert intake.items == [b"1", b"2", b"3", b"45", b"6", b"8"]
    assert [(one.reason, one.payload) for one in intake.refused] == [("unfinished", b"7")]
    assert intake.offsets == {}


async def test_a_line_is_accepted_as_soon_as_it_is_there_and_a_stop_keeps_what_was_begun() -> None:
    intake = Intake()

    async def turn(response: web.StreamResponse, request: web.Request) -> None:
        for n in range(3):
            await response.write(b"%d\n" % n)
            await until(lambda n=n: len(intake.items) == n + 1)
        await response.write(b'{"a":')
        await asyncio.sleep(60)

    async with (
        serving(streams(turn, kind="text/plain")) as server,
        fetching(intake, server.url, follow=True) as source,
    ):
        await until(lambda: len(intake.items) == 3)
        await until(lambda: source.totals.bytes == 11)
        await source.stop_taking(asyncio.get_running_loop().time() + 60)
    assert [(one.reason, one.payload) for one in intake.refused] == [("unfinished", b'{"a":')]


async def test_a_compressed_stream_that_is_cut() -> None:
    intake, fetched = Intake(), Fetched()
    whole = gzip.compress(b"1\n2\n")
    cut = whole[:-4]
    turns = [says(whole), says(cut, drop=fetched.of(whole, cut)), hold]
    handler = streams(*turns, kind="text/plain", Content_Encoding="gzip")
    async with (
        serving(handler) as server,
        fetching(intake, server.url, follow=True) as fetched.source,
    ):
        await until(lambda: len(server.asked) == 3)
    assert intake.items == [b"1", b"2"] * 2
