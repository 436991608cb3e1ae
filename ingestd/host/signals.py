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
        reload_requested: set by each SIGHUP; its receiver clears it.
        stop_requested: set by the first signal.
        force_requested: set by the second.
        name: the first signal's name.
    """

    def __init__(self) -> None:
        self.reload_requested = asyncio.Event()
        self.stop_requested = asyncio.Event()
        self.force_requested = asyncio.Event()
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
        loop.add_signal_handler(signal.SIGHUP, self.reload_requested.set)

    def remove(self) -> None:
        """Ignores them from now on: there is nothing left that a signal could hurry."""
        self._installed = False
        loop = asyncio.get_running_loop()
        for number in ALL:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    def _arrived(self, number: signal.Signals) -> None:
        if self.stop_requested.is_set():
            self.force_requested.set()
        else:
            self.name = number.name
            self.stop_requested.set()


def _nothing() -> None:
    pass
