"""Each endpoint beside the records endpoint: `python -m benchmarks.endpoints --rounds 5`.

All of them get the same 100 records of 1 KB a request, each in its own encoding, from the same load
on the same daemon, another endpoint first in each round. What counts is the payload: `EVENT_BYTES`
a record, however it is encoded, by the lower of accepted and settled a second. The table has each
endpoint's share of what the records endpoint took in the same round, beside its bar.

An endpoint is one entry of `ENDPOINTS` with the function that encodes a request. A missing package
that an encoding needs leaves its endpoint out, with a line on stderr.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from benchmarks.bars import TIMES
from benchmarks.cells import measure_all
from benchmarks.load import wrk_fits
from benchmarks.measure import Plan, Scenario
from benchmarks.peers.base import Page, Service, free_ports
from benchmarks.peers.ours import Ingestd
from benchmarks.processes import ROOT
from benchmarks.records import BODIES
from benchmarks.report import table
from benchmarks.results import problems, rates, ratio, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.results import Result

EVENT_BYTES = 1024
"""Of a record, as JSON without white space."""
EVENTS = 100
"""A request."""
RECORDS = "records"
SCENARIO = Scenario("endpoints", "http", EVENTS)
_WORDS = ("order", "basket", "payment", "accepted", "declined", "retry", "timeout", "session")


class Event(NamedTuple):
    """One record, for every encoding.

    Attributes:
        at: nanoseconds since the epoch.
        level: `info`, `warning` or `error`.
        message: about 850 characters.
        fields: texts and integers by name; some are the same in most records.
    """

    at: int
    level: str
    message: str
    fields: dict[str, str | int]

    def as_json(self) -> bytes:
        """`EVENT_BYTES` of JSON without white space."""
        return msgspec.json.encode(
            {"at": self.at, "level": self.level, "message": self.message, **self.fields}
        )


def events(number: int) -> list[Event]:
    """The events of one request; the same at every run.

    Args:
        number: of the request.
    """
    chance = random.Random(number)
    found = []
    for place in range(EVENTS):
        fields: dict[str, str | int] = {
            "method": chance.choice(("GET", "GET", "POST")),
            "route": f"/p/{chance.randrange(20)}",
            "status": chance.choice((200, 200, 200, 404)),
            "user": f"u-{chance.getrandbits(32):08x}",
            "bytes": chance.randrange(10_000, 99_999),
        }
        level = chance.choice(("info", "info", "warning", "error"))
        event = Event(1_760_000_000_000_000_000 + number * EVENTS + place, level, "", fields)
        left = EVENT_BYTES - len(event.as_json())
        message = " ".join(chance.choices(_WORDS, k=left // 3))[:left]
        found.append(event._replace(message=message))
    return found


# -- encodings -------------------------------------------------------------------------------------


def lines(batch: Sequence[Event]) -> bytes:
    return b"".join([event.as_json() + b"\n" for event in batch])


def array(batch: Sequence[Event]) -> bytes:
    return b"[" + b",".join([event.as_json() for event in batch]) + b"]"


def bulk(batch: Sequence[Event]) -> bytes:
    """`_bulk` as shippers of logs send it: one index, ids are made by the cluster."""
    return b"".join([b'{"create":{"_index":"logs"}}\n%b\n' % event.as_json() for event in batch])


def hec(batch: Sequence[Event]) -> bytes:
    return b"".join(
        [b'{"time":%.3f,"event":%b}' % (event.at / 1e9, event.as_json()) for event in batch]
    )


def otlp_logs(batch: Sequence[Event]) -> bytes:
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

    def pair(name: str, value: str | int) -> KeyValue:
        kind = "int_value" if isinstance(value, int) else "string_value"
        return KeyValue(key=name, value=AnyValue(**{kind: value}))  # type: ignore[arg-type]

    request = ExportLogsServiceRequest()
    resource = request.resource_logs.add()
    resource.resource.attributes.append(pair("service.name", "shop"))
    scope = resource.scope_logs.add()
    scope.scope.name = "shop.checkout"
    for event in batch:
        scope.log_records.add(
            time_unix_nano=event.at,
            severity_text=event.level,
            body=AnyValue(string_value=event.message),
            attributes=[pair(name, value) for name, value in event.fields.items()],
        )
    return request.SerializeToString()


def datadog(batch: Sequence[Event]) -> bytes:
    """Logs with Datadog's attributes; the agent sends such arrays."""
    tags = {"ddsource": "shop", "service": "web"}
    return msgspec.json.encode([{**msgspec.json.decode(one.as_json()), **tags} for one in batch])


def _by_level(batch: Sequence[Event]) -> dict[str, list[tuple[int, str]]]:
    """Streams: times and lines by level. A line is the event as JSON, as most shippers send it."""
    streams: dict[str, list[tuple[int, str]]] = {}
    for event in batch:
        streams.setdefault(event.level, []).append((event.at, event.as_json().decode()))
    return streams


def loki(batch: Sequence[Event]) -> bytes:
    streams = [
        {
            "stream": {"app": "web", "level": level},
            "values": [[str(at), line] for at, line in lines],
        }
        for level, lines in _by_level(batch).items()
    ]
    return msgspec.json.encode({"streams": streams})


def loki_protobuf(batch: Sequence[Event]) -> bytes:
    """A `PushRequest` as a snappy block."""
    import cramjam

    def varint(number: int) -> bytes:
        low = bytes([number & 0x7F | (0x80 if number > 0x7F else 0)])
        return low + varint(number >> 7) if number > 0x7F else low

    def field(number: int, value: bytes) -> bytes:
        return bytes([number << 3 | 2]) + varint(len(value)) + value

    streams = []
    for level, lines in _by_level(batch).items():
        entries = [
            field(1, b"\x08" + varint(at // 10**9) + b"\x10" + varint(at % 10**9))
            + field(2, line.encode())
            for at, line in lines
        ]
        labels = field(1, f'{{app="web", level="{level}"}}'.encode())
        streams.append(field(1, labels + b"".join([field(2, entry) for entry in entries])))
    return bytes(cramjam.snappy.compress_raw(b"".join(streams)))


def msgpack_array(batch: Sequence[Event]) -> bytes:
    return msgspec.msgpack.encode([msgspec.json.decode(event.as_json()) for event in batch])


# The bodies come again and again, so messages have no ids here: each would be accepted once. What
# an id costs is less than what differs from run to run.


def segment(batch: Sequence[Event]) -> bytes:
    return msgspec.json.encode(
        {
            "batch": [
                {"type": "track", "userId": "u", "properties": msgspec.Raw(event.as_json())}
                for event in batch
            ],
            "sentAt": "2026-01-01T00:00:00Z",
        }
    )


def posthog(batch: Sequence[Event]) -> bytes:
    captured = [
        {"event": "e", "distinct_id": "u", "properties": msgspec.Raw(event.as_json())}
        for event in batch
    ]
    return msgspec.json.encode({"batch": captured, "sent_at": "2026-01-01T00:00:00Z"})


def syslog(batch: Sequence[Event]) -> bytes:
    """Messages of RFC 5424 with their lengths, as relays send them."""
    head = b"<165>1 2026-01-01T00:00:00.000000Z web1.example.com shop 4242 ORDER - "
    messages = [head + event.as_json() for event in batch]
    return b"".join([b"%d %b" % (len(message), message) for message in messages])


def syslog_lines(batch: Sequence[Event]) -> bytes:
    """Messages of RFC 3164, one a line, as most devices send them."""
    head = b"<165>Jan  1 00:00:00 web1 shop[4242]: "
    return b"".join([b"%b%b\n" % (head, event.as_json()) for event in batch])


class Case(NamedTuple):
    """One endpoint in one encoding, or one source over TCP.

    Attributes:
        name: in the table.
        path: of its requests; empty for a source over TCP.
        content_type: of these.
        encode: makes a body.
        bar: the least share of the records endpoint's bytes a second; 0 where there is none.
        flags: switch it on; `{port}` is where it shall listen.
    """

    name: str
    path: str
    content_type: str
    encode: Callable[[Sequence[Event]], bytes]
    bar: float = 0.0
    flags: tuple[str, ...] = ()


ENDPOINTS = (
    Case(RECORDS, "/v1/records", "application/x-ndjson", lines),
    Case("records, an array", "/v1/records", "application/json", array),
    Case("records, MessagePack", "/v1/records", "application/msgpack", msgpack_array, 0.4),
    Case(
        "elasticsearch", "/elastic/_bulk", "application/x-ndjson", bulk, 0.6,
        ("--http.endpoints.elasticsearch.pipeline", "default"),
    ),
    Case(
        "splunk_hec", "/services/collector", "application/json", hec, 0.4,
        ("--http.endpoints.splunk_hec.pipeline", "default"),
    ),
    Case(
        "otlp", "/v1/logs", "application/x-protobuf", otlp_logs, 0.35,
        ("--http.endpoints.otlp.pipeline", "default"),
    ),
    Case(
        "datadog", "/api/v2/logs", "application/json", datadog, 0.4,
        ("--http.endpoints.datadog.pipeline", "default"),
    ),
    Case(
        "loki", "/loki/api/v1/push", "application/json", loki, 0.4,
        ("--http.endpoints.loki.pipeline", "default"),
    ),
    Case(
        "loki, protobuf", "/loki/api/v1/push", "application/x-protobuf", loki_protobuf, 0.4,
        ("--http.endpoints.loki.pipeline", "default"),
    ),
    Case(
        "segment", "/v1/batch", "application/json", segment, 0.4,
        ("--http.endpoints.segment.pipeline", "default"),
    ),
    Case(
        "posthog", "/batch/", "application/json", posthog, 0.4,
        ("--http.endpoints.posthog.pipeline", "default"),
    ),
    Case(
        "syslog", "", "", syslog, 0.4,
        ("--source", "syslog", "--syslog.listen", "127.0.0.1:{port}"),
    ),
    Case(
        "syslog, lines", "", "", syslog_lines, 0.4,
        ("--source", "syslog", "--syslog.listen", "127.0.0.1:{port}"),
    ),
)  # fmt: skip


class Taker(Ingestd):
    """The daemon, asked at one endpoint.

    Args:
        case: the endpoint.
    """

    handler = "benchmarks.handler:take"

    def __init__(self, case: Case) -> None:
        self.name = case.name
        self.case = case

    def missing(self) -> str:
        """See `Peer`."""
        try:
            self.case.encode(events(0))
        except ImportError as error:
            return str(error)
        return ""

    def service(self, folder: Path, age: float) -> Service:
        """See `Peer`."""
        port, admin = free_ports(2)
        flags = [flag.format(port=port) for flag in self.case.flags]
        command = self._daemon(folder, age, port, admin, *flags)
        service = Service((command,), port, (Page(admin, "/readyz"),), (Page(admin, "/v1/status"),))
        return service._replace(path=self.case.path, content_type=self.case.content_type)

    def bodies(self, folder: Path, size: int) -> list[Path]:  # noqa: ARG002 - always `EVENTS`
        """See `Peer`."""
        paths = [folder / f"body-{number}" for number in range(BODIES)]
        for number, path in enumerate(paths):
            path.write_bytes(self.case.encode(events(number)))
        return paths


# -- the table -------------------------------------------------------------------------------------


def report(results: Sequence[Result], cases: Sequence[Case]) -> str:
    """The table, in Markdown; pure."""
    rows = []
    ours = rates(results, SCENARIO.name, RECORDS)
    for case in cases:
        runs = rates(results, SCENARIO.name, case.name)
        speed = spread(runs, lambda run: run.rate * EVENT_BYTES / 1e6)
        share = ratio(runs, ours)
        wanted = f"≥ {case.bar:g} {TIMES}" if case.bar else ""
        met = ("yes" if share.median >= case.bar else "**no**") if share and case.bar else ""
        rows.append(
            [
                case.name,
                speed.text(1) if speed else "",
                share.text(2) if share else "",
                wanted,
                met,
            ]
        )
    return table(["endpoint", "MB/s", "÷ records", "bar", "met"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; the exit code says whether every run counted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endpoints")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of load a run [2]")
    parser.add_argument("--only", action="append", default=[], help="an endpoint; again for more")
    parser.add_argument("--directory", type=Path, default=ROOT / "build", help="[build/]")
    arguments = parser.parse_args(argv)
    takers = [
        Taker(case)
        for case in ENDPOINTS
        if case.name == RECORDS or not arguments.only or case.name in arguments.only
    ]
    for taker in takers:
        if missing := taker.missing():
            print(f"{taker.name} is left out: {missing}", file=sys.stderr)
    takers = [taker for taker in takers if not taker.missing()]
    tool = "wrk" if wrk_fits(arguments.seconds) else "python"
    arguments.directory.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="benchmark-", dir=arguments.directory))
    try:
        plan = Plan(arguments.rounds, arguments.seconds, 0, 1.0, tool, folder)
        results = list(measure_all([(SCENARIO, taker) for taker in takers], plan, folder))
    finally:
        shutil.rmtree(folder)
    print(report(results, [taker.case for taker in takers]))
    for problem in problems(results):
        print(f"- does not count: {problem}")
    return 1 if problems(results) else 0


if __name__ == "__main__":
    sys.exit(main())
