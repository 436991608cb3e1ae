"""Tells the service manager how it goes: sd_notify(3), a datagram of `KEY=value` lines.

Who listens is in the environment (`NOTIFY_SOCKET`), and whether he wants to hear regularly that the
daemon lives (`WATCHDOG_USEC`, `WATCHDOG_PID`). Without them nothing is sent.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_UNSENT_MAX = 16


class Notifier:
    """Sends what it is told, never waits, and never fails: nobody's daemon ends for a status line.

    Args:
        address: a path, or a name in the abstract namespace after `@`; empty for nobody.
        watchdog: seconds within which `WATCHDOG=1` is expected again and again; 0 if it is not.
    """

    def __init__(self, address: str = "", watchdog: float = 0.0) -> None:
        self.watchdog = watchdog if address else 0.0
        self._address = f"\0{address[1:]}" if address[:1] == "@" else address
        self._unsent: deque[bytes] = deque(maxlen=_UNSENT_MAX)

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Notifier:
        """What the environment says. It is taken out: what handlers start is not this service."""
        address, usec, pid = (environ.pop(name, "") for name in _VARIABLES)
        if address[:1] not in ("/", "@"):
            return cls()  # nobody, or on a kind of socket that is not for processes like us
        ours = pid in ("", str(os.getpid()))
        return cls(address, int(usec) / 1e6 if ours and usec.isascii() and usec.isdigit() else 0.0)

    @property
    def listened_to(self) -> bool:
        """Whether anybody hears it."""
        return bool(self._address)

    def tell(self, *lines: str) -> None:
        """Sends lines of one message; those before it that could not be sent go first.

        A change of state must arrive: what finds no room is kept for the next call.
        """
        if self._address:
            self._unsent.append("\n".join(lines).encode())
            self._send()

    def _send(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            while self._unsent:
                try:
                    sock.sendto(self._unsent[0], self._address)
                except BlockingIOError:
                    return  # he is busy
                except OSError:
                    pass  # he is gone, and may come back at the same address
                self._unsent.popleft()


def monotonic_usec() -> str:
    """The line that says when a reload began, which has to be the kernel's own time."""
    return f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"
