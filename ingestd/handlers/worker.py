"""What runs in a child process: say hello, then job after job until the daemon goes.

The child dies with its parent, three times over: an idle child reads the end of its socket, a busy
one has a thread that waits for the end of the lifeline, and on Linux the kernel kills one whose C
code holds the interpreter (`PR_SET_PDEATHSIG`). It leaves SIGINT, SIGTERM and SIGHUP to
the daemon: a terminal and systemd send them to everyone, and only the daemon knows what is still to
be done.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading

from ingestd.base.errors import HandlerLoadError
from ingestd.base.leaving import end_process
from ingestd.handlers import wire
from ingestd.handlers.runner import Runner

_PR_SET_PDEATHSIG = 1


def main(socket_fd: int, lifeline_fd: int, memory_fd: int) -> None:
    """The child's whole life."""
    for fd in (socket_fd, lifeline_fd):
        os.set_inheritable(fd, False)
    slot = wire.Slot(memory_fd)
    if memory_fd >= 0:
        os.close(memory_fd)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Not SIG_IGN: that would be inherited by what the handler starts.
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_watch, args=(lifeline_fd,), name="lifeline", daemon=True).start()
    with socket.socket(fileno=socket_fd) as sock, contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wire.SOCKET_BYTES)
        _serve(sock, slot)
    # The handler may have left threads behind that would keep the process.
    end_process(0)


def _serve(sock: socket.socket, slot: wire.Slot) -> None:
    message = wire.receive(sock)
    if message is None:
        return
    hello = wire.decode_hello(message)
    _die_with(hello.parent)
    runner = Runner(hello.handler)
    try:
        not_ready = runner.prepare()
    except HandlerLoadError as error:
        wire.send(sock, wire.encode(wire.Ready(load_error=str(error.facts["problem"]))))
        return
    wire.send(sock, wire.encode(wire.Ready(not_ready=not_ready, is_async=runner.is_async)))
    while (message := wire.receive(sock)) is not None:
        wire.send(sock, wire.encode(runner.run(slot.unpack(message))))
    failed = runner.close()
    if failed:
        print(f"ingestd: the handler's close() failed: {failed}", file=sys.stderr)  # noqa: T201


def _watch(lifeline_fd: int) -> None:
    with contextlib.suppress(OSError):
        os.read(lifeline_fd, 1)
    os._exit(1)


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
