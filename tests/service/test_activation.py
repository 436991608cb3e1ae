"""Sockets that somebody else has opened, in the real daemon."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.host.sockets import is_local
from ingestd.host.systemd import take_sockets
from tests.access.tools import SHOP, Files, bearer
from tests.daemon.harness import Daemon, daemon, written
from tests.service.tools import UnixConnection, listening, passing, refused, until

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.slow


def test_both_servers_serve_on_what_they_get(tmp_path: Path) -> None:
    with listening() as records, listening() as admin:
        sockets = {"records": records, "admin": admin}
        with daemon(cwd=tmp_path, **passing(sockets)) as one:
            assert one.port == records.getsockname()[1]
            assert one.admin_port == admin.getsockname()[1]
            assert one.post(b"1\n2\n")[0] == 202
            assert one.until_settled()["processed"] == 2
            one.terminate()
            assert one.wait() == 0
        # It is still open: who comes now waits.
        socket.create_connection(records.getsockname(), 60).close()
    assert len(written(tmp_path)) == 2


class Comer(threading.Thread):
    """Connects anew for each request, and writes down what it gets."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.answers, self.over = port, list[Any](), threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            try:
                connection.request("POST", "/v1/records", b"1\n")
                self.answers.append(connection.getresponse().status)
            except Exception as error:
                self.answers.append(error)
            finally:
                connection.close()

    @property
    def accepted(self) -> int:
        return self.answers.count(202)


def test_nobody_is_refused_while_it_starts_anew(tmp_path: Path) -> None:
    with listening() as records:
        comers = [Comer(records.getsockname()[1]) for _ in range(2)]
        for comer in comers:
            comer.start()
        for _ in range(3):
            before = sum(comer.accepted for comer in comers)
            with daemon(cwd=tmp_path, **passing([records])) as one:
                until(lambda: sum(comer.accepted for comer in comers) > before + 20)  # noqa: B023
                one.terminate()
                assert one.wait() == 0
        with daemon(cwd=tmp_path, **passing([records])) as one:
            for comer in comers:
                comer.over.set()
                comer.join(120)
                assert not comer.is_alive()
            one.terminate()
            assert one.wait() == 0
    assert set(comers[0].answers) | set(comers[1].answers) <= {202, 503}
    assert len(written(tmp_path)) == sum(comer.accepted for comer in comers)


def test_with_tls(tmp_path: Path) -> None:
    files = Files(tmp_path / "pem")
    context = ssl.create_default_context(cafile=files.ca)
    with listening() as records:
        flags = ("--http.tls.certificate", files.server())
        with daemon(*flags, cwd=tmp_path, **passing({"records": records})) as one:
            connection = http.client.HTTPSConnection(
                "localhost", one.port, context=context, timeout=60
            )
            connection.request("POST", "/v1/records", b"1\n")
            assert connection.getresponse().status == 202
            connection.close()


def test_a_unix_socket(tmp_path: Path) -> None:
    """It is this machine alone, and the kernel says who is there."""
    path = str(tmp_path / "records.sock")
    with listening(path, socket.AF_UNIX) as records:
        flags = ("--http.tokens.shop.token", SHOP)
        with daemon(*flags, cwd=tmp_path, **passing({"records": records})) as one:
            assert one.event("daemon_started")["listening"] == [f"unix:{path}"]
            connection = UnixConnection(path)
            connection.request("POST", "/v1/records", b"1\n", bearer(SHOP))
            assert connection.getresponse().read().startswith(b'{"accepted":1')
            connection.request("POST", "/v1/records", b"1\n")
            assert connection.getresponse().status == 401
            connection.close()
            assert one.event("requests_denied")["last"] == f"uid {os.getuid()}"
            one.terminate()
            assert one.wait() == 0
    assert (tmp_path / "records.sock").is_socket()


def test_a_unix_socket_for_the_admin_server(tmp_path: Path) -> None:
    path = str(tmp_path / "admin.sock")
    with listening(path, socket.AF_UNIX) as admin:
        flags = ("--admin.listen", "")
        with daemon(*flags, cwd=tmp_path, **passing({"admin": admin})) as one:
            connection = UnixConnection(path)
            connection.request("GET", "/readyz")
            assert connection.getresponse().status == 200
            connection.close()
            one.terminate()
            assert one.wait() == 0
    assert (tmp_path / "admin.sock").is_socket()


def test_a_public_socket_needs_proof(tmp_path: Path) -> None:
    """Whatever `http.listen` says: what counts is where the socket is."""
    with listening(("0.0.0.0", 0)) as records:
        said = refused(cwd=tmp_path, **passing([records]))
        assert (
            f"the passed socket 0.0.0.0:{records.getsockname()[1]} is reachable from other machines"
            in said
        )
        with daemon("--http.tokens.shop.token", SHOP, cwd=tmp_path, **passing([records])) as one:
            assert one.post(b"1\n", **bearer(SHOP))[0] == 202


def test_what_can_not_be_served_on(tmp_path: Path) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as datagrams, socket.socket() as deaf:
        assert "no stream socket" in refused(cwd=tmp_path, **passing([datagrams]))
        deaf.bind(("127.0.0.1", 0))
        assert "does not listen" in refused(cwd=tmp_path, **passing([deaf]))
        file: Any = (tmp_path / "file").open("w")
        assert "is no socket" in refused(cwd=tmp_path, **passing([file]))
        file.close()


def test_several_need_names(tmp_path: Path) -> None:
    with listening() as one, listening() as two:
        assert "FileDescriptorName=records" in refused(cwd=tmp_path, **passing([one, two]))


def test_standard_input_takes_no_socket(tmp_path: Path) -> None:
    with listening() as records:
        said = refused("--source", "stdin", cwd=tmp_path, **passing([records]))
    assert "source.kind is stdin" in said


def test_sockets_of_another_process_are_not_ours(tmp_path: Path) -> None:
    with listening() as records:
        started = passing([records], LISTEN_PID="1")
        with daemon(cwd=tmp_path, **started) as one:
            assert one.port != records.getsockname()[1]


def test_children_get_neither_the_sockets_nor_the_variables(tmp_path: Path) -> None:
    """Not even those that a handler starts without closing what it has."""
    (tmp_path / "look.py").write_text(
        "import json, os, pathlib\n"
        "fds = '/proc/self/fd'\n"
        "links = [os.path.realpath(f'{fds}/{n}') for n in os.listdir(fds)]\n"
        "pathlib.Path('seen').write_text(json.dumps([links, list(os.environ)]))\n"
    )
    (tmp_path / "app.py").write_text(
        "import subprocess, sys\n"
        "def store(batch: list[int]) -> None:\n"
        "    subprocess.run([sys.executable, 'look.py'], close_fds=False, check=True)\n"
    )
    with listening() as records:
        inode = os.fstat(records.fileno()).st_ino
        with daemon("app:store", cwd=tmp_path, **passing([records])) as one:
            assert one.post(b"1\n")[0] == 202
            one.until_settled()
    links, names = json.loads((tmp_path / "seen").read_text())
    assert not [link for link in links if f"socket:[{inode}]" in link]
    assert not [name for name in names if name.startswith("LISTEN_")]


@pytest.mark.parametrize("fds", ["", "0"])
def test_nothing_was_passed(fds: str) -> None:
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": fds}
    assert take_sockets(environ) == ([], [])
    assert not environ


@pytest.mark.parametrize(
    ("family", "address", "local"),
    [
        (socket.AF_INET, ("127.0.0.1", 0), True),
        (socket.AF_INET, ("127.3.2.1", 0), True),
        (socket.AF_INET, ("0.0.0.0", 0), False),
        (socket.AF_INET6, ("::1", 0), True),
        (socket.AF_INET6, ("::", 0), False),
        (socket.AF_INET6, ("::ffff:127.0.0.1", 0), True),
    ],
)
def test_where_only_this_machine_comes(family: int, address: Any, local: bool) -> None:
    with listening(address, family) as sock:
        assert is_local(sock) is local


def test_a_daemon_that_is_stopped_while_clients_wait(tmp_path: Path) -> None:
    """A connection in the backlog of the socket is served by the next daemon."""
    with listening() as records:
        with daemon(cwd=tmp_path, **passing([records])) as one:
            one.terminate()
            assert one.wait() == 0
        waiting = http.client.HTTPConnection(*records.getsockname(), timeout=60)
        waiting.request("POST", "/v1/records", b"7\n")
        with Daemon(cwd=tmp_path, **passing([records])):
            assert waiting.getresponse().status == 202
        waiting.close()
