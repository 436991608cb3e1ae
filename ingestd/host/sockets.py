"""Sockets that a service manager has opened and passed on: sd_listen_fds(3).

It opened them before the daemon was there and keeps them open when it is gone: a client that
connects in between waits, and is not refused. So the daemon closes its copy when it leaves, and
never shuts a socket down, which would be felt by everybody who has it.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, NamedTuple

from ingestd.base.errors import ConfigError
from ingestd.config.network import is_loopback_ip, show_address

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_FIRST = 3
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
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
    pid, count, names, _ = (environ.pop(name, "") for name in _VARIABLES)
    passed = ListenFds([], [])
    if pid != str(os.getpid()) or count in ("", "0"):
        return passed  # nothing, or it is meant for somebody who started us
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


def show_socket(sock: socket.socket) -> str:
    """The address of a socket: `HOST:PORT`, or `unix:` and its path."""
    name = sock.getsockname()
    if sock.family != socket.AF_UNIX:
        return show_address(*name[:2])
    path = name if isinstance(name, str) else os.fsdecode(name)
    return f"unix:{path.replace(chr(0), '@', 1)}"


def is_local(sock: socket.socket) -> bool:
    """Returns True if only this machine can reach it; the file of a unix socket has permissions."""
    return sock.family == socket.AF_UNIX or is_loopback_ip(sock.getsockname()[0].partition("%")[0])
