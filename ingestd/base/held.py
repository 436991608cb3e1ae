"""Holds signals back while a process is forked, until the child has its own handlers.

Between the fork and the first line that a child runs, it has its parent's handlers: a signal that
comes then is lost, or is written into the parent's wake-up pipe. `multiprocessing` ends its
children with SIGTERM, often just after it has started them, and waits for their end.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection


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
