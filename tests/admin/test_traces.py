"""Traces: a real daemon, OpenTelemetry's own SDK, and a collector that decodes what it gets."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.__main__ import main
from ingestd.base import envelope
from ingestd.base.append import Append, AppendCounts
from ingestd.base.envelope import Envelope, EnvelopeRuns
from ingestd.base.record import Records, Span
from ingestd.handlers.batch import Batch
from ingestd.handlers.outcome import Job
from ingestd.handlers.runner import HandlerConfig, Runner
from ingestd.handlers.wire import SharedBuffer
from tests.daemon.harness import Daemon, daemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CLIENT = f"00-{TRACE}-{PARENT}-01"
ON = ("--traces.enabled", "true")
THREAD = ("--executor.kind", "thread", "--executor.workers", "1")
ONE_BATCH = ("--batch.age_max", "10m", "--batch.records_max")
NOTES = """
import json
from opentelemetry import trace

def store(batch: Batch) -> None:
    current = trace.get_current_span().get_span_context()
    note = {
        "attempt": batch.attempt,
        "current": f"{current.trace_id:032x}-{current.span_id:016x}",
        "told": batch.traceparent,
        "envelopes": sorted({batch.envelope(i).traceparent for i in range(len(batch))}),
    }
    with open("notes", "a") as file:
        file.write(json.dumps(note) + "\\n")
"""


class Collector:
    """An OTLP/HTTP receiver.

    Attributes:
        spans: that came, with their attributes in `facts`.
        service: attributes of the resource.
        sent: bytes of endless answers.
    """

    ENDLESS_BYTES_MAX = 64 << 20

    def __init__(self, *, endless: bool = False) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        self.spans: list[Any] = []
        self.service: dict[str, Any] = {}
        self.sent = 0
        self._came = threading.Condition()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                message = ExportTraceServiceRequest.FromString(body)
                with outer._came:
                    for resource in message.resource_spans:
                        outer.service = _facts(resource.resource)
                        for scope in resource.scope_spans:
                            outer.spans.extend(scope.spans)
                    outer._came.notify_all()
                self.send_response(200)
                if not endless:
                    self.send_header("Content-Length", "0")
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    while endless and outer.sent < outer.ENDLESS_BYTES_MAX:
                        outer.sent += self.wfile.write(bytes(1 << 16))

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def until(self, spans: int) -> None:
        """Waits for so many: a daemon that leaves does not wait long for a busy collector."""
        with self._came:
            assert self._came.wait_for(lambda: len(self.spans) >= spans, 60), self.spans

    def named(self, name: str) -> list[Any]:
        found = [span for span in self.spans if span.name == name]
        return sorted(found, key=lambda span: span.start_time_unix_nano)


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.sdk.trace")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    one = Collector()
    yield one
    one.close()


def _facts(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def _id(span: Any) -> str:
    return f"{span.trace_id.hex()}-{span.span_id.hex()}"


def _told(traceparent: str) -> str:
    """Trace and span of a `traceparent`, which is sampled."""
    assert not traceparent or int(traceparent[-2:], 16) & 1
    return traceparent[3:-3]


def _links(span: Any) -> list[str]:
    return [_id(link) for link in span.links]


@contextlib.contextmanager
def traced(url: str, *args: str, cwd: Path, **environ: str) -> Iterator[Daemon]:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "100", **environ}
    with daemon(*args, *ON, cwd=cwd, environ=environ) as one:
        yield one


def left(one: Daemon) -> None:
    one.terminate()
    assert one.wait() == 0, (one.events[-5:], one.other[-20:])


def notes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "notes").read_text().splitlines()]


@pytest.mark.slow
def test_the_clients_span_the_requests_and_those_of_both_tries(
    tmp_path: Path, collector: Collector
) -> None:
    (tmp_path / "app.py").write_text(
        f"""
from ingestd import Batch
{NOTES}
def once(batch: Batch) -> None:
    with trace.get_tracer("mine").start_as_current_span("insert"):
        store(batch)
    if batch.attempt == 1:
        raise ValueError("secret payload")
    batch.reject(1, "no")
"""
    )
    backoff = ("--retry.backoff", "1ms")
    with traced(collector.url, "app:once", *THREAD, *backoff, cwd=tmp_path) as one:
        assert one.post(b"1\n2\n3", traceparent=CLIENT, tracestate="a=b")[0] == 202
        assert one.post(b"nonsense", traceparent=CLIENT)[0] == 400
        one.until_settled()
        collector.until(2 + 2 + 2)
        left(one)
    accepted, refused = collector.named("POST /v1/records")
    assert (accepted.trace_id.hex(), accepted.parent_span_id.hex()) == (TRACE, PARENT)
    assert (accepted.kind, accepted.trace_state) == (2, "a=b")  # SERVER
    assert _facts(accepted) == {
        "http.request.method": "POST",
        "http.route": "/v1/records",
        "http.response.status_code": 202,
        "messaging.system": "ingestd",
        "messaging.operation.name": "accept",
        "messaging.destination.name": "default",
        "messaging.batch.message_count": 3,
    }
    assert {"http.response.status_code": 400, "error.type": "malformed"}.items() <= _facts(
        refused
    ).items()
    assert refused.status.code == accepted.status.code == 0  # the client's fault is no error
    first, second = collector.named("process default")
    assert _links(first) == _links(second) == [_id(accepted)]
    assert not first.parent_span_id
    assert first.trace_id != second.trace_id
    assert (first.kind, first.status.code, second.status.code) == (5, 2, 0)  # CONSUMER, ERROR
    shared = {
        "messaging.system": "ingestd",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "default",
        "messaging.batch.message_count": 3,
    }
    facts = [_facts(first), _facts(second)]
    assert all(shared.items() <= one.items() for one in facts)
    assert facts[0]["ingestd.batch.id"] == facts[1]["ingestd.batch.id"]
    keys = [f"ingestd.batch.{key}" for key in ("attempt", "outcome", "rejected")]
    assert [[one.get(key) for key in (*keys, "error.type")] for one in facts] == [
        [1, "retry", 0, "ValueError"],
        [2, "done", 1, None],
    ]
    # The handler is inside of the span, and so is what it traces itself.
    said = notes(tmp_path)
    inner = collector.named("insert")
    assert [one.parent_span_id for one in inner] == [first.span_id, second.span_id]
    assert [one["current"] for one in said] == [_id(one) for one in inner]
    assert [_told(one["told"]) for one in said] == [_id(first), _id(second)]
    assert [list(map(_told, one["envelopes"])) for one in said] == [[_id(accepted)]] * 2
    assert b"secret" not in b"".join(span.SerializeToString() for span in collector.spans)
    assert collector.service["service.name"] == "ingestd"


@pytest.mark.slow
def test_processes_get_the_span_and_a_trace_begins_where_there_is_none(
    tmp_path: Path, collector: Collector
) -> None:
    (tmp_path / "app.py").write_text(f"from ingestd import Batch\n{NOTES}")
    process = ("--executor.kind", "process", "--executor.workers", "1")
    environ = {"OTEL_SERVICE_NAME": "shop"}
    debug = ("--log.level", "debug")
    with traced(collector.url, "app:store", *process, *debug, cwd=tmp_path, **environ) as one:
        for _ in range(3):  # the second one on have a head that is known
            assert one.post(b"1")[0] == 202
            one.until_settled()
        assert one.post(b"2", traceparent=f"{CLIENT[:-1]}0")[0] == 202
        one.until_settled()
        assert one.post(b"nonsense")[0] == 400
        collector.until(4 + 3)
        left(one)
    *accepted, refused = collector.named("POST /v1/records")
    tries = collector.named("process default")
    assert len(accepted) == len(tries) == 3
    assert not any(span.parent_span_id for span in accepted)
    assert [_links(span) for span in tries] == [[_id(span)] for span in accepted]
    said = notes(tmp_path)
    none = f"{0:032x}-{0:016x}"
    assert [one["current"] for one in said] == [*(_id(span) for span in tries), none]
    assert [_told(one["told"]) for one in said] == [*(_id(span) for span in tries), ""]
    assert said[-1]["envelopes"] == [f"{CLIENT[:-1]}0"]  # its sender did not want it traced
    assert collector.service["service.name"] == "shop"
    line = one.event("request_refused")
    assert (line["trace_id"], line["parent_id"]) == tuple(_id(refused).split("-"))


@pytest.mark.slow
def test_links_are_bounded_and_the_ratio_decides_for_requests_without_a_trace(
    tmp_path: Path, collector: Collector
) -> None:
    bounds = {"OTEL_SPAN_LINK_COUNT_LIMIT": "3"}
    ratio = ("--traces.ratio", "0")
    with traced(collector.url, *ONE_BATCH, "30", *ratio, cwd=tmp_path, **bounds) as one:
        for _ in range(20):  # with a head that is known, but the first
            assert one.post(b"1")[0] == 202
        for number in range(10):
            assert one.post(b"2", traceparent=f"00-{number + 1:032x}-{PARENT}-01")[0] == 202
        one.until_settled()
        for _ in range(30):
            assert one.post(b"3")[0] == 202
        one.until_settled()
        collector.until(10 + 1)
        left(one)
    accepted = collector.named("POST /v1/records")
    assert len(accepted) == 10
    (only,) = collector.named("process default")
    assert _links(only) == [_id(span) for span in accepted[:3]]


@pytest.mark.slow
def test_a_collector_that_does_not_answer_delays_nothing(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk.trace")
    small = {"OTEL_BSP_MAX_QUEUE_SIZE": "50", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "10"}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with traced(url, cwd=tmp_path, **small) as one:
            for _ in range(120):
                assert one.post(b"1")[0] == 202
            assert one.until_settled()["processed"] == 120
            left(one)
        assert "drained" in {line["event"] for line in one.events}
        assert one.event("spans_abandoned")
        said = Counter(line["message"] for line in one.events if line["event"] == "library_logged")
        assert said
        assert set(said.values()) == {1}


@pytest.mark.slow
def test_an_endless_answer_of_a_collector_is_cut_off(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    endless = Collector(endless=True)
    with contextlib.closing(endless), traced(endless.url, cwd=tmp_path) as one:
        for spans in (1, 2, 3):
            assert one.post(b"1")[0] == 202
            endless.until(spans)
        one.until_settled()
        left(one)
    assert endless.sent < endless.ENDLESS_BYTES_MAX  # what the buffers of connections hold
    assert "library_logged" not in {line["event"] for line in one.events}  # the spans were taken


@pytest.mark.slow
def test_a_collector_that_is_down_is_told_of_once_a_minute(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk.trace")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with traced(url, cwd=tmp_path, OTEL_EXPORTER_OTLP_TIMEOUT="1") as one:
        for _ in range(10):
            assert one.post(b"1")[0] == 202
            one.event("library_logged")
        one.until_settled()
        left(one)
    said = [line for line in one.events if line["event"] == "library_logged"]
    # Up to what each line has of its own: the error, or the code of an answer.
    kinds = {(line["logger"], re.split("error |code: ", line["message"])[0]) for line in said}
    assert len(kinds) == len(said) <= 4


@pytest.mark.slow
def test_a_wrong_variable_is_a_configuration_error(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk.trace")
    wrong = {"OTEL_BSP_MAX_QUEUE_SIZE": "-1"}
    with Daemon(*ON, cwd=tmp_path, environ=wrong) as one:
        assert one.wait() == 78
        assert any("OpenTelemetry's environment variables" in line for line in one.other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("", "Authorization: Bearer a-hidden-token"),
        ("", "authorization=Bearer%20a-hidden%0Atoken"),
        ("/in?key=a-hidden-token", "x-api-key=also-hidden"),
    ],
)
def test_no_secret_of_a_variable_is_in_the_log(tmp_path: Path, path: str, headers: str) -> None:
    pytest.importorskip("opentelemetry.sdk.trace")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}{path}"
    with traced(url, cwd=tmp_path, OTEL_EXPORTER_OTLP_HEADERS=headers) as one:
        assert one.post(b"1")[0] == 202
        said = one.event("library_logged")
        one.until_settled()
        left(one)
    assert said
    assert "hidden" not in json.dumps([one.events, one.other])


def test_check_names_the_extra_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "ingestd.admin.traces", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert main(["check", "jsonl", *ON]) == 78
    assert "pip install 'ingestd[otel]'" in capsys.readouterr().err
    assert main(["check", "jsonl"]) == 0


def test_a_job_has_its_span_on_both_sides_of_the_wire() -> None:
    records = Records.lines([b"1"])
    job = Job("j-1", 1, records, [Span(1, 0, 1)], "j", 1.0, ["j-0"], CLIENT)
    fd = SharedBuffer.make()
    ours, theirs = SharedBuffer(fd, ours=True), SharedBuffer(-1, ours=False)
    try:
        assert theirs.unpack(theirs.pack(job)) == job
        assert ours.unpack(ours.pack(job)) == job
    finally:
        ours.close()
        if fd >= 0:
            os.close(fd)
    assert Batch(None, job).traceparent == CLIENT
    assert Batch.of([1]).traceparent == ""


def noting(batch: list[Any]) -> None:
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    _inside.append(f"{context.trace_id:032x}-{context.span_id:016x}")


_inside: list[str] = []


def test_a_handler_is_inside_of_the_span_of_its_job_and_of_no_other() -> None:
    pytest.importorskip("opentelemetry.trace")
    runner = Runner(HandlerConfig(f"{__name__}:noting", {}, "json", "process", "p", b"/nowhere"))
    runner.prepare()
    none = f"{0:032x}-{0:016x}"
    zeros = f"00-{1:032x}-{PARENT}-01"  # its beginning looks like the id of no span
    jobs = [Job("j-1", 1, Records.lines([b"1"]), [Span(1, 0, 1)], "j", traceparent=one)
            for one in ("", CLIENT, "", zeros)]  # fmt: skip
    assert [runner.run(job).failure for job in jobs] == [None] * 4
    assert _inside == [none, f"{TRACE}-{PARENT}", none, f"{1:032x}-{PARENT}"]


def test_each_different_envelope_comes_once() -> None:
    one, two = envelope.pack(Envelope("a")), envelope.pack(Envelope("b", traceparent=CLIENT))
    packed = envelope.joined([(2, one), (1, two), (3, one)])
    found = list(EnvelopeRuns(packed, 6).different())
    assert found == [Envelope("a"), Envelope("b", traceparent=CLIENT)]
    assert list(EnvelopeRuns(b"", 3).different()) == [envelope.EMPTY]
    assert list(EnvelopeRuns(one, 3).different()) == [Envelope("a")]


def test_counts_of_requests_without_a_span_are_the_usual_ones() -> None:
    pytest.importorskip("opentelemetry.sdk.trace")
    from ingestd.admin.traces import RequestTraces

    counts, usual = RequestTraces(None, 0.0).counts(), AppendCounts()
    for each in (counts, usual):
        each.accepted(Append(Records.lines([b"1", b"22"])))
    assert (counts.records, counts.bytes) == (usual.records, usual.bytes) == (2, usual.bytes)
