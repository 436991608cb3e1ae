"""Who is measured: how each is started, how it is asked, and what it counted."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.processes import Failed, last_words

if TYPE_CHECKING:
    from pathlib import Path


class Counts(NamedTuple):
    """Records since the peer started.

    Attributes:
        accepted: the source said yes to them.
        processed: the handler is done with them.
        dead: given up.
    """

    accepted: int
    processed: int
    dead: int = 0


class Service(NamedTuple):
    """A peer that takes records over HTTP.

    Attributes:
        command: starts it.
        port: where it takes records.
        status_port: where it answers the next two.
        ready: the path that answers 200 once records are taken.
        status: the path of what it counted, as JSON.
    """

    command: list[str]
    port: int
    status_port: int
    ready: str
    status: str


class Peer(ABC):
    """One of those who are measured.

    Attributes:
        name: in the table.
        sources: what it can read: `http`, `stdin`.
        durable: whether what it accepted is on disk.
        needs: modules without which it can't be measured.
    """

    name: str
    sources: tuple[str, ...]
    durable: bool
    needs: tuple[str, ...]

    @abstractmethod
    def service(self, folder: Path, age: float) -> Service:
        """It over HTTP, on free ports, with its data in `folder` and batches up to `age` s old."""

    @abstractmethod
    def reader(self, folder: Path, age: float) -> list[str]:
        """The command that reads standard input to its end."""

    @abstractmethod
    def counts(self, status: dict[str, Any]) -> Counts:
        """What the status page says."""

    @abstractmethod
    def counted(self, folder: Path) -> Counts:
        """What the command that read standard input in this folder says."""


class Ingestd(Peer):
    """The daemon as it is installed: journal on disk, a sync before every yes, one process."""

    name = "ingestd"
    sources = ("http", "stdin")
    durable = True
    needs = ()

    def command(self, folder: Path, age: float) -> list[str]:
        """Everything that differs from the defaults, except addresses."""
        return [
            *[sys.executable, "-m", "ingestd", "run", "benchmarks.handler:store"],
            *["--executor.kind", "process", "--executor.workers", "1"],
            *["--batch.records_max", "1000", "--batch.age_max", f"{age:g}s"],
            *["--data-dir", str(folder / "data"), "--log.format", "json"],
        ]

    def service(self, folder: Path, age: float) -> Service:
        """See `Peer`."""
        _without_configuration(folder)
        port, admin = _free_ports(2)
        listen = ["--listen", f"127.0.0.1:{port}", "--admin.listen", f"127.0.0.1:{admin}"]
        command = [*self.command(folder, age), *listen]
        return Service(command, port, admin, "/readyz", "/v1/status")

    def reader(self, folder: Path, age: float) -> list[str]:
        """See `Peer`."""
        _without_configuration(folder)
        return [*self.command(folder, age), "--source", "stdin", "--admin.listen", ""]

    def counts(self, status: dict[str, Any]) -> Counts:
        """See `Peer`."""
        pipeline = status["pipelines"]["default"]
        return Counts(pipeline["accepted"], pipeline["processed"], pipeline["dead"])

    def counted(self, folder: Path) -> Counts:
        """Its last report on stderr.

        Raises:
            Failed: there is none.
        """
        lines = (folder / "stderr").read_text().splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{")]
        reports = [event for event in events if event["event"].startswith("drained")]
        if not reports:
            raise Failed(f"no report: {last_words(folder)}")
        return self.counts({"pipelines": {"default": reports[-1]}})


class _Baseline(Peer):
    """The plain loop: nothing is durable, batches are decoded and stored in one thread."""

    module: str
    sources: tuple[str, ...] = ("http",)
    durable = False
    needs: tuple[str, ...] = ()

    def service(self, folder: Path, age: float) -> Service:  # noqa: ARG002  keeps nothing
        """See `Peer`."""
        (port,) = _free_ports(1)
        command = [sys.executable, "-m", self.module, str(port), str(age)]
        return Service(command, port, port, "/status", "/status")

    def reader(self, folder: Path, age: float) -> list[str]:  # noqa: ARG002
        """See `Peer`."""
        return [sys.executable, "-m", "benchmarks.loop", str(age)]

    def counts(self, status: dict[str, Any]) -> Counts:
        """See `Peer`."""
        return Counts(status["accepted"], status["processed"])

    def counted(self, folder: Path) -> Counts:
        """What it printed."""
        return self.counts(json.loads((folder / "stdout").read_text()))


class PlainLoop(_Baseline):
    """The loop over standard input, and behind a bare aiohttp."""

    name = "loop"
    module = "benchmarks.web_aiohttp"
    sources = ("http", "stdin")


class FastAPI(_Baseline):
    """The loop behind FastAPI and uvicorn."""

    name = "fastapi"
    module = "benchmarks.web_fastapi"
    needs = ("fastapi", "uvicorn")


PEERS: tuple[Peer, ...] = (Ingestd(), PlainLoop(), FastAPI())
"""ingestd first, then what it is compared with."""


def missing(peer: Peer) -> list[str]:
    """What would have to be installed to measure this peer."""
    return [module for module in peer.needs if importlib.util.find_spec(module) is None]


def _without_configuration(folder: Path) -> None:
    """An empty file here, so that the machine's own in /etc is not read."""
    (folder / "ingestd.toml").touch()


def _free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now; held together, so that they differ."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
