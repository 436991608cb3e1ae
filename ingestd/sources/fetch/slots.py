"""How many downloads run at once, in all and from one host."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Lease:
    """A place among the downloads that run; given back once, at its end or before."""

    def __init__(self, *semaphores: asyncio.Semaphore) -> None:
        self._semaphores = semaphores

    def release(self) -> None:
        """Gives the place back; does nothing the second time."""
        semaphores, self._semaphores = self._semaphores, ()
        for semaphore in semaphores:
            semaphore.release()


class Slots:
    """The places.

    Args:
        most: in all.
        most_per_host: for each host.
    """

    def __init__(self, most: int, most_per_host: int) -> None:
        self._all = asyncio.Semaphore(most)
        self._hosts: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(most_per_host)
        )

    @asynccontextmanager
    async def lease(self, host: str) -> AsyncIterator[Lease]:
        """A place for a download from a host, as soon as there is one."""
        # The host first: nobody who waits for it keeps the others from running.
        await self._hosts[host].acquire()
        try:
            await self._all.acquire()
        except BaseException:
            self._hosts[host].release()
            raise
        lease = Lease(self._all, self._hosts[host])
        try:
            yield lease
        finally:
            lease.release()
