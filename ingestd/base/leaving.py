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
import sys
import threading
from typing import NoReturn

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
