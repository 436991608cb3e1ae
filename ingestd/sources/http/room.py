"""What is in flight: requests and bytes, one bound each for all clients together.

One client may fill all of it as long as it is alone. As soon as another one has something in
flight, or was turned away lately, no client gets beyond its share: it is told so (429), and what it
gives back is there for the others. A client is a token's name, or without one a peer's address (see
`clients.py`), so everybody behind one proxy is one client. Its only request is never refused for
its share, or it could never be sent at all.
"""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING, Self

from ingestd.base.rate import LONGEST, Rate, wait_for_room
from ingestd.sources.http import problem
from ingestd.sources.http.clients import client_of
from ingestd.sources.http.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from ingestd.sources.http.problem import Kind

EXPECTED_BYTES = 64 * 1024
"""What a body that was announced takes at once."""


class _Client:
    """What one client holds."""

    __slots__ = ("address", "bytes", "requests")

    def __init__(self, address: str) -> None:
        self.address = address
        self.requests = 0
        self.bytes = 0


class Room:
    """How many requests and bytes there may be. Bytes may be taken on any thread.

    Args:
        bytes_max: `http.inflight_bytes_max`.
        requests_max: `http.requests_max`.
        share: `http.client_share`, more than 0, at most 1.
        monotonic: seconds that do not go back.
    """

    def __init__(
        self,
        bytes_max: int,
        *,
        requests_max: int,
        share: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bytes_max = bytes_max
        self.requests_max = requests_max
        self.bytes = 0
        self.requests = 0
        self._bytes_share = bytes_max * share
        self._requests_share = requests_max * share
        self._clients: dict[str, _Client] = {}
        self._turned_away: dict[str, float] = {}  # the last two clients, and until when it counts
        self._monotonic = monotonic
        self._drained = Rate(monotonic())
        self._lock = threading.Lock()

    def enter(self, address: str) -> Hold:
        """A request's place, with no bytes to begin with; give it back with `with`.

        Raises:
            Problem: 503 if there are too many, 429 if the client has too many.
        """
        address = client_of(address)
        client = self._clients.get(address)
        requests = client.requests + 1 if client is not None else 1
        over_share = requests > 1 and requests > self._requests_share
        if over_share or self.requests >= self.requests_max:
            self._check_requests(address, over_share=over_share)
        if client is None:
            client = self._clients[address] = _Client(address)
        client.requests = requests
        self.requests += 1
        return Hold(self, client)

    def _check_requests(self, address: str, *, over_share: bool) -> None:
        with self._lock:
            if over_share and self._is_contended(address):
                raise self._refusal(problem.OVER_SHARE, "this client's share of http.requests_max")
            if self.requests >= self.requests_max:
                self._turn_away(address)
                raise self._refusal(problem.BUSY, "http.requests_max")

    def take(self, size: int, client: _Client, own: int) -> None:
        """Takes bytes for one request, of which it has `own` already.

        Raises:
            Problem: 503 if others have them, 429 if the client has too many, 413 if one request
                alone is too much.
        """
        with self._lock:
            over_share = client.bytes > own and client.bytes + size > self._bytes_share
            if over_share and self._is_contended(client.address):
                raise self._refusal(
                    problem.OVER_SHARE,
                    "this client's share of http.inflight_bytes_max",
                    client.bytes + size,
                    self._bytes_share,
                )
            if self.bytes + size <= self.bytes_max:
                self.bytes += size
                client.bytes += size
                return
            if own + size <= self.bytes_max:
                self._turn_away(client.address)
                raise self._refusal(
                    problem.BUSY, "http.inflight_bytes_max", self.bytes + size, self.bytes_max
                )
        detail = f"more than http.inflight_bytes_max = {self.bytes_max} in one request"
        raise Problem(problem.BODY_TOO_LARGE, detail)

    def give(self, size: int, client: _Client) -> None:
        """Takes back what a request asked for and does not hold yet."""
        with self._lock:
            self.bytes -= size
            client.bytes -= size

    def leave(self, client: _Client, size: int) -> None:
        """A request is over, and gives its bytes back; on the event loop."""
        self.give_back(client, size)
        self.requests -= 1
        client.requests -= 1
        if not client.requests:
            del self._clients[client.address]

    def give_back(self, client: _Client, size: int) -> None:
        """A request gives bytes back."""
        with self._lock:
            self.bytes -= size
            client.bytes -= size
            self._drained.add(size, self._monotonic())

    def _is_contended(self, address: str) -> bool:
        """Whether anybody else is here, or was turned away and has not had time to come back."""
        if len(self._clients) > (address in self._clients):
            return True
        now = self._monotonic()
        return any(one != address and now < end for one, end in self._turned_away.items())

    def _turn_away(self, address: str) -> None:
        # Two are enough: whoever asks, one of them is somebody else.
        self._turned_away.pop(address, None)
        self._turned_away[address] = self._monotonic() + LONGEST
        if len(self._turned_away) > 2:
            del self._turned_away[next(iter(self._turned_away))]

    def _refusal(self, kind: Kind, what: str, used: float = 0.0, bound: float = 0.0) -> Problem:
        rate = self._drained.per_second(self._monotonic())
        after = wait_for_room(used, bound, rate, random.random)
        return Problem(kind, f"{what} is reached", headers=problem.retry_after(after))


class Hold:
    """What one request has taken."""

    __slots__ = ("_client", "_room", "bytes")

    def __init__(self, room: Room, client: _Client) -> None:
        self._room = room
        self._client = client
        self.bytes = 0

    def grow(self, size: int) -> None:
        """Takes more bytes.

        Raises:
            Problem: see `Room.take`.
        """
        self._room.take(size, self._client, self.bytes)
        self.bytes += size

    def give_back(self) -> None:
        """The bytes are not held any more; the request's place still is."""
        self._room.give_back(self._client, self.bytes)
        self.bytes = 0

    def expect(self, size: int) -> None:
        """Asks for room for a body that was announced, and takes the first `EXPECTED_BYTES` of it.

        The rest is taken as it comes: saying that one has much to send costs a client nothing.

        Raises:
            Problem: see `Room.take`.
        """
        self._room.take(size, self._client, self.bytes)
        taken = min(size, EXPECTED_BYTES)
        if taken < size:
            self._room.give(size - taken, self._client)
        self.bytes += taken

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._room.leave(self._client, self.bytes)
