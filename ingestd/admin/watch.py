"""Watching a daemon: samples of the last 15 minutes, and events for those that watch.

`History` looks at the status every few seconds, watched or not, and keeps a bounded number of
samples. `Watchers` makes events once a second while at least one reader is there, each of them once
for all readers. A reader that is slow is given the newest events and misses some before them; one
that takes nothing for a while is hung up on (`connection.py`). Records cost nothing here.

The stream is one of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html),
whose data are JSON objects:

* `history`, once and first: the samples of each pipeline, as `History.of` gives them;
* `status`, once a second: the body of `/v1/status`, with the time `at` it was made;
* `batches`, when there are some: the tries of batches that have ended, by pipeline, the last ones
  if there were many; at first all that are kept, an event for each pipeline;
* `sample`: the newest sample of each pipeline, in the order of the fields.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from typing import TYPE_CHECKING, Any

import msgspec

from ingestd.base.batch import share
from ingestd.base.logging import get_logger
from ingestd.http.problem import BUSY, Problem, retry_after

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ingestd.admin.connection import Outlet
    from ingestd.admin.status import AdminView

SAMPLE_SECONDS = 5.0
"""Between two samples."""
SAMPLES_MAX = 180
"""Samples of each pipeline: 15 minutes."""
WATCHERS_MAX = 50
"""Readers at one time."""
TICK_SECONDS = 1.0
"""Between two events of the status."""
TICK_BATCHES = 50
"""Tries of batches of one pipeline in one event, the last ones."""

FIELDS = ("at", "accepted", "processed", "dead", "pending", "oldest", "age_50", "age_99")
"""Of a sample: seconds since the epoch; records ever accepted, processed and given up; records
that are pending; the age of the oldest one in seconds; and the ages that half and 99 % of the
batches did not exceed when they were done with since the sample before, -1 without a batch."""

log = get_logger()


class History:
    """Samples of each pipeline.

    Args:
        view: the daemon.
    """

    def __init__(self, view: AdminView) -> None:
        self._view = view
        self._samples: dict[str, array[float]] = {}
        self._ages: dict[str, list[int]] = {}
        self.taken = 0

    async def run(self) -> None:
        """Takes samples until it is cancelled."""
        while True:
            try:
                self.sample()
            except Exception:
                log.exception("sample_failed")  # the next one may do better
            await asyncio.sleep(SAMPLE_SECONDS)

    def sample(self) -> None:
        """Takes a sample of each pipeline, and lets the oldest one go."""
        now = time.time()
        pipelines = self._view.pipelines
        for name, one in self._view.status().pipelines.items():
            if name not in pipelines:
                continue
            ages = list(pipelines[name].settlements.recent.ages)
            before = self._ages.get(name) or [0] * len(ages)
            self._ages[name] = ages
            # A log that is adopted again begins with nothing.
            new = [max(0, count - earlier) for count, earlier in zip(ages, before, strict=True)]
            shares = [share(new, part) for part in (0.5, 0.99)]
            kept = self._samples.setdefault(name, array("d"))
            kept.extend((now, one.accepted, one.processed, one.dead_ever, one.pending))
            kept.append(one.oldest_pending_seconds)
            kept.extend(-1.0 if age is None else age for age in shares)
            del kept[: -SAMPLES_MAX * len(FIELDS)]
        for gone in self._samples.keys() - pipelines.keys():
            del self._samples[gone], self._ages[gone]
        self.taken += 1

    def of(self, names: Iterable[str] | None = None) -> dict[str, Any]:
        """The samples, each a list in the order of `fields`.

        Args:
            names: of pipelines; `None` for all.
        """
        chosen = self._samples if names is None else [n for n in names if n in self._samples]
        return {
            "seconds": SAMPLE_SECONDS,
            "fields": FIELDS,
            "pipelines": {name: _rows(self._samples[name]) for name in chosen},
        }

    def newest(self) -> dict[str, Any]:
        """The newest sample of each pipeline."""
        last = {name: kept[-len(FIELDS) :].tolist() for name, kept in self._samples.items()}
        return {"pipelines": last}


def _rows(kept: array[float]) -> list[list[float]]:
    flat, width = [round(value, 3) for value in kept], len(FIELDS)
    return [flat[start : start + width] for start in range(0, len(flat), width)]


class Watchers:
    """The readers of the event stream, and what they are given.

    Args:
        view: the daemon.
        history: of it.
    """

    def __init__(self, view: AdminView, history: History) -> None:
        self._view = view
        self._history = history
        self._readers = 0
        self._events = b""
        self._ticked = asyncio.Event()
        self._ticking: asyncio.Task[None] | None = None

    def check(self) -> None:
        """Checks that there is a place for one more reader.

        Raises:
            Problem: 503.
        """
        if self._readers >= WATCHERS_MAX:
            detail = f"{WATCHERS_MAX} readers watch already"
            raise Problem(BUSY, detail, headers=retry_after(10.0))

    async def write(self, outlet: Outlet) -> None:
        """Writes events until the reader has gone."""
        self._readers += 1
        try:
            if self._ticking is None:
                turn = self._tick(self._tried())
                self._ticking = asyncio.get_running_loop().create_task(turn, name="watch")
            for piece in self._first():
                await outlet.send(piece)
            while True:
                await self._ticked.wait()
                await outlet.send(self._events)
        finally:
            self._readers -= 1
            if not self._readers:
                self.stop()

    def stop(self) -> None:
        """Ends the making of events."""
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None

    def _first(self) -> Iterator[bytes]:
        """Yields what a new reader is given, piece by piece: one may take nothing."""
        yield event("history", self._history.of())
        yield self._status()
        for name, pipeline in list(self._view.pipelines.items()):
            tries = [one._asdict() for one in pipeline.settlements.recent.batches]
            yield event("batches", {"pipelines": {name: tries}})

    def _status(self) -> bytes:
        status = msgspec.to_builtins(self._view.status())
        return event("status", {"at": round(time.time(), 3), **status})

    def _tried(self) -> dict[str, int]:
        return {name: one.settlements.recent.tried for name, one in self._view.pipelines.items()}

    async def _tick(self, seen: dict[str, int]) -> None:
        taken = self._history.taken
        while True:
            await asyncio.sleep(TICK_SECONDS)
            try:
                events = [self._status(), *self._new_batches(seen)]
                if self._history.taken != taken:
                    taken = self._history.taken
                    events.append(event("sample", self._history.newest()))
            except Exception:
                log.exception("watch_failed")  # the next turn may do better
                continue
            self._events = b"".join(events)
            self._ticked.set()  # wakes the readers that wait now
            self._ticked.clear()

    def _new_batches(self, seen: dict[str, int]) -> Iterator[bytes]:
        """Yields an event if batches were tried since; takes note in `seen`, by pipeline."""
        batches = {}
        for name, pipeline in self._view.pipelines.items():
            recent = pipeline.settlements.recent
            if found := recent.since(seen.get(name, 0)):
                batches[name] = [one._asdict() for one in found[-TICK_BATCHES:]]
            seen[name] = recent.tried
        if batches:
            yield event("batches", {"pipelines": batches})


def event(kind: str, data: object) -> bytes:
    """A server-sent event."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(data))
