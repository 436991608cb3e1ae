"""Several daemons on one port (`http.reuse_port`), each with a data directory of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.daemon.harness import Daemon, daemon, written
from tests.daemon.test_mistakes import one_line, run
from tests.deploy.base import missing
from tests.service.tools import listening, passing, refused

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slow,  # each starts processes of its own
    pytest.mark.skipif(
        not hasattr(socket, "SO_REUSEPORT"), reason="the platform has no SO_REUSEPORT"
    ),
]
SHARED = ("--http.reuse_port", "true")


@pytest.fixture
def port() -> Iterator[int]:
    """One that nobody else gets: it is bound and shared, and does not listen."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def homes(tmp_path: Path) -> list[Path]:
    """Where each of two daemons runs; their data directories are in there."""
    homes = [tmp_path / "1", tmp_path / "2"]
    for home in homes:
        home.mkdir()
    return homes


def flags(port: int) -> tuple[str, ...]:
    return (*SHARED, "--listen", f"127.0.0.1:{port}")


def post(port: int, number: int) -> int | str:
    """A number, on a connection of its own: its status, or what happened instead."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/v1/records", b"%d\n" % number)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()


class Comers:
    """Threads that post numbers, each on a connection of its own, and note what came of them.

    Args:
        port: where.
        connections: how many in all.
    """

    def __init__(self, port: int, connections: int) -> None:
        self.outcomes: dict[int, int | str] = {}
        self._port = port
        self._numbers = iter(range(connections))
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._come, daemon=True) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def _come(self) -> None:
        while True:
            with self._lock:
                number = next(self._numbers, None)
            if number is None:
                return
            self.outcomes[number] = post(self._port, number)

    def wait(self, until: int | None = None) -> None:
        """Until so many have come; without a number, until all have."""
        for thread in self._threads:
            while thread.is_alive() and (until is None or len(self.outcomes) < until):
                thread.join(0.005)

    def accepted(self) -> list[int]:
        return sorted(number for number, outcome in self.outcomes.items() if outcome == 202)


def stored(homes: list[Path]) -> list[int]:
    return sorted(int(line) for home in homes for line in written(home))


def test_each_serves_and_every_record_is_in_one_of_them(port: int, homes: list[Path]) -> None:
    with daemon(*flags(port), cwd=homes[0]) as one, daemon(*flags(port), cwd=homes[1]) as two:
        assert one.port == two.port == port
        comers = Comers(port, 300)
        comers.wait()
        assert comers.accepted() == list(range(300))
        # It waits for one that got nothing, too; of 300 connections none gets none.
        ledgers = [one.until_settled(), two.until_settled()]
        assert sum(ledger["accepted"] for ledger in ledgers) == 300
        assert sum(ledger["processed"] for ledger in ledgers) == 300
    assert stored(homes) == list(range(300))


def test_one_goes_and_the_other_serves_on(port: int, homes: list[Path]) -> None:
    with daemon(*flags(port), cwd=homes[0]) as one, daemon(*flags(port), cwd=homes[1]) as two:
        one.terminate()
        assert one.wait() == 0
        assert {post(port, number) for number in range(50)} == {202}
        assert two.until_settled()["processed"] == 50


@pytest.mark.slow
def test_they_start_anew_one_after_the_other(port: int, homes: list[Path]) -> None:
    """Only who is on the way in at the moment of closing can be reset; the rest is served."""
    running: list[Daemon] = []
    try:
        for home in homes:
            running.append(Daemon(*flags(port), cwd=home))
            running[-1].event("daemon_started")
        comers = Comers(port, 3000)
        for turn in range(4):
            comers.wait(len(comers.outcomes) + 50)
            running[turn % 2].terminate()
            assert running[turn % 2].wait() == 0
            running[turn % 2].__exit__()
            running[turn % 2] = Daemon(*flags(port), cwd=homes[turn % 2])
            running[turn % 2].event("daemon_started")
        comers.wait()
        for one in running:
            one.terminate()
            assert one.wait() == 0
    finally:
        for one in running:
            one.__exit__()
    # Whatever happened to who was not accepted: what was is there, once, and nothing else is.
    assert stored(homes) == comers.accepted()
    seen = Counter(comers.outcomes.values())
    # Almost always 0. No more than each comer once a turn, even on a machine that stands still.
    assert seen.total() - seen[202] <= 4 * 4, seen
    assert set(seen) <= {202, 503, "ConnectionResetError", "RemoteDisconnected"}


@contextlib.contextmanager
def network(migrates: bool) -> Iterator[tuple[str, ...]]:
    """A network of its own, while it is there: what a command has to begin with to be in it."""
    setup = (
        f"ip link set lo up && echo {int(migrates)} > /proc/sys/net/ipv4/tcp_migrate_req"
        " && echo up && exec cat"
    )
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", setup], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        if holder.stdout.readline() != b"up\n":
            pytest.skip("this kernel does not know tcp_migrate_req")
        yield ("nsenter", f"--net=/proc/{holder.pid}/ns/net")
        assert holder.stdin is not None
        holder.stdin.close()


@pytest.mark.slow
@pytest.mark.skipif(bool(why := missing("unshare", "nsenter", "ip")), reason=why or "it can run")
@pytest.mark.parametrize("migrates", [True, False])
def test_who_waits_at_a_daemon_that_is_killed(homes: list[Path], migrates: bool) -> None:
    """With net.ipv4.tcp_migrate_req the other one serves them; without it they are reset."""
    with network(migrates) as inside:
        more = {"prefix": inside}
        with (
            daemon(*flags(8080), cwd=homes[0], **more) as one,
            daemon(*flags(8080), cwd=homes[1], **more) as two,
        ):
            one.process.send_signal(signal.SIGSTOP)
            script = Path(__file__).with_name("waiting_clients.py")
            with subprocess.Popen(
                [*inside, sys.executable, str(script), "8080", "64"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            ) as clients:  # fmt: skip
                assert clients.stdout is not None
                assert clients.stdout.readline() == "sent\n"
                one.process.kill()
                one.process.wait()
                seen = json.loads(clients.communicate(timeout=60)[0])
            two.terminate()
            assert two.wait() == 0
    assert len(stored(homes)) == seen["202"]
    reset = seen.get("ConnectionResetError", 0)
    assert seen["202"] + reset == 64
    assert (reset == 0) is migrates


def test_without_the_setting_the_port_is_taken_and_it_says_how_to_share(
    port: int, homes: list[Path]
) -> None:
    alone = ("--listen", f"127.0.0.1:{port}", "--admin.listen", "127.0.0.1:0")
    with daemon(*flags(port), cwd=homes[0]):
        done = run(*alone, cwd=homes[1])
        assert done.returncode == 78
        line = one_line(done)
        assert f"cannot listen on 127.0.0.1:{port} (http.listen): address already in use" in line
        assert "if each has http.reuse_port = true" in line


def test_with_the_setting_alone_it_says_what_the_other_needs(homes: list[Path]) -> None:
    with daemon(cwd=homes[0]) as one:
        done = run(*flags(one.port), "--admin.listen", "127.0.0.1:0", cwd=homes[1])
    assert done.returncode == 78
    assert "its other daemon needs http.reuse_port = true as well" in one_line(done)


def test_the_folder_is_not_shared(port: int, tmp_path: Path) -> None:
    with daemon(*flags(port), cwd=tmp_path) as one:
        done = run(*flags(port), "--admin.listen", "127.0.0.1:0", cwd=tmp_path)
        assert done.returncode == 78
        assert f"another ingestd (process {one.process.pid}) uses it" in one_line(done)


def test_port_0_is_refused(tmp_path: Path) -> None:
    done = run(*flags(0), cwd=tmp_path)
    assert done.returncode == 78
    assert "http.reuse_port (flag --http.reuse_port): http.listen is 127.0.0.1:0" in one_line(done)


def test_a_socket_that_was_passed_is_refused(tmp_path: Path) -> None:
    with listening() as records:
        at = f"127.0.0.1:{records.getsockname()[1]}"
        said = refused(*SHARED, "--listen", "127.0.0.1:9", cwd=tmp_path, **passing([records]))
    assert f"http.reuse_port: the socket {at} was passed" in said
