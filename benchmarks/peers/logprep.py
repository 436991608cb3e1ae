"""Logprep: a log processor in Python, with an HTTP input behind uvicorn.

It needs other versions of what ingestd needs, so it lives in an environment of its own
(`README.md` has the commands).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.peers.base import (
    Command,
    Counts,
    Page,
    Program,
    Service,
    free_ports,
    in_one_line,
    sample,
)

if TYPE_CHECKING:
    from pathlib import Path

CONFIGURATION = """\
version: 1
process_count: 1
timeout: 0.1
logger: {{level: WARNING}}
metrics:
  enabled: true
  port: {metrics}
  uvicorn_config: {{host: 127.0.0.1, access_log: false}}
input:
  door:
    type: http_input
    message_backlog_size: 1000000
    copy_headers_to_logs: []
    uvicorn_config: {{host: 127.0.0.1, port: {port}, access_log: false}}
    endpoints: {{/v1/records: jsonl}}
output:
  nowhere: {{type: dummy_output, do_nothing: true}}
pipeline: []
"""
"""One pipeline process with nothing in it; the backlog is long enough to refuse nobody."""


class Logprep(Program):
    """Its jsonl endpoint decodes in the server's thread; one process takes record by record."""

    name = "logprep"
    program = "logprep"
    version_pattern = r"logprep version:\s*(\S+)"
    scenarios = ("http-*", "start")
    accepted = "in a multiprocessing.Queue, in memory"

    def settings(self, age: float) -> str:  # noqa: ARG002  makes no batches
        """See `Peer`."""
        configuration = CONFIGURATION.format(port="PORT", metrics="PORT")
        return f"`logprep run` with `{in_one_line(configuration)}`"

    def service(self, folder: Path, age: float) -> Service:  # noqa: ARG002
        """See `Peer`."""
        port, metrics = free_ports(2)
        file = folder / "pipeline.yml"
        file.write_text(CONFIGURATION.format(port=port, metrics=metrics))
        numbers = folder / "metrics"
        numbers.mkdir()
        environment = {"PROMETHEUS_MULTIPROC_DIR": str(numbers)}
        command = Command([self.executable, "run", str(file)], folder, environment)
        ready = (Page(metrics, "/health"), Page(port, "/v1/records"))
        return Service((command,), port, ready, (Page(metrics, "/metrics"),))

    def counts(self, page: bytes) -> Counts:
        """What the pipeline took, and what lies before it."""
        door = ('component="input"', 'name="door"')
        processed = sample(page, "logprep_number_of_processed_events_total", *door)
        waiting = sample(page, "logprep_message_backlog_size", *door)
        return Counts(processed + waiting, processed)
