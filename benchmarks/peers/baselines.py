"""What people write by hand: the plain loop, and the same behind FastAPI."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import TYPE_CHECKING

from benchmarks.peers.base import Command, Counts, Page, Peer, Service, free_ports

if TYPE_CHECKING:
    from pathlib import Path


class _Baseline(Peer):
    """The plain loop: nothing is durable, batches are decoded and stored in one thread."""

    module: str
    accepted = "in an asyncio.Queue, in memory"
    needs: tuple[str, ...] = ()

    def missing(self) -> str:
        """See `Peer`."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"needs {' '.join(absent)}" if absent else ""

    def version(self) -> str:
        """See `Peer`; its packages are listed by themselves."""
        return ""

    def settings(self, age: float) -> str:
        """See `Peer`."""
        return f"`python -m {self.module} PORT {age:g}`"

    def service(self, folder: Path, age: float) -> Service:
        """See `Peer`."""
        (port,) = free_ports(1)
        command = Command([sys.executable, "-m", self.module, str(port), str(age)], folder)
        status = (Page(port, "/status"),)
        return Service((command,), port, status, status)

    def counts(self, page: bytes) -> Counts:
        """See `Peer`."""
        status = json.loads(page)
        return Counts(status["accepted"], status["processed"])


class PlainLoop(_Baseline):
    """The loop over standard input, and behind a bare aiohttp."""

    name = "loop"
    module = "benchmarks.web_aiohttp"
    scenarios = ("http-*", "stdin-*", "start")

    def settings(self, age: float) -> str:
        """See `Peer`."""
        return f"{super().settings(age)}, `python -m benchmarks.loop {age:g}`"

    def reader(self, folder: Path, age: float) -> Command:
        """See `Peer`."""
        return Command([sys.executable, "-m", "benchmarks.loop", str(age)], folder)

    def counted(self, folder: Path) -> Counts:
        """What it printed."""
        return self.counts((folder / "stdout").read_bytes())


class FastAPI(_Baseline):
    """The loop behind FastAPI and uvicorn."""

    name = "fastapi"
    module = "benchmarks.web_fastapi"
    scenarios = ("http-*", "start")
    needs = ("fastapi", "uvicorn")
