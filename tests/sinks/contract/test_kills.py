"""SIGKILL of the daemon, and of the other side, under load: nothing is missing, nothing is doubled.

`TEST_SINK_KILLS` (daemon, 5), `TEST_SINK_SERVER_KILLS` (the other side, 3) and `TEST_SINK_SEED` say
how often and at which moments.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from ingestd.prove.servers import free_port
from tests.daemon.harness import Daemon
from tests.sinks.contract.adapter import SinkAdapter, adapters
from tests.sinks.contract.test_contract import flags

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("TEST_SINK_KILLS", "5"))
SERVER_KILLS = int(os.environ.get("TEST_SINK_SERVER_KILLS", "3"))
SEED = int(os.environ.get("TEST_SINK_SEED", "0")) or random.SystemRandom().randrange(10**9)
RECORDS = 40


@pytest.fixture(params=[kind for kind in adapters() if kind.exactly_once], ids=lambda k: k.target)
def sink(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SinkAdapter]:
    one: SinkAdapter = request.param(tmp_path)
    yield one
    one.close()


class Client:
    """Posts numbered records, each body under a key of its own until it is accepted."""

    def __init__(self, port: int, place: int) -> None:
        self.bodies = 0  # accepted
        self._port, self._place = port, place
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def numbers(self) -> list[int]:
        first = self._place * 10**6
        return list(range(first, first + self.bodies * RECORDS))

    def _work(self) -> None:
        while not self._stopped.is_set():
            first = self._place * 10**6 + self.bodies * RECORDS
            lines = b"".join(b'{"n":%d}\n' % n for n in range(first, first + RECORDS))
            # Also after it was told to stop: whether this one was accepted is known only then.
            while not self._post(lines, f"body-{first}"):
                time.sleep(0.02)
            self.bodies += 1

    def _post(self, lines: bytes, key: str) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("POST", "/v1/records", lines, {"Idempotency-Key": key})
            return connection.getresponse().status == 202
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(180)
        assert not self._thread.is_alive()


def arguments(sink: SinkAdapter, port: int) -> list[str]:
    small = {"batch__records_max": "100", "executor__kind": sink.executor}
    return [sink.target, *flags(sink, **small), "--listen", f"127.0.0.1:{port}"]


def compare(sink: SinkAdapter, clients: list[Client]) -> None:
    stored = sink.stored()
    wanted = [n for client in clients for n in client.numbers()]
    print(f"seed {SEED}: {len(wanted)} accepted, {len(stored)} stored")
    assert len(wanted) > 0
    assert (len(set(wanted) - set(stored)), len(stored) - len(set(stored))) == (0, 0)
    assert set(stored) == set(wanted)


def test_kills_of_the_daemon(sink: SinkAdapter, tmp_path: Path) -> None:
    chance, port = random.Random(SEED), free_port()
    clients = [Client(port, place) for place in range(3)]
    for _ in range(KILLS):
        with Daemon(*arguments(sink, port), cwd=tmp_path, environ=sink.environ) as one:
            if chance.random() < 0.8:  # else while it starts
                one.event("daemon_started")
            time.sleep(chance.random())
            one.terminate(signal.SIGKILL)
            one.wait()
    with Daemon(*arguments(sink, port), cwd=tmp_path, environ=sink.environ) as one:
        one.event("daemon_started")
        for client in clients:
            client.stop()
        numbers = one.until_settled(timeout=120)
        assert numbers["dead"] == 0, json.dumps(numbers)
        one.terminate()
        assert one.wait() == 0
    compare(sink, clients)


def test_kills_of_the_other_side(sink: SinkAdapter, tmp_path: Path) -> None:
    if not sink.can_be_killed:
        pytest.skip("it has no process of its own")
    chance, port = random.Random(SEED), free_port()
    with Daemon(*arguments(sink, port), cwd=tmp_path, environ=sink.environ) as one:
        one.event("daemon_started")
        clients = [Client(port, place) for place in range(3)]
        for _ in range(SERVER_KILLS):
            time.sleep(0.2 + chance.random())
            sink.kill()
        for client in clients:
            client.stop()
        numbers = one.until_settled(timeout=120)
        assert numbers["dead"] == 0, json.dumps(numbers)
        one.terminate()
        assert one.wait() == 0
    compare(sink, clients)
