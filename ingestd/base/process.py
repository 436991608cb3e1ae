"""Ends the process whatever a handler has left running, and masks signals across forks.

A module of the user's may have begun threads that are no daemons, timers, or a pool with a job
that hangs; the interpreter would wait for them, for ever, at its exit. So the process ends itself.
Hooks registered with `atexit` run before that, in a thread, for `ATEXIT_SECONDS` at most: telemetry
of the user's is flushed, and a hook that hangs delays nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Collection


ATEXIT_SECONDS = 2.0
"""Longest wait for hooks registered with `atexit`, and for the readers of stdout and stderr."""

GARBAGE_MAX = 5_000
"""Objects that are made before Python looks for cycles among them. With the default of 700 that is
every 20 requests, and a seventh of what a small one costs; a worker looks through each batch of
1,000 records three times, which is a sixth of its CPU."""


def end_process(code: int) -> NoReturn:
    """Runs the hooks, flushes stdout and stderr, and ends the process whatever becomes of them."""
    hooks = threading.Thread(target=_run_exit_hooks, name="exit-hooks", daemon=True)
    try:
        hooks.start()
        hooks.join(ATEXIT_SECONDS)
    finally:
        os._exit(code)


def _run_exit_hooks() -> None:
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()  # noqa: SLF001  the only way to run them and come back
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()


# -- signals across a fork ------------------------------------------------------------------------
#
# Between the fork and the first line that a child runs, it has its parent's handlers: a signal
# that comes then is lost, or is written into the parent's wake-up pipe. `multiprocessing` ends its
# children with SIGTERM, often just after it has started them, and waits for their end.


class HeldSignals:
    """Blocks signals in every fork of this process until the child has handlers of its own.

    Args:
        numbers: the signals.
        in_child: gives the child handlers of its own; runs before it gets any of them.
    """

    def __init__(self, numbers: Collection[signal.Signals], in_child: Callable[[], None]) -> None:
        self._numbers = numbers
        self._in_child = in_child
        self._thread = threading.local()
        os.register_at_fork(
            before=self._hold, after_in_parent=self._release, after_in_child=self._begin
        )

    def _hold(self) -> None:
        self._thread.mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)

    def _release(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._thread.mask)

    def _begin(self) -> None:
        try:
            self._in_child()
        finally:
            self._release()
