"""Servers that are away for hours: as many tries to reach them as an outage of hours has."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

from ingestd.host import nats
from tests.journal.on_nats import accepted, batches, drain, start, takes_nothing
from tests.nats import running

if TYPE_CHECKING:
    from ingestd.prove.servers import NatsServer
    from tests.daemon.harness import Daemon

pytest.importorskip("nats", reason="needs nats-py: pip install 'ingestd[jetstream]'")
pytestmark = pytest.mark.slow

HOURS = float(os.environ.get("TEST_OUTAGE_HOURS", "0.2"))
TRIES = int(HOURS * 3600 / nats.RECONNECT_SECONDS)


class Deaf:
    """Hangs up on all connections to the port of a server that is down, and counts them."""

    def __init__(self, server: NatsServer) -> None:
        host, port = server.url.removeprefix("nats://").split(":")
        self.tries = 0
        self._socket = socket.create_server((host, int(port)))
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._socket.close()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._socket.accept()[0].close()
                self.tries += 1


def memory(daemon: Daemon) -> int:
    """Resident bytes."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def test_servers_are_away_for_hours(tmp_path: Path) -> None:
    """All tries of that time are made, without the waits between them: an hour takes a minute."""
    out = tmp_path / "out"
    (tmp_path / "nats").mkdir()
    own = ("--journal.jetstream.timeout", "1s", "--executor.kind", "thread")
    with (
        running(tmp_path / "nats") as cluster,
        start(tmp_path / "one", cluster, out, 0, *own, module="tests.journal.hurried") as one,
    ):
        accepted(one, b"1\n")
        (server,) = cluster.servers
        server.kill()
        with Deaf(server) as deaf:
            takes_nothing(one)  # a record that comes before may wait for the servers
            assert one.post(b"2\n")[0] == 503
            until(lambda: deaf.tries > TRIES / 10)
            before, lines = memory(one), len(one.events) + len(one.other)
            began, tries = time.monotonic(), deaf.tries
            while deaf.tries < TRIES:
                code, headers, _ = one.request("POST", "/v1/records", b"3\n")
                assert code == 503
                assert int(headers["retry-after"]) > 0
                assert time.monotonic() - began < 360 * max(1, HOURS)
                time.sleep(0.05)
            print(f"{deaf.tries - tries} tries in {time.monotonic() - began:.1f} s,"
                  f" {memory(one) - before:,} bytes more")  # fmt: skip
            assert memory(one) - before < 4 << 20
            assert len(one.events) + len(one.other) - lines <= 1, one.events
        server.start()
        accepted(one, b"4\n")
        one.until_settled()
        drain(one)
        assert len(one.events) < 30, one.events
    assert sorted(n for numbers in batches(out).values() for n in numbers) == [1, 4]


def until(found, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)
