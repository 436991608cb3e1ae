"""Requests of many connections: clients in rotation."""

from __future__ import annotations

import asyncio
import socket
import struct
import time

from ingestd.http.server import REQUESTS_A_TURN, TURN_SECONDS, FairQueue
from tests.sources.source_tools import MemoryIntake, serving, until

MANY = 4000


def test_one_request_of_another_client_is_not_behind_hundreds() -> None:
    order: list[str] = []

    async def one(turns: FairQueue, client: str) -> None:
        if (turn := turns.take(client)) is not None:
            await turn
        order.append(client)
        end = time.monotonic() + TURN_SECONDS / 4
        while time.monotonic() < end:
            pass

    async def run() -> None:
        turns = FairQueue(asyncio.get_running_loop())
        many = [asyncio.create_task(one(turns, "many")) for _ in range(100)]
        other = asyncio.create_task(one(turns, "other"))
        await asyncio.gather(other, *many)

    asyncio.run(run())
    assert len(order) == 101
    assert order.index("other") <= 2 * REQUESTS_A_TURN


def test_who_has_gone_keeps_no_place() -> None:
    async def run() -> None:
        turns = FairQueue(asyncio.get_running_loop())
        assert turns.take("a") is None
        time.sleep(TURN_SECONDS)  # noqa: ASYNC251  the turn's time is over
        waiting = [turns.take("a") for _ in range(50)]
        for turn in waiting[:49]:
            assert turn is not None
            turn.set_result(None)
        last = waiting[49]
        assert last is not None
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert last.done()

    asyncio.run(run())


def test_pipelined_requests_leave_the_loop_its_turns() -> None:
    """One connection with thousands of requests in its buffer, which need nothing but the loop."""
    request = b"GET /v1/nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answered = 0
    a_turn = [0]

    def count(*_: object) -> None:
        nonlocal answered
        answered += 1

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def turn(before: int) -> None:
            a_turn.append(answered - before)
            loop.call_soon(turn, answered)

        async with serving(MemoryIntake(), on_request=count) as source:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", source.addresses[0].rpartition(":")[2]
            )
            turn(0)
            writer.write(request * MANY)
            left = MANY
            while left:
                data = await reader.read(65536)
                assert data
                left -= data.count(b"HTTP/1.1 404")
            writer.close()

    asyncio.run(run())
    assert answered == MANY
    assert max(a_turn) < MANY / 8


def test_what_waits_with_a_connection_goes_with_it() -> None:
    """Not in its turn, nor in the next collection of old cycles: a head may be 60 KB of objects."""
    lines = b"".join(b"h%d: v\r\n" % number for number in range(90))
    request = b"GET /v1/nothing HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n"

    async def run() -> None:
        async with serving(MemoryIntake()) as source:
            server = source._server
            server.turns.take = lambda _: server._loop.create_future()  # it never comes
            _, writer = await asyncio.open_connection(
                "127.0.0.1", source.addresses[0].rpartition(":")[2]
            )
            writer.write(request * 3)
            await until(lambda: server.open == 1)
            (connection,) = server.connections
            await until(lambda: len(connection._messages) == 3)
            task = connection._task_handler
            reset = struct.pack("ii", 1, 0)
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            writer.transport.abort()
            await until(task.done)
            assert not connection._messages

    asyncio.run(run())
