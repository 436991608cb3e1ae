"""Monitors of child processes: their descendants, their end, and their output.

A worker leads a process group of its own, and one kill of it ends what stayed in it. What moved to
another group or session is found through `/proc` by two more signs: its parents lead to the worker,
or the environment that it was started with has the worker's mark. The last sign is also that of
orphans.

Out of reach, for a daemon without privileges: what became another user's, what left the group with
an emptied environment and lost its parent, and what another service was asked to start.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from ingestd.handlers import log_relay

if TYPE_CHECKING:
    from ingestd.execution.worker_log import WorkerLog


MARK = "_INGESTD_WORKER"
"""The variable in a worker's environment whose value names the worker."""
_SECONDS = 2.0  # for those that go on starting others while they are being ended
_ENVIRON_BYTES = 1 << 20
_OVER = frozenset("ZX")


class _Process(NamedTuple):
    pid: int
    parent: int
    group: int
    started: int  # clock ticks since the machine's start


def new_mark() -> str:
    """A value of `MARK` that no other worker has."""
    return secrets.token_hex(8)


def end_all(pid: int, mark: str) -> None:
    """Kills a process, a leader of its group, and what it started.

    Call it while the process is not reaped, dead or alive: until then its number is not given to
    anybody else, and neither is that of its group.
    """
    began = _process(pid)
    # Before its end: afterwards its children have another parent.
    found = _started_by(pid, mark, began)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
    give_up = time.monotonic() + _SECONDS
    while found and time.monotonic() < give_up:
        for one in found:
            _kill(one)
        time.sleep(0.001)
        found = _started_by(pid, mark, began)


def _started_by(pid: int, mark: str, began: _Process | None) -> list[_Process]:
    """The living processes that one started, not itself."""
    if began is None:
        return []
    every = {one.pid: one for one in _living() if one.started >= began.started}
    ours = [one for one in every.values() if one.pid != pid and _belongs(one, pid, mark, every)]
    return [one for one in ours if one.pid != os.getpid()]


def _belongs(one: _Process, pid: int, mark: str, every: dict[int, _Process]) -> bool:
    if one.group == pid:
        return True
    here: _Process | None = one
    for _ in range(len(every)):
        if here is None:
            break
        if here.parent == pid:
            return True
        here = every.get(here.parent)
    return _is_marked(one.pid, mark)


def _is_marked(pid: int, mark: str) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:  # noqa: PTH123  it is no path of a user's
            variables = file.read(_ENVIRON_BYTES).split(b"\0")
    except OSError:  # another user's, or it has gone
        return False
    return f"{MARK}={mark}".encode() in variables


def _living() -> list[_Process]:
    try:
        names = os.listdir("/proc")  # noqa: PTH208
    except OSError:
        return []
    found = (_process(int(name)) for name in names if name.isdecimal())
    return [one for one in found if one is not None and one.pid]


def _process(pid: int) -> _Process | None:
    """Reads a process from `/proc`; `None` if it is gone. A dead one has number 0."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123
            # The name in parentheses may have anything in it.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    over = fields[0].decode() in _OVER
    parent, group = map(int, fields[1:3])
    return _Process(0 if over else pid, parent, group, int(fields[19]))


def resident_bytes(pid: int) -> int:
    """The memory of a process that is in RAM; 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def _kill(one: _Process) -> None:
    """Kills this very process, not another one that has its number meanwhile."""
    with contextlib.suppress(OSError):
        if not hasattr(os, "pidfd_open"):
            os.kill(one.pid, signal.SIGKILL)
            return
        handle = os.pidfd_open(one.pid)
        try:
            now = _process(one.pid)
            if now is not None and now.started == one.started:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)


# -- monitoring a child ----------------------------------------------------------------------------
#
# The end is seen from the process, not from its connection: a child that a handler forked may hold
# the worker's end of the socket open long after the worker is gone. A thread for each child waits
# for the process itself, and then closes the connection for the worker that waits for an answer on
# it.
#
# The same thread reads what the child logs. After each look it rests for a moment: text that
# belongs together comes together, and a flood is read no faster than a bounded amount a second.

_POLL_MS = 50
"""How often a process is looked at where the kernel has no descriptor for it."""
_REST_SECONDS = 0.02
_PACKETS_A_LOOK = 500
_BYTES_A_LOOK = 64 * 1024
_BYTES_AT_END = 1 << 20


class Outputs(NamedTuple):
    """Descriptors of a child's output; the monitor owns both and closes them.

    Attributes:
        packets: the packet socket.
        text: the descriptor of a pipe that is the child's descriptor 2.
    """

    packets: socket.socket
    text: int


class Monitor:
    """Watches one child until `finish`. A thread of its own.

    Args:
        pid: a child of this process that is not reaped before `finish`.
        connection: shut down when it has ended, so that no wait on it goes on.
        outputs: what it logs comes from here.
        worker_log: takes it.
        name: of the thread.

    Attributes:
        batch: id of the batch that the child has; set by its worker.
        ended: the process is gone.
    """

    def __init__(
        self,
        pid: int,
        connection: socket.socket,
        outputs: Outputs,
        worker_log: WorkerLog,
        *,
        name: str,
    ) -> None:
        self.batch = ""
        self.ended = False
        self._pid = pid
        self._connection = connection
        self._outputs = outputs
        self._log = worker_log
        self._ended = threading.Event()
        self._finished = threading.Event()
        self._over: set[int] = set()  # descriptors whose other end is closed everywhere
        outputs.packets.setblocking(False)
        os.set_blocking(outputs.text, False)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wait(self, timeout: float) -> bool:
        """Waits until the process is gone, for `timeout` seconds at most; whether it is."""
        return self._ended.wait(max(0.0, timeout))

    def finish(self) -> None:
        """Writes what is there, and waits for the thread; the process has been killed."""
        self._finished.set()
        self._thread.join()

    def _run(self) -> None:
        handle = _handle_of(self._pid)
        try:
            while not self._look(handle):
                pass
            self._end()
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            while not self._finished.wait(_REST_SECONDS):
                self._read()
                self._log.flush()
            left = _BYTES_AT_END
            while left > 0 and (got := self._read()):
                left -= got
            self._log.flush(last=True)
        finally:
            self._end()
            self._outputs.packets.close()
            os.close(self._outputs.text)
            if handle >= 0:
                os.close(handle)

    def _end(self) -> None:
        self.ended = True  # costs no call where it is read before each job
        self._ended.set()

    def _look(self, handle: int) -> bool:
        """Waits for something, and takes what there is; whether the process has ended."""
        poll = select.poll()
        for fd in (handle, self._outputs.packets.fileno(), self._outputs.text):
            if fd >= 0 and fd not in self._over:
                poll.register(fd, select.POLLIN)
        wait = None if handle >= 0 else _POLL_MS
        if self._log.holds:
            wait = _POLL_MS
        ready = [fd for fd, _ in poll.poll(wait)]
        if handle in ready or (handle < 0 and _is_over(self._pid)):
            return True
        if ready:
            self._read()
            self._ended.wait(_REST_SECONDS)
            self._read()
        self._log.flush()
        return False

    def _read(self) -> int:
        """Takes what is there, and no more than a bound; how many bytes that was."""
        got = 0
        for _ in range(_PACKETS_A_LOOK):
            try:
                packet = self._outputs.packets.recv(log_relay.LINE_BYTES_MAX)
            except BlockingIOError:
                break
            except OSError:
                packet = b""
            if not packet:
                self._over.add(self._outputs.packets.fileno())
                break
            got += len(packet)
            self._log.packet(packet)
        with contextlib.suppress(BlockingIOError):
            text = os.read(self._outputs.text, _BYTES_A_LOOK)
            if text:
                self._log.raw(text, self.batch)
                got += len(text)
            else:
                self._over.add(self._outputs.text)
        return got


def _handle_of(pid: int) -> int:
    """A descriptor of a process, or -1 on an old kernel, or another kind of one."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return -1


def _is_over(pid: int) -> bool:
    """Returns True if a child has ended; it stays to be reaped."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
