"""Signals as events: the first asks to drain, the second to leave at once; SIGHUP to reload.

A timer's signal, or one that means nothing to us, would end the process: a handler in a thread can
set an alarm, and some programs write their state on a signal. Those do nothing here.
"""

from __future__ import annotations

import asyncio
import signal

LEAVE = (signal.SIGTERM, signal.SIGINT)
WITHOUT_MEANING = (
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
ALL = (*LEAVE, signal.SIGHUP, *WITHOUT_MEANING)
"""What the daemon receives, and a process that is forked from it must not."""


def ignore_hangups() -> None:
    """Ignores SIGHUP until there is a loop: a reload during the start must not end the process."""
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
        self._installed = False

    def install(self) -> None:
        """From now on signals arrive here; on the running loop."""
        self._installed = True
        self.keep()
        for number in WITHOUT_MEANING:
            # Not SIG_IGN: that would be inherited by what a handler starts.
            asyncio.get_running_loop().add_signal_handler(number, _nothing)

    def keep(self) -> None:
        """Installs those that mean something again, while they are: call it now and then.

        A handler in a thread can put another function in their place for the operating system
        (`faulthandler.register`), and Python would know nothing of it.
        """
        if not self._installed:
            return
        loop = asyncio.get_running_loop()
        for number in LEAVE:
            loop.add_signal_handler(number, self._arrived, number)
        loop.add_signal_handler(signal.SIGHUP, self.hung_up.set)

    def remove(self) -> None:
        """Ignores them from now on: there is nothing left that a signal could hurry."""
        self._installed = False
        loop = asyncio.get_running_loop()
        for number in ALL:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    def _arrived(self, number: signal.Signals) -> None:
        if self.asked.is_set():
            self.urged.set()
        else:
            self.name = number.name
            self.asked.set()


def _nothing() -> None:
    pass
