"""A lane that is a child process, with a thread of the daemon that speaks to it.

The child is started with exec, not forked: a fork would inherit the daemon's locks in whatever
state its other threads left them, and its sockets. It leads a process group of its own, so a Ctrl-C
on the terminal does not reach it, and a kill reaches what the handler started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ingestd.base.errors import HandlerLoadError
from ingestd.base.telemetry import get_logger
from ingestd.handlers import wire
from ingestd.handlers.outcome import Failure, Result

if TYPE_CHECKING:
    from collections.abc import Callable

    from ingestd.execution.shelf import Shelf
    from ingestd.handlers.outcome import Job

log = get_logger()

START_TIMEOUT = 120.0
"""Seconds for a child to import the handler; some load models."""
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from ingestd.handlers.worker import main; main(*map(int, sys.argv[2:]))"
)


class _WorkerDiedError(Exception):
    """The child is gone, or had to be killed."""

    def __init__(self, reason: str, error: str) -> None:
        super().__init__(error)
        self.failure = Failure(reason, error)


class Child:
    """One child process. Blocking; used by one thread.

    Args:
        hello: what it is told first.

    Raises:
        HandlerLoadError: the child can't load the handler.
        _WorkerDiedError: it did not come up.
    """

    def __init__(self, hello: wire.Hello) -> None:
        ours, theirs = socket.socketpair()
        lifeline_theirs, self._lifeline = os.pipe()
        memory = wire.Slot.make()
        self._sock = ours
        try:
            self._slot = wire.Slot(memory)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, wire.SOCKET_BYTES)
            fds = (theirs.fileno(), lifeline_theirs, memory)
            self.process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-c", _BOOT, json.dumps(sys.path), *map(str, fds)],
                stdin=subprocess.DEVNULL,
                pass_fds=[fd for fd in fds if fd >= 0],
                process_group=0,
            )
        except BaseException:
            ours.close()
            os.close(self._lifeline)
            raise
        finally:
            theirs.close()
            os.close(lifeline_theirs)
            if memory >= 0:
                os.close(memory)
        self._timeout = 0.0
        self.ready = self._greet(hello)

    def _greet(self, hello: wire.Hello) -> wire.Ready:
        ready = wire.decode_ready(self._exchange(wire.encode(hello), START_TIMEOUT))
        if ready.load_error:
            self.kill()
            raise HandlerLoadError(target=hello.handler.target, problem=ready.load_error)
        return ready

    def run(self, job: Job, timeout: float) -> Result:
        """One job.

        Raises:
            _WorkerDiedError: the child died, or overran and was killed.
        """
        return wire.decode_result(self._exchange(self._slot.pack(job), timeout))

    def _exchange(self, message: bytes, timeout: float) -> bytes | bytearray:
        if timeout != self._timeout:
            wire.set_timeout(self._sock, timeout)
            self._timeout = timeout
        try:
            wire.send(self._sock, message)
            answer = wire.receive(self._sock)
        except BlockingIOError:
            self.kill()
            raise _WorkerDiedError(
                "timeout", f"the worker was killed after {timeout:g} s"
            ) from None
        except OSError:
            answer = None
        if answer is None:
            raise _WorkerDiedError("crashed", self._obituary())
        return answer

    def _obituary(self) -> str:
        """How the child died; it has closed its socket, so it is dead or about to be."""
        try:
            code = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            self.kill()
            return "the worker closed its connection and was killed"
        self.kill()
        if code >= 0:
            return f"the worker exited with code {code}"
        with contextlib.suppress(ValueError):
            return f"the worker was killed by {signal.Signals(-code).name}"
        return f"the worker was killed by signal {-code}"

    def stop(self, timeout: float) -> None:
        """Lets the idle child end by itself, so that the handler's `close()` runs; else kills."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, timeout))
        self.kill()

    def kill(self) -> None:
        """Ends the child and everything in its process group, and reaps it. May be repeated."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._sock.close()
        self._slot.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


class ProcessLane:
    """One child process at a time; a dead one is replaced when the next job comes.

    Args:
        name: for the thread and the log.
        hello: what each child is told.
        timeout: seconds after which a job's child is killed.
        on_restart: called with `crashed` or `timeout`, on the lane's thread, each time a child
            has to be replaced.

    Attributes:
        is_async: with the executor `auto`, the handler has to be awaited; known after the start.
    """

    def __init__(
        self, name: str, hello: wire.Hello, *, timeout: float, on_restart: Callable[[str], None]
    ) -> None:
        self._name = name
        self._hello = hello
        self._timeout = timeout
        self._on_restart = on_restart
        self.is_async = False
        self._child: Child | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def start(self) -> None:
        """See `Lane.start`."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._start)

    def _start(self) -> None:
        try:
            self._spawn()
        except _WorkerDiedError as died:
            raise HandlerLoadError(target=self._hello.handler.target, problem=str(died)) from None

    def _spawn(self) -> Child:
        child = Child(self._hello)
        self._child = child
        log.debug("worker_started", lane=self._name, pid=child.process.pid)
        self.is_async = child.ready.is_async
        if child.ready.not_ready:
            log.warning("handler_not_ready", lane=self._name, error=child.ready.not_ready)
        return child

    def serve(self, shelf: Shelf) -> None:
        """See `ThreadedLane.serve`."""
        self._thread.submit(shelf.serve, self._run, self._name)

    def _run(self, job: Job) -> Result:
        started = time.monotonic()
        try:
            child = self._child or self._spawn()
            return child.run(job, self._timeout)
        except _WorkerDiedError as died:
            log.warning("worker_died", lane=self._name, error=died.failure.error)
            failure = died.failure
        except (HandlerLoadError, OSError) as error:
            failure = Failure("crashed", f"no worker could be started: {error}")
        self._child = None
        self._on_restart(failure.reason)
        return Result(failure=failure, seconds=time.monotonic() - started)

    def _stop(self, timeout: float) -> None:
        if self._child is not None:
            self._child.stop(timeout)

    async def close(self, deadline: float) -> bool:
        """See `Lane.close`."""
        loop = asyncio.get_running_loop()
        closing = loop.run_in_executor(self._thread, self._stop, deadline - loop.time())
        self._thread.shutdown(wait=False)
        done, _ = await asyncio.wait({closing}, timeout=max(0.0, deadline - loop.time()))
        if not done and self._child is not None:
            # The lane's thread waits for its job: killing the child is what ends both.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.process.pid, signal.SIGKILL)
            await asyncio.wait({closing}, timeout=5.0)
        return closing.done()
