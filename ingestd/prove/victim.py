"""One life of the daemon: a process of its own, started, watched, killed or asked to leave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ingestd
from ingestd.base.errors import IngestdError

if TYPE_CHECKING:
    from collections.abc import Sequence

START_SECONDS = 120.0
LOG = "daemon.log"
_WATCHED = (b'"daemon_started"', b'"drained"', b'"drained_partly"')
# Dies with us, whatever happens to us. The kernel's word for it survives exec.
_BOOT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.getppid() == int(sys.argv[1]) or os._exit(1)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
# What is in effect is in the file; systemd shall not hear from this one.
_NOT_PASSED = {"CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC"}


class VictimDied(IngestdError):  # noqa: N818  reads as what happened
    """The daemon ended, or did not come up."""

    message = "the daemon {what}; its last lines: {lines}"


class Ready(NamedTuple):
    """A daemon that takes records.

    Attributes:
        port: for records.
        admin_port: for status.
        seconds: from its start.
    """

    port: int
    admin_port: int
    seconds: float


class Victim:
    """A daemon that was just started. Start it from the main thread: it dies with its starter.

    Args:
        arguments: of `python -m ingestd`.
        folder: its current folder, and where its log goes.
    """

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self.events: dict[str, dict[str, Any]] = {}
        self._lines: deque[str] = deque(maxlen=20)
        self._started_at = time.monotonic()
        self._changed = threading.Condition()
        self._ended = False
        boot = [sys.executable, "-c", _BOOT, str(os.getpid()), "-m", "ingestd"]
        self.process = subprocess.Popen(  # noqa: S603
            [*boot, *arguments],
            cwd=folder,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is ours
        )
        self._reader = threading.Thread(target=self._read, args=(folder / LOG,), daemon=True)
        self._reader.start()

    def _read(self, file: Path) -> None:
        assert self.process.stderr is not None  # noqa: S101  it is a pipe
        with file.open("ab") as log, self.process.stderr as lines:
            for line in lines:
                log.write(line)
                self._lines.append(line.decode(errors="replace").rstrip())
                if any(word in line for word in _WATCHED):
                    self._note(line)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _note(self, line: bytes) -> None:
        with contextlib.suppress(ValueError), self._changed:
            event = json.loads(line)
            self.events[event["event"]] = event | {"seconds": time.monotonic() - self._started_at}
            self._changed.notify_all()

    def ready(self) -> Ready:
        """Waits until it takes records.

        Raises:
            VictimDied: it ended, or did not come up in time.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended or "daemon_started" in self.events, START_SECONDS
            )
        started = self.events.get("daemon_started")
        if started is None:
            raise self.died("did not start")
        port, admin = (_port(started[key]) for key in ("listening", "admin"))
        return Ready(port, admin, started["seconds"])

    def wait(self, seconds: float) -> bool:
        """Whether it ended by itself within some time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode is not None

    def kill(self) -> None:
        """SIGKILL, and wait for the end of the process. Only of the daemon, not of its workers."""
        self.process.kill()
        self.process.wait()

    def leave(self) -> None:
        """SIGTERM: drain and leave; the second time, leave at once."""
        self.process.send_signal(signal.SIGTERM)

    def last_words(self) -> int:
        """Its exit code; `events` are complete when this returns. It has ended."""
        self._reader.join(10.0)
        return self.process.wait()

    def close(self) -> None:
        """Whatever state it is in: ends it."""
        if self.process.poll() is None:
            self.kill()
        self._reader.join(10.0)

    def died(self, what: str) -> VictimDied:
        """An error that shows what it said last."""
        if self._ended or self.process.poll() is not None:  # one may be seen before the other
            self._reader.join(2.0)
            self.wait(2.0)
        code = self.process.poll()
        how = what if code is None else f"{what} (exit code {code})"
        return VictimDied(what=how, lines="\n" + "\n".join(self._lines))


def _port(addresses: Sequence[str]) -> int:
    return int(addresses[0].rpartition(":")[2])


def _environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("INGESTD_") and name not in _NOT_PASSED
    }
    ours = str(Path(ingestd.__file__).parents[1])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [ours, kept.get("PYTHONPATH", "")]))
    return kept
