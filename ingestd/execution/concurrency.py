"""Adaptive concurrency: decides how many workers a pipeline has, from what their calls show. Pure.

The rule is that of TCP Vegas (Brakmo and Peterson, 1995) as Netflix's concurrency-limits uses it
for calls (`VegasLimit`), with the multiplicative decrease of AIMD for errors. `workers` calls at
once, of which each takes `latency` where it took `floor` without a crowd, are work for
`workers * floor / latency` of them; the others wait somewhere in the sink:

    waiting = workers * (1 - floor / latency)

While few wait, more workers do more; when many wait, they only wait longer. Three things differ
from requests of one kind:

* **Calls are of different sizes.** A call is compared with calls of about as many records, so there
  is a floor for each power of two.
* **Calls vary.** A floor is a mean of many calls, the lowest that a window had, and one window
  lowers it only by half of the difference. Up to `FLAT` of difference counts as none.
* **Sinks change.** At the least number of workers there is no crowd of ours, so what calls take
  there is the floor, up or down: a sink that has become slower for good is climbed anew from there.
  If it is slower by so little that the number need not fall, this has to wait for a quiet minute.

It is decided once a window: after as many calls as are needed for a mean, and no earlier than a
second. Calls that began under another number of workers do not count.

Invariants, each with a test:

1. The number is never outside of `least` and `most`.
2. It grows only while jobs waited for a worker, and no worker is missing that it asked for.
3. Failures of more than `FAILED_SHARE` of the calls lower it by a quarter, down to `least`, however
   quick they are; a failure that a handler asks for (`raise Retry`) is none.
4. After `IDLE_SECONDS` it is no more than were busy at once in that time.
"""

from __future__ import annotations

from math import log10
from typing import TYPE_CHECKING, NamedTuple

from ingestd.handlers.outcome import POSTPONED

if TYPE_CHECKING:
    from ingestd.handlers.outcome import Result

LOOK_SECONDS = 1.0
"""Between two looks."""
WINDOW_CALLS = 10
"""Calls that make a mean; more where more workers run, so that each has one."""
FAILED_SHARE = 0.1
FLAT = 1.1
"""Latency, in floors, that still counts as no crowd: means differ by that much anyway."""
IDLE_SECONDS = 60.0
"""Workers that were not needed for so long end."""
REST_SECONDS = 60.0
"""Time without growth after workers could not be started."""
_WEIGHT = 0.5  # of a window in a floor


class Demand(NamedTuple):
    """The workers of a pool at the time of a look.

    Attributes:
        workers: that serve.
        waited: jobs so far that waited until a worker had time for them.
        taken: all jobs so far.
        failed: workers so far that could not be started.
    """

    workers: int
    waited: int
    taken: int
    failed: int = 0


def waiting(workers: int, crowd: float) -> float:
    """Calls that wait in the sink, of so many at once that take `crowd` floors each."""
    return workers * (1 - 1 / max(crowd, 1.0))


def step(workers: int, crowd: float) -> int:
    """The next number of workers, before any bound.

    Args:
        workers: now.
        crowd: the latency, in floors.
    """
    few = max(1.0, 3 * log10(workers), workers * (1 - 1 / FLAT))
    crowded = waiting(workers, crowd)
    if crowded <= few / 3:
        return workers + max(1, workers // 4)
    if crowded < few:
        return workers + 1
    if crowded > 2 * few:
        return workers - max(1, workers // 10)
    return workers


class ConcurrencyLimit:
    """The number of workers of one pipeline.

    Args:
        least: `executor.workers`.
        most: `executor.workers_max`; more than these.
        now: seconds of a clock that only goes forward, as in every call.

    Attributes:
        workers: wanted now.
        look_seconds: between two looks.
    """

    look_seconds = LOOK_SECONDS

    def __init__(self, least: int, most: int, now: float) -> None:
        self.workers = self._least = least
        self._most = most
        self._floors: dict[int, float] = {}  # seconds by the bits of a call's records
        self._seen = Demand(least, 0, 0)
        self._rests_until = 0.0
        self._busy, self._idle_since = 0, now
        self._begin(now)

    def _begin(self, now: float) -> None:
        """A window begins."""
        self._began = now
        self._waited = self._taken = 0
        self._calls = self._failed = 0
        self._times: dict[int, tuple[int, float]] = {}

    def ran(self, result: Result, records: int, now: float, *, running: int) -> None:
        """Takes note of a call.

        Args:
            result: of it.
            records: in it.
            now: when it came back.
            running: calls that ran at once, this one included.
        """
        self._busy = max(self._busy, running)
        failure = result.failure
        if now - result.seconds < self._began or (failure and failure.reason == POSTPONED):
            return
        undone = len(result.rejections) + len(result.retries)
        if failure is not None or (result.retries and undone >= records):
            self._calls, self._failed = self._calls + 1, self._failed + 1
        elif undone < records:  # what is rejected at once tells nothing of the sink
            self._calls += 1
            size = records.bit_length()
            calls, seconds = self._times.get(size, (0, 0.0))
            self._times[size] = calls + 1, seconds + result.seconds

    def look(self, demand: Demand, now: float) -> int:
        """Decides; call it about once a second. Returns the number of workers wanted now."""
        before, self._seen = self._seen, demand
        self._waited += demand.waited - before.waited
        self._taken += demand.taken - before.taken
        if demand.failed > before.failed:
            self._rests_until = now + REST_SECONDS
            self._set(demand.workers, now)
        elif demand.workers != self.workers:
            self._begin(now)  # some are being started, or have not ended yet
        elif now - self._began >= LOOK_SECONDS:
            self._decide(now)
        if now - self._idle_since >= IDLE_SECONDS:
            self._set(min(self.workers, self._busy), now)
            self._busy, self._idle_since = 0, now
        return self.workers

    def _decide(self, now: float) -> None:
        if self._failed > FAILED_SHARE * self._calls:
            self._set(self.workers - max(1, self.workers // 4), now)
            self._begin(now)
        elif self._calls >= max(WINDOW_CALLS, self.workers):
            wanted = step(self.workers, self._crowd())
            is_wanted = 2 * self._waited >= self._taken and now >= self._rests_until
            self._set(wanted if is_wanted or wanted < self.workers else self.workers, now)
            self._begin(now)

    def _set(self, workers: int, now: float) -> None:
        workers = min(max(workers, self._least), self._most)
        if workers != self.workers:
            self.workers = workers
            self._begin(now)

    def _crowd(self) -> float:
        """The window's latency, in floors; takes note of what it says of these."""
        total = calls = 0.0
        for size, (count, seconds) in self._times.items():
            mean = seconds / count
            floor = self._floors.setdefault(size, mean)
            if mean < floor:
                self._floors[size] = floor + _WEIGHT * (mean - floor)
            elif self.workers == self._least:
                self._floors[size] = mean
            total += count * mean / max(self._floors[size], 1e-9)
            calls += count
        return total / calls if calls else 1.0
