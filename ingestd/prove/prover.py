"""Runs the proof: starts the daemon, kills it again and again, lets it drain and compares."""

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
from ingestd.prove import owned
from ingestd.prove.clients import ProofClients, ProofTarget
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
# The effective settings are in the file; systemd must not hear from this daemon.
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
    """One process of the daemon, which dies with the thread that starts it.

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
        self.process = subprocess.Popen(  # noqa: S603
            owned([sys.executable, "-m", "ingestd", *arguments]),
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
            DaemonDied: it ended, or did not come up in time.
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
        """Returns True if it ended by itself within some time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode is not None

    def kill(self) -> None:
        """Kills the daemon, not its workers, and waits for the end of its process."""
        self.process.kill()
        self.process.wait()

    def leave(self) -> None:
        """Sends SIGTERM: drain and leave; the second time, leave at once."""
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self) -> int:
        """The exit code of a process that has ended; `events` are complete when this returns."""
        self._reader.join(10.0)
        return self.process.wait()

    def close(self) -> None:
        """Ends the process, whatever its state."""
        if self.process.poll() is None:
            self.kill()
        self._reader.join(10.0)

    def died(self, what: str) -> DaemonDied:
        """An error with the last lines of the log."""
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


# -- the run ---------------------------------------------------------------------------------------

_STALLED_SECONDS = 120.0
LAST_SECONDS = 0.5
"""The daemon takes records after the last kill, too."""
LOOK_SECONDS = 0.1


class Task(NamedTuple):
    """Inputs of a run.

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
        task: its inputs.
        progress: its state; kept up to date, in its file too.
        say: prints a line of progress.
    """

    def __init__(self, task: Task, progress: ProofProgress, say: Callable[[str], None]) -> None:
        self._task = task
        self._progress = progress
        self._say = say
        self._daemon: DaemonProcess | None = None
        self._target = ProofTarget()
        self._clients = ProofClients(progress, task.bounds, [self._target])

    def run(self) -> ProofReport:
        """Runs to the end; leaves no process and no thread behind, however it ends.

        Raises:
            IngestdError: it can't go on; the state is saved.
            KeyboardInterrupt: as above.
        """
        state = self._progress.state
        self._ends_at = time.monotonic() + (self._task.seconds or float("inf"))
        self._progress.save()
        self._clients.start()
        try:
            more = True
            while more and state.killed < state.kills:
                more = self._live(kill_at(state.seed, state.killed))
            exit_code, said = self._finish()
        finally:
            self._end()
        found = compare(rows_in(self._task.rows), state.sent)
        return report(state, found, said, exit_code)

    # -- one process of the daemon -------------------------------------------------------------

    def _live(self, kill: Kill) -> bool:
        """Runs from a start to a kill; returns False if the time is over before."""
        state = self._progress.state
        daemon = self._start()
        after = kill.after(state.first_start)
        if not kill.early:
            self._serve(daemon)
        if not self._wait(daemon, after):
            return False
        daemon.kill()
        self._target.open(None)
        self._daemon = None
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
        self._daemon = DaemonProcess(self._task.arguments, self._task.folder)
        return self._daemon

    def _serve(self, daemon: DaemonProcess) -> int:
        """Waits until it is ready and lets the clients in; gives the port of its status."""
        state = self._progress.state
        ready = daemon.ready()
        if state.killed:
            state.starts.append(round(ready.seconds, 4))
        else:
            state.first_start = state.first_start or ready.seconds
        self._target.open(ready.port)
        return ready.admin_port

    def _wait(self, daemon: DaemonProcess, seconds: float) -> bool:
        """Waits for some time while it runs; returns False if the time is over before.

        Raises:
            DaemonDied: it ended by itself.
            ClientFailed: it gave a wrong answer.
        """
        until = time.monotonic() + seconds
        while (left := min(until, self._ends_at) - time.monotonic()) > 0:
            if daemon.wait(min(left, LOOK_SECONDS)):
                raise daemon.died("ended by itself")
            self._clients.check()
        return time.monotonic() < self._ends_at

    # -- the end -------------------------------------------------------------------------------

    def _finish(self) -> tuple[int, dict[str, Any]]:
        """Lets the daemon drain; returns its exit code and its drain report."""
        daemon = self._daemon or self._start()
        admin_port = self._serve(daemon)
        self._wait(daemon, LAST_SECONDS)
        self._clients.stop()
        self._clients.check()
        self._say("no more kills; the daemon drains")
        return drained(daemon, admin_port)

    def _end(self) -> None:
        try:
            self._clients.stop()
        finally:
            if self._daemon is not None:
                self._daemon.close()


def drained(daemon: DaemonProcess, port: int) -> tuple[int, dict[str, Any]]:
    """Lets a daemon drain as long as records are settled.

    Args:
        daemon: that serves.
        port: of its status.

    Returns:
        Its exit code and its drain report.

    Raises:
        DaemonDied: it does not leave.
    """
    daemon.leave()
    pending, since, urged = -1, time.monotonic(), False
    while not daemon.wait(LOOK_SECONDS):
        now = _pending(port, pending)
        if now != pending:
            pending, since = now, time.monotonic()
        elif time.monotonic() - since > _STALLED_SECONDS:
            if urged:
                raise daemon.died("does not leave")
            daemon.leave()  # at once, with what is pending in the journal
            urged, since = True, time.monotonic()
    code, said = daemon.exit_code(), daemon.events
    return code, said.get("drained") or said.get("drained_partly") or {}


def _pending(port: int, before: int) -> int:
    """Asks for the pending records; returns `before` without an answer: it is about to leave."""
    status = _status(port)
    return before if status is None else int(status["pending"])


def check_balance(port: int) -> None:
    """Checks that each record is accounted for at this moment.

    Raises:
        DaemonDied: one is not.
    """
    status = _status(port)
    if status is not None and not status["balanced"]:
        raise DaemonDied(what="counts otherwise than it should", lines=json.dumps(status))


def _status(port: int) -> dict[str, Any] | None:
    """Asks for the status of its pipeline; `None` without an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/v1/status")
        status = json.load(connection.getresponse())
    except (OSError, ValueError, http.client.HTTPException):
        return None
    else:
        found: dict[str, Any] = status["pipelines"]["default"]
        return found
    finally:
        connection.close()
