"""Prometheus metrics. One `Metrics` a process, with a registry of its own.

Two ways in, neither on the path of a single record:

* What happens is counted where it happens, once a request, commit or batch, through objects whose
  label values are already resolved (`Metrics.route`, `Metrics.pipeline`).
* What is known anyway (the ledger, the queue, the workers) is read at each scrape
  (`Metrics.watch`), so no second count of it can drift.

Names follow https://prometheus.io/docs/practices/naming/: base units, `_total` on counters.
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ingestd.base.scraped import Watcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client import Metric

    from ingestd.base.append import AppendCounts
    from ingestd.base.scraped import SinkCounts

REASONS_MAX = 32
"""Values that one `reason` label may take in one pipeline; what comes later counts as `other`."""

Tried = Literal["done", "retry", "split", "failed"]
"""Outcome of a try of a batch; see `_Families.batches`."""

_BY_PIPELINE = ("pipeline",)
_BY_REASON = ("pipeline", "reason")
_REQUEST_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_COMMIT_SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_HANDLER_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_APPENDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_RECORDS = (1, 10, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 100_000)
_BYTES = tuple(1024 * 4**n for n in range(9))  # 1 KiB to 64 MiB


class _Reasons:
    """Children of a counter by reason, resolved once each and bounded in number."""

    __slots__ = ("_children", "_counter", "_pipeline")

    def __init__(self, counter: Counter, pipeline: str) -> None:
        self._counter = counter
        self._pipeline = pipeline
        self._children: dict[str, Counter] = {}

    def inc(self, reason: str, amount: float) -> None:
        child = self._children.get(reason)
        if child is None:
            if len(self._children) >= REASONS_MAX:
                reason = "other"
            child = self._counter.labels(self._pipeline, reason)
            self._children[reason] = child
        child.inc(amount)


class _Families:
    """Every series that is counted where it happens."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        count, observe = self._counter, self._histogram
        # sources
        self.accepted_bytes = count("accepted_bytes_total", "Payload bytes made durable.")
        self.invalid_bytes = count(
            "invalid_bytes_total", "Payload bytes of invalid records that are kept.", *_BY_REASON
        )
        self.requests_refused = count(
            "requests_refused_total", "Whole requests turned away at a bound.", *_BY_REASON
        )
        self.unkept = count(
            "records_unkept_total", "Invalid records that only their sender was told of."
        )
        self.dead_letters = count(
            "dead_letters_total", "Dead letters, of invalid records too.", *_BY_REASON
        )
        # journal
        self.commit_seconds = observe(
            "journal_commit_duration_seconds", "One commit with its sync.", _COMMIT_SECONDS
        )
        self.appends = observe("journal_commit_appends", "Appends sharing one commit.", _APPENDS)
        self.commit_bytes = count("journal_committed_bytes_total", "Bytes committed.")
        # batches
        # done: something was processed. retry: nothing, and all or some of it comes again. split:
        # it failed, and its halves come in its place. failed: all of it was given up.
        self.batches = count("batches_total", "Tries of batches.", "pipeline", "outcome")
        self.batch_records = observe("batch_records", "Records in a batch.", _RECORDS)
        self.batch_bytes = observe("batch_bytes", "Payload bytes in a batch.", _BYTES)
        self.handler_seconds = observe(
            "handler_duration_seconds", "One call of the handler.", _HANDLER_SECONDS
        )
        self.worker_restarts = count("worker_restarts_total", "Workers replaced.", *_BY_REASON)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"ingestd_{name}", text, labels or _BY_PIPELINE, registry=self._registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(
            f"ingestd_{name}",
            text,
            labels or _BY_PIPELINE,
            buckets=buckets,
            registry=self._registry,
        )


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


class _Routes(Collector):
    """Reads the requests of all routes at each scrape."""

    def __init__(self) -> None:
        self.routes: dict[str, RouteMetrics] = {}

    def describe(self) -> Iterable[Metric]:
        """No names in advance: the registry would otherwise collect to learn them."""
        return ()

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "ingestd_http_requests_total", "HTTP requests answered.", labels=["route", "code"]
        )
        seconds = HistogramMetricFamily(
            "ingestd_http_request_duration_seconds", "From head to answer.", labels=["route"]
        )
        bounds = [*map(str, map(float, _REQUEST_SECONDS)), "+Inf"]
        for route, counted in self.routes.items():
            for first, count in enumerate(counted.classes, 2):
                requests.add_metric([route, f"{first}xx"], count)
            sums = list(accumulate(counted.buckets))
            seconds.add_metric([route], list(zip(bounds, sums, strict=True)), counted.seconds)
        yield requests
        yield seconds


class PipelineMetrics:
    """Counts events of one pipeline. From `Metrics.pipeline`; safe to call from any thread."""

    __slots__ = (
        "_accepted_bytes",
        "_appends",
        "_batch_bytes",
        "_batch_records",
        "_batches",
        "_commit_bytes",
        "_commit_seconds",
        "_dead_letters",
        "_handler_seconds",
        "_invalid_bytes",
        "_requests_refused",
        "_restarts",
        "_unkept",
    )

    def __init__(self, name: str, families: _Families) -> None:
        self._accepted_bytes = families.accepted_bytes.labels(name)
        self._dead_letters = _Reasons(families.dead_letters, name)
        self._invalid_bytes = _Reasons(families.invalid_bytes, name)
        self._requests_refused = _Reasons(families.requests_refused, name)
        self._unkept = families.unkept.labels(name)
        self._commit_seconds = families.commit_seconds.labels(name)
        self._commit_bytes = families.commit_bytes.labels(name)
        self._appends = families.appends.labels(name)
        self._batch_records = families.batch_records.labels(name)
        self._batch_bytes = families.batch_bytes.labels(name)
        self._handler_seconds = families.handler_seconds.labels(name)
        self._batches = {one: families.batches.labels(name, one) for one in get_args(Tried)}
        self._restarts = _Reasons(families.worker_restarts, name)

    def accepted(self, size: int) -> None:
        """A source's append of `size` payload bytes is durable. The records are in the ledger."""
        self._accepted_bytes.inc(size)

    def invalid(self, reason: str, records: int, size: int) -> None:
        """Counts records that a source keeps as dead letters instead: once a request and reason."""
        self._dead_letters.inc(reason, records)
        self._invalid_bytes.inc(reason, size)

    def unkept(self, records: int) -> None:
        """Invalid records were listed or counted in an answer, and not kept as dead letters."""
        self._unkept.inc(records)

    def request_refused(self, reason: str) -> None:
        """A whole request was turned away and may be sent again: which bound, in one word."""
        self._requests_refused.inc(reason, 1)

    def committed(self, seconds: float, appends: int, size: int) -> None:
        """The journal committed `appends` appends of `size` bytes together, in `seconds`."""
        self._commit_seconds.observe(seconds)
        self._commit_bytes.inc(size)
        self._appends.observe(appends)

    def batch_tried(self, outcome: Tried, records: int, size: int, seconds: float) -> None:
        """A try of a batch has ended; its handler ran for `seconds`, 0 if it was not called."""
        self._batches[outcome].inc()
        if seconds > 0:
            self._handler_seconds.observe(seconds)
        if outcome in {"done", "failed"}:  # of the others all or some comes again
            self._batch_records.observe(records)
            self._batch_bytes.observe(size)

    def died(self, reason: str, records: int) -> None:
        """Accepted records became dead letters: once a batch and reason."""
        self._dead_letters.inc(reason, records)

    def worker_restarted(self, reason: str) -> None:
        """A worker was replaced: `crashed` or `timeout`."""
        self._restarts.inc(reason, 1)


class Metrics:
    """All series of one process.

    Args:
        version: of ingestd, for `ingestd_build_info`.

    Attributes:
        loop_lag: gauge, seconds; set by the daemon's loop monitor.
    """

    def __init__(self, version: str) -> None:
        self._registry = CollectorRegistry()
        self._watcher = Watcher()
        self._routes = _Routes()
        self._pipelines: dict[str, PipelineMetrics] = {}
        self._registry.register(self._watcher)
        self._registry.register(self._routes)
        ProcessCollector(registry=self._registry)
        self._families = _Families(self._registry)
        build = Gauge(
            "ingestd_build_info",
            "What is running; always 1.",
            ["version", "python"],
            registry=self._registry,
        )
        build.labels(version, platform.python_version()).set(1)
        self.loop_lag = Gauge(
            "ingestd_loop_lag_seconds",
            "How late the event loop woke up lately, at worst.",
            registry=self._registry,
        )

    def route(self, route: str) -> RouteMetrics:
        """The requests of a route, named by its template (`/v1/records/{pipeline}`)."""
        return self._routes.routes.setdefault(route, RouteMetrics())

    def pipeline(self, name: str) -> PipelineMetrics:
        """The metrics of the pipeline of that name; the same object every time."""
        if name not in self._pipelines:
            self._pipelines[name] = PipelineMetrics(name, self._families)
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
        """Yields all series but the `_created` ones, which double the page and have no use."""
        for family in self._registry.collect():
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            yield family

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Renders the page of a scrape: body and content type.

        Args:
            accept: the request's `Accept`; OpenMetrics if it asks for that, else Prometheus text.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self), content_type
