"""Reads descriptors of any kind without blocking the event loop.

Pipes, FIFOs and sockets are read when the loop says that they are ready. Everything else (files,
terminals, devices) is read by a thread: epoll refuses regular files, never fires for some devices,
and a terminal is shared with other processes, so its O_NONBLOCK is not ours to set.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import queue
import select
import socket
import stat
import sys
import threading
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

READ_BYTES = 240 * 1024
"""The most that one read takes: with a line that was begun before still one chunk of a journal."""
_PIPE_BYTES = 1024 * 1024  # what Linux allows every user (fs.pipe-max-size)
_JOIN_SECONDS = 1.0


class Reader(Protocol):
    """One open input."""

    async def read(self) -> bytes | None:
        """Returns bytes as soon as there are some; `b""` at the end; `None` once stopped.

        Raises:
            OSError: it can't be read.
        """
        ...

    def stop(self) -> None:
        """Reads nothing more; a `read` that waits returns `None`, and no byte is lost."""
        ...

    def close(self) -> None:
        """Releases descriptors, flags and the thread."""
        ...


def open_reader(fd: int) -> Reader:
    """Opens the right reader for a descriptor, which stays open and keeps its flags.

    A descriptor that is not open reads as empty input.
    """
    if fd == 0 and sys.__stdin__ is None:
        # Closed when the process started: whatever has the number now is not our input.
        return _Empty()
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return _Empty()
    if stat.S_ISSOCK(mode):
        return _open_socket(fd)
    if stat.S_ISFIFO(mode):
        return _open_pipe(fd)
    return ThreadReader(fd)


class _Empty:
    async def read(self) -> bytes | None:
        return b""

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


def _open_socket(fd: int) -> Reader:
    # MSG_DONTWAIT is for one call: a socket can't be opened anew, and its flags are shared, often
    # with stdout. The loop polls an epoll of ours, because libuv sets O_NONBLOCK on what it
    # polls.
    sock = socket.socket(fileno=os.dup(fd))
    poll = select.epoll()
    poll.register(sock, select.EPOLLIN)

    def close() -> None:
        poll.close()
        sock.close()

    return ReadyReader(poll.fileno(), lambda: sock.recv(READ_BYTES, socket.MSG_DONTWAIT), close)


def _open_pipe(fd: int) -> Reader:
    own, close = _open_anew(fd)
    with contextlib.suppress(OSError, AttributeError):
        if fcntl.fcntl(own, fcntl.F_GETPIPE_SZ) < _PIPE_BYTES:
            fcntl.fcntl(own, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return ReadyReader(own, lambda: os.read(own, READ_BYTES), close)


def _open_anew(fd: int) -> tuple[int, Callable[[], None]]:
    """Opens a non-blocking descriptor for the same pipe; returns it with its release.

    O_NONBLOCK belongs to the open file, which other processes may share: opening the pipe once
    more gives one of our own. Where that is not allowed the flag is set, and restored at the end.
    """
    # The end that is written to, opened anew, would be one that is read, and would never end.
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY:
        with contextlib.suppress(OSError):
            own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            return own, lambda: os.close(own)
    dup = os.dup(fd)
    blocking = os.get_blocking(dup)
    os.set_blocking(dup, False)

    def close() -> None:
        os.set_blocking(dup, blocking)
        os.close(dup)

    return dup, close


class ReadyReader:
    """Reads a descriptor when the loop says that it is ready.

    Args:
        fd: the descriptor that the loop polls.
        read_now: one read that never blocks; raises BlockingIOError if there is nothing.
        release: called once, at the end.
    """

    def __init__(self, fd: int, read_now: Callable[[], bytes], release: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = fd
        self._read_now = read_now
        self._release = release
        self._ready: asyncio.Future[None] | None = None
        self._stopped = False
        self._closed = False

    async def read(self) -> bytes | None:
        """See `Reader`."""
        while not self._stopped:
            try:
                return self._read_now()
            except (BlockingIOError, InterruptedError):
                await self._wait()
        return None

    async def _wait(self) -> None:
        ready = self._ready = self._loop.create_future()
        self._loop.add_reader(self._fd, self._wake)
        try:
            await ready
        finally:
            self._ready = None
            self._loop.remove_reader(self._fd)

    def _wake(self) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    def stop(self) -> None:
        """See `Reader`."""
        self._stopped = True
        self._wake()

    def close(self) -> None:
        """See `Reader`."""
        self.stop()
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            self._release()


class ThreadReader:
    """Reads a descriptor in a thread, one read for each call.

    Args:
        fd: the descriptor; not closed.
    """

    def __init__(self, fd: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = fd
        self._requests: queue.SimpleQueue[asyncio.Future[bytes | None] | None] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe()
        self._stopped = False
        self._closed = False
        # A read that hangs in the kernel must not keep the process: daemon.
        self._thread = threading.Thread(target=self._run, name="stdin-reader", daemon=True)
        self._thread.start()

    async def read(self) -> bytes | None:
        """See `Reader`."""
        if self._stopped:
            return None
        answer: asyncio.Future[bytes | None] = self._loop.create_future()
        self._requests.put(answer)
        return await answer

    def stop(self) -> None:
        """See `Reader`."""
        if not self._stopped:
            self._stopped = True
            os.write(self._wake_write, b"x")

    def close(self) -> None:
        """See `Reader`."""
        if self._closed:
            return
        self._closed = True
        self.stop()
        self._requests.put(None)
        self._thread.join(_JOIN_SECONDS)
        if not self._thread.is_alive():
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        while (answer := self._requests.get()) is not None:
            data: bytes | None = None
            error: OSError | None = None
            try:
                # A terminal has nothing to read until a line is ended.
                if all(fd != self._wake_read for fd, _ in poll.poll()):
                    data = os.read(self._fd, READ_BYTES)
            except OSError as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop is gone, and with it the caller
                self._loop.call_soon_threadsafe(_resolve, answer, data, error)


def _resolve(
    answer: asyncio.Future[bytes | None], data: bytes | None, error: OSError | None
) -> None:
    if answer.done():
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(data)
