"""`GET /v1/tap` over HTTP, with a pipeline behind it."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import aiohttp
import pytest

from ingestd.admin import connection, tap
from ingestd.admin.connection import Outlet
from ingestd.base.append import Append
from ingestd.base.record import Records
from ingestd.config.network import split_address
from tests.admin.test_admin_api import ADMIN, READER, SETTINGS, Seen, seen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["seen"]


class Reader:
    """The reading end of a tap."""

    def __init__(self, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        self._from, self._to = streams

    async def lines(self, count: int) -> list[dict]:
        """The next lines, each a chunk of its own or several in one."""
        found: list[dict] = []
        async with asyncio.timeout(60):
            while len(found) < count:
                size = int(await self._from.readuntil(b"\r\n"), 16)
                if not size:
                    break
                piece = await self._from.readexactly(size + 2)
                found += [json.loads(line) for line in piece[:-2].splitlines() if line]
        return found

    def close(self) -> None:
        self._to.transport.abort()


@pytest.fixture
async def open_tap(seen: Seen) -> AsyncIterator:
    readers: list[Reader] = []

    async def open_(query: str = "") -> Reader:
        host, port = split_address(seen.server.addresses[0])
        streams = await asyncio.open_connection(host, port)
        streams[1].write(b"GET /v1/tap?%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % query.encode())
        head = await streams[0].readuntil(b"\r\n\r\n")
        assert b"200 OK" in head
        assert b"application/x-ndjson" in head
        readers.append(Reader(streams))
        return readers[-1]

    yield open_
    for reader in readers:
        reader.close()


def hooks(seen: Seen) -> tuple[object, object]:
    return seen.pipeline.reader.on_push, seen.pipeline.settlements.on_outcome


async def test_records_are_shown_at_each_stage(
    seen: Seen,
    open_tap,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tap, "IDLE_SECONDS", 0.05)
    accepted = await open_tap("where=n=2&limit=1")
    processed = await open_tap("stage=processed&pipeline=default")
    dead = await open_tap("stage=dead")
    assert None not in hooks(seen)
    await seen.feed({"n": 1}, {"n": 2, "refused": "it"}, {"n": 3})
    journal = seen.pipeline.settlements.journal_id
    (one,) = await accepted.lines(2)  # and it ends
    assert one.pop("at")
    assert one == {
        "stage": "accepted", "pipeline": "default", "id": f"{journal}.1.1", "envelope": {},
        "payload": '{"n": 2, "refused": "it"}',
    }  # fmt: skip
    assert [line["id"][-3:] for line in await processed.lines(2)] == ["1.0", "1.2"]
    (letter,) = await dead.lines(1)
    assert (letter["id"], letter["reason"]) == (f"{journal}.1.1", "rejected")
    assert letter["error"] == "ValueError: cannot take it"
    assert letter["batch"] == f"{journal}-1"
    for reader in (processed, dead):
        reader.close()
    await seen.until(lambda: hooks(seen) == (None, None))


async def test_a_pipeline_that_has_left_settles_what_it_has(seen: Seen, open_tap) -> None:
    reader = await open_tap("stage=processed")
    await seen.until(lambda: hooks(seen)[1] is not None)
    adopted = seen.pipelines.pop("default")
    await adopted.accept(Append(Records.lines([b'{"n": 1}'])))
    (one,) = await reader.lines(1)
    assert one["payload"] == '{"n": 1}'
    await seen.until(lambda: not adopted.ledger.pending)
    assert not adopted.broken.done()
    seen.pipelines["default"] = adopted


async def test_what_waits_for_a_reader_is_one_piece_of_a_batch(
    seen: Seen,
    open_tap,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[int] = []
    send = Outlet.send

    async def spy(outlet: Outlet, data: bytes) -> None:
        sent.append(len(data))
        await send(outlet, data)

    monkeypatch.setattr(Outlet, "send", spy)
    monkeypatch.setattr(connection, "PIECE_BYTES", 4096)
    reader = await open_tap("where=a=1")
    await seen.feed(*({"a": 1, "text": "\x01" * 500} for _ in range(100)))  # six bytes for each
    assert len(await reader.lines(100)) == 100
    assert sum(sent) > 300_000
    assert max(sent) < 10_000


async def test_a_sample_is_evenly_spread(seen: Seen, open_tap) -> None:
    reader = await open_tap("sample=0.25")
    await seen.feed(*({"n": n} for n in range(40)))
    shown = [json.loads(one["payload"])["n"] for one in await reader.lines(10)]
    assert shown == list(range(3, 40, 4))


async def test_a_slow_reader_loses_records_and_is_told(
    seen: Seen,
    open_tap,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tap, "HELD_MAX", 2)
    reader = await open_tap("limit=3")
    first = Append(Records.lines([b'"first"']))
    waits = [seen.pipeline.accept(first)]
    # Larger than a chunk, so that each of them is some, which come in one turn of the loop.
    large = Records.lines([b'"%b"' % (b"x" * 100_000)] * 9)
    waits.append(seen.pipeline.accept(Append(large)))
    await asyncio.gather(*waits)
    lines = await reader.lines(4)
    assert sum("payload" in line for line in lines) == 3
    assert max(line.get("lost", 0) for line in lines) > 0
    await seen.until(lambda: not seen.pipeline.ledger.pending)


async def test_wrong_taps_and_too_many_are_refused(
    seen: Seen,
    open_tap,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    conditions = "&".join(["where=a=1"] * 17)
    for query in ("stage=x", "sample=0", "sample=nan", "limit=-1", "limit=x", "where=a", "x=1",
                  conditions):  # fmt: skip
        assert (await seen.ask(f"/v1/tap?{query}"))[0] == 400, query
    status, found = await seen.ask("/v1/tap?pipeline=x")
    assert (status, found["detail"]) == (404, "there is no pipeline 'x'; there are: default")
    monkeypatch.setattr(tap, "TAPS_MAX", 1)
    await open_tap()
    await seen.until(lambda: hooks(seen)[0] is not None)
    assert (await seen.ask("/v1/tap"))[0] == 503


async def test_beyond_this_machine_only_admins_see_payloads(seen: Seen) -> None:
    beyond = {"X-Forwarded-For": "192.0.2.1"}
    assert (await seen.ask("/v1/tap?limit=1", **beyond))[0] == 401
    assert (await seen.ask("/v1/tap?limit=1", token=ADMIN, **beyond))[0] == 403
    seen.server.prepare(SETTINGS.model_copy(update={"payloads": "always"}))()
    assert (await seen.ask("/v1/tap?limit=1", token=READER, **beyond))[0] == 403
    allowed = asyncio.ensure_future(seen.ask("/v1/tap?limit=1", token=ADMIN, **beyond))
    await seen.until(lambda: hooks(seen)[0] is not None)
    await seen.feed({"n": 1})
    assert (await allowed)[0] == 200
    seen.server.prepare(SETTINGS.model_copy(update={"payloads": "never"}))()
    assert (await seen.ask("/v1/tap?limit=1"))[0] == 403


async def test_a_reload_ends_the_streams_that_are_not_allowed_any_more(seen: Seen) -> None:
    beyond = {"X-Forwarded-For": "192.0.2.1"}
    shown = SETTINGS.model_copy(update={"payloads": "always"})
    seen.server.prepare(shown)()

    async def stream(path: str, token: str, **headers: str) -> str:
        try:
            return str((await seen.ask(path, token=token, **headers))[0])
        except aiohttp.ClientError:
            return "ended"

    def streams() -> int:
        return len(seen.server._protocol._streaming)

    def open_(*arguments: str, **headers: str) -> asyncio.Task[str]:
        return asyncio.create_task(stream(*arguments, **headers))

    local, tapped = open_("/v1/tap", ""), open_("/v1/tap", ADMIN, **beyond)
    reader, watched = open_("/v1/watch", READER, **beyond), open_("/v1/watch", ADMIN, **beyond)
    await seen.until(lambda: streams() == 4)
    seen.server.prepare(shown)()  # which changes nothing
    await asyncio.sleep(0.05)
    assert streams() == 4
    # An admin that became a reader may watch, and taps no more.
    less = {name: one.model_copy(update={"role": "reader"}) for name, one in shown.tokens.items()}
    seen.server.prepare(shown.model_copy(update={"tokens": less}))()
    assert await asyncio.wait_for(tapped, 60) == "ended"
    await seen.until(lambda: streams() <= 3)
    assert streams() == 3
    eye = {"eye": shown.tokens["eye"]}
    seen.server.prepare(shown.model_copy(update={"tokens": eye}))()
    assert await asyncio.wait_for(watched, 60) == "ended"
    await seen.until(lambda: streams() <= 2)
    assert streams() == 2
    seen.server.prepare(SETTINGS.model_copy(update={"payloads": "never"}))()
    assert await asyncio.wait_for(local, 60) == "ended"
    await seen.until(lambda: streams() <= 1)
    assert streams() == 1
    reader.cancel()
