"""Attacks that hold much and send little: bodies, windows, streams, heads, answers, places."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import sys
from typing import TYPE_CHECKING

from tests.attacks.smuggling import CHUNKED, HOST, LINE, head

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

    from tests.attacks.attackers import Attack

ZSTD = b"Content-Encoding: zstd\r\n"
WINDOW = {zstd.CompressionParameter.window_log: 23}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def noise() -> bytes:
    return b"".join(b'{"r":"%b"}\n' % os.urandom(200).hex().encode() for _ in range(600))


def windows() -> Iterator[bytes]:
    """A zstd frame with a window of 8 MiB that is filled and never ended."""
    packer = zstd.ZstdCompressor(options=WINDOW)
    while True:
        yield chunk(packer.compress(noise()) + packer.flush(packer.FLUSH_BLOCK))


def alternating() -> Iterator[bytes]:
    """Good and bad lines, as many of each."""
    yield chunk(b"1\n")
    while True:
        yield chunk(b"1\nx\n" * 16_384)


def one_line() -> Iterator[bytes]:
    yield chunk(b"1\n")


async def stream(
    attack: Attack, name: str, group: int, more: bytes, pieces: Iterator[bytes], pause: float
) -> None:
    """One chunked body that goes on, or falls silent when there are no more pieces."""
    async with attack.connection(group) as (reader, writer):
        writer.write(LINE + HOST + CHUNKED + more + b"\r\n")
        answer = asyncio.create_task(reader.read(4096))
        attack.done[name] += 1
        try:
            for piece in pieces:
                if answer.done() or not attack.goes_on:
                    return
                writer.write(piece)
                await asyncio.wait_for(writer.drain(), attack.left)
                await asyncio.sleep(pause)
            await asyncio.wait({answer}, timeout=attack.left)
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)


async def again(attack: Attack, make: Callable[[], Awaitable[None]]) -> None:
    while attack.goes_on:
        with contextlib.suppress(OSError, TimeoutError):
            await make()
        await asyncio.sleep(0.2)


async def unread(attack: Attack, name: str, group: int, request: bytes) -> None:
    """Sends the same requests again and again, and reads no answer."""
    async with attack.connection(group) as (reader, writer):
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        attack.done[name] += 1
        while attack.goes_on:
            writer.write(request * 32)
            await asyncio.wait_for(writer.drain(), attack.left)


async def part_of_a_head(attack: Attack, name: str, group: int, data: bytes) -> None:
    async with attack.connection(group) as (reader, writer):
        writer.write(data)
        attack.done[name] += 1
        await asyncio.wait_for(reader.read(100), attack.left)


def plain(body: bytes, more: bytes = b"") -> bytes:
    return head(b"%bContent-Length: %d\r\n" % (more, len(body)), body)


def packed(body: bytes, more: bytes = b"") -> bytes:
    return plain(gzip.compress(body, 9), b"Content-Encoding: gzip\r\n" + more)


def requests() -> dict[str, tuple[int, list[bytes]]]:
    """Whole requests, and from how many connections at once."""
    line = b'{"t":"%b"}\n' % (b"y" * 400)
    as_json = b"Content-Type: application/json"
    return {
        "waiting bodies": (40, [plain(line * 36_000, b"Prefer: wait=60\r\n")]),
        "invalid lines": (
            12,
            [packed(b"x\n" * 99_000), packed(b"1\n" + b"x\n" * 99_000), packed(b"1\nx\n" * 49_000)],
        ),
        "long invalid lines": (6, [plain((b'{"t":"' + b"y" * 300_000 + b"\n") * 45 + b"1\n")]),
        "long headers": (
            8,
            [
                plain(b"1\n", as_json + b";" * 8000 + b"\r\n"),
                plain(b"1\n", b"Prefer: " + b'a="' * 2600 + b"\r\n"),
                plain(b"1\n", b"Prefer: wait=" + b"9" * 8000 + b"\r\n"),
                plain(b"1\n", b"Idempotency-Key: " + b'"\\' * 4000 + b"\r\n"),
                plain(b"1\n", b"traceparent: " + b"00-" * 2600 + b"\r\n"),
                plain(b"1\n", b"Content-Encoding: " + b"gzip," * 1600 + b"\r\n"),
                plain(b"1\n", b"Authorization: Basic " + b"eDp4" * 2000 + b"\r\n"),
                plain(b"1\n", b"Cookie: " + b"a=b;" * 2000 + b"\r\n"),
                plain(b"1\n", b"Forwarded: " + b'for="' * 1600 + b"\r\n"),
            ],
        ),
    }


async def slowly(attack: Attack, name: str, group: int) -> None:
    """Almost all of a large body, and the rest as slowly as it may be."""
    async with attack.connection(group) as (reader, writer):
        writer.write(LINE + HOST + b"Content-Length: 16000000\r\n\r\n" + b"1" * 15_900_000)
        await asyncio.wait_for(writer.drain(), attack.left)
        attack.done[name] += 1
        answer = asyncio.create_task(reader.read(4096))
        while attack.goes_on and not answer.done():
            writer.write(b"1" * 1200)
            await asyncio.wait({answer}, timeout=1)
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)


def holding(attack: Attack) -> dict[str, list[Coroutine[None, None, None]]]:
    """The attacks, as the tasks that make them."""
    lines = b"".join(b"h%d: %b\r\n" % (n, b"v" * 60) for n in range(100))
    page = b"GET /openapi.json HTTP/1.1\r\n" + HOST + b"\r\n"
    whole = plain(b"1\n", lines)
    part = LINE + HOST + b"".join(b"h%d:\r\n" % n for n in range(120))

    async def ask(name: str, group: int, bodies: list[bytes]) -> None:
        number = 0
        while attack.goes_on:
            await attack.send(name, group, bodies[number % len(bodies)])
            number += 1

    found: dict[str, list[Coroutine[None, None, None]]] = {}
    for group, (name, (number, bodies)) in enumerate(requests().items(), 20):
        found[name] = [ask(name, group, bodies) for _ in range(number)]
    streams = {
        "windows": (24, 48, ZSTD, windows, 0.05),
        "alternating lines": (25, 16, b"", alternating, 0.0),
        "idle streams": (26, 48, b"", one_line, 0.0),
    }
    for name, (group, number, more, pieces, pause) in streams.items():
        found[name] = [
            again(
                attack, lambda a=(name, group, more), p=pieces, s=pause: stream(attack, *a, p(), s)
            )
            for _ in range(number)
        ]
    others = {
        "pipelined heads": (130, lambda: unread(attack, "pipelined heads", 27, whole)),
        "unread pages": (
            200,
            lambda: unread(attack, "unread pages", 28, page),
        ),
        "parts of heads": (300, lambda: part_of_a_head(attack, "parts of heads", 29, part)),
        "large slow bodies": (4, lambda: slowly(attack, "large slow bodies", 30)),
    }  # fmt: skip
    for name, (number, make) in others.items():
        found[name] = [again(attack, make) for _ in range(number)]
    return found
