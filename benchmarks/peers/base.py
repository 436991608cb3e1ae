"""What a peer is: how it is started, how it is asked, and what it counted."""

from __future__ import annotations

import re
import shutil
import subprocess
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.processes import Failed
from benchmarks.records import write_bodies
from ingestd.prove.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NDJSON = "application/x-ndjson"
VERSION_SECONDS = 30.0
"""A program has said its version after this, or has none."""


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


class Command(NamedTuple):
    """One process of a peer.

    Attributes:
        argv: starts it.
        folder: its current folder; what it prints is put there.
        environment: beside the usual.
    """

    argv: list[str]
    folder: Path
    environment: Mapping[str, str] = {}


class Page(NamedTuple):
    """What can be asked for on 127.0.0.1."""

    port: int
    path: str


class Service(NamedTuple):
    """A peer that takes records over HTTP.

    Attributes:
        commands: start it; mostly one.
        port: where it takes records.
        ready: answer 200 once records are taken.
        status: what it counted; of several the sum.
        path: where records are posted to.
        content_type: of a body with one record a line.
    """

    commands: tuple[Command, ...]
    port: int
    ready: tuple[Page, ...]
    status: tuple[Page, ...]
    path: str = "/v1/records"
    content_type: str = NDJSON


class Peer(ABC):
    """One of those who are measured.

    Attributes:
        name: in the tables.
        scenarios: patterns of what it is measured in.
        durable: whether what it accepted is on disk, synced.
        accepted: what its yes means, for the report.
        tested: whether its configuration was ever run; what is only written after the
            documentation says so in the report.
    """

    name: str
    scenarios: tuple[str, ...]
    durable = False
    accepted: str
    tested = True

    @abstractmethod
    def missing(self) -> str:
        """What it needs to be measured and does not find; empty if nothing."""

    @abstractmethod
    def version(self) -> str:
        """Of the program; packages of this environment are listed by themselves."""

    @abstractmethod
    def settings(self, age: float) -> str:
        """The command or the configuration, as it is used, in one line."""

    def service(self, folder: Path, age: float) -> Service:  # noqa: ARG002
        """It over HTTP, on free ports, with its data in `folder` and batches up to `age` s old."""
        raise Failed(f"{self.name} is not measured over HTTP")

    def starter(self, folder: Path, age: float) -> Service:
        """It over HTTP as its start is measured; mostly as everything else is."""
        return self.service(folder, age)

    def bodies(self, folder: Path, size: int) -> list[Path]:
        """Files of requests of `size` records each, sent in turn."""
        return write_bodies(folder, size)

    def reader(self, folder: Path, age: float) -> Command:  # noqa: ARG002
        """The command that reads standard input to its end."""
        raise Failed(f"{self.name} is not measured with standard input")

    def counts(self, page: bytes) -> Counts:  # noqa: ARG002
        """What a status page says."""
        raise Failed(f"{self.name} has no status page")

    def counted(self, folder: Path) -> Counts:  # noqa: ARG002
        """What the command that read standard input in this folder has done."""
        raise Failed(f"{self.name} is not measured with standard input")


class Program(Peer):
    """A peer that is a program of somebody else.

    Args:
        given: where it is; without it, it is looked for on the path.

    Attributes:
        program: what it is called.
    """

    program: str
    version_option = "--version"
    version_pattern = r"(\d+\.\d[\w.+~-]*)"

    def __init__(self, given: str | None = None) -> None:
        self.given = given

    @property
    def found(self) -> str | None:
        """Where it is."""
        # Daemons of Debian are in sbin, which is not on everybody's path.
        return shutil.which(self.given or self.program) or (
            None if self.given else shutil.which(self.program, path="/usr/sbin:/usr/local/sbin")
        )

    @property
    def executable(self) -> str:
        """Where it is.

        Raises:
            Failed: nowhere.
        """
        if self.found is None:
            raise Failed(f"no {self.program}")
        return self.found

    def environment(self) -> dict[str, str]:
        """What it needs beside the usual."""
        return {}

    def missing(self) -> str:
        """See `Peer`."""
        return "" if self.found else f"{self.given or self.program} not found"

    def version(self) -> str:
        """What the pattern finds in what the program prints when it is asked."""
        try:
            said = subprocess.run(
                [self.executable, self.version_option],
                env=self.environment() or None,
                capture_output=True,
                text=True,
                check=False,
                timeout=VERSION_SECONDS,
            )
        except (OSError, subprocess.SubprocessError):
            return "unknown"
        match = re.search(self.version_pattern, said.stdout + said.stderr)
        return match.group(1) if match else "unknown"


def sample(page: bytes, name: str, *labels: str) -> int:
    """The sum of a metric's samples on a page for Prometheus that carry these labels."""
    total = 0.0
    for line in page.decode().splitlines():
        head, _, value = line.rpartition(" ")
        metric = head.partition("{")[0]
        if metric == name and all(label in head for label in labels):
            total += float(value)
    return round(total)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now."""
    return [free_port() for _ in range(count)]


def in_one_line(configuration: str) -> str:
    """A configuration as the report quotes it."""
    return " ".join(configuration.split())
