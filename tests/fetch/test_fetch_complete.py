"""A download that ended is not a download that is complete: servers that misbehave exactly.

Each of them sends bytes as they stand here and closes the connection. Nothing is left out and
nothing comes twice; what can't be known to be whole is asked for again, and given up by name.
"""

from __future__ import annotations

import asyncio
import gzip
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from backports import zstd

from ingestd.base.errors import InputIncomplete
from ingestd.sources.fetch import FetchSettings
from ingestd.sources.fetch.client import _Window
from ingestd.sources.fetch.concurrency import InflightBudget, memory_for
from ingestd.sources.fetch.failure import DownloadFailed, TryAgain
from tests.fetch.tools import (
    Asked,
    Intake,
    chunked,
    fetch,
    fetching,
    lines,
    packed,
    reply,
    speaking,
)
from tests.sources.source_tools import until

if TYPE_CHECKING:
    from collections.abc import Callable

BODY = lines(0, 1000)
ITEMS = BODY.splitlines()
TAG = {"ETag": '"v1"'}
WHOLE = BODY[:9000].rfind(b"\n") + 1
"""Of the first 9,000 bytes, what are whole lines."""
MIB = 1024**2


async def reason_of(intake: Intake, url: str, **more: Any) -> str:
    """Why a URL was given up."""
    async with fetching(intake, url, **more) as source, asyncio.timeout(60):
        with pytest.raises(InputIncomplete):
            await source.wait_finished()
        (download,) = source._downloads
    assert not any(offset.state.count(b'"done":true') for offset in intake.offsets.values())
    return download.reason


def start_of(asked: Asked) -> int | None:
    """Where a range that was asked for begins."""
    place = asked.headers.get("range")
    return int(place.removeprefix("bytes=").removesuffix("-")) if place else None


def begins(size: int = 9000, body: bytes = BODY, **headers: str) -> bytes:
    """The beginning of a whole body."""
    return reply(body[:size], Content_Length=len(body), **(headers or TAG))


# -- parts -----------------------------------------------------------------------------------------


def part(first: int, last: int, total: int | str, body: bytes | None = None, **more: Any) -> bytes:
    """A 206, whatever it says."""
    place = f"bytes {first}-{last}/{total}"
    body = BODY[first : last + 1] if body is None else body
    return reply(body, "206 Partial Content", Content_Range=place, **TAG, **more)


def stars_then_the_end(first: int) -> bytes:
    if first == len(BODY):
        return reply(b"", "416 No", Content_Range=f"bytes */{first}", Content_Length=0)
    return part(first, min(first + 9000, len(BODY)) - 1, "*")


def stars_then_a_bare_416(first: int) -> bytes:
    if first == len(BODY):
        return reply(b"", "416 No", Content_Length=0)
    return part(
        first, min(first + 9000, len(BODY)) - 1, "*", Content_Length=min(9000, len(BODY) - first)
    )


PARTS: dict[str, Callable[[int], bytes]] = {
    "star, then 416": stars_then_the_end,
    "star, then a bare 416": stars_then_a_bare_416,
    "star in the middle of a line": lambda first: part(first, first + 4, "*"),
    "shorter than its range": lambda first: part(
        first, len(BODY) - 1, len(BODY), BODY[first : first + 5000]
    ),
    "shorter than its range, in chunks": lambda first: part(
        first, len(BODY) - 1, len(BODY), chunked(BODY[first : first + 5000]),
        Transfer_Encoding="chunked",
    ),
    "shorter than its range and length": lambda first: part(
        first, len(BODY) - 1, len(BODY), BODY[first : first + 5000],
        Content_Length=len(BODY) - first,
    ),
    "shorter than its range, as its length says": lambda first: part(
        first, len(BODY) - 1, len(BODY), BODY[first : first + 5000],
        Content_Length=len(BODY[first : first + 5000]),
    ),
    "longer than its range": lambda first: part(first, first + 99, len(BODY), BODY[first:]),
    "longer than its range, in chunks": lambda first: part(
        first, first + 99, len(BODY), chunked(BODY[first:]), Transfer_Encoding="chunked"
    ),
    "shorter than a line": lambda first: part(first, first + 4, len(BODY)),
    "from the beginning": lambda first: part(0, len(BODY) - 1, len(BODY)),
    "from elsewhere": lambda first: part(first + 1, len(BODY) - 1, len(BODY)),
    "several parts": lambda first: reply(
        b"--x\r\nContent-Range: bytes 0-1/9\r\n\r\n{}\r\n--x--\r\n", "206 Partial Content",
        Content_Type="multipart/byteranges; boundary=x",
    ),
    "without a place": lambda first: reply(BODY[first:], "206 Partial Content", **TAG),
    "of another version": lambda first: part(first, len(BODY) - 1, len(BODY)).replace(
        b'"v1"', b'"v2"'
    ),
    "only weakly the same": lambda first: part(first, len(BODY) - 1, len(BODY)).replace(
        b'"v1"', b'W/"v1"'
    ),
    "range ignored": lambda first: reply(BODY, Content_Length=len(BODY), **TAG),
    "range ignored, weak": lambda first: reply(BODY, Content_Length=len(BODY), ETag='W/"v1"'),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
async def test_a_part_is_what_it_is_and_no_more(name: str) -> None:
    """The first answer is cut; those to ranges are as the name says; a whole one is whole."""
    intake = Intake()

    def answer(asked: Asked) -> bytes:
        first = start_of(asked)
        if first is not None:
            return PARTS[name](first)
        return begins() if len(server.asked) == 1 else begins(len(BODY))

    async with speaking(answer) as server:
        await fetch(intake, server.url + "/x")
    assert intake.items == ITEMS
    assert intake.refused == []
    assert intake.position.done
    assert intake.position.offset == len(BODY)
    assert start_of(server.asked[1]) == WHOLE  # behind the last whole line of 9,000 bytes


async def test_a_part_that_never_is_the_rest_is_given_up_by_name() -> None:
    intake = Intake()

    def answer(asked: Asked) -> bytes:
        return begins() if start_of(asked) is None else part(WHOLE, WHOLE + 3, "*")

    async with speaking(answer) as server:
        reason = await reason_of(intake, server.url)
        asked = len(server.asked)
    assert reason == "the body was cut short (3 tries without progress)"
    assert asked == 4
    assert intake.items == BODY[:WHOLE].splitlines()


async def test_a_resource_that_grows_between_two_tries() -> None:
    """A part of something longer is not the rest of what was begun, whatever its tag says."""
    intake = Intake()
    longer = BODY + lines(1000, 1100)

    def answer(asked: Asked) -> bytes:
        first = start_of(asked)
        if first is not None:
            place = f"bytes {first}-{len(longer) - 1}/{len(longer)}"
            return reply(longer[first:], "206 Partial Content", Content_Range=place, **TAG)
        return begins() if len(server.asked) == 1 else begins(len(longer), longer)

    async with speaking(answer) as server:
        await fetch(intake, server.url)
    assert intake.items == longer.splitlines()
    assert len(server.asked) == 3


async def test_a_resource_that_shrinks_between_two_tries() -> None:
    """Where it ends now is where accepted bytes end: that is another version, not the end."""
    intake = Intake()
    shorter = BODY[:WHOLE]

    def answer(asked: Asked) -> bytes:
        if start_of(asked) is not None:
            place = f"bytes */{len(shorter)}"
            return reply(b"", "416 No", Content_Range=place, Content_Length=0)
        return begins() if len(server.asked) == 1 else begins(len(shorter), shorter, ETag='"v2"')

    async with speaking(answer) as server:
        with structlog.testing.capture_logs() as logs:
            await fetch(intake, server.url)
    assert intake.items == shorter.splitlines() * 2
    assert [line for line in logs if line["event"] == "resource_changed"]


@pytest.mark.parametrize("status", ["204 No Content", "205 Reset Content"])
async def test_no_content_in_place_of_the_rest(status: str) -> None:
    intake = Intake()

    def answer(_: Asked) -> bytes:
        return begins() if len(server.asked) == 1 else reply(b"", status)

    async with speaking(answer) as server:
        reason = await reason_of(intake, server.url)
    assert (
        reason
        == f"the server answered {status[:3]} in place of the rest (3 tries without progress)"
    )


async def test_416_to_one_who_asked_for_all() -> None:
    async with speaking(lambda _: reply(b"", "416 No", Content_Length=0)) as server:
        reason = await reason_of(Intake(), server.url)
    assert reason.startswith("the server answered 416")


async def test_a_redirect_that_turns_round_once_the_rest_is_asked_for() -> None:
    intake = Intake()

    def answer(asked: Asked) -> bytes:
        if len(server.asked) == 1:
            return begins()
        return reply(b"", "302 Found", Location="/b" if asked.path == "/a" else "/a")

    async with speaking(answer) as server:
        reason = await reason_of(intake, server.url + "/a", redirects_max=4)
    assert reason == "more than 4 redirects"
    assert intake.items == BODY[:WHOLE].splitlines()


# -- whole bodies ----------------------------------------------------------------------------------

GZIP = packed(BODY, "gzip", parts=4)
ZSTD = packed(BODY, "zstd", parts=4)
CUTS = {
    "length": lambda wire: (wire[: len(wire) // 2], {"Content_Length": len(wire)}),
    "chunks": lambda wire: (chunked(wire[: len(wire) // 2], ended=False),
                            {"Transfer_Encoding": "chunked"}),
    "the end of the connection": lambda wire: (wire[: len(wire) // 2], {}),
    "chunks that end": lambda wire: (chunked(wire[: len(wire) // 2]),
                                     {"Transfer_Encoding": "chunked"}),
    "a length that agrees": lambda wire: (wire[: len(wire) // 2],
                                          {"Content_Length": len(wire) // 2}),
    "nothing at all": lambda wire: (b"", {}),
    "chunks without one": lambda wire: (b"", {"Transfer_Encoding": "chunked"}),
    "a length and nothing": lambda wire: (b"", {"Content_Length": len(wire)}),
    "only the last byte": lambda wire: (wire[:-1], {"Content_Length": len(wire)}),
}  # fmt: skip


# Where the head or the framing says that plain lines end there, nothing tells that they were cut.
ENDS = ("the end of the connection", "chunks that end", "a length that agrees")


@pytest.mark.parametrize(
    ("path", "cut"),
    [(path, cut) for path in ("/x.gz", "/x.zst", "/x") for cut in CUTS
     if path != "/x" or cut not in ENDS],
)  # fmt: skip
async def test_a_body_that_is_cut_comes_again(path: str, cut: str) -> None:
    """Once, then it comes whole; and for ever, then it is given up by name, and asked for anew."""
    wire = {"/x.gz": GZIP, "/x.zst": ZSTD, "/x": BODY}[path]
    body, headers = CUTS[cut](wire)
    whole = reply(wire, Content_Length=len(wire), **TAG)
    times = 1

    def answer(_: Asked) -> bytes:
        return reply(body, **headers, **TAG) if len(server.asked) <= times else whole

    intake = Intake()
    async with speaking(answer) as server:
        await fetch(intake, server.url + path)
        assert intake.items == ITEMS
        assert intake.refused == []
        assert intake.position.done
    times = 100
    intake = Intake()
    async with speaking(answer) as server:
        reason = await reason_of(intake, server.url + path)
        assert "tries without progress)" in reason
        expected = ("cut", "not valid", "closed behind the head, which gives no length")
        assert any(words in reason for words in expected), reason
        times = 0  # and the next life asks for it as for something new
        await fetch(intake, server.url + path)
        assert "if-none-match" not in server.asked[-1].headers
    assert intake.items == ITEMS


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
@pytest.mark.parametrize("cut", ["length", "chunks", "the end of the connection", "nothing at all"])
async def test_a_body_with_a_content_encoding_that_is_cut(encoding: str, cut: str) -> None:
    wire = {"gzip": GZIP, "zstd": ZSTD}[encoding]
    body, headers = CUTS[cut](wire)
    headers = {**headers, "Content_Encoding": encoding, **TAG}
    intake = Intake()

    def answer(_: Asked) -> bytes:
        if len(server.asked) < 3:
            return reply(body, **headers)
        return reply(wire, Content_Encoding=encoding, Content_Length=len(wire), **TAG)

    async with speaking(answer) as server:
        await fetch(intake, server.url)
    assert intake.items == ITEMS
    assert intake.position.done


@pytest.mark.parametrize("path", ["/x.gz", "/x.zst"])
async def test_the_end_of_what_is_compressed_is_an_end(path: str) -> None:
    """Without a length and without chunks, as HTTP/1.0 servers send it."""
    wire = GZIP if path == "/x.gz" else ZSTD
    intake = Intake()
    async with speaking(lambda _: reply(wire)) as server:
        with structlog.testing.capture_logs() as logs:
            await fetch(intake, server.url + path)
    assert intake.items == ITEMS
    (done,) = [line for line in logs if line["event"] == "url_done"]
    assert "end_announced" not in done


async def test_plain_lines_may_end_with_their_connection_and_the_log_says_so() -> None:
    intake = Intake()
    async with speaking(lambda _: reply(BODY)) as server:
        with structlog.testing.capture_logs() as logs:
            await fetch(intake, server.url)
    assert intake.items == ITEMS
    (done,) = [line for line in logs if line["event"] == "url_done"]
    assert done["end_announced"] is False


@pytest.mark.parametrize(
    "whole",
    [reply(b"", Content_Length=0), reply(chunked(), Transfer_Encoding="chunked")],
    ids=["length", "chunks"],
)
@pytest.mark.parametrize("path", ["/x", "/x.gz", "/x.zst"])
async def test_something_empty_that_says_so_is_done(whole: bytes, path: str) -> None:
    intake = Intake()
    async with speaking(lambda _: whole) as server:
        await fetch(intake, server.url + path)
    assert intake.items == []
    assert intake.position.done


@pytest.mark.parametrize(
    ("path", "wire"),
    [
        ("/x.gz", GZIP + b"\0" * 10_000),
        ("/x.gz", GZIP + b"\0" * 7 + GZIP[:0] + gzip.compress(b"") * 3 + b"\0" * 900),
        ("/x.gz", gzip.compress(b"") + GZIP),
        ("/x.zst", ZSTD + zstd.compress(b"") * 3),
    ],
    ids=["padding", "padding and empty members", "an empty member first", "empty frames"],
)
@pytest.mark.parametrize("length", [True, False])
async def test_what_may_follow_compressed_data(path: str, wire: bytes, length: bool) -> None:
    intake = Intake()
    head = {"Content_Length": len(wire)} if length else {}
    async with speaking(lambda _: reply(wire, **head)) as server:
        await fetch(intake, server.url + path)
        assert len(server.asked) == 1
    assert intake.items == ITEMS


@pytest.mark.parametrize(
    "behind", [b"garbage", b"\0\0garbage", b"\x1f\x8b", gzip.compress(b"x")[:-1]]
)
async def test_what_may_not_follow_gzip(behind: bytes) -> None:
    intake = Intake()
    wire = GZIP + behind
    async with speaking(lambda _: reply(wire, Content_Length=len(wire))) as server:
        reason = await reason_of(intake, server.url + "/x.gz")
    assert reason.startswith("the gzip body is not valid")
    assert intake.items == ITEMS


# -- zstd windows ----------------------------------------------------------------------------------


def with_window(body: bytes, log: int) -> bytes:
    stream = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: log})
    return stream.compress(body) + stream.flush()


async def test_a_file_made_with_long_says_what_it_needs() -> None:
    wire = with_window(BODY, 27)
    async with speaking(lambda _: reply(wire, Content_Length=len(wire))) as server:
        reason = await reason_of(Intake(), server.url + "/x.zst")
        assert reason == "it needs a zstd window of 128 MiB, more than fetch.window_max = 8 MiB"
        assert len(server.asked) == 1, "it is not worth another try"
        intake = Intake()
        await fetch(intake, server.url + "/x.zst", window_max="128MiB")
        assert intake.items == ITEMS
        urls = [f"{server.url}/{n}.zst" for n in range(8)]
        intake = Intake()
        source = await fetch(intake, *urls, window_max="128MiB", concurrency=8,
                             concurrency_per_host=8)  # fmt: skip
        assert sorted(intake.items) == sorted(ITEMS * 8)
        memory = source._downloads[0].tries._memory
        assert memory.downloads.used == memory.streams.used == 0


async def test_the_memory_of_all_windows_is_bounded() -> None:
    budget = InflightBudget(32 * MIB)
    windows = [_Window(budget, 128 * MIB, waits=True) for _ in range(4)]
    for window in windows[:3]:
        assert await window.grow(8 * MIB) == 8 * MIB
    large = asyncio.create_task(windows[3].grow(128 * MIB))
    for window in windows[:3]:
        await asyncio.sleep(0)
        assert not large.done()
        window.close()
    assert await large == 128 * MIB
    assert budget.used == 128 * MIB
    stream = _Window(budget, 128 * MIB, waits=False)
    with pytest.raises(TryAgain, match="no memory left"):
        await stream.grow(1 * MIB)
    windows[3].close()
    windows[3].close()
    assert await stream.grow(1) == 64 * 1024
    with pytest.raises(DownloadFailed):
        await stream.grow(129 * MIB)
    stream.close()
    assert budget.used == 0
    assert memory_for(FetchSettings()).downloads.has(32 * MIB)
    assert not memory_for(FetchSettings()).downloads.has(32 * MIB + 1)


# -- heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (reply(BODY[:WHOLE], Content_Length=WHOLE, Content_Range=f"bytes 0-{WHOLE - 1}/99999"),
         "200 with a Content-Range"),
        (reply(BODY, Content_Length=100), "not HTTP as it should be"),
        (reply(GZIP, Content_Length=100, Content_Encoding="gzip"), "not HTTP as it should be"),
        (reply(BODY, Content_Length="9, 10"), "not HTTP as it should be"),
        (reply(chunked(BODY), Content_Length=5, Transfer_Encoding="chunked"), "not HTTP as it"),
        (reply(b"zz\r\n" + BODY, Transfer_Encoding="chunked"), "not HTTP as it should be"),
        (reply(GZIP, Transfer_Encoding="gzip"), "it is compressed"),
        (reply(b"").replace(b"1.1", b"1.0"), "closed behind the head"),
    ],
)  # fmt: skip
async def test_a_head_that_contradicts_its_body(answer: bytes, says: str) -> None:
    intake = Intake()
    async with speaking(lambda _: answer) as server:
        assert says in await reason_of(intake, server.url)
    assert intake.items == []


@pytest.mark.parametrize(
    "answer",
    [
        reply(BODY).replace(b"1.1", b"1.0"),
        reply(GZIP, Content_Encoding="gzip").replace(b"1.1", b"1.0"),
        reply(BODY, Connection="keep-alive"),
        reply(b"", "100 Continue") + reply(BODY, Content_Length=len(BODY)),
        reply(b"", "103 Early Hints", Link="x") + reply(BODY, Content_Length=len(BODY)),
    ],
)
async def test_heads_that_are_old_or_come_in_two(answer: bytes) -> None:
    intake = Intake()
    async with speaking(lambda _: answer) as server:
        await fetch(intake, server.url)
    assert intake.items == ITEMS


async def test_a_long_header_is_read_and_a_longer_one_is_named() -> None:
    size = 20_000

    def answer(_: Asked) -> bytes:
        return reply(BODY, Content_Length=len(BODY), X_Policy="x" * size)

    async with speaking(answer) as server:
        intake = Intake()
        await fetch(intake, server.url)
        assert intake.items == ITEMS
        size = 80_000
        reason = await reason_of(Intake(), server.url)
    assert reason == "a header of its answer is longer than 65536 bytes"


async def test_a_long_redirect() -> None:
    def answer(asked: Asked) -> bytes:
        if asked.path == "/":
            return reply(b"", "302 Found", Location="/x?" + "y" * 7000, Set_Cookie="z" * 12_000)
        return reply(BODY, Content_Length=len(BODY))

    intake = Intake()
    async with speaking(answer) as server:
        await fetch(intake, server.url + "/")
    assert intake.items == ITEMS


# -- again and again, and for ever -----------------------------------------------------------------


async def test_a_poll_that_is_cut_does_not_count_as_seen() -> None:
    """The new version comes in pieces, cut each time; its tag is not sent before it is whole."""
    intake = Intake()
    new = packed(lines(2000, 2100), "gzip")

    def answer(asked: Asked) -> bytes:
        number = len(server.asked)
        if number == 1:
            return reply(GZIP, Content_Length=len(GZIP), **TAG)
        if number == 2:
            return reply(b"", "304 Not Modified", **TAG)
        if asked.headers.get("if-none-match") == '"v2"':
            return reply(b"", "304 Not Modified", ETag='"v2"')
        return reply(new if number > 5 else b"", ETag='"v2"')

    async with speaking(answer) as server, fetching(
        intake, server.url + "/x.gz", every="1ms"
    ) as source:  # fmt: skip
        ended = asyncio.ensure_future(source.wait_finished())
        await until(lambda: len(server.asked) > 8)
        assert not ended.done()
        ended.cancel()
    assert intake.items == ITEMS + lines(2000, 2100).splitlines()
    tags = [one.headers.get("if-none-match") for one in server.asked]
    assert tags[:3] == [None, '"v1"', '"v1"']
    assert '"v2"' not in tags[:6]
    assert tags[7] == '"v2"'


async def test_a_stream_may_end_anywhere() -> None:
    """Its end behind the head is no failure, and it is never given up for it."""
    intake = Intake()

    def answer(asked: Asked) -> bytes:
        assert asked.headers["accept-encoding"] == "identity"  # its name says how it comes
        if len(server.asked) < 6:
            return reply(b"")
        return reply(gzip.compress(b"%d\n" % len(server.asked)))

    async with (
        speaking(answer) as server,
        fetching(intake, server.url + "/x.gz", follow=True, attempts_max=2),
    ):
        await until(lambda: len(intake.items) > 2)
    assert intake.items[:2] == [b"6", b"7"]
    assert intake.offsets == {}


async def test_streams_do_not_ask_for_zstd() -> None:
    """It would hold its window for as long as the stream lasts."""
    kind = {"Content_Type": "text/event-stream"}

    def answer(asked: Asked) -> bytes:
        if "zstd" in asked.headers["accept-encoding"]:
            body = zstd.compress(b"retry: 1\nid: 1\ndata: 1\n\n")
            return reply(body, Content_Encoding="zstd", **kind)
        return reply(b"retry: 1\ndata: 2\n\n", **kind)

    intake = Intake()
    async with speaking(answer) as server, fetching(intake, server.url):
        await until(lambda: len(intake.items) > 2)
    assert intake.items[:3] == [b"1", b"2", b"2"]
    async with speaking(answer) as server, fetching(Intake(), server.url, follow=True):
        await until(lambda: server.asked)
    assert server.asked[0].headers["accept-encoding"] == "gzip"
