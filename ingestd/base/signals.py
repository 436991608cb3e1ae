"""Signals as events: the first asks to drain, the second to leave at once."""

from __future__ import annotations

import asyncio
import signal

LEAVE = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Turns SIGTERM and SIGINT into two events while it is installed.

    Attributes:
        asked: set by the first signal.
        urged: set by the second.
        name: the first signal's name.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.urged = asyncio.Event()
        self.name = ""

    def install(self) -> None:
        """From now on signals arrive here; on the running loop."""
        loop = asyncio.get_running_loop()
        for number in LEAVE:
            loop.add_signal_handler(number, self._arrived, number)

    def remove(self) -> None:
        """Ignores them from now on: there is nothing left that a signal could hurry."""
        loop = asyncio.get_running_loop()
        for number in LEAVE:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    def _arrived(self, number: signal.Signals) -> None:
        if self.asked.is_set():
            self.urged.set()
        else:
            self.name = number.name
            self.asked.set()
