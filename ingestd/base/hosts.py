"""Names under which an address may be asked for, against pages that rebind a name of their own.

A page in a browser may send requests to any address of this machine, and one whose name suddenly
means 127.0.0.1 may read the answers, because to the browser they are its own (DNS rebinding). Such
a request carries the name in `Host`: nobody needs a name to rebind an IP address, so those are
always good, and `localhost` never leaves the machine (RFC 6761, 6.3).
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

ANY = "*"
_NAME = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*", re.ASCII)
_ABSOLUTE = re.compile(r"https?://([^/?#]*)", re.IGNORECASE)
_KNOWN_MAX = 256


def check_hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    """Names of hosts as settings write them, or `*` for any; as they are.

    Raises:
        ValueError: one would never be matched.
    """
    for host in hosts:
        if host != ANY and not _NAME.fullmatch(host):
            raise ValueError(
                f"{host[:80]!r} is no name of a host: small letters, without a port, or * for any"
            )
    return hosts


def authority_of(target: str, host: str) -> str:
    """The host and port that a request is for (RFC 9112, 3.3).

    Args:
        target: as the request line has it; the authority in a whole URL counts more than `Host`.
        host: the value of `Host`; empty if there is none.
    """
    if target[:1] == "/":
        return host
    absolute = _ABSOLUTE.match(target)
    return absolute[1] if absolute else host


class Hosts:
    """Knows by which names an address may be asked for.

    Args:
        names: beside IP addresses and `localhost`; with `*` every name is good.

    Attributes:
        known: authorities that were found to be good, some of them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(name.lower() for name in names)
        self.known: set[str] = {""}  # no browser leaves Host out

    def know(self, authority: str) -> bool:
        """Whether a host, with or without a port, is one of them."""
        if authority in self.known:
            return True
        good = ANY in self._names or self._is_good(authority)
        if good and len(self.known) < _KNOWN_MAX:
            self.known.add(authority)
        return good

    def _is_good(self, authority: str) -> bool:
        name, colon, port = authority.lower().rpartition(":")
        if not (colon and port.isdigit()):
            name = authority.lower().removesuffix(":")
        name = name.removesuffix(".")
        if name == "localhost" or name.endswith(".localhost") or name in self._names:
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True
