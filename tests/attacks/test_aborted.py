"""Requests that are given up at any moment: nothing of what they held is counted any more."""

from __future__ import annotations

import asyncio
import gzip
import random
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from tests.sources.source_tools import until
from tests.sources.test_idempotency import Door

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = {name: {"token": f"{name}-token-of-the-tests-0123456789"} for name in ("a", "b", "c")}
BODIES = (b"1\n2\n3\n", b"x\n1\n", b"x\n", b"7\n" * 40_000, b'"' + b"y" * 300_000 + b'"\n')


def request(chance: random.Random, number: int) -> bytes:
    """A request as it should be, of one of many kinds."""
    body = chance.choice(BODIES)
    lines = ["POST /v1/records HTTP/1.1", "Host: localhost"]
    token = TOKENS[chance.choice("abc")]["token"]
    lines.append(f"Authorization: Bearer {token if chance.random() < 0.95 else 'none'}")
    if chance.random() < 0.3:
        lines.append(f"Idempotency-Key: k{chance.choice((number, number % 7))}")
    if chance.random() < 0.3:
        lines.append(f"Prefer: wait={chance.choice((0, 1, 5))}")
    if chance.random() < 0.2:
        lines.append("Prefer: handling=strict")
    if chance.random() < 0.2:
        lines.append("Expect: 100-continue")
    if chance.random() < 0.4:
        lines.append("Content-Encoding: gzip")
        body = gzip.compress(body, 1)
        if chance.random() < 0.2:
            body = body[:-4] + b"none"
    if chance.random() < 0.5:
        lines.append("Transfer-Encoding: chunked")
        step = chance.choice((5, 1000, 70_000)) if len(body) < 50_000 else 20_000
        pieces = [body[at : at + step] for at in range(0, len(body), step)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    else:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


async def give_up(port: int, chance: random.Random, number: int) -> None:
    """Sends some of a few requests, in a few pieces, and goes away, in one of several ways."""
    data = b"".join(request(chance, number) for _ in range(chance.choice((1, 1, 1, 3))))
    data = data[: chance.choice((len(data), chance.randrange(len(data) + 1)))]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.choice((0, 1, 3))))
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            if writer.transport.is_closing():
                break
            writer.write(data[start:end])
            await asyncio.sleep(chance.choice((0, 0, 0.001)))
        way = chance.choice(("abort", "close", "half", "read"))
        if way == "half" and not writer.transport.is_closing():
            writer.write_eof()
        if way in ("half", "read"):
            async with asyncio.timeout(0.05):
                await reader.read(100)
    except TimeoutError:
        pass
    except ConnectionError:
        way = "abort"
    if way == "abort":
        writer.transport.abort()
    writer.close()
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def held(door: Door) -> dict[str, Any]:
    """Everything that is counted of requests and connections."""
    inner, server, taking = (
        door.source._handler,
        door.source._server,
        door.source._handler.ingestion,
    )
    room = taking.admission
    keys = door.pipelines["default"].journal.idempotency
    return {
        "connections": (server.open, len(server._welcomed), len(server._silent)),
        "connections of clients": server._clients._open,
        "held": (server._held, dict(server._held_by)),
        "turns": server.turns._waiting,
        "room": (room.bytes, room.requests, room.streams, room._lasting),
        "shares": dict(room._clients),
        "door": (inner._active, len(taking.streams), len(taking.waiting), len(taking.quiet)),
        "watches": len(door.pipelines["default"].waiters),
        "claims": (len(keys._claims), dict(keys._claimed)),
    }


@pytest.mark.parametrize("number", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_nothing_is_held_for_who_has_gone(tmp_path: Path, number: int) -> None:
    async def attack() -> None:
        http = {"tokens": TOKENS, "body_timeout": 1, "stream_silence_max": 1}
        async with Door(tmp_path, http=http) as door:
            nothing = held(door)
            port = int(door.source.addresses[0].rpartition(":")[2])
            chance = random.Random(7)
            numbers = iter(range(number))

            async def go_on() -> None:
                for one in numbers:
                    await give_up(port, chance, one)

            await asyncio.gather(*(go_on() for _ in range(16)))
            await until(lambda: held(door) == nothing, 60)
            journal = door.pipelines["default"].journal
            await until(lambda: not journal.ledger.pending, 60)
            ledger = journal.ledger
            assert ledger.accepted == ledger.processed + ledger.dead
            assert (
                journal.idempotency.owners.total() == journal.idempotency.count == len(door.rows())
            )

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(attack())
