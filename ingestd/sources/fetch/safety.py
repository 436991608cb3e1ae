"""Address checks against requests to private networks, made where the connection is made.

A name is resolved once, by `Resolver`; its result is the address that is connected to, and the
socket is only made for an address that passes (`open_socket`). So a name that resolves to something
else the second time (DNS rebinding) gains nothing, and neither does an address that is written in
the URL, or in a redirect.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING, Any

from aiohttp import ThreadedResolver
from aiohttp.abc import AbstractResolver

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.abc import ResolveResult

    Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# https://www.iana.org/assignments/iana-ipv4-special-registry, and multicast.
_SPECIAL_4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
            "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16",
            "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
            # Public by its number, but a service of the machine's own host in one large cloud.
            "168.63.129.16/32",
        ),
    )
)  # fmt: skip
# Of IPv6 only 2000::/3 is assigned to the public; inside of it, what the IANA registry keeps back.
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_6 = tuple(
    map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "3fff::/20", "2620:4f:8000::/48"))
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class ForbiddenAddress(OSError):  # noqa: N818 - names the condition
    """Connections to this address are not allowed."""

    def __init__(self) -> None:
        super().__init__("a private or special address")


def is_public(address: str) -> bool:
    """Returns True for an address, as numbers, of the public internet."""
    try:
        return _is_public(ipaddress.ip_address(address.partition("%")[0]))
    except ValueError:
        return False


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _SPECIAL_4)
    # Addresses that stand for an IPv4 address are what that one is.
    inner = address.ipv4_mapped or address.sixtofour
    if address in _NAT64:
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if inner is not None:
        return _is_public(inner)
    return address in _GLOBAL_6 and not any(address in network for network in _SPECIAL_6)


class Resolver(AbstractResolver):
    """Resolves names, and leaves out addresses that may not be connected to.

    Args:
        allowed: tells if an address may be.
        inner: resolves names; the system's resolver by default.
    """

    def __init__(
        self, allowed: Callable[[str], bool], inner: AbstractResolver | None = None
    ) -> None:
        self._allowed = allowed
        self._inner = inner or ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Resolves a host to the addresses that may be connected to.

        Raises:
            OSError: there are none at all.
            ForbiddenAddress: there are only others.
        """
        found = await self._inner.resolve(host, port, family)
        allowed = [one for one in found if self._allowed(one["host"])]
        if found and not allowed:
            raise ForbiddenAddress
        return allowed

    async def close(self) -> None:
        """Closes the inner resolver."""
        await self._inner.close()


def open_socket(
    allowed: Callable[[str], bool],
) -> Callable[[tuple[Any, Any, int, str, tuple[Any, ...]]], socket.socket]:
    """Makes sockets for the addresses that are allowed; any other raises `ForbiddenAddress`."""

    def open_(info: tuple[Any, Any, int, str, tuple[Any, ...]]) -> socket.socket:
        family, kind, proto, _, address = info
        if not allowed(str(address[0])):
            raise ForbiddenAddress
        return socket.socket(family, kind, proto)

    return open_
