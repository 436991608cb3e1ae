"""How long a yes takes at a rate that the peer can bear: an open loop.

`python -m benchmarks.latency PORT SECONDS PATH TYPE RATE BODY…` sends that many requests a second
at fixed times, whether or not the earlier ones were answered, and measures each from the time at
which it was **due**. A closed loop would wait with the peer while that is busy, and so leave out
just the requests that would have waited longest (coordinated omission). When every connection is
busy a request waits here, and that counts as well; so does any lateness of this process itself,
which is told apart in `late_p99`. It waits with epoll instead of an event loop, which takes 57 µs
of CPU a request: at 16,000 a second one of two cores, and what was measured was its own queue.

Prints one line of JSON.
"""

from __future__ import annotations

import itertools
import json
import math
import select
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.load import CONNECTIONS, START_SECONDS, is_yes, request
from benchmarks.processes import Failed, output_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.peers.base import Service

LEAD_SECONDS = 0.05
"""The first request is due this long after the connections are made."""
TURN_SECONDS = 0.001
"""Between two looks at the schedule while nothing comes, at least."""
READ_BYTES = 1 << 16
ANSWER_SECONDS = 10.0
"""After its end a load waits this long for answers; who has none then has none."""


class Latency(NamedTuple):
    """What a paced load saw; times in seconds.

    Attributes:
        sent: requests that were due.
        refused: answers that were no 2xx.
        unanswered: requests without an answer; they count as the longest.
        p50: half of the requests were answered within this.
        p99: 99 of 100.
        max: all that were answered.
        late_p99: how late this process itself sent, where a connection was free.
    """

    sent: int
    refused: int
    unanswered: int
    p50: float
    p99: float
    max: float
    late_p99: float


def pace(
    service: Service, bodies: Sequence[Path], rate: float, seconds: float, folder: Path
) -> Latency:
    """Sends bodies at a fixed rate for some seconds, from a process of its own.

    Args:
        service: to whom.
        bodies: files, sent in turn.
        rate: requests a second.
        seconds: how long.
        folder: an empty one for the process.

    Raises:
        Failed: it did not end well.
    """
    where = [str(service.port), str(seconds), service.path, service.content_type, str(rate)]
    command = [sys.executable, "-m", "benchmarks.latency", *where, *map(str, bodies)]
    printed = output_of(command, folder, seconds + ANSWER_SECONDS + START_SECONDS)
    latency = Latency(**json.loads(printed))
    if latency.unanswered:
        raise Failed(f"{latency.unanswered} of {latency.sent} requests got no answer")
    return latency


def quantile(times: Sequence[float], share: float) -> float:
    """The smallest of the sorted times that so many of them do not exceed (nearest rank)."""
    return times[max(0, math.ceil(share * len(times)) - 1)]


class _Connection:
    """One of the connections; free when its request was answered."""

    __slots__ = ("due", "received", "rest", "socket")

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.due = 0.0
        self.received = b""
        self.rest = b""

    def send(self, request: bytes) -> None:
        """Sends what the kernel takes of a request; the rest is kept."""
        try:
            sent = self.socket.send(request)
        except BlockingIOError:
            sent = 0
        self.rest = request[sent:]

    def receive(self) -> bool | None:
        """Whether the answer is a yes; `None` while it is not whole.

        Raises:
            OSError: there will be none.
        """
        try:
            piece = self.socket.recv(READ_BYTES)
        except BlockingIOError:
            return None
        if not piece:
            raise ConnectionResetError
        self.received += piece
        yes = is_yes(self.received)
        if yes is not None:
            self.received = b""
        return yes


class _Pacer:
    """The schedule, the connections, and the times."""

    def __init__(self, requests: Sequence[bytes], rate: float, seconds: float) -> None:
        self._requests = itertools.cycle(requests)
        self._interval = 1.0 / rate
        self._count = max(1, round(rate * seconds))
        self._sent = 0
        self._poll = select.epoll()
        self._free: deque[_Connection] = deque()
        self._times: list[float] = []
        self._late: list[float] = []
        self._refused = 0

    def run(self, port: int) -> Latency:
        """Sends all requests; waits for their answers."""
        connections = {}
        for _ in range(CONNECTIONS):
            one = _Connection(port)
            connections[one.socket.fileno()] = one
            self._poll.register(one.socket, select.EPOLLIN)
        self._free.extend(connections.values())
        self._began = time.perf_counter() + LEAD_SECONDS
        end = self._began + self._count * self._interval + ANSWER_SECONDS
        while len(self._times) < self._count and time.perf_counter() < end:
            self._send_due(on_time=True)
            due = self._began + self._sent * self._interval
            # Asleep until then, to the millisecond that epoll is exact to: who turns instead takes
            # the CPU from the peer, and then waits for it in turn.
            for descriptor, _ in self._poll.poll(max(TURN_SECONDS, due - time.perf_counter())):
                one = connections[descriptor]
                if one.rest:
                    self._send(one, one.rest)
                else:
                    self._receive(one)
            self._send_due()
        for one in connections.values():
            one.socket.close()
        return self._seen()

    def _send_due(self, *, on_time: bool = False) -> None:
        """Sends what is due, as far as connections are free.

        Args:
            on_time: nothing but this process can have made it late, if a connection was free.
        """
        now = time.perf_counter()
        while self._free and self._sent < self._count:
            due = self._began + self._sent * self._interval
            if due > now:
                return
            if on_time:
                self._late.append(now - due)
            one = self._free.popleft()
            one.due = due
            self._send(one, next(self._requests))
            self._sent += 1

    def _send(self, one: _Connection, request: bytes) -> None:
        had_rest = bool(one.rest)
        try:
            one.send(request)
        except OSError:
            self._poll.unregister(one.socket)
        else:
            if bool(one.rest) != had_rest:
                wanted = select.EPOLLOUT if one.rest else select.EPOLLIN
                self._poll.modify(one.socket, wanted)

    def _receive(self, one: _Connection) -> None:
        try:
            yes = one.receive()
        except OSError:
            # Its request stays without an answer, and the connection is not used again.
            self._poll.unregister(one.socket)
            return
        if yes is not None:
            self._times.append(time.perf_counter() - one.due)
            self._refused += not yes
            self._free.append(one)

    def _seen(self) -> Latency:
        times, late = sorted(self._times), sorted(self._late)
        unanswered = self._count - len(times)
        every = times + [math.inf] * unanswered
        return Latency(
            sent=self._count,
            refused=self._refused,
            unanswered=unanswered,
            p50=_finite(quantile(every, 0.5)),
            p99=_finite(quantile(every, 0.99)),
            max=times[-1] if times else 0.0,
            late_p99=quantile(late, 0.99) if late else 0.0,
        )


def _finite(seconds: float) -> float:
    """JSON knows no infinity; who has unanswered requests is told so by their number."""
    return seconds if math.isfinite(seconds) else ANSWER_SECONDS


if __name__ == "__main__":
    target, kind, pace_text, *names = sys.argv[3:]
    posts = [request(target, kind, Path(name).read_bytes()) for name in names]
    pacer = _Pacer(posts, float(pace_text), float(sys.argv[2]))
    print(json.dumps(pacer.run(int(sys.argv[1]))._asdict()))
