"""Main loop of a child process: handshake, then job after job until the daemon goes.

The child dies with its parent, three times over: an idle child reads the end of its packets, a busy
one has a thread that waits for the end of the lifeline, and on Linux the kernel kills one whose C
code holds the interpreter (`PR_SET_PDEATHSIG`). It leaves SIGINT, SIGTERM and SIGHUP to
the daemon: a terminal and systemd send them to everyone, and only the daemon knows what is still to
be done. What it forks does not: `multiprocessing` ends its children with SIGTERM.

The descriptors of the connection are the worker's alone. They are closed in every process that it
forks and in every program that it starts, and before one is used it is looked at: a handler that
closes descriptors may have got the same number for something of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from typing import TYPE_CHECKING

from ingestd.base.errors import HandlerLoadError
from ingestd.base.process import GARBAGE_MAX, HeldSignals, end_process
from ingestd.handlers import wire
from ingestd.handlers.log_relay import Relay
from ingestd.handlers.runner import Runner

if TYPE_CHECKING:
    from types import FrameType

_PR_SET_PDEATHSIG = 1
_LEFT_TO_DAEMON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_JOB_BYTES_MAX = 1 << 40


class _DaemonConnection:
    """The worker's end of the two sockets, the lifeline and the memory.

    Attributes:
        number: of the job that was received last.
        job: gives the job of a message.
    """

    def __init__(self, socket_fd: int, packets_fd: int, lifeline_fd: int, memory_fd: int) -> None:
        for fd in (socket_fd, packets_fd, lifeline_fd):
            os.set_inheritable(fd, False)
        self._sock = socket.socket(fileno=socket_fd)
        self._packets = socket.socket(fileno=packets_fd)
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wire.SOCKET_BYTES)
        self._lifeline = lifeline_fd
        self._slot = wire.SharedBuffer(memory_fd, ours=False)
        if memory_fd >= 0:
            os.close(memory_fd)
        self._is = {fd: _identity(fd) for fd in (socket_fd, packets_fd, lifeline_fd)}
        self._worker = os.getpid()
        self.number = 0
        self.job = self._slot.unpack
        os.register_at_fork(after_in_child=self._leave_to_parent)

    def receive(self) -> bytes | bytearray | None:
        """The next message for this worker; `None` when the daemon has gone."""
        self._look(self._packets.fileno())
        # By the number of this process: a child of the worker's gets nothing.
        message = wire.receive_packet(
            self._packets, self._sock, worker=os.getpid(), limit=_JOB_BYTES_MAX
        )
        if message is None:
            return None
        self.number = message.number
        return message.body

    def send(self, message: bytes) -> None:
        """Answers the message that was received last."""
        self._look(self._sock.fileno())
        wire.send(self._sock, message, worker=os.getpid(), number=self.number)

    def watch_lifeline(self) -> None:
        """Waits until the daemon is gone, and takes along what the worker started."""
        with contextlib.suppress(OSError):
            os.read(self._lifeline, 1)
            self._look(self._lifeline)
            os.killpg(self._worker, signal.SIGKILL)
        os._exit(1)

    def _look(self, fd: int) -> None:
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) != self._is[fd]:
            raise OSError("a descriptor of the worker's was taken")

    def _leave_to_parent(self) -> None:
        """In a forked child: these are the parent's, and it answers alone."""
        for one in (self._sock.detach(), self._packets.detach(), self._lifeline):
            with contextlib.suppress(OSError):
                if _identity(one) == self._is[one]:
                    os.close(one)
        self._slot.close()


def main(log_fd: int, level: int, *connection_fds: int) -> None:
    """The child's whole life; takes the descriptors of its connection in their order."""
    gc.set_threshold(GARBAGE_MAX)
    connection = _DaemonConnection(*connection_fds)
    relay = Relay(log_fd, level)
    relay.install()
    for number in _LEFT_TO_DAEMON:
        # Not SIG_IGN: that would be inherited by what the handler starts.
        signal.signal(number, _leave_to_daemon)
    HeldSignals(_LEFT_TO_DAEMON, _take_from_daemon)
    threading.Thread(target=connection.watch_lifeline, name="lifeline", daemon=True).start()
    code = 1
    try:
        _serve(connection, relay)
        code = 0
    except OSError:
        pass  # the daemon is gone, or the handler closed the connection
    except BaseException:  # noqa: BLE001  no memory for a message, say: this worker is no use
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    # The handler may have left threads behind that would keep the process.
    end_process(code)


def _leave_to_daemon(_number: int, _frame: FrameType | None) -> None:
    pass


def _take_from_daemon() -> None:
    """In a forked child: it ends when it is told to, unless the handler wants something else."""
    for number in _LEFT_TO_DAEMON:
        if signal.getsignal(number) is _leave_to_daemon:
            signal.signal(number, signal.SIG_DFL)


def _serve(connection: _DaemonConnection, relay: Relay) -> None:
    message = connection.receive()
    if message is None:
        return
    hello = wire.decode_hello(message)
    _die_with(hello.parent)
    close_errors: list[str] = []
    runner = Runner(hello.handler, close_errors.append)
    try:
        not_ready = runner.prepare()
        relay.adopt_structlog()
    except HandlerLoadError as error:
        connection.send(wire.encode(wire.ReadyMessage(load_error=str(error.facts["problem"]))))
        return
    ready = wire.ReadyMessage("", not_ready, runner.is_async, runner.schema)
    connection.send(wire.encode(ready))
    if hello.checks and not ready.is_async:
        connection.send(wire.encode(wire.CheckMessage(runner.check())))
    while (message := connection.receive()) is not None:
        job = connection.job(message)
        relay.batch = job.batch
        relay.adopt_structlog()
        result = runner.run(job)
        relay.done()
        closing = runner.spoiled
        connection.send(wire.encode(wire.ResultMessage(result, closing)))
        if closing:
            runner.renew()
            connection.send(wire.encode(wire.ConnectionClosed("; ".join(close_errors))))
            close_errors.clear()
    failed = runner.close()
    if failed:
        relay.event(logging.WARNING, "handler_close_failed", {"error": failed})


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
