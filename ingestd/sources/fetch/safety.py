"""Address checks against requests to private networks, made where the connection is made.

A name is resolved once, by `Resolver`; its result is the address that is connected to, and the
socket is only made for an address that passes (`open_socket`). So a name that resolves to something
else the second time (DNS rebinding) gains nothing, and neither does an address that is written in
the URL, or in a redirect.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from aiohttp import ThreadedResolver
from aiohttp.abc import AbstractResolver

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.abc import ResolveResult


class ForbiddenAddress(OSError):  # noqa: N818 - names the condition
    """Connections to this address are not allowed."""

    def __init__(self) -> None:
        super().__init__("a private or special address")


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
