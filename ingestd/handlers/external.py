"""The worker's side of an executor that the user builds: one handler for each calling thread.

`call_externally` is all that crosses, by its name: it is submitted with the handler's name and the
batch's bytes, and gives plain data back. A pool's process or a cluster's worker needs ingestd and
the handler's module, nothing of the daemon.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import threading
import time
import weakref

import msgspec

from ingestd.base.errors import HandlerLoadError
from ingestd.handlers.call import failure_from
from ingestd.handlers.outcome import Job, Result
from ingestd.handlers.runner import HandlerConfig, Runner

_LOOK_SECONDS = 1.0


class ExternalAnswer(msgspec.Struct, frozen=True, array_like=True):
    """The answer of one call.

    Attributes:
        load_error: one line if the handler can't be loaded; then there is no result.
        not_ready: one line if its constructor failed while it was loaded.
        result: of the job; `None` without one.
    """

    load_error: str = ""
    not_ready: str = ""
    result: Result | None = None


class _ThreadHandler:
    """The handler of one thread; closed when the thread ends, or its process does."""

    def __init__(self, config: bytes) -> None:
        self.config = config
        self._runner: Runner | None = Runner(
            msgspec.msgpack.decode(config, type=HandlerConfig), _report
        )
        self.not_ready = self._runner.prepare()
        _thread_handlers.add(self)

    def run(self, job: Job) -> Result:
        runner = self._runner
        assert runner is not None  # noqa: S101  only its thread's end closes it
        return runner.run(job)

    def close(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None and (failed := runner.close()):
            _report(failed)

    __del__ = close


_thread_handlers: weakref.WeakSet[_ThreadHandler] = weakref.WeakSet()
_own = threading.local()


def _report(failed: str) -> None:
    logging.getLogger("ingestd").warning("handler_close_failed: %s", failed)


def _close_all() -> None:
    for one in list(_thread_handlers):
        one.close()


class _ProcessGuard:
    """Ends a pool's process with the daemon, or when a call of it has hung for too long.

    Only a process that `multiprocessing` started from the daemon is ended; any other one belongs to
    a cluster, which has means of its own.
    """

    _here: _ProcessGuard | None = None
    _lock = threading.Lock()

    def __init__(self, daemon: int) -> None:
        self.process = os.getpid()
        self.ends: dict[int, float] = {}  # by thread: when its call has hung for too long
        multiprocessing.util.Finalize(None, _close_all, exitpriority=10)
        parent = multiprocessing.parent_process()
        if parent is None or parent.pid != daemon:
            return
        if threading.current_thread() is threading.main_thread():
            # A terminal sends it to every process; the daemon alone knows what is left to do.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=self._watch, args=(parent.sentinel,), daemon=True).start()

    @classmethod
    def here(cls, daemon: int) -> _ProcessGuard:
        """The guard of this process, which may have been forked from one that has one."""
        guard = cls._here
        if guard is None or guard.process != os.getpid():
            with cls._lock:
                guard = cls._here
                if guard is None or guard.process != os.getpid():
                    guard = cls._here = cls(daemon)
        return guard

    def _watch(self, parent: int) -> None:
        while not multiprocessing.connection.wait([parent], timeout=_LOOK_SECONDS):
            now = time.monotonic()
            if any(end <= now for end in list(self.ends.values())):
                break
        os._exit(1)


def call_externally(config: bytes, job: Job | None, daemon: int, hangs_after: float) -> bytes:
    """Runs one job; never raises.

    Args:
        config: the `HandlerConfig`, as MessagePack.
        job: to be run; `None` only loads the handler.
        daemon: the daemon's process id.
        hangs_after: seconds after which a process of the daemon's pool ends itself over the call.

    Returns:
        An `ExternalAnswer`, as MessagePack.
    """
    guard, thread = _ProcessGuard.here(daemon), threading.get_ident()
    guard.ends[thread] = time.monotonic() + hangs_after
    try:
        return msgspec.msgpack.encode(_answer(config, job))
    finally:
        guard.ends.pop(thread, None)


def _answer(config: bytes, job: Job | None) -> ExternalAnswer:
    held: _ThreadHandler | None = getattr(_own, "handler", None)
    try:
        if held is None or held.config != config:
            held = _own.handler = _ThreadHandler(config)
    except HandlerLoadError as error:
        return ExternalAnswer(load_error=str(error.facts["problem"]))
    except BaseException as error:  # noqa: BLE001  a worker catches everything
        return ExternalAnswer(result=Result(failure=failure_from(error)))
    if job is None:
        return ExternalAnswer(not_ready=held.not_ready)
    return ExternalAnswer(result=held.run(job))
