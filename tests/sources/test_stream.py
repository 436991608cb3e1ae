"""Chunked bodies without end: accepted in pieces, with backpressure, and counted."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestd.base.errors import JournalFailed, Overloaded
from ingestd.http import body
from ingestd.http.admission import AdmissionController
from ingestd.http.auth import Principal
from ingestd.http.problem import Problem
from ingestd.sources.http.decode import LinesCodec
from ingestd.sources.http.endpoints.base import BodyLimits
from ingestd.sources.http.stream import HELD_BYTES, Stream
from tests.sources.source_tools import MemoryIntake, Reply, ask, connected, serving, until

CHUNKED = {"Transfer_Encoding": "chunked"}


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """A piece is old after 20 ms here, and an overload is asked again at once."""
    monkeypatch.setattr(body, "PIECE_SECONDS", 0.02)
    monkeypatch.setattr("ingestd.sources.base.AGAIN_SECONDS", 0.01)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


END = b"0\r\n\r\n"


async def begin(client, data: bytes, **headers: str) -> None:
    client.post(b"", **CHUNKED, **headers)
    client.send(chunk(data))


async def test_a_chunked_body_that_comes_at_once_is_taken_as_a_whole():
    intake = MemoryIntake()
    async with serving(intake) as source:
        reply = await ask(source, chunk(b"1\nbad\n") + chunk(b"2") + END, **CHUNKED)
        assert (reply.status, reply.json["accepted"], reply.json["invalid"]) == (202, 2, 1)
        reply = await ask(source, chunk(b"bad\n") + END, **CHUNKED)
        assert (reply.status, reply.slug) == (400, "malformed")
        assert len(intake.refused) == 1  # of the first


async def test_a_stream_that_begins_with_nothing_good_is_refused_and_leaves_nothing():
    intake = MemoryIntake()
    async with serving(intake) as source, connected(source) as client:
        await begin(client, b"bad\nworse\n")
        reply = await client.reply()
        assert (reply.status, reply.slug) == (400, "malformed")
        assert (reply.json["accepted"], reply.json["invalid"]) == (0, 0)
        assert [error["index"] for error in reply.json["errors"]] == [0, 1]
    assert not intake.asked.is_set()


async def test_a_stream_that_turns_into_noise_is_ended():
    intake = MemoryIntake()
    async with serving(intake) as source, connected(source) as client:
        await begin(client, b"1\n")
        await until(lambda: intake.items)
        client.send(chunk(b"bad\n" * 500))
        reply = await client.reply()
        assert (reply.status, reply.slug) == (400, "mostly-invalid")
        assert (reply.json["accepted"], reply.json["invalid"]) == (1, 0)
    assert not intake.refused


async def test_lines_are_accepted_while_the_body_goes_on():
    intake = MemoryIntake()
    async with serving(intake) as source, connected(source) as client:
        await begin(client, b"1\n2\n3")
        await until(lambda: intake.items == [b"1", b"2"])
        client.send(chunk(b"3\n4\n"))
        await until(lambda: intake.items == [b"1", b"2", b"33", b"4"])
        client.send(chunk(b"bad\n5") + END)
        reply = await client.reply()
        assert reply.status == 202
        assert reply.json["accepted"] == 5
        assert reply.json["invalid"] == 1
        assert [error["index"] for error in reply.json["errors"]] == [4]
        assert intake.items[-1] == b"5"
        # The connection goes on.
        client.post(b"6")
        assert (await client.reply()).status == 202


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_stream(encoding):
    pack = zlib.compressobj(wbits=31 if encoding == "gzip" else 15)

    def flushed(data: bytes) -> bytes:
        return pack.compress(data) + pack.flush(zlib.Z_SYNC_FLUSH)

    intake = MemoryIntake()
    async with serving(intake) as source, connected(source) as client:
        await begin(client, flushed(b"1\n2\n"), Content_Encoding=encoding)
        await until(lambda: intake.items == [b"1", b"2"])
        client.send(chunk(flushed(b"3\n")))
        await until(lambda: len(intake.items) == 3)
        client.send(chunk(pack.flush()) + END)
        assert (await client.reply()).json["accepted"] == 3


async def test_a_stream_is_longer_than_any_bound_on_bodies_and_memory_stays_flat():
    intake = MemoryIntake()
    block = b"".join(b'{"n":%d}\n' % n for n in range(20_000))
    async with serving(
        intake, request_bytes_max="300KiB", decompressed_bytes_max="300KiB", records_max=30_000
    ) as source, connected(source) as client:  # fmt: skip
        client.post(b"", **CHUNKED)
        for _ in range(40):
            client.send(chunk(block))
            await client.writer.drain()
            assert source._handler.ingestion.admission.bytes <= HELD_BYTES
        client.send(END)
        assert (await client.reply()).json["accepted"] == 800_000
    assert intake.waiting_most <= 2 * body.PIECE_BYTES


async def test_a_connection_that_breaks_keeps_what_was_accepted_and_no_half_line():
    intake = MemoryIntake()
    async with serving(intake) as source:
        async with connected(source) as client:
            await begin(client, b'"one"\n"half')
            await until(lambda: intake.items)
        await until(lambda: not source._handler.ingestion.admission.requests)
    assert intake.items == [b'"one"']
    assert not intake.refused


async def test_an_overload_before_anything_is_stored_refuses_the_whole():
    intake = MemoryIntake()
    intake.errors = [Overloaded(what="it")]
    async with serving(intake) as source, connected(source) as client:
        await begin(client, b"1\n")
        reply = await client.reply()
        assert (reply.status, reply.slug) == (503, "overloaded")
        assert reply.json["accepted"] == 0
        assert int(reply.headers["retry-after"]) >= 1
        assert await client.closed()
    assert not intake.items


async def test_an_overload_later_makes_the_client_wait():
    intake = MemoryIntake()
    async with serving(intake) as source, connected(source) as client:
        await begin(client, b"1\n")
        await until(lambda: intake.items)
        intake.errors = [Overloaded(what="it", retry_after=0.01) for _ in range(5)]
        client.send(chunk(b"2\n") + chunk(b"3\n") + END)
        assert (await client.reply()).json["accepted"] == 3
    assert intake.items == [b"1", b"2", b"3"]


async def test_while_the_pipeline_is_full_the_connection_is_not_read():
    intake = MemoryIntake()
    block = b"1\n" * 100_000
    async with serving(intake) as source, connected(source) as client:
        await begin(client, b"1\n")
        await until(lambda: intake.items)
        intake.gate.clear()
        sent = 0
        async with asyncio.timeout(60):
            while True:
                client.send(chunk(block))
                sent += len(block)
                try:
                    async with asyncio.timeout(0.5):
                        await client.writer.drain()
                except TimeoutError:
                    break
                assert sent < 64 * 1024**2, "it reads on and on"
        intake.gate.set()
        await client.writer.drain()
        client.send(END)
        assert (await client.reply()).json["accepted"] == sent // 2 + 1


async def test_a_drain_ends_a_stream_and_says_how_far_it_came():
    intake = MemoryIntake()
    async with serving(intake) as source, connected(source) as client:
        await begin(client, b"1\n2\nhal")
        await until(lambda: len(intake.items) == 2)
        await source.stop_taking(asyncio.get_running_loop().time() + 10)
        reply = await client.reply()
        assert (reply.status, reply.slug) == (503, "draining")
        assert reply.json["accepted"] == 2
        assert await client.closed()
    assert intake.items == [b"1", b"2"]
    assert not intake.refused


async def test_silence_ends_a_stream():
    intake = MemoryIntake()
    async with serving(intake, stream_silence_max="100ms") as source, connected(source) as client:
        await begin(client, b"1\n")
        reply = await client.reply()
        assert (reply.status, reply.slug, reply.json["accepted"]) == (408, "body-timeout", 1)


async def test_broken_compression_and_broken_framing_say_how_far_it_came():
    intake = MemoryIntake()
    wire = gzip.compress(b"1\n") + b"garbage"
    async with serving(intake) as source:
        async with connected(source) as client:
            await begin(client, wire, Content_Encoding="gzip")
            client.send(chunk(b"more"))
            reply = await client.reply()
            assert (reply.status, reply.slug) == (400, "corrupt-encoding")
        async with connected(source) as client:
            await begin(client, b"5\n")
            await until(lambda: b"5" in intake.items)
            client.send(b"nonsense\r\n")
            reply = await client.reply()
            assert (reply.status, reply.slug, reply.json["accepted"]) == (400, "bad-request", 1)


async def test_a_journal_that_fails_ends_it():
    intake = MemoryIntake()
    async with serving(intake) as source, connected(source) as client:
        await begin(client, b"1\n")
        await until(lambda: intake.items)
        intake.errors = [JournalFailed(path="/secret/place", problem="EIO")]
        client.send(chunk(b"2\n") + chunk(b"3\n"))
        reply = await client.reply()
        assert (reply.status, reply.slug) == (503, "journal-failed")
        assert reply.json["accepted"] == 1
        assert b"secret" not in reply.body


@pytest.mark.parametrize(
    ("setting", "headers"),
    [(0, {}), (64, {"Idempotency_Key": "k"}), (64, {"Prefer": "handling=strict"})],
)
async def test_what_has_to_be_whole_is_no_stream(setting, headers):
    intake = MemoryIntake()
    intake.begin = _no_key  # type: ignore[attr-defined]
    async with serving(intake, streams_max=setting, request_bytes_max=1000) as source:
        async with connected(source) as client:
            await begin(client, b"1\n", **headers)
            client.send(chunk(b"2\n" * 600))
            assert (await client.reply()).slug == "payload-too-large"
        assert not intake.items


async def _no_key(*_: object) -> object:
    raise AssertionError("not reached")


async def test_documents_are_never_streams():
    intake = MemoryIntake()
    async with serving(intake, request_bytes_max=1000) as source, connected(source) as client:
        client.post(b"", **CHUNKED, Content_Type="application/json")
        client.send(chunk(b"[1,\n" + b" " * 2000))
        assert (await client.reply()).slug == "payload-too-large"


async def test_a_slow_first_line_is_held_to_the_deadline_of_bodies():
    intake = MemoryIntake()
    async with serving(intake, body_timeout="200ms") as source, connected(source) as client:
        await begin(client, b'"never ended')
        reply = await client.reply()
        assert (reply.status, reply.slug) == (408, "body-timeout")
    assert not intake.items


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from([b"1", b"\n", b"\r\n", b'{"a":', b"2}", b" ", b"bad", b"x" * 40]))
    .map(b"".join),
    st.lists(st.integers(0, 10**6), max_size=8),
    st.sampled_from(["json", "text"]),
)  # fmt: skip
async def test_any_division_gives_the_records_of_the_whole(body, cuts, form):
    whole_records: list[bytes] = []
    refused: list[int] = []
    try:
        parsed = LinesCodec(form).decode(body, BodyLimits(10**6, 30))[0].parsed
        whole_records, refused = parsed.records.items(), [one.index for one in parsed.refused]
    except Problem as found:
        refused = [one.index for one in found.refused]
    marks = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    pieces = [body[a:b] for a, b in itertools.pairwise(marks)] or [b""]
    intake = MemoryIntake(form, record_bytes_max=30)
    left = iter(pieces[1:])

    async def read() -> tuple[bytes, bool]:
        piece = next(left, None)
        return (b"", True) if piece is None else (piece, False)

    room = AdmissionController(10**7, requests_max=1, share=1, streams_max=1)
    problem = None
    with ThreadPoolExecutor(1) as thread, room.enter("somebody") as hold:
        one = Stream(
            read, intake, Principal(), hold, thread, invalid_kept=100,
            encoding="identity", ratio_max=0, silence=10.0, gone=lambda: False,
        )  # fmt: skip
        try:
            answer = Reply(202, {}, (await one.run(pieces[0])).response().body).json
        except Problem as found:
            problem = found
    assert room.bytes == 0
    if problem is not None:
        # What its first piece holds decides; as a whole it may hold something good later on.
        assert problem.refused
        assert not intake.asked.is_set()
        return
    assert intake.items == whole_records
    assert [one.index for one in intake.refused] == refused
    assert (answer["accepted"], answer["invalid"]) == (len(whole_records), len(refused))
