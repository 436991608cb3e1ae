"""Signals as events: the first asks to drain, the second to leave at once; SIGHUP to reload."""

from __future__ import annotations

import asyncio
import signal

LEAVE = (signal.SIGTERM, signal.SIGINT)


def ignore_hangups() -> None:
    """Until there is a loop: who reloads us while we start shall not end us."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


class Signals:
    """Turns SIGTERM and SIGINT into two events while it is installed, and SIGHUP into a third.

    Attributes:
        hung_up: set by each SIGHUP; whoever acts upon it clears it.
        asked: set by the first signal.
        urged: set by the second.
        name: the first signal's name.
    """

    def __init__(self) -> None:
        self.hung_up = asyncio.Event()
        self.asked = asyncio.Event()
        self.urged = asyncio.Event()
        self.name = ""

    def install(self) -> None:
        """From now on signals arrive here; on the running loop."""
        loop = asyncio.get_running_loop()
        for number in LEAVE:
            loop.add_signal_handler(number, self._arrived, number)
        loop.add_signal_handler(signal.SIGHUP, self.hung_up.set)

    def remove(self) -> None:
        """Ignores them from now on: there is nothing left that a signal could hurry."""
        loop = asyncio.get_running_loop()
        for number in (*LEAVE, signal.SIGHUP):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    def _arrived(self, number: signal.Signals) -> None:
        if self.asked.is_set():
            self.urged.set()
        else:
            self.name = number.name
            self.asked.set()
