"""Numbers that are read at each scrape: the state of pipelines, sources and endpoints.

What is known anyway is not counted a second time. The counts of endpoints and targets are plain
integers, which move with each append or batch and are read here. Only a scrape imports
prometheus_client, so its families are made by functions.
"""

from __future__ import annotations

from itertools import accumulate
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from prometheus_client import Metric
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    from ingestd.base.append import AppendCounts

ERROR_KINDS_MAX = 32
"""Kinds of errors of one target that are counted apart; what comes later counts as `other`."""

_LIFE = ", over the life of the data directory."
# Attribute of a pipeline's status (`admin.status`), metric, help. A `_total` is a counter.
_STATE = (
    ("accepted", "records_accepted_total", "Records made durable" + _LIFE),
    ("processed", "records_processed_total", "Records the handler is done with" + _LIFE),
    ("dead_ever", "records_dead_total", "Accepted records given up" + _LIFE),
    ("invalid_ever", "records_invalid_total", "Invalid records, kept as dead letters" + _LIFE),
    ("deduplicated", "records_deduplicated_total", "Records that dedupe.key left out."),
    ("dead_letters.requeued", "records_requeued_total", "Records given up, then requeued" + _LIFE),
    (
        "dead_letters.readmitted",
        "records_readmitted_total",
        "Invalid records that were accepted later" + _LIFE,
    ),
    ("dead_letters.expired", "letters_expired_total", "Dead letters that became too old" + _LIFE),
    ("dead_letters.purged", "letters_purged_total", "Dead letters that a person deleted" + _LIFE),
    (
        "dead_letters.dropped",
        "letters_dropped_total",
        "Dead letters of invalid records, dropped for newer ones" + _LIFE,
    ),
    ("dead_letters.kept", "letters_kept", "Dead letters that are kept."),
    ("dead_letters.bytes", "letters_bytes", "Bytes of the dead letters of accepted records."),
    (
        "dead_letters.bytes_max",
        "letters_limit_bytes",
        "Bytes that the dead letters of accepted records may take (dead.bytes_max).",
    ),
    (
        "dead_letters.invalid_kept",
        "letters_invalid",
        "Dead letters of records that were never accepted.",
    ),
    (
        "dead_letters.invalid_bytes",
        "letters_invalid_bytes",
        "Bytes of the dead letters of invalid records.",
    ),
    ("is_stopped", "dispatch_stopped", "1 while dead letters at their bound stop batches."),
    ("paused", "pipeline_paused", "1 while a person has paused the pipeline."),
    ("throttled", "dispatch_throttled", "1 while a rate of [executor] holds a batch back."),
    ("pending", "records_pending", "Records accepted and not settled."),
    (
        "unaccounted",
        "records_unaccounted",
        "Pending records by the counters minus those in the journal's rows; 0 is right.",
    ),
    ("journal.bytes", "journal_bytes", "Bytes of the journal in use."),
    (
        "journal.bytes_max",
        "journal_limit_bytes",
        "Bytes that the journal may use (journal.bytes_max).",
    ),
    ("journal.disk_free", "journal_disk_free_bytes", "Bytes free for the journal on its disk."),
    (
        "journal.disk_free_min",
        "journal_disk_limit_bytes",
        "Free bytes of the disk below which the journal refuses records.",
    ),
    ("queue.chunks", "queue_chunks", "Chunks held in memory."),
    ("queue.bytes", "queue_bytes", "Bytes of the chunks held in memory."),
    ("workers", "workers", "Workers that there are now."),
    ("batches.running", "workers_busy", "Batches that are with a worker."),
    ("batches.waiting_retry", "batches_waiting", "Batches that wait for their next try."),
    (
        "handler.down_since_seconds",
        "handler_down_since_seconds",
        "Unix time since which all tries fail; 0 while they do not.",
    ),
    ("handler.is_blocked", "handler_blocked", "1 while the sink waits for an operator."),
    ("oldest_pending_seconds", "oldest_pending_seconds", "Age of the oldest unsettled record."),
    ("kept.replayed", "records_replayed_total", "Kept records accepted once more" + _LIFE),
    ("kept.bytes", "kept_bytes", "Bytes of the processed records that are kept."),
)

# Attribute of a pipeline's status, by the name of a bound; metric, help.
_BY_BOUND = (
    ("bounds_used", "bound_used_ratio", "Share of a bound in use, from 0 to 1."),
    ("refusing", "records_refusing", "1 while the bound refuses records, until some are accepted."),
    ("appends_refused", "appends_refused_total", "Appends that the bound refused since the start."),
)

# Attribute of the counts of an endpoint, metric, help.
_ENDPOINT = (
    ("records", "endpoint_records_total", "Records accepted by an endpoint."),
    ("bytes", "endpoint_bytes_total", "Payload bytes accepted by an endpoint."),
    ("invalid", "endpoint_invalid_total", "Invalid records sent to an endpoint."),
)

# Attribute of the counts of a sink, metric, help.
_SINK = (
    ("batches", "sink_batches_total", "Calls of a target of handler.target or handler.targets."),
    ("records", "sink_records_total", "Records that a target is done with."),
    ("seconds", "sink_seconds_total", "Seconds that the calls of a target took."),
)

# Name among the numbers of a source (`Source.numbers`), metric, help.
_SOURCE = (
    ("records", "source_records_total", "Records of a source that were accepted."),
    ("invalid", "source_invalid_total", "Invalid records of a source."),
    ("urls", "source_urls", "URLs of a source that downloads."),
    ("urls_done", "source_urls_done", "URLs that a source has finished."),
    ("urls_given_up", "source_urls_failed_total", "URLs given up, in each round."),
    ("retries", "source_retries_total", "Downloads that failed and are tried again."),
    ("left_bytes", "source_left_bytes", "Bytes that a source has still to read; an estimate."),
    (
        "certificate_until",
        "source_certificate_expiry_seconds",
        "Unix time of the last second of a source's certificate.",
    ),
    ("connections", "source_connections", "Open connections of a source over TCP."),
    (
        "connections_refused",
        "source_connections_refused_total",
        "Connections that were too many, at once or for their client.",
    ),
    (
        "connections_cut",
        "source_connections_cut_total",
        "Connections ended at a bound, a deadline or a fault of their peer.",
    ),
    ("received_bytes", "source_received_bytes_total", "Bytes that a source read."),
    (
        "framing_faults",
        "source_framing_faults_total",
        "Wrong lengths of messages in connections that went on.",
    ),
    ("datagrams", "source_datagrams_total", "Datagrams that a source read."),
    (
        "datagrams_dropped",
        "source_datagrams_dropped_total",
        "Datagrams that came and were lost, because too many waited.",
    ),
    ("connected", "source_connected", "1 while a source has a connection to its broker."),
    ("messages", "source_messages_total", "Messages that a source took from its broker."),
    (
        "acknowledged",
        "source_acknowledged_total",
        "Messages that were acknowledged to a broker, because their records are settled.",
    ),
    (
        "unsettled",
        "source_unsettled_messages",
        "Messages that were taken from a broker and not acknowledged yet.",
    ),
    (
        "backlog",
        "source_backlog_messages",
        "Messages that the broker had for a source and had not delivered, when it last said so.",
    ),
)


class SinkCounts:
    """Counts of one target of a pipeline, in this run.

    Attributes:
        batches: calls that came back.
        records: that it is done with.
        seconds: that the calls took.
        errors: calls that failed, by the class of the exception or the reason.
    """

    __slots__ = ("batches", "errors", "records", "seconds")

    def __init__(self) -> None:
        self.batches = self.records = 0
        self.seconds = 0.0
        self.errors: dict[str, int] = {}

    def ran(self, records: int, seconds: float, error: str) -> None:
        """Counts one call; `error` is the kind of its failure, empty if there was none."""
        self.batches += 1
        self.records += records
        self.seconds += seconds
        if error:
            known = error in self.errors or len(self.errors) < ERROR_KINDS_MAX
            kind = error if known else "other"
            self.errors[kind] = self.errors.get(kind, 0) + 1


def family(name: str, text: str, *labels: str) -> CounterMetricFamily | GaugeMetricFamily:
    """Returns a counter without samples if its name ends with `_total`, else a gauge.

    Args:
        name: of it, without `ingestd_`.
        text: its help.
        labels: names of its labels.
    """
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415

    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    return kind(f"ingestd_{name}", text, labels=labels)


def histogram(
    name: str,
    text: str,
    label: str,
    bounds: Sequence[float],
    observed: Iterable[tuple[str, Sequence[int], float]],
) -> HistogramMetricFamily:
    """Returns a histogram.

    Args:
        name: of it, without `ingestd_`.
        text: its help.
        label: name of its label.
        bounds: of its buckets, in ascending order.
        observed: (value of the label, how many numbers by bound and beyond all, their sum).
    """
    from prometheus_client.core import HistogramMetricFamily  # noqa: PLC0415
    from prometheus_client.utils import floatToGoString  # noqa: PLC0415

    made = HistogramMetricFamily(f"ingestd_{name}", text, labels=[label])
    written = [*map(floatToGoString, bounds), "+Inf"]
    for value, buckets, total in observed:
        made.add_metric([value], list(zip(written, accumulate(buckets), strict=True)), total)
    return made


class Watcher:
    """Reads the pipelines' states at each scrape."""

    def __init__(self) -> None:
        self.read: Callable[[], Mapping[str, object]] = dict
        self.lost: Callable[[], int] = int
        self.sources: Callable[[], Mapping[tuple[str, str], bool]] = dict
        self.numbers: Callable[[], Mapping[tuple[str, str], Mapping[str, float]]] = dict
        self.sinks: Callable[[], Mapping[str, Mapping[str, SinkCounts]]] = dict
        self.memory: Callable[[], Mapping[str, Mapping[str, int]]] = dict
        self.endpoints: Callable[[], Mapping[tuple[str, str], AppendCounts]] = dict

    def collect(self) -> Iterator[Metric]:
        """Reads all of it."""
        states = self.read()
        for field, name, text in _STATE:
            made = family(name, text, "pipeline")
            for pipeline, state in states.items():
                value = attrgetter(field)(state)
                if value is not None:
                    made.add_metric([pipeline], value)
            yield made
        for field, name, text in _BY_BOUND:
            made = family(name, text, "pipeline", "bound")
            for pipeline, state in states.items():
                for bound, value in getattr(state, field).items():
                    made.add_metric([pipeline, bound], value)
            yield made
        text = "1 while a source takes records, 0 when its input has ended."
        running = family("source_running", text, "source", "kind")
        for labels, is_running in self.sources().items():
            running.add_metric(labels, int(is_running))
        yield running
        yield from self._numbers()
        yield from self._endpoints()
        yield from self._sinks()
        text = "Log lines given up because the log's reader was slow or gone."
        dropped = family("log_lines_dropped_total", text)
        dropped.add_metric([], self.lost())
        yield dropped

    def _numbers(self) -> Iterator[Metric]:
        """Yields the numbers of sources; those that a source does not have are left out."""
        numbers = self.numbers()
        for key, name, text in _SOURCE:
            made = family(name, text, "source", "kind")
            for labels, values in numbers.items():
                if key in values:
                    made.add_metric(labels, values[key])
            yield made

    def _endpoints(self) -> Iterator[Metric]:
        """Yields the counts of endpoints, which servers over HTTP have."""
        endpoints = self.endpoints()
        for field, name, text in _ENDPOINT:
            made = family(name, text, "source", "endpoint")
            for labels, counts in endpoints.items():
                made.add_metric(labels, getattr(counts, field))
            yield made
        text = "Requests to an endpoint, or parts of them, that were refused."
        refused = family("endpoint_refused_total", text, "source", "endpoint", "reason")
        for labels, counts in endpoints.items():
            for reason, number in counts.refused.items():
                refused.add_metric([*labels, reason], number)
        yield refused

    def _sinks(self) -> Iterator[Metric]:
        """Yields the counts of each target of each pipeline, and the memory of its workers."""
        sinks = [
            ((pipeline, sink), counts)
            for pipeline, targets in self.sinks().items()
            for sink, counts in targets.items()
        ]
        for field, name, text in _SINK:
            made = family(name, text, "pipeline", "sink")
            for labels, counts in sinks:
                made.add_metric(labels, getattr(counts, field))
            yield made
        text = "Calls of a target that failed, by the class of the error."
        errors = family("sink_errors_total", text, "pipeline", "sink", "error")
        for labels, counts in sinks:
            for error, number in counts.errors.items():
                errors.add_metric([*labels, error], number)
        yield errors
        text = "Memory of a worker that is a process of its own."
        memory = family("worker_resident_memory_bytes", text, "pipeline", "worker")
        for pipeline, workers in self.memory().items():
            for worker, size in workers.items():
                memory.add_metric([pipeline, worker], size)
        yield memory
