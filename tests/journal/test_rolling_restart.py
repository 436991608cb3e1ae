"""A rolling restart of all daemons, and of all servers, while clients send."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import random
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Self

import pytest

from ingestd.journal.jetstream import JetStreamKind, JetStreamSettings
from tests.journal.on_nats import batches, drain, start
from tests.nats import running

if TYPE_CHECKING:
    from pathlib import Path

    from tests.daemon.harness import Daemon
    from tests.nats import Cluster

pytest.importorskip("nats", reason="needs nats-py: pip install 'ingestd[jetstream]'")
pytestmark = pytest.mark.slow

NAMES = ("one", "two")
CLIENTS = 4
RECORDS = 20
"""Of a request."""
MORE = 8
"""Requests of each client that have to be accepted between two restarts."""
LEASE = 6
"""Seconds: a daemon that stands still for three of them is not adopted."""


class Clients:
    """Clients that send to any daemon, come again when they are told to, and repeat what was lost.

    Attributes:
        accepted: the records that were answered with 202.
        answers: how often each status came; 0 for a connection without an answer.
        wrong: answers that no client should get.
    """

    def __init__(self) -> None:
        self.accepted: list[int] = []
        self.answers: Counter[int] = Counter()
        self.wrong: list[object] = []
        self._ports: dict[str, int] = {}
        self._counts = [0] * CLIENTS
        self._numbers = itertools.count()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(CLIENTS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def serves(self, name: str, daemon: Daemon) -> None:
        self._ports[name] = daemon.port

    def more(self) -> None:
        """Waits until each client had some more records accepted."""
        wanted = [count + MORE for count in self._counts]
        deadline = time.monotonic() + 120
        while any(a < b for a, b in zip(self._counts, wanted, strict=True)):
            assert time.monotonic() < deadline, (self.answers, self.wrong)
            assert all(thread.is_alive() for thread in self._threads), self.wrong
            time.sleep(0.01)

    def _run(self, client: int) -> None:
        while not self._ended.is_set() and not self.wrong:
            records = [next(self._numbers) for _ in range(RECORDS)]
            if self._sent(f"request-{records[0]}", records):
                self.accepted += records
                self._counts[client] += 1

    def _sent(self, key: str, records: list[int]) -> bool:
        """Sends records until they are accepted; without an answer to the daemon that has them."""
        body = b"".join(b"%d\n" % record for record in records)
        name, lost = "", False
        while True:
            name = name if lost else random.choice(NAMES)
            connection = http.client.HTTPConnection("127.0.0.1", self._ports[name], timeout=30)
            with contextlib.closing(connection):
                try:
                    connection.connect()
                except OSError:
                    time.sleep(0.02)
                    continue
                try:
                    connection.request("POST", "/v1/records", body, {"Idempotency-Key": key})
                    answer = connection.getresponse()
                    text = answer.read()
                except (OSError, http.client.HTTPException):
                    lost = True
                    self.answers[0] += 1
                    continue
            self.answers[answer.status] += 1
            again = float(answer.headers.get("Retry-After", 0))
            if answer.status == 202:
                return True
            if answer.status not in {429, 503} or again <= 0:
                self.wrong.append((answer.status, dict(answer.headers), text))
                return False
            self._ended.wait(again)


def whole(cluster: Cluster) -> None:
    """Waits until each node has all of its streams."""
    cluster.wait_ready()
    for node in cluster.servers:
        node.wait_ready("/healthz")


def test_all_daemons_and_all_servers_are_restarted_under_load(tmp_path: Path) -> None:
    """Nothing is answered with 5xx but 503 and a time to come again; nothing is lost or doubled."""
    out, lives = tmp_path / "out", itertools.count()
    (tmp_path / "nats").mkdir()
    with running(tmp_path / "nats", 3) as cluster, contextlib.ExitStack() as stack:

        def life(name: str) -> Daemon:
            own = ("--journal.jetstream.name", name, "--journal.jetstream.adopt", "true",
                   "--journal.jetstream.timeout", "1s", "--executor.kind", "thread",
                   "--journal.jetstream.lease", f"{LEASE}s")  # fmt: skip
            folder = tmp_path / f"{name}-{next(lives)}"
            return stack.enter_context(start(folder, cluster, out, 0, *own))

        daemons = {name: life(name) for name in NAMES}
        clients = Clients()
        for name, daemon in daemons.items():
            clients.serves(name, daemon)
        with clients:
            clients.more()
            for name, daemon in daemons.items():
                daemon.terminate()
                assert daemon.wait() == 0
                daemons[name] = life(name)
                clients.serves(name, daemons[name])
                clients.more()
            for node in cluster.servers:
                node.stop()
                clients.more()  # two of three are a majority
                node.launch()
                whole(cluster)
                clients.more()
        print(f"{len(clients.accepted)} records, answers: {dict(clients.answers)}")
        assert not clients.wrong
        for daemon in daemons.values():
            assert daemon.process.poll() is None, "the servers' restarts cost no daemon its life"
            daemon.until_settled()
            drain(daemon)
        own = JetStreamSettings(servers=tuple(cluster.urls), lease=LEASE)
        logs = asyncio.run(JetStreamKind().logs(own))
    keys = ("accepted", "processed", "dead", "pending")
    taken = len(clients.accepted)
    assert [sum(log[key] for log in logs) for key in keys] == [taken, taken, 0, 0]
    found = sorted(number for numbers in batches(out).values() for number in numbers)
    assert found == sorted(clients.accepted)
