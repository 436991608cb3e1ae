"""Watching a child process: its end is seen from the process, not from its connection.

A child that a handler forked may hold the worker's end of the socket open long after the worker is
gone. A thread for each child waits for the process itself, and then closes the connection for the
lane that waits for an answer on it.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading

_POLL_MS = 50
"""How often a process is looked at where the kernel has no descriptor for it."""


class Monitor:
    """Watches one child until `finish`. A thread of its own.

    Args:
        pid: a child of this process that nobody else reaps before `finish`.
        connection: shut down when it has ended, so that no wait on it goes on.
        name: of the thread.
    """

    def __init__(self, pid: int, connection: socket.socket, name: str) -> None:
        self._pid = pid
        self._connection = connection
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._ended.is_set()

    def wait(self, timeout: float) -> bool:
        """Waits until the process is gone, for `timeout` seconds at most; whether it is."""
        return self._ended.wait(max(0.0, timeout))

    def finish(self) -> None:
        """Waits for the thread; the process has been killed."""
        self._thread.join()

    def _run(self) -> None:
        self._wait_for_end()
        self._ended.set()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _wait_for_end(self) -> None:
        try:
            handle = os.pidfd_open(self._pid)
        except (OSError, AttributeError):  # an old kernel, or none of its kind
            while not _is_over(self._pid):
                self._ended.wait(_POLL_MS / 1000)
            return
        try:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            poll.poll()
        finally:
            os.close(handle)


def _is_over(pid: int) -> bool:
    """Whether a child of ours has ended; it stays to be reaped."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
