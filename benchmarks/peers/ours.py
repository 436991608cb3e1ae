"""The daemon itself: one of it, and two of it on one port."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from benchmarks.peers.base import Command, Counts, Page, Peer, Service, free_ports
from benchmarks.processes import Failed, last_words
from ingestd.http.settings import HttpSettings

if TYPE_CHECKING:
    from pathlib import Path

PAIR = 2


class Ingestd(Peer):
    """The daemon as it is installed: journal on disk, a sync before every yes, one process."""

    name = "ingestd"
    handler = "benchmarks.handler:store"
    scenarios: tuple[str, ...] = ("http-*", "stdin-*", "start", "memory", "latency-*", "journal")
    durable = True
    accepted = "in the journal, and the journal was synced to disk"

    def missing(self) -> str:
        """See `Peer`."""
        return ""

    def version(self) -> str:
        """See `Peer`; it is listed with the packages."""
        return ""

    def settings(self, age: float) -> str:
        """See `Peer`."""
        return f"`python {' '.join(self._run(age)[1:])} --data-dir TEMPORARY`"

    def service(self, folder: Path, age: float) -> Service:
        """See `Peer`."""
        return self._service(folder, age)

    def starter(self, folder: Path, age: float) -> Service:
        """See `Peer`; without a worker process, whose own start would be waited for."""
        return self._service(folder, age, "--executor.kind", "thread")

    def _service(self, folder: Path, age: float, *more: str) -> Service:
        port, admin = free_ports(2)
        command = self._daemon(folder, age, port, admin, *more)
        return Service((command,), port, (Page(admin, "/readyz"),), (Page(admin, "/v1/status"),))

    def reader(self, folder: Path, age: float) -> Command:
        """See `Peer`."""
        return self._command(folder, age, "--source", "stdin", "--admin.listen", "")

    def counts(self, page: bytes) -> Counts:
        """See `Peer`."""
        pipeline = json.loads(page)["pipelines"]["default"]
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
        report = reports[-1]
        return Counts(report["accepted"], report["processed"], report["dead"])

    def _run(self, age: float) -> list[str]:
        """Everything that differs from the defaults, except addresses and the data directory."""
        return [
            *[sys.executable, "-m", "ingestd", "run", self.handler],
            *["--executor.kind", "process", "--executor.workers", "1"],
            *["--batch.records_max", "1000", "--batch.age_max", f"{age:g}s"],
            *["--log.format", "json"],
        ]

    def _command(self, folder: Path, age: float, *more: str) -> Command:
        # An empty file here, so that the machine's own in /etc is not read.
        (folder / "ingestd.toml").touch()
        argv = [*self._run(age), "--data-dir", str(folder / "data"), *more]
        return Command(argv, folder)

    def _daemon(self, folder: Path, age: float, port: int, admin: int, *more: str) -> Command:
        listen = ["--listen", f"127.0.0.1:{port}", "--admin.listen", f"127.0.0.1:{admin}"]
        return self._command(folder, age, *listen, *more)


class IngestdPair(Ingestd):
    """Two daemons that share one port, each with a data directory of its own.

    The door of one daemon is one event loop, so on more than one core the second is a second door.
    """

    name = "ingestd-x2"
    scenarios = ("http-1",)
    accepted = "the same, in the journal of one of the two daemons"

    def missing(self) -> str:
        """See `Peer`."""
        known = "reuse_port" in HttpSettings.model_fields
        return "" if known else "this version has no setting http.reuse_port"

    def settings(self, age: float) -> str:
        """See `Peer`."""
        return f"twice {super().settings(age)[:-1]} --http.reuse_port true`"

    def service(self, folder: Path, age: float) -> Service:
        """See `Peer`."""
        port, *admins = free_ports(1 + PAIR)
        commands = []
        for number, admin in enumerate(admins, 1):
            own = folder / str(number)
            own.mkdir()
            shared = ("--http.reuse_port", "true")
            commands.append(self._daemon(own, age, port, admin, *shared))
        ready = tuple(Page(admin, "/readyz") for admin in admins)
        status = tuple(Page(admin, "/v1/status") for admin in admins)
        return Service(tuple(commands), port, ready, status)
