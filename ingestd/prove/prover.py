"""The run: start, serve, kill, again; then drain and compare. READ FIRST in this room."""

from __future__ import annotations

import http.client
import json
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from ingestd.base.errors import IngestdError
from ingestd.prove.clients import Client, Door
from ingestd.prove.plan import kill_at
from ingestd.prove.verdict import compare, report, rows_in
from ingestd.prove.victim import Victim

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ingestd.prove.plan import Bounds, Kill
    from ingestd.prove.progress import Progress
    from ingestd.prove.verdict import Report

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
    bounds: Bounds
    seconds: float | None


class Prover:
    """One run, or the rest of one. Use it from the main thread.

    Args:
        task: what is to be done.
        progress: what was done already; kept up to date, in its file too.
        say: shows a line about how it goes.
    """

    def __init__(self, task: Task, progress: Progress, say: Callable[[str], None]) -> None:
        self._task = task
        self._progress = progress
        self._say = say
        self._victim: Victim | None = None
        self._door = Door()
        self._stop = threading.Event()
        self._clients = [
            Client(
                number,
                seed=progress.state.seed,
                bounds=task.bounds,
                door=self._door,
                progress=progress,
                stop=self._stop,
            )
            for number in range(len(progress.state.sent))
        ]

    def run(self) -> Report:
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

    def _start(self) -> Victim:
        self._victim = Victim(self._task.arguments, self._task.folder)
        return self._victim

    def _serve(self, victim: Victim) -> int:
        """Waits until it is ready and lets the clients in; gives the port of its status."""
        state = self._progress.state
        ready = victim.ready()
        if state.killed:
            state.starts.append(round(ready.seconds, 4))
        else:
            state.first_start = state.first_start or ready.seconds
        self._door.open(ready.port)
        return ready.admin_port

    def _wait(self, victim: Victim, seconds: float) -> bool:
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

    def _drain(self, victim: Victim, port: int) -> int:
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
