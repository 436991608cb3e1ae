"""Admission control: rate limits of principals, and bounds of requests and bytes in flight.

The size of a request is only known once it was read. So it is admitted while the bucket is not in
debt, whole, and charged what it really held: a large one puts the bucket into debt, and until that
is paid nothing more is admitted. On average no principal exceeds its rate.
"""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING, Self

from ingestd.base.rate import LONGEST, Rate, TokenBucket, wait_for_room
from ingestd.http import problem
from ingestd.http.peer import client_of
from ingestd.http.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from ingestd.http.problem import ProblemType


BURST_SECONDS = 5.0
"""What was not used is saved for so long: after a pause so many seconds' worth come at once."""


class RateLimiter:
    """Both bounds of one token.

    Args:
        records: a second; 0 is no limit.
        size: bytes of records a second; 0 is no limit.
        now: seconds that do not go back.
    """

    __slots__ = ("_records", "_size")

    def __init__(self, records: int, size: int, now: float) -> None:
        self._records = TokenBucket(records, now, BURST_SECONDS) if records else None
        self._size = TokenBucket(size, now, BURST_SECONDS) if size else None

    def wait(self, now: float) -> tuple[float, str]:
        """Seconds until something may be sent again, and the setting that says so."""
        waits = [(0.0, "")]
        if self._records is not None:
            waits.append((self._records.wait(now), "records_per_second"))
        if self._size is not None:
            waits.append((self._size.wait(now), "bytes_per_second"))
        return max(waits)

    def charge(self, records: int, size: int, now: float) -> None:
        """Charges records, and their bytes."""
        if self._records is not None:
            self._records.charge(records, now)
        if self._size is not None:
            self._size.charge(size, now)


# -- requests and bytes in flight ------------------------------------------------------------------
#
# One client may fill all of it as long as it is alone. As soon as another one has something in
# flight, or was turned away lately, no client gets beyond its share: it is told so (429), and what
# it gives back is there for the others. A client is a token's name, or without one a peer's
# address (see `peer.py`), so all users of one proxy are one client. Its only request is
# never refused for its share, or it could never be sent at all.
#
# A client that fills a bound does not keep others out until its requests end: an eighth more is
# there for the first `SPARE_REQUESTS` requests, and the first `EXPECTED_BYTES`, of each client.
#
# Streams have no end. What one keeps between two pieces (a decompression window, an unfinished
# line) is held to half of the bytes, and so is the number of streams to a share for each client,
# also while that client is alone: nobody would get it back.

EXPECTED_BYTES = 64 * 1024
"""What a body that was announced takes at once."""
SPARE_REQUESTS = 4
"""A client that connects again has its last connections there still: their ends are seen later."""

_SPARE = 8


class ClientShare:
    """Requests and bytes of one client."""

    __slots__ = ("address", "bytes", "lasting", "requests", "streams")

    def __init__(self, address: str) -> None:
        self.address = address
        self.requests = 0
        self.streams = 0
        self.bytes = 0
        self.lasting = 0


class AdmissionController:
    """Bounds requests and bytes in flight, with a share for each client; bytes on any thread.

    Args:
        bytes_max: `http.inflight_bytes_max`.
        requests_max: `http.requests_max`.
        share: `http.client_share`, more than 0, at most 1.
        streams_max: `http.streams_max`.
        monotonic: seconds that do not go back.
    """

    def __init__(
        self,
        bytes_max: int,
        *,
        requests_max: int,
        share: float,
        streams_max: int = 0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bytes_max = bytes_max
        self.requests_max = requests_max
        self.streams_max = streams_max
        self.bytes = 0
        self.requests = 0
        self.streams = 0
        self._lasting = 0
        # In whole MiB: a small bound is what it says.
        self._bytes_spare = bytes_max // _SPARE >> 20 << 20
        self._requests_spare = requests_max // _SPARE
        self._streams_share = max(1.0, streams_max * share)
        self._lasting_share = bytes_max * share / 2
        self._bytes_share = bytes_max * share
        self._requests_share = requests_max * share
        self._clients: dict[str, ClientShare] = {}
        self._turned_away: dict[str, float] = {}  # the last two clients, and until when it counts
        self._monotonic = monotonic
        self._drained = Rate(monotonic())
        self._lock = threading.Lock()

    def enter(self, address: str) -> Reservation:
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
            client = self._clients[address] = ClientShare(address)
        client.requests = requests
        self.requests += 1
        return Reservation(self, client)

    def enter_quickly(self, address: str, size: int) -> ClientShare | None:
        """A place and bytes for a request that is here as a whole; `None` if a bound is near.

        Args:
            address: see `client_of`, which made it.
            size: its bytes, which `leave` gives back with the place.
        """
        client = self._clients.get(address)
        if self.requests >= self.requests_max:
            return None
        if client is not None:
            if client.requests >= self._requests_share or client.bytes + size > self._bytes_share:
                return None
        elif size > self._bytes_share:
            return None
        with self._lock:
            if self.bytes + size > self.bytes_max:
                return None
            self.bytes += size
            if client is None:
                client = self._clients[address] = ClientShare(address)
            client.bytes += size
        client.requests += 1
        self.requests += 1
        return client

    def _check_requests(self, address: str, *, over_share: bool) -> None:
        with self._lock:
            if over_share and self._is_contended(address):
                raise self._refusal(problem.OVER_SHARE, "this client's share of http.requests_max")
            client = self._clients.get(address)
            has_few = client is None or client.requests < SPARE_REQUESTS
            spare = self._requests_spare if has_few else 0
            if self.requests >= self.requests_max + spare:
                self._turn_away(address)
                raise self._refusal(problem.BUSY, "http.requests_max")

    def take(self, size: int, client: ClientShare, own: int) -> None:
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
            spare = self._bytes_spare if client.bytes + size <= EXPECTED_BYTES else 0
            if self.bytes + size <= self.bytes_max + spare:
                self.bytes += size
                client.bytes += size
                return
            if own + size <= self.bytes_max:
                self._turn_away(client.address)
                raise self._refusal(
                    problem.BUSY, "http.inflight_bytes_max", self.bytes + size, self.bytes_max
                )
        detail = f"more than http.inflight_bytes_max = {self.bytes_max} in one request"
        raise Problem(problem.PAYLOAD_TOO_LARGE, detail)

    def keep(self, size: int, client: ClientShare, own: int) -> None:
        """Counts bytes as those of a stream between its pieces, of which it has `own` already.

        Args:
            size: how many more; fewer if it is less than 0.
            client: whose they are.
            own: of the same stream.

        Raises:
            Problem: 503 if other streams have them, 429 if the client has too many.
        """
        with self._lock:
            if size > 0 and client.lasting > own and client.lasting + size > self._lasting_share:
                what = "this client's share of what streams may keep of http.inflight_bytes_max"
                raise self._refusal(problem.OVER_SHARE, what)
            if size > 0 and self._lasting > own and self._lasting + size > self.bytes_max / 2:
                raise self._refusal(problem.BUSY, "half of http.inflight_bytes_max")
            self._lasting += size
            client.lasting += size

    def begin_stream(self, client: ClientShare) -> bool:
        """Counts a stream in, unless there are too many, or too many of its client's."""
        if self.streams >= self.streams_max or client.streams >= self._streams_share:
            return False
        self.streams += 1
        client.streams += 1
        return True

    def end_stream(self, client: ClientShare) -> None:
        """Counts one out that was counted in."""
        self.streams -= 1
        client.streams -= 1

    def give(self, size: int, client: ClientShare) -> None:
        """Takes back what a request asked for and does not hold yet."""
        with self._lock:
            self.bytes -= size
            client.bytes -= size

    def leave(self, client: ClientShare, size: int, requests: int = 1) -> None:
        """Requests of a client are over, and give their bytes back; on the event loop."""
        self.give_back(client, size)
        self.requests -= requests
        client.requests -= requests
        if not client.requests:
            del self._clients[client.address]

    def give_back(self, client: ClientShare, size: int) -> None:
        """A request gives bytes back."""
        with self._lock:
            self.bytes -= size
            client.bytes -= size
            self._drained.add(size, self._monotonic())

    def _is_contended(self, address: str) -> bool:
        """Returns True if another client is active, or was rejected lately and may come back."""
        if len(self._clients) > (address in self._clients):
            return True
        now = self._monotonic()
        return any(one != address and now < end for one, end in self._turned_away.items())

    def _turn_away(self, address: str) -> None:
        # Two are enough: one of them is another client than the one that asks.
        self._turned_away.pop(address, None)
        self._turned_away[address] = self._monotonic() + LONGEST
        if len(self._turned_away) > 2:
            del self._turned_away[next(iter(self._turned_away))]

    def _refusal(
        self, kind: ProblemType, what: str, used: float = 0.0, bound: float = 0.0
    ) -> Problem:
        rate = self._drained.per_second(self._monotonic())
        after = wait_for_room(used, bound, rate, random.random)
        return Problem(kind, f"{what} is reached", headers=problem.retry_after(after))


class Reservation:
    """Bytes that one request holds.

    Attributes:
        base: bytes that are no part of its body.
        bytes: all of them.
    """

    __slots__ = ("_admission", "_client", "_lasting", "base", "bytes")

    def __init__(self, admission: AdmissionController, client: ClientShare) -> None:
        self._admission = admission
        self._client = client
        self._lasting = 0
        self.base = 0
        self.bytes = 0

    @property
    def client(self) -> str:
        """The name that its bytes count under."""
        return self._client.address

    def grow(self, size: int) -> None:
        """Takes more bytes.

        Raises:
            Problem: see `AdmissionController.take`.
        """
        self._admission.take(size, self._client, self.bytes)
        self.bytes += size

    def give_back(self) -> None:
        """The bytes are not held any more; the request's place still is."""
        self.set(0)

    def add_base(self, size: int) -> None:
        """Takes bytes that are held to the end, and count as no part of the body.

        Raises:
            Problem: see `AdmissionController.take`.
        """
        self.grow(size)
        self.base += size

    def set(self, size: int) -> None:
        """Takes more bytes, or gives some back, so that it is so many of the body.

        Raises:
            Problem: see `AdmissionController.take`; it has as many as before.
        """
        size += self.base
        if size > self.bytes:
            self.grow(size - self.bytes)
        elif size < self.bytes:
            self._admission.give_back(self._client, self.bytes - size)
            self.bytes = size

    def keep(self, size: int) -> None:
        """Of its bytes so many are there for as long as the stream is.

        Raises:
            Problem: see `AdmissionController.keep`.
        """
        if size != self._lasting:
            self._admission.keep(size - self._lasting, self._client, self._lasting)
            self._lasting = size

    def begin_stream(self) -> bool:
        """Returns True if the request may go on as a stream; then `end_stream` comes after it."""
        return self._admission.begin_stream(self._client)

    def end_stream(self) -> None:
        """The stream is over, and so is what it kept."""
        self.keep(0)
        self._admission.end_stream(self._client)

    def expect(self, size: int) -> None:
        """Reserves bytes for a body that was announced, and takes the first `EXPECTED_BYTES` of it.

        The rest is taken as it comes: saying that one has much to send costs a client nothing.

        Raises:
            Problem: see `AdmissionController.take`.
        """
        self._admission.take(size, self._client, self.bytes)
        taken = min(size, EXPECTED_BYTES)
        if taken < size:
            self._admission.give(size - taken, self._client)
        self.bytes += taken

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._admission.leave(self._client, self.bytes)
