"""Fluent Bit and Vector over HTTP, with their buffers on disk.

Where they are not on the path they are not measured. Vector's configuration was written after its
documentation, and the report says that it was not run by us.
"""

from __future__ import annotations

import json
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

FLUENT_BIT = """\
[SERVICE]
    flush               {age:g}
    log_level           warn
    http_server         on
    http_listen         127.0.0.1
    http_port           {metrics}
    storage.path        {storage}
    storage.sync        full
    storage.checksum    on
[INPUT]
    name                http
    alias               door
    listen              127.0.0.1
    port                {port}
    buffer_max_size     16M
    storage.type        filesystem
[OUTPUT]
    name                file
    alias               out
    match               *
    path                {folder}
    file                out
    format              plain
"""

VECTOR = """\
data_dir = "{storage}"
[sources.door]
type = "http_server"
address = "127.0.0.1:{port}"
path = "/v1/records"
framing.method = "newline_delimited"
decoding.codec = "json"
[sinks.nowhere]
type = "blackhole"
inputs = ["door"]
print_interval_secs = 0
buffer.type = "disk"
buffer.max_size = 4294967296
buffer.when_full = "block"
[sources.numbers]
type = "internal_metrics"
scrape_interval_secs = 0.1
[sinks.numbers_out]
type = "prometheus_exporter"
inputs = ["numbers"]
address = "127.0.0.1:{metrics}"
"""


class FluentBit(Program):
    """The http input, filesystem storage with full sync and checksums, and the file output."""

    name = "fluent-bit"
    program = "fluent-bit"
    scenarios = ("http-*", "start")
    accepted = (
        "in a chunk file, mapped into memory; storage.sync=full makes its syncs wait for the disk, "
        "but its documentation promises none before the answer"
    )

    def settings(self, age: float) -> str:
        """See `Peer`."""
        shown = FLUENT_BIT.format(
            age=age, metrics="PORT", port="PORT", storage="FOLDER", folder="FOLDER"
        )
        return f"`fluent-bit -c FILE` with `{in_one_line(shown)}`"

    def service(self, folder: Path, age: float) -> Service:
        """See `Peer`."""
        port, metrics = free_ports(2)
        file = folder / "fluent-bit.conf"
        values = {"age": age, "metrics": metrics, "port": port, "storage": folder / "storage"}
        values["folder"] = folder
        file.write_text(FLUENT_BIT.format(**values))
        command = Command([self.executable, "-c", str(file)], folder)
        numbers = (Page(metrics, "/api/v1/metrics"),)
        # Its http input knows no NDJSON by name, but takes several objects in one body. It has no
        # numbers in its first second, and then not before a load ends.
        return Service((command,), port, numbers, numbers, content_type="application/json")

    def starter(self, folder: Path, age: float) -> Service:
        """See `Peer`; it takes records before it has numbers."""
        service = self.service(folder, age)
        return service._replace(ready=(service.ready[0]._replace(path="/"),))

    def counts(self, page: bytes) -> Counts:
        """What its input took and its output did away with."""
        numbers = json.loads(page)
        output = numbers["output"]["out"]
        dropped = output.get("dropped_records", 0)
        return Counts(numbers["input"]["door"]["records"], output["proc_records"], dropped)


class Vector(Program):
    """The http_server source, a disk buffer, and the blackhole sink."""

    name = "vector"
    program = "vector"
    scenarios = ("http-*", "start")
    accepted = "in its disk buffer, which is synced every half second"
    tested = False

    def settings(self, age: float) -> str:  # noqa: ARG002  makes no batches
        """See `Peer`."""
        shown = VECTOR.format(metrics="PORT", port="PORT", storage="FOLDER")
        return f"`vector --config FILE` with `{in_one_line(shown)}`"

    def service(self, folder: Path, age: float) -> Service:  # noqa: ARG002
        """See `Peer`."""
        port, metrics = free_ports(2)
        storage = folder / "storage"
        storage.mkdir()
        file = folder / "vector.toml"
        file.write_text(VECTOR.format(metrics=metrics, port=port, storage=storage))
        command = Command([self.executable, "--quiet", "--config", str(file)], folder)
        pages = (Page(metrics, "/metrics"),)
        return Service((command,), port, pages, pages)

    def counts(self, page: bytes) -> Counts:
        """What its source took and its sink got."""
        accepted = sample(page, "vector_component_received_events_total", 'component_id="door"')
        processed = sample(page, "vector_component_sent_events_total", 'component_id="nowhere"')
        return Counts(accepted, processed)
