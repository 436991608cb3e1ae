"""Attacks on the source `forward` with its defaults, all at once, beside a polite client."""

from __future__ import annotations

import contextlib
import gzip
import random
import socket
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

import msgpack
import pytest

from tests.attacks.test_all_at_once import RESIDENT_MAX, Watch
from tests.daemon.harness import daemon

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1024**2
SECONDS = 15
HEAD = b"\x93\xa3app"  # of a message with options
PACKED = {"compressed": "gzip"}


def packed(payload: bytes) -> bytes:
    return msgpack.packb(["app", payload, PACKED])


def dense() -> bytes:
    """Events that become 8 MiB, and more as JSON, within every bound."""
    chance = random.Random(1)
    texts = [f"{chance.getrandbits(256):x}" for _ in range(300)]
    events = [msgpack.packb([5, {"log": chance.choice(texts)}]) for _ in range(90_000)]
    return packed(gzip.compress(b"".join(events)))


ATTACKS = {
    "dense": dense(),
    "bomb": packed(gzip.compress(msgpack.packb([5, {}]) * 4_000_000)),
    "nested bomb": packed(gzip.compress(gzip.compress(bytes(200 * MIB)))),
    "tiny messages": b"\x93\xa0\x00\x80" * 65_536,
    "tiny messages with ids": b"\x94\xa0\x00\x80\x81\xa5chunk\xa1a" * 20_000,
    "invalid events": msgpack.packb(["", [0] * 99_000]) * 3,
    "long tags": msgpack.packb(["\0" * 1000, [[0, {}]] * 50_000]),
    "control characters": msgpack.packb(["app", [[0, {"log": "\0" * 100_000}]] * 80]),
    "wide": msgpack.packb(["app", [[0, {str(n): n for n in range(60_000)}]] * 10]),
    "deep": msgpack.packb(["app", 0]) + b"\x93\xa3app\x00" + b"\x81\xa1a" * 590,
    "begun": b"\x92\xa3app\xc6\x00\x8f\x00\x00" + bytes(8 * MIB),
    "lying": HEAD + b"\xdd\x00\x80\x00\x00" + b"\xdd\x00\x80\x00\x00" * 1000,
}


def attack(port: int, name: str, end: float, done: Counter[str]) -> None:
    """Sends it again and again, from an address of its own."""
    source = f"127.0.{1 + list(ATTACKS).index(name)}.1"
    late = end + 60  # where fewer than are wanted came through in time
    while time.monotonic() < (end if len(done) > len(ATTACKS) // 2 else late):
        with contextlib.suppress(OSError), socket.create_connection(
            ("127.0.0.1", port), 5, (source, 0)
        ) as one:  # fmt: skip
            one.sendall(ATTACKS[name])
            if name == "begun":
                time.sleep(1)
            done[name] += 1


def polite(port: int, end: float) -> list[float]:
    """Small messages, one after the other: the seconds until each is acknowledged."""
    times = []
    while time.monotonic() < end:
        with socket.create_connection(("127.0.0.1", port), 60, ("127.0.0.2", 0)) as one:
            for _ in range(20):
                name = f"{len(times)}"
                start = time.monotonic()
                one.sendall(msgpack.packb(["app", 5, {"polite": len(times)}, {"chunk": name}]))
                assert msgpack.unpackb(one.recv(100)) == {"ack": name}
                times.append(time.monotonic() - start)
                time.sleep(0.01)
    return times


@pytest.mark.slow
def test_all_attacks_at_once(tmp_path: Path) -> None:
    handler = f"{__name__}:drop"
    args = ("--source", "forward", "--forward.listen", "127.0.0.1:0", "--handler.target", handler)
    with daemon(*args, cwd=tmp_path) as one:
        port = int(one.event("daemon_started")["listening"][0].rpartition(":")[2])
        watch, done = Watch(one.pid), Counter[str]()
        watch.start()
        end = time.monotonic() + SECONDS
        threads = [
            threading.Thread(target=attack, args=(port, name, end, done))
            for name in ATTACKS
            for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        times = sorted(polite(port, end))
        for thread in threads:
            thread.join()
        most = watch.end()
        print(f"{most / 1e6:.0f} MB, {len(times)} polite, worst {times[-1]:.2f} s; {dict(done)}")
        assert len(done) > len(ATTACKS) // 2
        assert most < RESIDENT_MAX
        assert one.process.poll() is None
        errors = [event for event in one.events if event.get("level") == "error"]
        assert not errors, errors[:3]
        assert not one.other


def drop(batch: list[object]) -> None:
    """Takes everything."""
