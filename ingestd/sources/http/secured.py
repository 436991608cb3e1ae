"""TLS that lets a client end its own direction alone, and take its answer.

asyncio and uvloop end both directions as soon as the other side has said goodbye (`close_notify`).
TLS 1.3 does not ask for that (RFC 8446, 6.1), so here the goodbye is kept from the transport and
told to whoever wants to know. A transport that sees the connection itself end closes all the same.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class Secured(ssl.SSLObject):
    """What a context makes that has it as its `sslobject_class`.

    Attributes:
        at_end: called once, in a turn of the loop of its own, when nothing more will come; without
            it the transport ends the connection, as ever.
    """

    at_end: Callable[[], None] | None = None
    _told = False

    def read(self, len: int = 1024, buffer: Any = None) -> Any:  # noqa: A002 - the base's name
        """Reads, and says that more may come where it was the end."""
        data = super().read(len, buffer)
        if data or self.at_end is None:
            return data
        if not self._told:
            self._told = True
            # What came before it in the same packets goes to the protocol first.
            asyncio.get_running_loop().call_soon(self.at_end)
        raise ssl.SSLWantReadError
