"""Whose request is next: clients in rotation, however many connections each has.

As long as the event loop keeps up, each request is answered as it comes. Once the requests of one
turn of the loop have taken `TURN_SECONDS` the others wait, and from then on it is one of each
client in rotation: one that sends on 400 connections, or 4,000 requests in one piece, has no more
of the loop's time than one that sends a single request.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

TURN_SECONDS = 0.01
"""How long requests that came together are answered without a look at whose they are."""

REQUESTS_A_TURN = 8
"""Of those that wait, so many are answered in each turn."""


class Turns:
    """On one event loop.

    Args:
        loop: whose turns.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._end = 0.0
        self._begun = False

    def take(self, client: str) -> asyncio.Future[None] | None:
        """Asks for a request of this client to be answered: now, or when the future is done.

        Who does not want it any more ends the future.
        """
        now = self._loop.time()
        if not self._begun:
            self._begun = True
            self._end = now + TURN_SECONDS
            self._loop.call_soon(self._next)
        elif now >= self._end or client in self._waiting:
            waiter = self._loop.create_future()
            self._waiting.setdefault(client, deque()).append(waiter)
            return waiter
        return None

    def _next(self) -> None:
        """A new turn begins."""
        left = REQUESTS_A_TURN
        while self._waiting and left:
            client = next(iter(self._waiting))
            waiters = self._waiting.pop(client)
            waiter = waiters.popleft()
            if waiters:
                self._waiting[client] = waiters  # behind the others
            if not waiter.done():
                waiter.set_result(None)
                left -= 1
        self._begun = bool(self._waiting)
        if self._begun:
            self._end = self._loop.time() + TURN_SECONDS
            self._loop.call_soon(self._next)
