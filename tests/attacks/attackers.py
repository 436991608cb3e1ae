"""Every attack at once: `python -m tests.attacks.attackers PORT SECONDS [NAME …]`.

Each comes from addresses of its own. Prints how often each went through its motions. Talks to
127.0.0.1 only, and ends by itself. It is nice: attackers come from other machines, and what it
computes here is not to be taken from the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import random
import resource
import socket
import struct
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

from tests.attacks.holders import holding
from tests.attacks.smuggling import CHUNKED, HOST, LINE, REFUSED, SMUGGLED, TAKEN_ALONE, head

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

MIB = 1024**2
RESET = struct.pack("ii", 1, 0)
LATE_SECONDS = 60
"""On a busy machine an attack may need so much more."""
done: Counter[str] = Counter()


class Attack:
    """Who attacks, where, and until when.

    Attributes:
        names: attacks that go on beyond the end, until each went through its motions.
    """

    def __init__(self, port: int, seconds: float) -> None:
        self.port = port
        self.done = done
        self.end = time.monotonic() + seconds
        self.names: list[str] = []
        self.random = random.Random(4)

    @property
    def left(self) -> float:
        """Seconds until the last moment; `main` may end it all before."""
        return max(0.1, self.end + LATE_SECONDS - time.monotonic())

    @property
    def goes_on(self) -> bool:
        late = 0 if all(self.done[name] for name in self.names) else LATE_SECONDS
        return time.monotonic() < self.end + late

    @contextlib.asynccontextmanager
    async def connection(
        self, group: int, number: int = 0
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection from the group's own address, or one of them."""
        source = (f"127.{group}.{number >> 8}.{(number & 255) or 1}", 0)
        reader, writer = await asyncio.wait_for(
            asyncio.open_connection("127.0.0.1", self.port, local_addr=source), 20
        )
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def send(
        self, name: str, group: int, data: bytes, pause: float = 0.05, number: int = 0
    ) -> None:
        """One request after another, each on a connection of its own, its answer awaited."""
        with contextlib.suppress(OSError, TimeoutError):
            async with self.connection(group, number) as (reader, writer):
                writer.write(data)
                with contextlib.suppress(ConnectionError):
                    await writer.drain()
                await asyncio.wait_for(reader.read(4096), 15)
                done[name] += 1
        await asyncio.sleep(pause)


async def repeat(attack: Attack, name: str, group: int, bodies: list[bytes], pause: float) -> None:
    number = 0
    while attack.goes_on:
        await attack.send(name, group, bodies[number % len(bodies)], pause, 1 + number % 8)
        number += 1


async def trickle(attack: Attack, name: str, group: int, number: int, data: bytes) -> None:
    """A byte a second, again and again, until the time is over."""
    while attack.goes_on:
        with contextlib.suppress(OSError, TimeoutError):
            async with attack.connection(group, number) as (reader, writer):
                for byte in data:
                    writer.write(bytes([byte]))
                    try:
                        if await asyncio.wait_for(reader.read(4096), 1.0) != b"never":
                            done[name] += 1
                            break
                    except TimeoutError:
                        if not attack.goes_on:
                            return
        await asyncio.sleep(0.1)


async def idle(attack: Attack, number: int) -> None:
    """Connects and says nothing."""
    while attack.goes_on:
        with contextlib.suppress(OSError, TimeoutError):
            async with attack.connection(4, number % 8) as (reader, _):
                done["idle"] += 1
                await asyncio.wait_for(reader.read(1), attack.left)
        await asyncio.sleep(0.1)


async def pipeline(attack: Attack, number: int) -> None:
    """Sends as fast as it can and reads nothing."""
    request = head(b"Content-Length: 10\r\n", b'{"pi":123}') * 200
    while attack.goes_on:
        with contextlib.suppress(OSError, TimeoutError):
            async with attack.connection(5, number) as (reader, writer):
                reader._transport.pause_reading()  # type: ignore[attr-defined]
                for _ in range(40):
                    writer.write(request)
                    await asyncio.wait_for(writer.drain(), 5)
                    done["pipelining"] += 200
                    await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)


async def reset(attack: Attack) -> None:
    """Leaves in the middle, the hard way."""
    whole = head(b"Content-Length: 20\r\n", b'{"reset":"01234567"}')
    while attack.goes_on:
        with contextlib.suppress(OSError, TimeoutError):
            async with attack.connection(6) as (_, writer):
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                writer.write(whole[: attack.random.randrange(1, len(whole))])
                await writer.drain()
                done["resets"] += 1
        await asyncio.sleep(0.02)


async def endless(attack: Attack, name: str, group: int, first: bytes, piece: bytes) -> None:
    """A chunked body without an end."""
    while attack.goes_on:
        with contextlib.suppress(OSError, TimeoutError):
            async with attack.connection(group) as (reader, writer):
                writer.write(LINE + HOST + CHUNKED + b"\r\n" + first)
                reading = asyncio.create_task(reader.read(4096))
                while time.monotonic() < attack.end and not reading.done():
                    writer.write(piece)
                    await asyncio.wait_for(writer.drain(), 5)
                    await asyncio.sleep(0.01)
                done[name] += 1
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
        await asyncio.sleep(0.05)


def packed(encoding: bytes, body: bytes, more: bytes = b"") -> bytes:
    return head(
        b"Content-Encoding: %b\r\n%bContent-Length: %d\r\n" % (encoding, more, len(body)), body
    )


def plain(body: bytes, more: bytes = b"") -> bytes:
    return head(b"%bContent-Length: %d\r\n" % (more, len(body)), body)


def bombs() -> list[bytes]:
    """A GiB and more from a few bytes."""
    level = {"compresslevel": 9}
    json_zeros = b"[" + b"0," * (8 * MIB)
    return [
        packed(b"gzip", gzip.compress(bytes(200 * MIB), **level)),
        packed(b"zstd", zstd.compress(bytes(1024 * MIB))),
        packed(b"gzip", gzip.compress(b'{"a":1}\n' * (8 * MIB), **level)),
        packed(b"zstd", zstd.compress(b'{"a":1}\n' * (8 * MIB))),
        packed(b"gzip", gzip.compress(b"1\n" * 1000, **level) * 60_000),
        packed(b"zstd", zstd.compress(bytes(10 * MIB)) * 1000),
        packed(b"gzip", gzip.compress(b"") * 100_000),
        packed(b"zstd", zstd.compress(b"") * 100_000),
        packed(b"zstd", zstd.compress(json_zeros), b"Content-Type: application/json\r\n"),
        packed(b"gzip", gzip.compress(gzip.compress(bytes(100 * MIB), **level), **level)),
    ]


def deep() -> list[bytes]:
    as_json = b"Content-Type: application/json\r\n"
    return [
        plain(b"[" * 500_000 + b"]" * 500_000),
        plain(b"[" * 500_000 + b"]" * 500_000, as_json),
        plain(b'{"a":' * 400 + b"1" + b"}" * 400 + b"\n"),
        plain((b"[" * 120 + b"]" * 120 + b"\n") * 4000 + b"[" * 900 + b"]" * 900),
        plain((b"[" * 129 + b"]" * 129 + b"\n") * 2000),
        plain(b"[" + b"[" * 600 + b"]" * 600 + b"]", as_json),
        plain(b"[" + b'["[{"],' * 100_000 + b"1]", as_json),
    ]


def large() -> list[bytes]:
    """At the bounds, and beyond them."""
    as_json = b"Content-Type: application/json\r\n"
    return [
        LINE + HOST + b"Content-Length: 17000000\r\n\r\n" + b"1\n" * 100_000,
        plain(b"[" + b"1," * 8_000_000 + b"1]", as_json),
        plain(b"[" + b"1," * 199_998 + b"1]", as_json),
        plain(b"[" + b"[]," * 99_998 + b"[]]", as_json),
        plain(b"1\n" * 8_000_000),
        plain(b"1\n" * 99_999),
        plain(b"x\n" * 90_000),
        plain(b'{"k":"' + b"y" * 2_000_000 + b'"}'),
    ]


def tiny_chunks() -> list[bytes]:
    body = b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"tiny":1}\n' * 20_000)
    return [LINE + HOST + CHUNKED + b"\r\n" + body + b"0\r\n\r\n"]


async def slow(attack: Attack, group: int, number: int, start: bytes) -> None:
    """A body that comes a byte a second."""
    while attack.goes_on:
        with contextlib.suppress(OSError, TimeoutError):
            async with attack.connection(group, number) as (reader, writer):
                writer.write(start)
                reading = asyncio.create_task(reader.read(4096))
                while attack.goes_on and not reading.done():
                    writer.write(b"1")
                    await asyncio.wait({reading}, timeout=1)
                if reading.done() and not reading.exception():
                    done["slow bodies"] += reading.result().startswith(b"HTTP/1.1 408")
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
        await asyncio.sleep(0.1)


def plan(attack: Attack) -> dict[str, list[Coroutine[None, None, None]]]:
    """Every attack, as the tasks that make it."""
    slow_head = LINE + b"X: " + b"y" * 1000
    slow_body = head(b"Content-Length: 1000\r\n", b"")
    announced = head(b"Content-Length: 16000000\r\n", b"")
    odd = [data + SMUGGLED for data in (*REFUSED.values(), *TAKEN_ALONE.values())]
    heavy, big = bombs(), large()
    noise = b"%x\r\n%b\r\n" % (65536, os.urandom(65536))
    return {
        "idle": [idle(attack, n) for n in range(600)],
        "slow heads": [trickle(attack, "slow heads", 7, n % 8, slow_head) for n in range(150)],
        "slow bodies": [slow(attack, 8, n % 8, slow_body) for n in range(100)]
        + [slow(attack, 9, n, announced) for n in range(40)],
        "pipelining": [pipeline(attack, n % 8) for n in range(20)],
        "bombs": [repeat(attack, "bombs", 10, heavy, 0.05) for _ in range(3)],
        "deep": [repeat(attack, "deep", 11, deep(), 0.05)],
        "large": [repeat(attack, "large", 12, big, 0.05) for _ in range(3)],
        "tiny chunks": [repeat(attack, "tiny chunks", 13, tiny_chunks(), 0.05)],
        "smuggling": [repeat(attack, "smuggling", 14, odd, 0.01)],
        "resets": [reset(attack)],
        "endless bodies": [endless(attack, "endless bodies", 15, b"", noise)],
        "endless chunk lines": [endless(attack, "endless chunk lines", 16, b"1;", b"x" * 1000)],
        **holding(attack),
    }


async def main(port: int, seconds: float, only: list[str]) -> None:
    attack = Attack(port, seconds)
    tasks = plan(attack)
    attack.end = time.monotonic() + seconds  # packing the bombs took its time
    attack.names = only or list(tasks)
    print("ready", flush=True)
    running = []
    async with asyncio.TaskGroup() as group:
        for name, coroutines in tasks.items():
            for coroutine in coroutines:
                if not only or name in only:
                    running.append(group.create_task(coroutine))
                else:
                    coroutine.close()
        while attack.goes_on:
            await asyncio.sleep(0.05)
        for task in running:
            task.cancel()
    print(json.dumps(done), flush=True)


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    os.nice(10)
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
