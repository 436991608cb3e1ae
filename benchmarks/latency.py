"""How long a yes takes at a rate that the peer can bear: an open loop.

`python -m benchmarks.latency PORT SECONDS PATH TYPE RATE BODY…` sends that many requests a second
at fixed times, whether or not the earlier ones were answered, and measures each from the time at
which it was **due**. A closed loop would wait with the peer while that is busy, and so leave out
just the requests that would have waited longest (coordinated omission). When every connection is
busy a request waits here, and that counts as well; so does any lateness of this process itself,
which is told apart in `late_p99`.

Prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.load import CONNECTIONS, START_SECONDS, Client, request
from benchmarks.loop import loop_factory
from benchmarks.processes import Failed, output_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.peers.base import Service

LEAD_SECONDS = 0.05
"""The first request is due this long after the connections are made."""
TURN_SECONDS = 0.0005
"""Between two looks at the schedule, at least."""
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


class _Paced(Client):
    """One of the connections; free when its request was answered."""

    def __init__(self, pacer: _Pacer) -> None:
        super().__init__()
        self._pacer = pacer
        self.due = 0.0

    def answered(self, *, yes: bool) -> None:
        self._pacer.times.append(time.perf_counter() - self.due)
        self._pacer.refused += not yes
        self._pacer.free.append(self)
        self._pacer.send_due()

    def connection_lost(self, exc: Exception | None) -> None:
        """Its request stays without an answer, and the connection is not used again."""


class _Pacer:
    """The schedule, the connections, and the times."""

    def __init__(self, requests: Sequence[bytes], rate: float, seconds: float) -> None:
        self._requests = itertools.cycle(requests)
        self._interval = 1.0 / rate
        self._count = max(1, round(rate * seconds))
        self._sent = 0
        self.free: deque[_Paced] = deque()
        self.times: list[float] = []
        self.late: list[float] = []
        self.refused = 0

    async def run(self, port: int) -> Latency:
        loop = asyncio.get_running_loop()
        clients = []
        for _ in range(CONNECTIONS):
            _, client = await loop.create_connection(lambda: _Paced(self), "127.0.0.1", port)
            clients.append(client)
        self.free.extend(clients)
        self._began = time.perf_counter() + LEAD_SECONDS
        end = self._began + self._count * self._interval + ANSWER_SECONDS
        while len(self.times) < self._count and time.perf_counter() < end:
            self.send_due(on_time=True)
            due = self._began + self._sent * self._interval
            # Asleep until then, to the millisecond that an event loop is exact to: who turns
            # instead takes the CPU from the peer, and then waits for it in turn.
            await asyncio.sleep(max(TURN_SECONDS, due - time.perf_counter()))
        for client in clients:
            client.abort()
        return self._seen()

    def send_due(self, *, on_time: bool = False) -> None:
        """Sends what is due, as far as connections are free.

        Args:
            on_time: nothing but this process can have made it late, if a connection was free.
        """
        now = time.perf_counter()
        while self.free and self._sent < self._count:
            due = self._began + self._sent * self._interval
            if due > now:
                return
            if on_time:
                self.late.append(now - due)
            client = self.free.popleft()
            client.due = due
            client.send(next(self._requests))
            self._sent += 1

    def _seen(self) -> Latency:
        times, late = sorted(self.times), sorted(self.late)
        unanswered = self._count - len(times)
        every = times + [math.inf] * unanswered
        return Latency(
            sent=self._count,
            refused=self.refused,
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
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        print(json.dumps(runner.run(pacer.run(int(sys.argv[1])))._asdict()))
