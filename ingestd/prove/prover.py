"""One life of the daemon: a process of its own, started, watched, killed or asked to leave."""

from __future__ import annotations

import contextlib
import http.client
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
from ingestd.prove.clients import ProofClient, ProofTarget
from ingestd.prove.plan import kill_at
from ingestd.prove.verdict import compare, report, rows_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ingestd.prove.plan import Kill, ProofBounds
    from ingestd.prove.progress import ProofProgress
    from ingestd.prove.verdict import ProofReport


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


class DaemonDied(IngestdError):  # noqa: N818  reads as what happened
    """The daemon ended, or did not come up."""

    message = "the daemon {what}; its last lines: {lines}"


class DaemonReady(NamedTuple):
    """A daemon that takes records.

    Attributes:
        port: for records.
        admin_port: for status.
        seconds: from its start.
    """

    port: int
    admin_port: int
    seconds: float


class DaemonProcess:
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

    def ready(self) -> DaemonReady:
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
        return DaemonReady(port, admin, started["seconds"])

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

    def died(self, what: str) -> DaemonDied:
        """An error that shows what it said last."""
        if self._ended or self.process.poll() is not None:  # one may be seen before the other
            self._reader.join(2.0)
            self.wait(2.0)
        code = self.process.poll()
        how = what if code is None else f"{what} (exit code {code})"
        return DaemonDied(what=how, lines="\n" + "\n".join(self._lines))


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


# -- the run: start, serve, kill, again; then drain and compare ------------------------------------
#
# READ FIRST in this room.

_STALLED_SECONDS = 120.0
_LAST_SECONDS = 0.5
"""The daemon takes records after the last kill, too."""
_LOOK_SECONDS = 0.1


class ClientFailed(IngestdError):  # noqa: N818  reads as what happened
    """A client can't go on."""

    message = "a client can't go on: {problem}"


class Task(NamedTuple):
    """What is to be done.

    Attributes:
        arguments: of `python -m ingestd`, to start the daemon.
        folder: its current folder.
        rows: the sink's file.
        bounds: of the clients' requests.
        seconds: no kill begins later than this after the start; `None`: no bound.
    """

    arguments: Sequence[str]
    folder: Path
    rows: Path
    bounds: ProofBounds
    seconds: float | None


class Prover:
    """One run, or the rest of one. Use it from the main thread.

    Args:
        task: what is to be done.
        progress: what was done already; kept up to date, in its file too.
        say: shows a line about how it goes.
    """

    def __init__(self, task: Task, progress: ProofProgress, say: Callable[[str], None]) -> None:
        self._task = task
        self._progress = progress
        self._say = say
        self._victim: DaemonProcess | None = None
        self._door = ProofTarget()
        self._stop = threading.Event()
        self._clients = [
            ProofClient(
                number,
                seed=progress.state.seed,
                bounds=task.bounds,
                door=self._door,
                progress=progress,
                stop=self._stop,
            )
            for number in range(len(progress.state.sent))
        ]

    def run(self) -> ProofReport:
        """Everything; leaves no process and no thread behind, however it ends.

        Raises:
            IngestdError: it can't go on; what was sent is written down.
            KeyboardInterrupt: as above.
        """
        state = self._progress.state
        self._ends_at = time.monotonic() + (self._task.seconds or float("inf"))
        self._progress.save()
        for client in self._clients:
            client.start()
        try:
            more = True
            while more and state.killed < state.kills:
                more = self._live(kill_at(state.seed, state.killed))
            exit_code, drained = self._finish()
        finally:
            self._end()
        found = compare(rows_in(self._task.rows), state.sent)
        return report(state, found, drained, exit_code)

    # -- one life ------------------------------------------------------------------------------

    def _live(self, kill: Kill) -> bool:
        """From a start to a kill; `False` if the time is over before."""
        state = self._progress.state
        victim = self._start()
        after = kill.after(state.first_start)
        if not kill.early:
            self._serve(victim)
        if not self._wait(victim, after):
            return False
        victim.kill()
        self._door.open(None)
        self._victim = None
        state.killed += 1
        state.early += kill.early
        self._progress.save()
        accepted, unknown = self._progress.totals()
        place = "its start" if kill.early else "it was ready"
        self._say(
            f"kill {state.killed}/{state.kills}, {after:.2f} s after {place};"
            f" accepted {accepted:,}, unknown {unknown:,}"
        )
        return True

    def _start(self) -> DaemonProcess:
        self._victim = DaemonProcess(self._task.arguments, self._task.folder)
        return self._victim

    def _serve(self, victim: DaemonProcess) -> int:
        """Waits until it is ready and lets the clients in; gives the port of its status."""
        state = self._progress.state
        ready = victim.ready()
        if state.killed:
            state.starts.append(round(ready.seconds, 4))
        else:
            state.first_start = state.first_start or ready.seconds
        self._door.open(ready.port)
        return ready.admin_port

    def _wait(self, victim: DaemonProcess, seconds: float) -> bool:
        """Lets it live for some time; `False` if the time is over before.

        Raises:
            VictimDied: it ended by itself.
            ClientFailed: it gave an answer that can't be.
        """
        until = time.monotonic() + seconds
        while (left := min(until, self._ends_at) - time.monotonic()) > 0:
            if victim.wait(min(left, _LOOK_SECONDS)):
                raise victim.died("ended by itself")
            self._check_clients()
        return time.monotonic() < self._ends_at

    def _check_clients(self) -> None:
        for client in self._clients:
            if client.problem:
                raise ClientFailed(problem=client.problem)

    # -- the end -------------------------------------------------------------------------------

    def _finish(self) -> tuple[int, dict[str, object]]:
        """Lets the daemon settle everything and leave; its exit code and its last word."""
        victim = self._victim or self._start()
        admin_port = self._serve(victim)
        self._wait(victim, _LAST_SECONDS)
        self._stop_clients()
        self._check_clients()
        self._say("no more kills; the daemon drains")
        code = self._drain(victim, admin_port)
        said = victim.events
        return code, said.get("drained") or said.get("drained_partly") or {}

    def _drain(self, victim: DaemonProcess, port: int) -> int:
        """Waits for its end, as long as something moves; its exit code."""
        victim.leave()
        pending, since, urged = -1, time.monotonic(), False
        while not victim.wait(_LOOK_SECONDS):
            now = _pending(port, pending)
            if now != pending:
                pending, since = now, time.monotonic()
            elif time.monotonic() - since > _STALLED_SECONDS:
                if urged:
                    raise victim.died("does not leave")
                victim.leave()  # at once, with what is pending in the journal
                urged, since = True, time.monotonic()
        return victim.last_words()

    def _stop_clients(self) -> None:
        """Each sees the answer of the request that it is at."""
        self._stop.set()
        for client in self._clients:
            client.join()
        self._progress.save(idle=True)

    def _end(self) -> None:
        try:
            self._stop_clients()
        finally:
            if self._victim is not None:
                self._victim.close()


def _pending(port: int, before: int) -> int:
    """Records that are not settled; as before, if it does not say: it is about to leave."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/v1/status")
        status = json.load(connection.getresponse())
        return int(status["pipelines"]["default"]["pending"])
    except (OSError, http.client.HTTPException):
        return before
    finally:
        connection.close()
