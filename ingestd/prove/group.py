"""Runs the proof for journals in NATS: several daemons, and the servers, are killed and paused.

Each daemon has a log, and a thread here that kills it, pauses it, and starts it again under its
name with an empty data directory, as on another machine. One that is paused past its lease gets a
successor before it goes on, and has to be refused then. A thread more does the like to the servers,
which keep their disks. All daemons write into one file of the sink `sqlite`.

The threads that start processes live until the end of the run: a process dies with its starter.
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from ingestd.base.errors import Exit
from ingestd.prove.clients import ProofClients, ProofTarget
from ingestd.prove.plan import (
    EARLY_SPREAD,
    SERVING_SECONDS_MAX,
    daemon_fault_at,
    server_fault_at,
)
from ingestd.prove.prover import (
    LAST_SECONDS,
    LOOK_SECONDS,
    START_SECONDS,
    DaemonDied,
    DaemonProcess,
    check_balance,
    drained,
)
from ingestd.prove.servers import ServersFailed, local_cluster
from ingestd.prove.verdict import compare, report_of_group, rows_in

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ingestd.prove.plan import DaemonFault
    from ingestd.prove.progress import GroupState, ProofProgress
    from ingestd.prove.prover import DaemonReady, Task
    from ingestd.prove.servers import NatsCluster, NatsServer
    from ingestd.prove.verdict import ProofReport

_REFUSED_SECONDS = 10.0
"""A daemon that lost its log, and has nothing to write, may not know it."""
_SHORT = 0.8
"""Of a lease: the longest pause without a successor."""
_MACHINES = "machines"
_RECOVERED_SECONDS = 30.0


class GroupTask(NamedTuple):
    """Inputs of a run with several daemons.

    Attributes:
        task: as for one daemon; each has a folder in its folder.
        lease: seconds, of each daemon's log.
    """

    task: Task
    lease: float


class _Over(Exception):  # noqa: N818  ends a thread, and is no error
    """The run is over."""


class GroupProver:
    """One run, or the rest of one, with several daemons. Use it from the main thread.

    Args:
        inputs: of the run.
        progress: its state; kept up to date, in its file too.
        group: the part of the state that is of several daemons.
        say: prints a line of progress.

    Attributes:
        folder: of the run.
        lease: seconds.
        seed: of the run.
        group: its state.
        arguments: of all daemons.
        over: set at the end of the run, however it ends.
        draining: set when there are no more faults, and no more records.
    """

    def __init__(
        self,
        inputs: GroupTask,
        progress: ProofProgress,
        group: GroupState,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.lease = inputs.task.folder, inputs.lease
        self.seed, self.group = progress.state.seed, group
        self.over, self.draining = threading.Event(), threading.Event()
        self._progress, self._state, self._say = progress, progress.state, say
        self._lock = threading.Lock()
        self._next = self._state.killed
        servers = inputs.task.folder / "servers"
        servers.mkdir(exist_ok=True)
        self._cluster = local_cluster(servers, group.nodes)
        urls = ",".join(self._cluster.urls)
        self.arguments = [*inputs.task.arguments, "--journal.jetstream.servers", urls]
        self._task = inputs.task
        self._daemons = [_GroupDaemon(self, number) for number in range(group.daemons)]
        self._servers = _Servers(self, self._cluster)
        targets = [one.target for one in self._daemons]
        self._clients = ProofClients(progress, inputs.task.bounds, targets)

    def run(self) -> ProofReport:
        """Runs to the end; leaves no process and no thread behind, however it ends.

        Raises:
            IngestdError: it can't go on; the state is saved.
            KeyboardInterrupt: as above.
        """
        task = self._task
        self._ends_at = time.monotonic() + (task.seconds or float("inf"))
        self._progress.save()
        threads: list[_Faulted] = [*self._daemons, self._servers]
        try:
            self._cluster.start()
            self._clients.start()
            for one in threads:
                one.start()
            self._until(lambda: all(one.faultless.is_set() for one in threads))
            self.over.wait(LAST_SECONDS)  # they take records after the last fault, too
            self._clients.stop()
            self._say("no more faults; the daemons drain")
            self.draining.set()
            self._until(lambda: all(one.end is not None for one in self._daemons))
        finally:
            self._end()
        ends = [one.end for one in self._daemons if one.end is not None]
        return report_of_group(
            self._state, self.group, compare(rows_in(task.rows), self._state.sent), ends
        )

    def _until(self, done: Callable[[], bool]) -> None:
        """Waits for something.

        Raises:
            IngestdError: a daemon, a server or a client can't go on.
        """
        while not done():
            time.sleep(LOOK_SECONDS)
            for one in (*self._daemons, self._servers):
                if one.problem is not None:
                    raise one.problem
            self._clients.check()

    def _end(self) -> None:
        self._clients.stopping.set()
        self.over.set()
        for server in self._cluster.servers:
            server.resume()
        for one in self._daemons:
            one.close()
        self._servers.join()
        self._cluster.stop()
        self._clients.stop()

    # -- for its threads -----------------------------------------------------------------------

    def next_fault(self) -> DaemonFault | None:
        """Gives out the next fault of a daemon; `None`: there are no more."""
        with self._lock:
            if self._next >= self._state.kills or self.is_late:
                return None
            self._next += 1
            return daemon_fault_at(self._state.seed, self._next - 1)

    @property
    def have_served(self) -> bool:
        """Tells if each daemon has taken records."""
        return all(one.served.is_set() for one in self._daemons)

    @property
    def is_late(self) -> bool:
        """Tells if no fault should begin any more."""
        return time.monotonic() >= self._ends_at

    def rest(self, seconds: float) -> None:
        """Waits for some time.

        Raises:
            _Over: the run is over.
        """
        if self.over.wait(seconds):
            raise _Over

    def survived(self, text: str = "", **counts: int) -> None:
        """Counts a fault, and tells of it."""
        with self._lock:
            for name, count in counts.items():
                of = self.group if hasattr(self.group, name) else self._state
                setattr(of, name, getattr(of, name) + count)
            self._progress.save()
            if text:
                accepted, unknown = self._progress.totals()
                done = f"{self._state.killed}/{self._state.kills}"
                servers = f"{self.group.server_faults}/{self.group.server_kills}"
                self._say(
                    f"daemons {done}, servers {servers}: {text};"
                    f" accepted {accepted:,}, unknown {unknown:,}"
                )

    def started(self, seconds: float, *, again: bool) -> None:
        """Keeps the time that a start took."""
        with self._lock:
            if again:
                self._state.starts.append(round(seconds, 4))
            else:
                self._state.first_start = self._state.first_start or seconds

    @property
    def start_seconds(self) -> float:
        """Seconds that a start takes, with its wait for the lease."""
        return max(1.0, self._state.first_start) + self.lease


class _Faulted:
    """A thread with faults to make.

    Attributes:
        faultless: set when it has made its last one.
        problem: why it can't go on.
    """

    def __init__(self, prover: GroupProver, name: str) -> None:
        self.faultless = threading.Event()
        self.problem: Exception | None = None
        self._prover = prover
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def join(self) -> None:
        """Waits for its end; the run is over."""
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
        except _Over:
            pass
        except Exception as error:  # noqa: BLE001  the main thread raises it, and waits for nothing more
            if not self._prover.over.is_set():
                self.problem = error
        self._prover.over.wait()

    def _work(self) -> None:
        raise NotImplementedError


class _Servers(_Faulted):
    """Kills and pauses servers, one after the other or several at once."""

    def __init__(self, prover: GroupProver, cluster: NatsCluster) -> None:
        super().__init__(prover, "servers")
        self._cluster = cluster

    def _work(self) -> None:
        prover, group = self._prover, self._prover.group
        while not prover.have_served:  # a stream is made only while all of its nodes are there
            prover.rest(LOOK_SECONDS)
        while group.server_faults < group.server_kills and not prover.is_late:
            self._fault()
        self.faultless.set()

    def _fault(self) -> None:
        prover, group = self._prover, self._prover.group
        fault = server_fault_at(prover.seed, group.server_faults, group.nodes)
        prover.rest(fault.gap)
        nodes = [self._cluster.servers[number] for number in fault.nodes]
        for node in nodes:
            (node.pause if fault.pauses else node.kill)()
        prover.rest(fault.length)
        for node in nodes:
            (node.resume if fault.pauses else node.launch)()
        names = ", ".join(node.name for node in nodes)
        count = {"servers_paused" if fault.pauses else "servers_killed": len(nodes)}
        what = "paused" if fault.pauses else "killed"
        prover.survived(f"{names} {what} for {fault.length:.1f} s", server_faults=1, **count)
        for node in self._cluster.servers:
            self._recovered(node)

    def _recovered(self, node: NatsServer) -> None:
        """Waits until a node has what it missed: records are taken between faults, too."""
        until = time.monotonic() + _RECOVERED_SECONDS
        while node.ask("/healthz").get("status") != "ok":
            self._prover.rest(LOOK_SECONDS)
            if not node.running:
                raise ServersFailed(problem=f"{node.name} ended by itself")
            if time.monotonic() > until:
                return  # the next fault may come before


class _GroupDaemon(_Faulted):
    """One daemon's log, and the processes that own it one after the other.

    Attributes:
        target: the port of the one that serves.
        served: set when the first of them took records.
        end: exit code and drain report of the last one.
    """

    def __init__(self, prover: GroupProver, number: int) -> None:
        self._name = f"daemon-{number + 1}"
        super().__init__(prover, self._name)
        self.target = ProofTarget()
        self.served = threading.Event()
        self.end: tuple[int, dict[str, Any]] | None = None
        self._folder = prover.folder / self._name
        self._daemon: DaemonProcess | None = None
        self._ready: DaemonReady | None = None
        self._live: dict[DaemonProcess, Path] = {}
        self._changing = threading.Lock()
        self._lives = 0

    def close(self) -> None:
        """Ends its processes and its thread; the run is over."""
        with self._changing:
            for daemon in self._live:
                daemon.close()
        self.join()

    def _work(self) -> None:
        shutil.rmtree(self._folder / _MACHINES, ignore_errors=True)
        while (fault := self._prover.next_fault()) is not None:
            self._make(fault)
        self._serve()
        self.faultless.set()
        while not self._prover.draining.is_set():
            self._rest(LOOK_SECONDS)
        daemon, ready = self._serve()
        self.end = drained(daemon, ready.admin_port)

    # -- processes -----------------------------------------------------------------------------

    def _start(self) -> DaemonProcess:
        """Starts a process with an empty data directory."""
        with self._changing:
            self._prover.rest(0)
            self._lives += 1
            data = self._folder / _MACHINES / str(self._lives)
            data.mkdir(parents=True)
            own = ["--data-dir", str(data), "--journal.jetstream.name", self._name]
            daemon = DaemonProcess([*self._prover.arguments, *own], self._folder)
            self._live[daemon] = data
        return daemon

    def _gone(self, daemon: DaemonProcess) -> None:
        """Kills a process, if it runs, and removes its machine."""
        daemon.close()
        with self._changing:
            data = self._live.pop(daemon)
        shutil.rmtree(data, ignore_errors=True)
        if daemon is self._daemon:
            self.target.open(None)
            self._daemon = self._ready = None

    def _until_ready(self, daemon: DaemonProcess) -> tuple[DaemonProcess, DaemonReady]:
        """Waits until a process takes records; starts it again if the servers were not up for it.

        Raises:
            DaemonDied: it does not start.
        """
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                return daemon, daemon.ready()
            except DaemonDied:
                if daemon.process.poll() != Exit.LOST or time.monotonic() > until:
                    raise
            self._gone(daemon)
            self._prover.survived(restarts=1)
            daemon = self._start()

    def _serve(self) -> tuple[DaemonProcess, DaemonReady]:
        """Waits until there is a process that takes records."""
        if self._daemon is None or self._ready is None:
            daemon, ready = self._until_ready(self._daemon or self._start())
            self._opened(daemon, ready)
            return daemon, ready
        return self._daemon, self._ready

    def _opened(self, daemon: DaemonProcess, ready: DaemonReady) -> None:
        self._daemon, self._ready = daemon, ready
        self.target.open(ready.port)
        self.served.set()
        self._prover.started(ready.seconds, again=self._lives > 1)

    def _rest(self, seconds: float) -> None:
        """Waits for some time while it serves.

        Raises:
            DaemonDied: it ended by itself.
        """
        daemon, _ = self._serve()
        self._prover.rest(seconds)
        if daemon.process.poll() is not None:
            raise daemon.died("ended by itself")

    # -- faults --------------------------------------------------------------------------------

    def _make(self, fault: DaemonFault) -> None:
        if fault.how == "early" and self._daemon is None:
            self._kill_early(fault.part * EARLY_SPREAD * self._prover.start_seconds)
            return
        daemon, ready = self._serve()
        after = fault.part * SERVING_SECONDS_MAX
        self._rest(after)
        check_balance(ready.admin_port)
        if fault.how == "pause":
            self._pause(daemon, fault.length * _SHORT * self._prover.lease)
        elif fault.how == "replace":
            self._replace(daemon)
        else:
            self._gone(daemon)
            self._prover.survived(f"{self._name} killed {after:.2f} s after it was ready", killed=1)

    def _kill_early(self, seconds: float) -> None:
        daemon = self._start()
        self._prover.rest(seconds)
        code = daemon.process.poll()
        if code is not None and code != Exit.LOST:
            raise daemon.died("did not start")
        self._gone(daemon)
        text = f"{self._name} killed {seconds:.2f} s after its start"
        self._prover.survived(text, killed=1, early=1)

    def _pause(self, daemon: DaemonProcess, seconds: float) -> None:
        daemon.process.send_signal(signal.SIGSTOP)
        self._prover.rest(seconds)
        daemon.process.send_signal(signal.SIGCONT)
        self._prover.survived(f"{self._name} paused for {seconds:.2f} s", killed=1, paused=1)

    def _replace(self, paused: DaemonProcess) -> None:
        """Pauses a process until another one has its log, and lets it go on.

        Raises:
            DaemonDied: it ended in another way than one that lost its log.
        """
        began = time.monotonic()
        paused.process.send_signal(signal.SIGSTOP)
        self.target.open(None)
        daemon, ready = self._until_ready(self._start())
        self._opened(daemon, ready)
        paused.process.send_signal(signal.SIGCONT)
        seconds = time.monotonic() - began
        refused = self._left(paused)
        if refused and paused.exit_code() != Exit.LOST:
            raise paused.died("lost its log and ended otherwise")
        self._gone(paused)
        text = f"{self._name} paused for {seconds:.2f} s and replaced"
        self._prover.survived(text, killed=1, replaced=1, refused=int(refused))

    def _left(self, daemon: DaemonProcess) -> bool:
        """Waits for some time until a process has ended by itself."""
        until = time.monotonic() + _REFUSED_SECONDS
        while not daemon.wait(0) and time.monotonic() < until:
            self._rest(LOOK_SECONDS)
        return daemon.wait(0)
