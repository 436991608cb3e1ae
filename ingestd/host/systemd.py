"""The service manager (systemd): messages to it, and the sockets that it passes.

`Notifier` speaks sd_notify(3), a datagram of `KEY=value` lines. The receiver is in the environment
(`NOTIFY_SOCKET`), and so is the interval in which it expects a sign of life (`WATCHDOG_USEC`,
`WATCHDOG_PID`). Without them nothing is sent. `ServiceNotifier` decides what is sent and when.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from ingestd.base.errors import ConfigError
from ingestd.base.watchdog import LOOK_SECONDS
from ingestd.host.sockets import show_socket

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping


_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_UNSENT_MAX = 16


class Notifier:
    """Sends sd_notify messages; never waits and never fails.

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
        """Makes a notifier from the environment, whose variables are cleared for children."""
        address, usec, pid = (environ.pop(name, "") for name in _VARIABLES)
        if address[:1] not in ("/", "@"):
            return cls()  # nobody, or on a kind of socket that is not for processes like us
        ours = pid in ("", str(os.getpid()))
        return cls(address, int(usec) / 1e6 if ours and usec.isascii() and usec.isdigit() else 0.0)

    @property
    def listened_to(self) -> bool:
        """Returns True if there is a service manager."""
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


# -- states and messages ---------------------------------------------------------------------------

STATUS_SECONDS = 5.0
EXTENSION_SECONDS = 20.0
"""How much time is asked for at once. It is asked for again every `STATUS_SECONDS`."""

_CPU_SHARE = 0.01
_IO_BYTES = 4096


class ServiceState(NamedTuple):
    """State of the daemon, for the service manager.

    Attributes:
        state: where in its life it is.
        hung: what hangs; empty if nothing does.
        leave_by: when it will have left at the latest, seconds on the caller's clock; `None` if
            nothing bounds that.
        accepted, processed, pending: records, of all pipelines.
    """

    state: Literal["starting", "running", "draining"]
    hung: str
    leave_by: float | None
    accepted: int
    processed: int
    pending: int


class Effort(NamedTuple):
    """Work of the process so far: seconds of processors, bytes read and written."""

    cpu: float
    io: int


def effort() -> Effort:
    """This process's."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        io = sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))
    except (OSError, ValueError):
        io = 0
    return Effort(time.process_time(), io)


class ServiceNotifier:
    """Decides what is to be said, and says it.

    Args:
        notifier: receives the notifications.
        effort: what tells a long recovery from a start that hangs.

    Attributes:
        period: seconds between two calls of `turn`.
    """

    def __init__(self, notifier: Notifier, effort: Callable[[], Effort] = effort) -> None:
        self._notifier = notifier
        self._effort = effort
        self._before = Effort(0.0, 0)
        watchdog = notifier.watchdog
        self.period = min(LOOK_SECONDS, watchdog / 2) if watchdog else LOOK_SECONDS
        self._fed: float | None = None
        self._said_at: float | None = None
        self._said: ServiceState | None = None

    def ready(self) -> None:
        """It takes records in; also the end of a reload."""
        self._notifier.tell("READY=1")

    def reloading(self) -> None:
        """It reads its settings again; `ready` ends it."""
        self._notifier.tell("RELOADING=1", monotonic_usec())

    def stopping(self) -> None:
        """It drains."""
        self._notifier.tell("STOPPING=1")

    def turn(self, service: ServiceState, now: float) -> None:
        """Says what is due.

        Args:
            service: how it is doing now.
            now: seconds that do not go back.
        """
        if not self._notifier.listened_to:
            return
        lines = []
        if self._notifier.watchdog and not service.hung and self._is_hungry(now):
            lines.append("WATCHDOG=1")
            self._fed = now
        said, at = self._said, self._said_at
        if said is None or at is None or service.state != said.state or self._is_due(at, now):
            lines.append(f"STATUS={_status(service, said, now - at if at is not None else 0.0)}")
            if self._may_take_longer(service, now):
                lines.append(f"EXTEND_TIMEOUT_USEC={EXTENSION_SECONDS * 1e6:.0f}")
            self._said, self._said_at = service, now
        if lines:
            self._notifier.tell(*lines)

    def _is_hungry(self, now: float) -> bool:
        """Returns True if the watchdog is due: half of its time must always be left."""
        return self._fed is None or now - self._fed + self.period > self._notifier.watchdog / 2

    def _is_due(self, said_at: float, now: float) -> bool:
        return now - said_at + self.period > STATUS_SECONDS

    def _may_take_longer(self, service: ServiceState, now: float) -> bool:
        """Returns True while a start that works, or a drain, may take longer."""
        if service.state == "draining":
            return not service.hung and (service.leave_by is None or now < service.leave_by)
        if service.state == "running":
            return False
        before, self._before = self._before, self._effort()
        worked = self._before.cpu - before.cpu > _CPU_SHARE * STATUS_SECONDS
        return worked or self._before.io - before.io > _IO_BYTES


def _status(now: ServiceState, before: ServiceState | None, seconds: float) -> str:
    if now.state == "starting":
        return "starting: handlers are loaded, journals recovered"
    text = f"{now.state}: {now.pending} pending"
    if before is not None and before.state != "starting" and seconds > 0:
        accepted = (now.accepted - before.accepted) / seconds
        processed = (now.processed - before.processed) / seconds
        text += f", {accepted:.0f} accepted/s, {processed:.0f} processed/s"
    return f"{text}; {now.hung}" if now.hung else text


# -- passed sockets -------------------------------------------------------------------------------
#
# Sockets that a service manager has opened and passed on: sd_listen_fds(3).
#
# It opened them before the daemon was there and keeps them open when it is gone: a client that
# connects in between waits, and is not refused. So the daemon closes its copy when it leaves, and
# never shuts a socket down, which would end it for every process that has it.

_FIRST = 3
_LISTEN_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
_HOW = "FileDescriptorName=records or FileDescriptorName=admin"


class ListenFds(NamedTuple):
    """Sockets that a service manager passed, by server; the owner closes them.

    Attributes:
        records: for the http source.
        admin: for the admin server.
    """

    records: list[socket.socket]
    admin: list[socket.socket]

    def close(self) -> None:
        """Lets go of all; for those that a server has closed already it does nothing."""
        for sock in (*self.records, *self.admin):
            sock.close()


def take_sockets(environ: MutableMapping[str, str]) -> ListenFds:
    """Takes the sockets passed to this process, and their variables out of the environment.

    Raises:
        ConfigError: something was passed that is no listening stream socket, or has no name.
    """
    pid, count, names, _ = (environ.pop(name, "") for name in _LISTEN_VARIABLES)
    passed = ListenFds([], [])
    if pid != str(os.getpid()) or count in ("", "0"):
        return passed  # nothing, or it is meant for another process
    if not (count.isascii() and count.isdigit()):
        raise ConfigError(problem=f"LISTEN_FDS is {count[:20]!r} and should be a number")
    called = names.split(":") if names else []
    called += [""] * (int(count) - len(called))
    problems: list[str] = []
    for number, name in enumerate(called[: int(count)]):
        sock = _adopt(_FIRST + number, problems)
        if sock is None:
            continue
        if name == "admin":
            passed.admin.append(sock)
        elif name == "records" or (int(count) == 1 and _is_no_name(name)):
            passed.records.append(sock)
        else:
            problems.append(f"{show_socket(sock)}: passed under the name {name!r}; use {_HOW}")
            sock.close()
    if problems:
        passed.close()
        raise ConfigError(problem="\n".join(problems))
    return passed


def _is_no_name(name: str) -> bool:
    """Returns True for systemd's default names: its own word, or the name of the unit."""
    return name in ("", "unknown", "connection") or name.endswith(".socket")


def _adopt(fd: int, problems: list[str]) -> socket.socket | None:
    """A passed descriptor as a socket that children do not get; or a line about what is wrong."""
    what = f"descriptor {fd}, which the service manager passed,"
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OSError as error:
        problems.append(f"{what} is no socket: {error.strerror}")
        return None
    if sock.family not in _FAMILIES or sock.type != socket.SOCK_STREAM:
        problems.append(f"{what} is no stream socket; use ListenStream=")
    elif not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        problems.append(f"{what} does not listen; use Accept=no")
    else:
        sock.setblocking(False)
        return sock
    sock.close()
    return None
