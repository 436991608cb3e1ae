"""The end of the process: once all is reported, nothing that a handler has left behind keeps it.

A module of the user's may have begun threads that are no daemons, timers, or a pool with a job
that hangs; the interpreter would wait for them, for ever, at its exit. So the process ends itself.
Hooks registered with `atexit` run before that, in a thread, for `ATEXIT_SECONDS` at most: telemetry
of the user's gets to send its last words, and a hook that hangs keeps nothing.
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
"""How long hooks registered with `atexit`, and the readers of stdout and stderr, are waited for."""


def end_process(code: int) -> NoReturn:
    """Runs the hooks, flushes stdout and stderr, and ends the process whatever becomes of them."""
    last = threading.Thread(target=_last_words, name="last-words", daemon=True)
    try:
        last.start()
        last.join(ATEXIT_SECONDS)
    finally:
        os._exit(code)


def _last_words() -> None:
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()  # noqa: SLF001  the only way to run them and come back
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()


# -- holds signals back while a process is forked, until the child has its own handlers ------------
#
# Between the fork and the first line that a child runs, it has its parent's handlers: a signal
# that comes then is lost, or is written into the parent's wake-up pipe. `multiprocessing` ends its
# children with SIGTERM, often just after it has started them, and waits for their end.


class HeldSignals:
    """Holds them in every fork of this process from now on; each thread has a mask of its own.

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
