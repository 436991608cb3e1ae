from __future__ import annotations

import re

import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from ingestd.admin.status import BatchesStatus, JournalUsage, PipelineStatus, QueueStatus
from ingestd.base.append import Append, AppendCounts
from ingestd.base.metrics import REASONS_MAX, Metrics
from ingestd.base.record import Records
from ingestd.base.scraped import ERROR_KINDS_MAX, SinkCounts

STATE = PipelineStatus(
    accepted=100,
    processed=90,
    dead=3,
    pending=7,
    invalid=2,
    balanced=True,
    journal=JournalUsage(bytes=4096, bytes_max=8192, poisoned=False),
    queue=QueueStatus(chunks=5, bytes=1000, bytes_max=2000),
    batches=BatchesStatus(sealed=0, running=4, waiting_retry=1),
    oldest_pending_seconds=1.5,
    bounds_near=[],
    bounds_used={"journal.bytes_max": 0.5},
    refusing={"journal.bytes_max": True},
    appends_refused={"journal.bytes_max": 3},
)


def samples(
    metrics: Metrics, accept: str = ""
) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    body, _ = metrics.render(accept)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse_text(body.decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, tuple(sorted(labels.items()))]


@pytest.fixture
def metrics() -> Metrics:
    """With one child of every series, so that every name is on the page."""
    made = Metrics("1.2.3")
    made.watch(lambda: {"default": STATE})
    made.watch_log(lambda: 17)
    made.route("/v1/records").answered(202, 0.003)
    pipeline = made.pipeline("default")
    pipeline.accepted(500)
    pipeline.invalid("malformed", 2, 30)
    pipeline.request_refused("journal")
    pipeline.committed(0.004, 3, 500)
    pipeline.batch_tried("done", 1000, 65536, 0.2)
    pipeline.batch_tried("retry", 1000, 65536, 0.1)
    pipeline.batch_tried("split", 1000, 65536, 0.1)
    pipeline.batch_tried("failed", 10, 640, 0.3)
    pipeline.batch_tried("failed", 0, 0, 0.0)  # nothing fits the annotation: it was not called
    pipeline.died("failed", 10)
    pipeline.worker_restarted("crashed")
    made.loop_lag.set(0.02)
    return made


def test_the_ledger_is_read_at_scrape_time_and_nothing_else_counts_it(metrics: Metrics) -> None:
    state = STATE
    metrics.watch(lambda: {"default": state, "clicks": STATE})
    assert value(metrics, "ingestd_records_accepted_total", pipeline="default") == 100
    state = msgspec.structs.replace(STATE, accepted=101, pending=8)
    page = samples(metrics)
    told = {
        name: page[f"ingestd_records_{name}", (("pipeline", "default"),)]
        for name in ("accepted_total", "processed_total", "dead_total", "pending", "invalid_total")
    }
    assert told == {
        "accepted_total": 101,
        "processed_total": 90,
        "dead_total": 3,
        "pending": 8,
        "invalid_total": 2,
    }
    assert page["ingestd_records_accepted_total", (("pipeline", "clicks"),)] == 100


def test_a_page_without_pipelines_is_a_page() -> None:
    page = samples(Metrics("1.2.3"))
    assert ("ingestd_log_lines_dropped_total", ()) in page
    assert ("process_open_fds", ()) in page


def test_what_happens_is_counted(metrics: Metrics) -> None:
    page = samples(metrics)

    def of(name: str, **labels: str) -> float:
        return page[f"ingestd_{name}", tuple(sorted({"pipeline": "default", **labels}.items()))]

    assert of("accepted_bytes_total") == 500
    assert of("invalid_bytes_total", reason="malformed") == 30
    assert of("dead_letters_total", reason="malformed") == 2
    assert of("dead_letters_total", reason="failed") == 10
    assert of("requests_refused_total", reason="journal") == 1
    assert of("journal_commit_duration_seconds_bucket", le="0.005") == 1
    assert of("journal_commit_duration_seconds_bucket", le="0.0025") == 0
    assert of("journal_commit_appends_sum") == 3
    assert of("journal_committed_bytes_total") == 500
    assert of("batch_records_sum") == 1010
    assert of("batch_bytes_sum") == 65536 + 640
    assert of("handler_duration_seconds_count") == 4
    assert of("worker_restarts_total", reason="crashed") == 1
    outcomes = ("done", "retry", "split", "failed")
    assert [of("batches_total", outcome=o) for o in outcomes] == [1, 1, 1, 2]
    assert of("oldest_pending_seconds") == 1.5
    assert page["ingestd_log_lines_dropped_total", ()] == 17
    assert page["ingestd_loop_lag_seconds", ()] == 0.02


@pytest.mark.parametrize(
    ("status", "code"), [(200, "2xx"), (202, "2xx"), (304, "3xx"), (429, "4xx"), (503, "5xx")]
)
def test_requests_are_counted_by_class_of_status(status: int, code: str) -> None:
    metrics = Metrics("1.2.3")
    metrics.route("/v1/records").answered(status, 0.5)
    counted = {
        labels: number
        for (name, labels), number in samples(metrics).items()
        if name == "ingestd_http_requests_total" and number
    }
    assert counted == {(("code", code), ("route", "/v1/records")): 1}


def test_names_keep_the_rules_of_promtool(metrics: Metrics) -> None:
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in parse_text(body.decode())}
    ours = {name: family for name, family in families.items() if name.startswith("ingestd_")}
    assert set(families) - set(ours) == {name for name in families if name.startswith("process_")}
    for name, family in ours.items():
        assert family.documentation.endswith("."), name
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", name), name
        assert not re.search(r"_(count|sum|bucket|created|gauge|counter|histogram)(_|$)", name)
        assert not re.search(r"milli|micro|minutes|hours|kilo|mega|_ms$|_mb$", name), name
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)
        else:
            assert not name.endswith("_total"), name
        if family.type == "histogram":
            assert name.endswith(("_seconds", "_bytes", "_records", "_appends")), name


def test_openmetrics_for_who_asks(metrics: Metrics) -> None:
    body, content_type = metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")
    names = {family.name for family in parse_openmetrics(body.decode())}
    assert "ingestd_records_accepted" in names


def test_reasons_are_bounded() -> None:
    metrics = Metrics("1.2.3")
    pipeline = metrics.pipeline("default")
    for number in range(REASONS_MAX + 10):
        pipeline.died(f"reason{number}", 1)
    page = [key for key in samples(metrics) if key[0] == "ingestd_dead_letters_total"]
    assert len(page) == REASONS_MAX + 1
    assert value(metrics, "ingestd_dead_letters_total", pipeline="default", reason="other") == 10


def test_one_object_a_name() -> None:
    metrics = Metrics("1.2.3")
    assert metrics.pipeline("a") is metrics.pipeline("a")
    assert metrics.route("/x") is metrics.route("/x")


def test_two_in_one_process_do_not_meet() -> None:
    one, other = Metrics("1"), Metrics("2")
    one.pipeline("default").accepted(5)
    other.pipeline("default").accepted(7)
    assert value(one, "ingestd_accepted_bytes_total", pipeline="default") == 5
    assert value(other, "ingestd_accepted_bytes_total", pipeline="default") == 7


def test_the_bounds_of_a_pipeline_are_read_by_name(metrics: Metrics) -> None:
    labels = {"pipeline": "default", "bound": "journal.bytes_max"}
    assert value(metrics, "ingestd_bound_used_ratio", **labels) == 0.5
    assert value(metrics, "ingestd_records_refusing", **labels) == 1
    assert value(metrics, "ingestd_appends_refused_total", **labels) == 3
    names = {name for name, _ in samples(metrics)}
    assert "ingestd_journal_disk_free_bytes" not in names  # the journal has no disk
    usage = JournalUsage(bytes=1, bytes_max=2, poisoned=False, disk_free=70, disk_free_min=60)
    metrics.watch(lambda: {"default": msgspec.structs.replace(STATE, journal=usage)})
    assert value(metrics, "ingestd_journal_disk_free_bytes", pipeline="default") == 70
    assert value(metrics, "ingestd_journal_disk_limit_bytes", pipeline="default") == 60


def test_sources_and_endpoints_are_read(metrics: Metrics) -> None:
    counts = AppendCounts()
    counts.accepted(Append(Records.lines([b"11", b"2"]), unkept=3))
    counts.refuse("overloaded")
    numbers = {("web", "http"): {"records": 2, "certificate_until": 1e9}}
    metrics.watch_sources(dict, lambda: numbers, lambda: {("web", "loki"): counts})
    source, endpoint = {"source": "web", "kind": "http"}, {"source": "web", "endpoint": "loki"}
    assert value(metrics, "ingestd_source_records_total", **source) == 2
    assert value(metrics, "ingestd_source_certificate_expiry_seconds", **source) == 1e9
    assert value(metrics, "ingestd_endpoint_records_total", **endpoint) == 2
    assert value(metrics, "ingestd_endpoint_bytes_total", **endpoint) == 5
    assert value(metrics, "ingestd_endpoint_invalid_total", **endpoint) == 3
    refused = {**endpoint, "reason": "overloaded"}
    assert value(metrics, "ingestd_endpoint_refused_total", **refused) == 1
    assert "ingestd_source_urls" not in {name for name, _ in samples(metrics)}


def test_targets_and_workers_are_read(metrics: Metrics) -> None:
    counts = SinkCounts()
    counts.ran(100, 0.5, "")
    for number in range(ERROR_KINDS_MAX + 5):
        counts.ran(0, 0.25, f"Error{number}")
    metrics.watch_workers(lambda: {"p": {"postgres": counts}}, lambda: {"p": {"0": 70}})
    labels = {"pipeline": "p", "sink": "postgres"}
    assert value(metrics, "ingestd_sink_batches_total", **labels) == ERROR_KINDS_MAX + 6
    assert value(metrics, "ingestd_sink_records_total", **labels) == 100
    assert value(metrics, "ingestd_sink_seconds_total", **labels) == 0.5 + (ERROR_KINDS_MAX + 5) / 4
    assert value(metrics, "ingestd_sink_errors_total", **labels, error="Error0") == 1
    assert value(metrics, "ingestd_sink_errors_total", **labels, error="other") == 5
    memory = {"pipeline": "p", "worker": "0"}
    assert value(metrics, "ingestd_worker_resident_memory_bytes", **memory) == 70
