"""A stream whose first line comes late (`tail -F quiet.log | curl -T -`)."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.sources.source_tools import MemoryIntake, connected, serving, until
from tests.sources.test_stream import CHUNKED, END, chunk

GRACE = 0.1


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """A body is too slow after 100 ms here."""
    monkeypatch.setattr("ingestd.http.deadlines.GRACE_SECONDS", GRACE)
    monkeypatch.setattr("ingestd.http.body.PIECE_SECONDS", 0.02)


async def test_it_is_waited_for(monkeypatch):
    # Where this process had no time for a moment, that is not the client's.
    monkeypatch.setattr("ingestd.http.deadlines.LATE_SECONDS", 0.01)
    intake = MemoryIntake()
    async with serving(intake) as source, connected(source) as client:
        client.post(b"", Expect="100-continue", **CHUNKED)
        assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        assert not await quiet(client, 5 * GRACE)
        client.send(chunk(b"1\n"))
        await until(lambda: intake.items == [b"1"])
        assert not await quiet(client, 5 * GRACE)
        client.send(chunk(b"2\n") + END)
        assert (await client.reply()).json["accepted"] == 2


async def quiet(client, seconds: float) -> bytes:
    """What comes within so many seconds, if anything does."""
    try:
        async with asyncio.timeout(seconds):
            return await client.reader.read(1000)
    except TimeoutError:
        return b""


async def test_not_for_ever():
    served = serving(MemoryIntake(), stream_silence_max=0.3)
    async with served as source, connected(source) as client:
        client.post(b"", **CHUNKED)
        reply = await client.reply()
        assert (reply.status, reply.slug) == (408, "body-timeout")
        assert "http.stream_silence_max" in reply.json["detail"]
        assert await client.closed()


@pytest.mark.parametrize(
    ("sent", "headers"),
    [
        (b"", {"Content_Length": "10"}),
        (b"", {**CHUNKED, "Idempotency_Key": "k"}),
        (b"", {**CHUNKED, "Prefer": "handling=strict"}),
        (b"", {**CHUNKED, "Content_Type": "application/json"}),
        (chunk(b"1"), CHUNKED),
    ],
)
async def test_every_other_body_is_there_in_time_or_ended(sent, headers):
    async with serving(MemoryIntake()) as source, connected(source) as client:
        client.post(b"", **headers)
        client.send(sent)
        reply = await client.reply()
        assert (reply.status, reply.slug) == (408, "body-timeout")


async def test_those_that_wait_are_bounded_like_streams():
    served = serving(MemoryIntake(), streams_max=1)
    async with served as source, connected(source) as first, connected(source) as second:
        first.post(b"", **CHUNKED)
        await until(lambda: source._handler.ingestion.quiet)
        second.post(b"", **CHUNKED)
        assert (await second.reply()).status == 408
        first.send(chunk(b"1\n") + END)
        assert (await first.reply()).status == 202


async def test_a_daemon_that_leaves_does_not_wait_for_it():
    async with serving(MemoryIntake()) as source, connected(source) as client:
        client.post(b"", **CHUNKED)
        await until(lambda: source._handler.ingestion.quiet)
        began = time.monotonic()
        await source.stop_taking(asyncio.get_running_loop().time() + 120)
        assert time.monotonic() - began < 60
        assert (await client.reply()).slug == "draining"


async def test_one_that_ends_without_a_line_is_empty():
    async with serving(MemoryIntake()) as source, connected(source) as client:
        client.post(b"", **CHUNKED)
        await until(lambda: source._handler.ingestion.quiet)
        client.send(END)
        assert (await client.reply()).slug == "empty"


async def test_a_client_that_leaves_gives_its_place_back():
    async with serving(MemoryIntake()) as source:
        async with connected(source) as client:
            client.post(b"", **CHUNKED)
            await until(lambda: source._handler.ingestion.quiet)
        await until(lambda: not source._handler.ingestion.quiet)
        assert source._handler.ingestion.admission.requests == 0
