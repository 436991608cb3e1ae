"""SIGHUP at the real daemon, while clients go on."""

from __future__ import annotations

import contextlib
import http.client
import signal
import ssl
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.http.credentials import hash_of
from tests.access.tools import LOGS, NEXT, SHOP, Files, bearer
from tests.daemon.harness import Daemon, daemon, written

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow  # daemons that are reloaded

ROUNDS = 15


def send(port: int, context: ssl.SSLContext, token: str) -> int:
    """One request on a connection of its own."""
    connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=60)
    try:
        connection.request("POST", "/v1/records", b"1", bearer(token))
        return connection.getresponse().status
    finally:
        connection.close()


@contextlib.contextmanager
def coming_again_and_again(port: int, context: ssl.SSLContext, token: str) -> Iterator[list[Any]]:
    """Two clients that connect anew for each request; what they got, errors too."""
    seen: list[Any] = []
    over = threading.Event()

    def come() -> None:
        while not over.is_set():
            try:
                seen.append(send(port, context, token))
            except Exception as error:
                seen.append(error)

    clients = [threading.Thread(target=come) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        yield seen
    finally:
        over.set()
        for client in clients:
            client.join(60)


def reloads(door: Daemon, count: int, event: str = "reloaded") -> None:
    """Waits until it was said so often."""
    deadline = time.monotonic() + 60
    while sum(line.get("event") == event for line in door.events) < count:
        assert time.monotonic() < deadline, door.events[-5:]
        time.sleep(0.005)


def test_certificates_and_tokens_change_and_nobody_notices(tmp_path: Path) -> None:
    files = Files(tmp_path / "pem")
    server = files.server()
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{SHOP}\n{LOGS}\n")
    context = ssl.create_default_context(cafile=files.ca)
    flags = ("--http.tls.certificate", server, "--http.tokens.shop.file", str(tokens),
             "--http.keepalive_timeout", "10m")  # fmt: skip
    with daemon(*flags, cwd=tmp_path) as door:
        kept = http.client.HTTPSConnection("localhost", door.port, context=context, timeout=60)
        kept.request("POST", "/v1/records", b"1", bearer(LOGS))
        assert kept.getresponse().read()
        socket = kept.sock
        with coming_again_and_again(door.port, context, SHOP) as seen:
            for done in range(1, ROUNDS + 1):
                files.server()
                tokens.write_text(f"{NEXT}\n{hash_of(SHOP)}\n")
                came = len(seen)
                door.terminate(signal.SIGHUP)
                reloads(door, done)
                while len(seen) < came + 3:
                    time.sleep(0.002)
        assert set(seen) == {202}
        # Still the connection of the beginning, and its token is no longer good.
        kept.request("POST", "/v1/records", b"1", bearer(LOGS))
        assert kept.sock is socket
        assert kept.getresponse().status == 401
        kept.close()
        assert send(door.port, context, NEXT) == 202
        accepted = len(seen) + 2

        Path(server).write_text("-----BEGIN nothing")
        tokens.write_text("short")
        door.terminate(signal.SIGHUP)
        error = door.event("reload_refused")["error"]
        assert "http.tls.certificate" in error
        assert "http.tokens.shop.file: line 1" in error
        assert send(door.port, context, NEXT) == 202
        assert door.until_settled()["accepted"] == accepted + 1
        door.terminate()
        assert door.wait() == 0
    assert len(written(tmp_path)) == accepted + 1
    for line in [*map(str, door.events), *door.other]:
        assert not [secret for secret in (SHOP, LOGS, NEXT, "short'") if secret in line]


def test_a_hangup_during_the_start_and_the_drain_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import os, signal, time\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "def store(batch: list[int]) -> None:\n"
        "    os.kill(os.getpid(), signal.SIGHUP); time.sleep(0.2)\n"
    )
    with daemon("app:store", "--executor.kind", "thread", cwd=tmp_path) as door:
        reloads(door, 1)
        assert door.post(b"1")[0] == 202
        door.terminate()
        door.terminate(signal.SIGHUP)
        assert door.wait() == 0
        assert door.event("drained")["processed"] == 1


def test_a_worker_process_outlives_a_hangup(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import os, signal\n"
        "def store(batch: list[int]) -> None:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
    )
    with daemon("app:store", "--executor.kind", "process", cwd=tmp_path) as door:
        assert door.post(b"1")[0] == 202
        now = door.until_settled()
        assert (now["processed"], now["dead"]) == (1, 0)
        assert not [line for line in door.events if line.get("event") == "worker_died"]


def test_a_hangup_where_there_is_nothing_to_reload(tmp_path: Path) -> None:
    import subprocess

    with daemon("--source", "stdin", cwd=tmp_path, stdin=subprocess.PIPE) as door:
        door.terminate(signal.SIGHUP)
        door.event("reloaded")
        assert door.process.stdin is not None
        door.process.stdin.write(b"1\n")
        door.process.stdin.close()
        assert door.wait() == 0
