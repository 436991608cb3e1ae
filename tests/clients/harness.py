"""Runs a real client against a daemon that refuses some requests and is restarted amid them.

A client program is called with its address and the number of records, `ADDRESS COUNT [MORE …]`. It
sends `{"n": 0}` to `{"n": COUNT - 1}` in its protocol's own form, prints the line `half` once half
of them are handed to the client, goes on at once, waits until the client has sent all, and ends
with 0. It is configured as the page of its family in `docs/clients/` says.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import pytest

from ingestd.prove.servers import free_port
from tests.clients.install import DEBIAN_PINS, NPM_PINS, PYTHON_PINS, folder
from tests.daemon.harness import ROOT, Daemon, written

if TYPE_CHECKING:
    from collections.abc import Sequence

COUNT = 1000
PROGRAMS = Path(__file__).resolve().parent / "programs"
TABLE = ROOT / "docs" / "clients" / "README.md"
INSTALL = "not installed: python -m tests.clients.install"


class Client(NamedTuple):
    """A program and the client that it uses.

    Attributes:
        name: of the client's package.
        version: of the package.
        command: that runs the program, before its arguments.
        pinned: the version is the same on every machine.
    """

    name: str
    version: str
    command: tuple[str, ...]
    pinned: bool = True


def python_client(package: str, program: str) -> Client:
    """A client from PyPI; the test is skipped if it is not installed."""
    home = folder(PYTHON_PINS)
    stem = package.replace("-", "_").lower()
    for found in home.glob("lib/python*/site-packages/*.dist-info"):
        name, _, version = found.stem.partition("-")
        if name.lower() == stem and (home / "complete").exists():
            return Client(package, version, (str(home / "bin" / "python"), str(PROGRAMS / program)))
    pytest.skip(f"{package} is {INSTALL}")


def npm_client(package: str, program: str) -> Client:
    """A client from npm; the test is skipped if it is not installed."""
    home, node = folder(*NPM_PINS), shutil.which("node")
    facts = home / "node_modules" / package / "package.json"
    if node is None or not facts.exists():
        pytest.skip(f"{package} is {INSTALL}" if node else "node is not installed")
    # Modules are looked for beside the program; a link keeps the programs in one folder.
    place = home / "programs"
    place.mkdir(exist_ok=True)
    program_there = place / program
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        if not program_there.exists() or program_there.readlink() != PROGRAMS / program:
            program_there.unlink(missing_ok=True)
            program_there.symlink_to(PROGRAMS / program)
    version = json.loads(facts.read_bytes())["version"]
    return Client(package, version, (node, "--preserve-symlinks-main", str(program_there)))


def found_client(name: str, version: Sequence[str], command: Sequence[str]) -> Client:
    """A client that the machine has, or not: then the test is skipped.

    Args:
        name: of the program.
        version: arguments with which it says its version, in the first line.
        command: see `Client`; where it is `name`, its path is put in.
    """
    here = folder(DEBIAN_PINS) / "bin"
    path = shutil.which(name, path=f"{here}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed")
    said = subprocess.run([path, *version], capture_output=True, text=True, timeout=120)
    words = [word.strip(",()") for word in (said.stdout + said.stderr).split()]
    number = next((word for word in words if word.lstrip("v")[:1].isdigit()), "?")
    run = tuple(path if word == name else word for word in command)
    return Client(name, number, run, pinned=False)


class Receiver:
    """A daemon on one address for its whole life, through restarts; use with `with`.

    Args:
        cwd: its folder.
        args: its flags.
        listens: it has an http source; else flags say where it listens.
        flaky: it refuses every twentieth append.
        more: of `Daemon`.
    """

    def __init__(
        self, cwd: Path, *args: str, listens: bool = True, flaky: bool = True, **more: Any
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._cwd = cwd
        listen = ("--listen", f"127.0.0.1:{self.port}") if listens else ()
        self._args = (*listen, "--batch.age_max", "50ms", *args)
        self._more = {"module": "tests.clients.flaky" if flaky else "ingestd", **more}
        self.daemon: Daemon

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.daemon.__exit__()

    def start(self) -> None:
        self.daemon = Daemon(*self._args, cwd=self._cwd, **self._more)
        try:
            self.daemon.event("daemon_started")
        except BaseException:
            self.daemon.__exit__()
            raise

    def stop(self) -> None:
        """Drains the daemon; nothing that is odd may stand in its log."""
        self.daemon.terminate()
        code = self.daemon.wait()
        faults = [e for e in self.daemon.events if e["level"] in {"error", "critical"}]
        assert (code, faults, self.daemon.other) == (0, [], [])
        self.daemon.__exit__()

    def restart(self) -> None:
        self.stop()
        self.start()

    def deliver(
        self,
        client: Client,
        *more: str,
        address: str = "",
        count: int = COUNT,
        timeout: float = 180,
    ) -> list[Any]:
        """Runs a client to its end, with a restart amid it, and drains the daemon.

        Returns:
            The records as the sink wrote them.
        """
        command = [*client.command, address or self.url, str(count), *more]
        environ = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
        with subprocess.Popen(
            command, cwd=self._cwd, env=environ, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        ) as process:  # fmt: skip
            said: list[str] = []
            half = threading.Event()

            def read() -> None:
                assert process.stdout is not None
                for line in process.stdout:
                    said.append(line)
                    if line.strip() == "half":
                        half.set()
                half.set()

            reader = threading.Thread(target=read)
            reader.start()
            try:
                assert half.wait(timeout), said[-20:]
                self.restart()
                code = process.wait(timeout)
            finally:
                # With what it has started: that would hold the pipe, and so the reader.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                reader.join(60)
        assert code == 0, "".join(said)[-4000:]
        assert "half\n" in said, "".join(said)[-4000:]
        return self.finish()

    def until_accepted(self, count: int) -> None:
        """Waits until so many records were accepted in this life of the daemon and before it."""
        deadline = time.monotonic() + 60
        while self.daemon.status()["pipelines"]["default"]["accepted"] < count:
            assert time.monotonic() < deadline, self.daemon.status()
            time.sleep(0.01)

    def finish(self) -> list[Any]:
        """Drains the daemon; the records as the sink wrote them."""
        deadline = time.monotonic() + 120
        while any(one["pending"] for one in self.daemon.status()["pipelines"].values()):
            assert time.monotonic() < deadline, self.daemon.status()
            time.sleep(0.05)
        self.stop()
        return [json.loads(line) for line in written(self._cwd)]


def check(numbers: Sequence[int], *, once: bool, count: int = COUNT) -> None:
    """Checks that every number came, and each once where the protocol has an id."""
    times = Counter(numbers)
    missing = sorted(set(range(count)) - times.keys())
    assert not missing, f"{len(missing)} missing: {missing[:20]}"
    doubled = {n: found for n, found in times.items() if found > 1}
    assert not (once and doubled), f"{len(doubled)} came more than once: {list(doubled)[:20]}"


def report(endpoint: str, client: Client, what: str) -> None:
    """Says in the table of `docs/clients/README.md` what ran; call it at the end of a test.

    With `CLIENTS_TABLE=write` the row is written; else it must stand there.

    Args:
        endpoint: name of the endpoint or source.
        client: that was run.
        what: it did, in a few words: `1,000 logs, protobuf, gzip; exactly once`.
    """
    row = f"| `{endpoint}` | {client.name} | {client.version} | {what} |"
    if os.environ.get("CLIENTS_TABLE") == "write":
        _write(row)
    kept = _rows(TABLE.read_text())
    if not client.pinned:
        row = row.replace(f"| {client.version} |", "|")
        kept = [_without_version(one) for one in kept]
    assert row in kept, f"{row}\nis not in {TABLE}; CLIENTS_TABLE=write pytest … writes it"


BEGIN, END = "<!-- clients -->\n", "<!-- /clients -->\n"


def _rows(text: str) -> list[str]:
    table = text.partition(BEGIN)[2].partition(END)[0]
    return [line for line in table.splitlines() if line.startswith("| `")]


def _without_version(row: str) -> str:
    cells = row.split(" | ")
    return " | ".join([*cells[:2], *cells[3:]])


def _write(row: str) -> None:
    with TABLE.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = file.read()
        same = row.split(" | ")[:2]
        rows = [one for one in _rows(text) if one.split(" | ")[:2] != same]
        head = ["| endpoint | client | version | what was run |", "| --- | --- | --- | --- |"]
        table = "\n".join([*head, *sorted([*rows, row], key=str.lower), ""])
        before, _, rest = text.partition(BEGIN)
        file.seek(0)
        file.write(before + BEGIN + table + END + rest.partition(END)[2])
        file.truncate()
