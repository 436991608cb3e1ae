"""Metrics in plain numbers. One `Metrics` a process; a scrape makes the page of Prometheus of it.

Two ways in, neither on the path of a single record:

* What happens is counted where it happens, once a request, commit or batch, through objects whose
  label values are already resolved (`Metrics.route`, `Metrics.pipeline`).
* What is known anyway (the ledger, the queue, the workers) is read at each scrape
  (`Metrics.watch`), so no second count of it can drift.

Names follow https://prometheus.io/docs/practices/naming/: base units, `_total` on counters. The
first scrape imports prometheus_client: a start that waits for it takes 25 ms more, and a daemon
that is never scraped 3.5 MB.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from threading import Lock
from typing import TYPE_CHECKING, Literal, get_args

from ingestd.base.scraped import Watcher, family, histogram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from prometheus_client import Metric

    from ingestd.base.append import AppendCounts
    from ingestd.base.scraped import SinkCounts

REASONS_MAX = 32
"""Values that one `reason` label may take in one pipeline; what comes later counts as `other`."""

Tried = Literal["done", "retry", "split", "failed"]
"""Outcome of a try of a batch; see `_BY_LABEL`."""

_REQUEST_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_COMMIT_SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_HANDLER_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_APPENDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_RECORDS = (1, 10, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 100_000)
_BYTES = tuple(1024 * 4**n for n in range(9))  # 1 KiB to 64 MiB

# Name, help.
_COUNTERS = (
    ("accepted_bytes_total", "Payload bytes made durable."),
    ("records_unkept_total", "Invalid records that only their sender was told of."),
    ("journal_committed_bytes_total", "Bytes written by the journal's commits."),
)
# Name, help, the label beside `pipeline`.
_BY_LABEL = (
    ("invalid_bytes_total", "Payload bytes of invalid records that are kept.", "reason"),
    ("requests_refused_total", "Whole requests turned away at a bound.", "reason"),
    ("dead_letters_total", "Dead letters, of invalid records too.", "reason"),
    # done: something was processed. retry: nothing, and all or some of it comes again. split:
    # it failed, and its halves come in its place. failed: all of it was given up.
    ("batches_total", "Tries of batches.", "outcome"),
    ("worker_restarts_total", "Workers that were replaced after a crash or an overrun.", "reason"),
)
# Name, help, bounds.
_HISTOGRAMS = (
    ("journal_commit_duration_seconds", "Seconds of a commit, its sync included.", _COMMIT_SECONDS),
    ("journal_commit_appends", "Appends sharing one commit.", _APPENDS),
    ("batch_records", "Records in a batch.", _RECORDS),
    ("batch_bytes", "Payload bytes in a batch.", _BYTES),
    ("handler_duration_seconds", "Seconds of a call of the handler.", _HANDLER_SECONDS),
)


class Gauge:
    """A number that goes up and down."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        """Replaces the number."""
        self.value = value


class RouteMetrics:
    """The requests of one route. From `Metrics.route`; to be called on one thread.

    The numbers are plain integers, which a scrape reads: they move with every request.

    Attributes:
        classes: requests by the first digit of their status, from 2 to 5.
        buckets: requests by `_REQUEST_SECONDS`, the last ones beyond all of these.
        seconds: of all requests.
    """

    __slots__ = ("buckets", "classes", "seconds")

    def __init__(self) -> None:
        self.classes = [0] * 4
        self.buckets = [0] * (len(_REQUEST_SECONDS) + 1)
        self.seconds = 0.0

    def answered(self, status: int, seconds: float, requests: int = 1) -> None:
        """Requests got their answers, each `seconds` after its head was read."""
        self.classes[min(max(status // 100, 2), 5) - 2] += requests
        self.buckets[bisect_left(_REQUEST_SECONDS, seconds)] += requests
        self.seconds += seconds * requests


class _Histogram:
    """Counts numbers by the least bound that they do not pass.

    Attributes:
        bounds: in ascending order.
        buckets: numbers by bound, the last ones beyond all of these.
        total: their sum.
    """

    __slots__ = ("bounds", "buckets", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.buckets[bisect_left(self.bounds, value)] += 1
        self.total += value


class PipelineMetrics:
    """Counts events of one pipeline. From `Metrics.pipeline`; safe to call from any thread.

    Attributes:
        counters: by name.
        labeled: counters by name and value of their label.
        histograms: by name.
    """

    __slots__ = ("_lock", "counters", "histograms", "labeled")

    def __init__(self) -> None:
        self._lock = Lock()
        self.counters = {name: 0.0 for name, _ in _COUNTERS}
        self.labeled: dict[str, dict[str, float]] = {name: {} for name, _, _ in _BY_LABEL}
        self.labeled["batches_total"] = dict.fromkeys(get_args(Tried), 0.0)
        self.histograms = {name: _Histogram(bounds) for name, _, bounds in _HISTOGRAMS}

    def _count(self, name: str, label: str, amount: float) -> None:
        """Adds to a counter with a label, whose values are bounded in number; under the lock."""
        counts = self.labeled[name]
        if label not in counts and len(counts) >= REASONS_MAX:
            label = "other"
        counts[label] = counts.get(label, 0.0) + amount

    def accepted(self, size: int) -> None:
        """A source's append of `size` payload bytes is durable. The records are in the ledger."""
        with self._lock:
            self.counters["accepted_bytes_total"] += size

    def invalid(self, reason: str, records: int, size: int) -> None:
        """Counts records that a source keeps as dead letters instead: once a request and reason."""
        with self._lock:
            self._count("dead_letters_total", reason, records)
            self._count("invalid_bytes_total", reason, size)

    def unkept(self, records: int) -> None:
        """Invalid records were listed or counted in an answer, and not kept as dead letters."""
        with self._lock:
            self.counters["records_unkept_total"] += records

    def request_refused(self, reason: str) -> None:
        """A whole request was turned away and may be sent again: which bound, in one word."""
        with self._lock:
            self._count("requests_refused_total", reason, 1)

    def committed(self, seconds: float, appends: int, size: int) -> None:
        """The journal committed `appends` appends of `size` bytes together, in `seconds`."""
        with self._lock:
            self.histograms["journal_commit_duration_seconds"].observe(seconds)
            self.counters["journal_committed_bytes_total"] += size
            self.histograms["journal_commit_appends"].observe(appends)

    def batch_tried(self, outcome: Tried, records: int, size: int, seconds: float) -> None:
        """A try of a batch has ended; its handler ran for `seconds`, 0 if it was not called."""
        with self._lock:
            self._count("batches_total", outcome, 1)
            if seconds > 0:
                self.histograms["handler_duration_seconds"].observe(seconds)
            if outcome in {"done", "failed"}:  # of the others all or some comes again
                self.histograms["batch_records"].observe(records)
                self.histograms["batch_bytes"].observe(size)

    def died(self, reason: str, records: int) -> None:
        """Accepted records became dead letters: once a batch and reason."""
        with self._lock:
            self._count("dead_letters_total", reason, records)

    def worker_restarted(self, reason: str) -> None:
        """A worker was replaced: `crashed` or `timeout`."""
        with self._lock:
            self._count("worker_restarts_total", reason, 1)


class Metrics:
    """All series of one process.

    Args:
        version: of ingestd, for `ingestd_build_info`.

    Attributes:
        loop_lag: gauge, seconds; set by the daemon's loop monitor.
    """

    def __init__(self, version: str) -> None:
        self._version = version
        self._watcher = Watcher()
        self._routes: dict[str, RouteMetrics] = {}
        self._pipelines: dict[str, PipelineMetrics] = {}
        self.loop_lag = Gauge()

    def route(self, route: str) -> RouteMetrics:
        """The requests of a route, named by its template (`/v1/records/{pipeline}`)."""
        return self._routes.setdefault(route, RouteMetrics())

    def pipeline(self, name: str) -> PipelineMetrics:
        """The metrics of the pipeline of that name; the same object every time."""
        if name not in self._pipelines:
            self._pipelines[name] = PipelineMetrics()
        return self._pipelines[name]

    def watch(self, read: Callable[[], Mapping[str, object]]) -> None:
        """Has each scrape read the pipelines' states, by name, from `read`."""
        self._watcher.read = read

    def watch_sources(
        self,
        running: Callable[[], Mapping[tuple[str, str], bool]],
        numbers: Callable[[], Mapping[tuple[str, str], Mapping[str, float]]] = dict,
        endpoints: Callable[[], Mapping[tuple[str, str], AppendCounts]] = dict,
    ) -> None:
        """Has each scrape read the sources by name and kind, and endpoints by source and name.

        Args:
            running: tells which sources are.
            numbers: gives those of each source.
            endpoints: gives the counts of each endpoint.
        """
        self._watcher.sources, self._watcher.numbers = running, numbers
        self._watcher.endpoints = endpoints

    def watch_workers(
        self,
        sinks: Callable[[], Mapping[str, Mapping[str, SinkCounts]]],
        memory: Callable[[], Mapping[str, Mapping[str, int]]],
    ) -> None:
        """Has each scrape read, by pipeline, the counts of its targets and its workers' memory."""
        self._watcher.sinks, self._watcher.memory = sinks, memory

    def watch_log(self, lost: Callable[[], int]) -> None:
        """Has each scrape read the number of dropped log lines from `lost`."""
        self._watcher.lost = lost

    def collect(self) -> Iterator[Metric]:
        """Yields all series."""
        from prometheus_client import ProcessCollector  # noqa: PLC0415  see the module

        yield from self._watcher.collect()
        yield from self._requests()
        yield from ProcessCollector(registry=None).collect()
        yield from self._counted()
        build = family(
            "build_info",
            "Versions of ingestd and Python, as labels; always 1.",
            "version",
            "python",
        )
        build.add_metric([self._version, ".".join(map(str, sys.version_info[:3]))], 1)
        yield build
        lag = family("loop_lag_seconds", "Longest recent delay of the event loop, in seconds.")
        lag.add_metric([], self.loop_lag.value)
        yield lag

    def _requests(self) -> Iterator[Metric]:
        """Yields the requests of all routes."""
        routes = list(self._routes.items())
        requests = family("http_requests_total", "HTTP requests answered.", "route", "code")
        for route, counted in routes:
            for first, count in enumerate(counted.classes, 2):
                requests.add_metric([route, f"{first}xx"], count)
        yield requests
        took = [(route, counted.buckets, counted.seconds) for route, counted in routes]
        name, text = (
            "http_request_duration_seconds",
            "Seconds from the head of a request to its answer.",
        )
        yield histogram(name, text, "route", _REQUEST_SECONDS, took)

    def _counted(self) -> Iterator[Metric]:
        """Yields what the pipelines have counted."""
        pipelines = list(self._pipelines.items())
        for name, text in _COUNTERS:
            made = family(name, text, "pipeline")
            for pipeline, counted in pipelines:
                made.add_metric([pipeline], counted.counters[name])
            yield made
        for name, text, label in _BY_LABEL:
            made = family(name, text, "pipeline", label)
            for pipeline, counted in pipelines:
                for value, count in list(counted.labeled[name].items()):
                    made.add_metric([pipeline, value], count)
            yield made
        for name, text, bounds in _HISTOGRAMS:
            seen = [(pipeline, counted.histograms[name]) for pipeline, counted in pipelines]
            rows = [(pipeline, list(one.buckets), one.total) for pipeline, one in seen]
            yield histogram(name, text, "pipeline", bounds, rows)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Renders the page of a scrape: body and content type.

        Args:
            accept: the request's `Accept`; OpenMetrics if it asks for that, else Prometheus text.
        """
        from prometheus_client.exposition import choose_encoder  # noqa: PLC0415  see the module

        encode, content_type = choose_encoder(accept)
        return encode(self), content_type
