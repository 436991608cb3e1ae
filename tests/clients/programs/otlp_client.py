"""Sends with opentelemetry-sdk: ADDRESS COUNT logs|traces|metrics; see `tests/clients/harness.py`.

The environment of `docs/clients/opentelemetry.md` configures the exporters.
"""

import logging
import os
import re
import sys
from pathlib import Path

from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

address, count, signal = sys.argv[1], int(sys.argv[2]), sys.argv[3]
page = Path(__file__).resolve().parents[3] / "docs" / "clients" / "opentelemetry.md"
shown = page.read_text().partition("<!-- client: environment -->\n```sh\n")[2].partition("```")[0]
for name, value in re.findall(r"export (\w+)=([^\s\"]+)", shown):
    os.environ[name] = value.replace("http://127.0.0.1:8080", address)
resource = Resource.create({"service.name": "test"})
batches = {"max_export_batch_size": 20, "schedule_delay_millis": 100}
logging.basicConfig(level=logging.WARNING, format="%(message)s")


def half(n: int) -> None:
    if n == count // 2:
        print("half", flush=True)


def logs() -> LoggerProvider:
    provider = LoggerProvider(resource)
    provider.add_log_record_processor(BatchLogRecordProcessor(OTLPLogExporter(), **batches))
    logger = provider.get_logger("test")
    for n in range(count):
        logger.emit(body=f"order {n}", severity_text="INFO", attributes={"n": n})
        half(n)
    return provider


def traces() -> TracerProvider:
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(), **batches))
    tracer = provider.get_tracer("test")
    for n in range(count):
        with tracer.start_as_current_span("order", attributes={"n": n}):
            half(n)
    return provider


def metrics() -> MeterProvider:
    exporter = OTLPMetricExporter(max_export_batch_size=20)
    reader = PeriodicExportingMetricReader(exporter, 3_600_000, 120_000)
    provider = MeterProvider([reader], resource)
    counter = provider.get_meter("test").create_counter("orders")
    for n in range(count):
        counter.add(1, {"n": n})
    print("half", flush=True)
    return provider


provider = {"logs": logs, "traces": traces, "metrics": metrics}[signal]()
assert provider.force_flush(120_000)
provider.shutdown()
