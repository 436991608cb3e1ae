"""Hostile senders of syslog over TCP and UDP: the daemon stays small, goes on, and leaves well."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

import pytest

from tests.daemon.harness import Daemon

pytestmark = pytest.mark.slow

PEAK_MB = 200
SECONDS = 3.0
ATTACKS = {
    "begun lines": (300, b"<1>" + b"x" * 900_000),
    "begun frames": (300, b"1000000 <1>" + b"x" * 900_000),
    "tiny lines": (100, b"x\n" * 200_000),
    "tiny frames": (100, b"4 <1>b" + b"3 abc" * 100_000),
    "lines that are too long": (100, b"<1>" + b"x" * 3_000_000 + b"\n"),
    "lengths that are too large": (100, b"99999999 <1>" + b"x" * 1_000_000),
    "lengths that are none": (100, b"4 <1>a" + b"9x" * 100_000),
    "noise": (100, os.urandom(300_000)),
    "one byte": (300, b"<"),
}


def peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def attack(port: int, connections: int, payload: bytes) -> None:
    """Sends as much as is taken on all connections, and closes them all at once."""
    with contextlib.ExitStack() as stack:
        left = {}
        for _ in range(connections):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            one.setblocking(False)
            left[one] = memoryview(payload)
        end = time.monotonic() + SECONDS
        while left and time.monotonic() < end:
            for one, rest in list(left.items()):
                try:
                    left[one] = rest[one.send(rest[:65536]) :]
                except BlockingIOError:
                    continue
                except OSError:
                    left[one] = rest[:0]
                if not left[one]:
                    del left[one]


def test_the_daemon_stays_small_and_goes_on(tmp_path: Path) -> None:
    listen = "tcp://127.0.0.1:0,udp://127.0.0.1:0"
    with Daemon("--source", "syslog", "--syslog.listen", listen, cwd=tmp_path) as one:
        addresses = one.event("daemon_started")["listening"]
        tcp, udp = (int(address.rpartition(":")[2]) for address in addresses)
        for name, (connections, payload) in ATTACKS.items():
            attack(tcp, connections, payload)
            assert peak_mb(one.pid) < PEAK_MB, name
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                for datagram in (b"<1>" + b"x" * 60_000, b"x", b"", b"\0\n" * 100):
                    sender.sendto(datagram, ("127.0.0.1", udp))
        assert peak_mb(one.pid) < PEAK_MB
        before = one.status()["pipelines"]["default"]["accepted"]
        deadline = time.monotonic() + 120
        while one.status()["pipelines"]["default"]["accepted"] <= before:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", tcp)) as good,
            ):
                good.sendall(b"<13>still here\n")
            assert time.monotonic() < deadline
            time.sleep(0.1)
        one.terminate()
        assert one.wait(90) == 0
        assert not one.other
        assert not [event for event in one.events if "exception" in event]
