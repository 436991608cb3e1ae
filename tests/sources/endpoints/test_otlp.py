"""OTLP as its clients see it: a real server, intakes in memory; and the codec beside protobuf's."""

from __future__ import annotations

import gzip
import json
import zlib
from time import process_time
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("opentelemetry.proto", reason="requests are made with opentelemetry-proto")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import (
    AnyValue,
    ArrayValue,
    KeyValue,
    KeyValueList,
)

from ingestd.base.errors import Draining, KeyInFlight, Overloaded
from ingestd.codecs.otlp import SIGNALS, read_groups
from ingestd.codecs.otlp.logs import LogItems
from ingestd.http.problem import Problem
from ingestd.sources.http import HttpSourceKind
from ingestd.sources.http.endpoints.base import BodyLimits
from ingestd.sources.http.endpoints.otlp import JSON, PROTOBUF, OtlpCodec
from tests.daemon.harness import ROOT
from tests.peak import peak
from tests.sources.endpoints.endpoint_tools import KeyIntake, serving_endpoint
from tests.sources.endpoints.otlp_requests import (
    NAMES,
    REQUESTS,
    RESPONSES,
    expected,
    loads,
    otlp_json,
    requests,
)
from tests.sources.source_tools import Reply, ask

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from ingestd.codecs.lines import Parsed
    from ingestd.sources.http.source import HttpSource

LIMITS = BodyLimits(100_000, 1024**2)
KINDS = (PROTOBUF, JSON)
EXAMPLES = pytest.mark.parametrize("examples", [15, pytest.param(300, marks=pytest.mark.slow)])
ANY = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
TOKEN = "token-of-the-tests-0123456789-abcdef"


def decode(signal: str, kind: bytes, body: bytes, limits: BodyLimits = LIMITS) -> Parsed | None:
    parts = OtlpCodec(SIGNALS[signal], kind).decode(body, limits)
    return parts[0].parsed if parts else None


def outcome(signal: str, kind: bytes, body: bytes) -> Parsed | Problem | None:
    try:
        return decode(signal, kind, body)
    except Problem as found:
        return found


def encoded(request: Message, kind: bytes) -> bytes:
    if kind == PROTOBUF:
        return request.SerializeToString()
    return json.dumps(otlp_json(request)).encode()


def logs(*bodies: str, attributes: dict[str, str] | None = None) -> ExportLogsServiceRequest:
    request = ExportLogsServiceRequest()
    scope = request.resource_logs.add().scope_logs.add()
    for name, value in (attributes or {}).items():
        pair = KeyValue(key=name, value=AnyValue(string_value=value))
        request.resource_logs[0].resource.attributes.append(pair)
    for body in bodies:
        scope.log_records.add(body=AnyValue(string_value=body))
    return request


def bad_ids(*sizes: int) -> ExportLogsServiceRequest:
    """Log records whose trace ids have so many bytes."""
    request = logs(*map(str, sizes))
    for record, size in zip(request.resource_logs[0].scope_logs[0].log_records, sizes, strict=True):
        record.trace_id = b"\1" * size
    return request


# -- the codec -------------------------------------------------------------------------------------


@EXAMPLES
@pytest.mark.parametrize("signal", SIGNALS)
def test_any_request_gives_the_same_records_in_both_encodings(signal: str, examples: int) -> None:
    records = 0

    @settings(max_examples=examples, **ANY)
    @given(requests(signal))
    def try_one(request: Message) -> None:
        nonlocal records
        wanted = expected(signal, request)
        records += len(wanted)
        for kind in KINDS:
            parsed = decode(signal, kind, encoded(request, kind), LIMITS._replace(depth_max=512))
            assert (loads(parsed.records.payload) if parsed else []) == wanted
            assert parsed is None or (parsed.records.count, parsed.invalid) == (len(wanted), 0)

    try_one()
    assert records >= examples


@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_zero_is_a_value(kind: bytes) -> None:
    request = REQUESTS["metrics"]()
    metric = request.resource_metrics.add().scope_metrics.add().metrics.add()
    metric.exponential_histogram.data_points.add(zero_threshold=-0.0, sum=-0.0)
    parsed = decode("metrics", kind, encoded(request, kind))
    assert parsed is not None
    assert loads(parsed.records.payload) == expected("metrics", request)


@EXAMPLES
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("kind", KINDS)
def test_broken_bodies_are_problems_or_invalid_records_and_nothing_else(
    signal: str, kind: bytes, examples: int
) -> None:
    refused = 0

    @settings(max_examples=examples, **ANY)
    @given(requests(signal), st.data())
    def try_one(request: Message, data: st.DataObject) -> None:
        nonlocal refused
        body = bytearray(encoded(request, kind))
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(body)))
            how = data.draw(st.sampled_from(("cut", "change", "insert", "remove")))
            if how == "cut":
                del body[at:]
            elif how == "insert":
                body[at:at] = data.draw(st.binary(max_size=3))
            elif how == "remove":
                del body[at : at + 2]
            elif at < len(body):
                body[at] = data.draw(st.integers(0, 255))
        parsed = outcome(signal, kind, bytes(body))
        if isinstance(parsed, Problem):
            assert parsed.kind.status == 400
            assert parsed.detail
            refused += 1
            return
        if parsed is not None:
            assert len(loads(parsed.records.payload)) == parsed.records.count
            refused += parsed.invalid > 0

    try_one()
    assert refused >= examples // 5


@settings(max_examples=60, **ANY)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(
        [*NAMES["logs"], *NAMES["metrics"], "gauge", "dataPoints", "attributes", "key", "value",
         "body", "arrayValue", "values", "traceId", "resource", "scope"]), inner, max_size=4),
    max_leaves=20,
))  # fmt: skip
def test_any_json_is_taken_or_a_problem(value: Any) -> None:
    for signal in ("logs", "metrics"):
        found = outcome(signal, JSON, json.dumps(value).encode())
        assert not isinstance(found, Problem) or found.kind.status == 400


def usual_logs(data: st.DataObject) -> ExportLogsServiceRequest:
    """Log records with some of the fields that SDKs set, and values of any size."""
    request = logs(*[""] * data.draw(st.integers(1, 6)), attributes={"service": "shop"})
    texts = st.sampled_from(("", "a", "ü", "x" * 127, "x" * 128, "y" * 16_380, "z" * 17_000))
    values = st.one_of(
        st.builds(lambda text: AnyValue(string_value=text), texts),
        st.builds(lambda number: AnyValue(int_value=number), st.integers(-(2**63), 2**63 - 1)),
        st.just(AnyValue(array_value=ArrayValue(values=[AnyValue(bool_value=True)]))),
        st.just(AnyValue()),
    )
    choose = data.draw
    for one in request.resource_logs[0].scope_logs[0].log_records:
        one.time_unix_nano = choose(st.sampled_from((1, 2**63, 2**64 - 1, 0)))
        one.severity_number = choose(st.sampled_from((0, 9, 24, 127, 128, -1)))  # type: ignore[assignment]
        one.severity_text = choose(st.sampled_from(("", "INFO", "x" * 127, "x" * 128)))
        one.ClearField("body")
        if choose(st.booleans()):
            one.body.CopyFrom(choose(values))
        for key in choose(st.lists(st.sampled_from(("a", "b", "", "k" * 130)), max_size=4)):
            one.attributes.append(KeyValue(key=key, value=choose(values)))
        one.dropped_attributes_count = choose(st.sampled_from((0, 0, 0, 1)))
        one.flags = choose(st.sampled_from((0, 1, 2**32 - 1)))
        one.trace_id = choose(st.sampled_from((b"", bytes(16), b"\n" * 16, b"x" * 16, b"x" * 15)))
        one.span_id = choose(st.sampled_from((b"", bytes(8), b"2" * 8)))
        one.observed_time_unix_nano = choose(st.sampled_from((0, 1, 2**64 - 1)))
        one.event_name = choose(st.sampled_from(("", "", "", "paid")))
    return request


@EXAMPLES
def test_log_records_read_in_runs_are_the_same_to_the_byte(examples: int) -> None:
    """As without runs: what is accepted, what is refused and why; whole bodies and broken ones."""

    def both(body: bytes) -> None:
        found = outcome("logs", PROTOBUF, body)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LogItems, "read_run", lambda *_: 0)
            wanted = outcome("logs", PROTOBUF, body)
        if isinstance(wanted, Problem):
            assert isinstance(found, Problem)
            assert (found.kind, found.detail) == (wanted.kind, wanted.detail)
            assert found.refused == wanted.refused
        else:
            assert found == wanted

    @settings(max_examples=examples * 2, **ANY)
    @given(st.data())
    def try_one(data: st.DataObject) -> None:
        body = bytearray(usual_logs(data).SerializeToString())
        both(bytes(body))
        for _ in range(3):
            at = data.draw(st.integers(0, len(body) - 1))
            body[at] = data.draw(st.integers(0, 255))
            both(bytes(body))
        both(bytes(body[: data.draw(st.integers(0, len(body)))]))

    try_one()


@pytest.mark.parametrize(
    "last",
    [
        b"\x1a\x05INFO",
        b"\x2a\x7f\x0a\x7dtext",
        b"\x2a\x06\x0a\x04tex",
        b"\x32\x7f\x0a\x01k\x12\x02\x18\x05",
    ],
)
def test_a_log_record_with_a_field_that_is_cut_off_is_refused_at_the_end_too(last: bytes) -> None:
    """Wherever in a body it stands."""
    good, bad = (field(2, b"\x09" + bytes(8) + more) for more in (b"", last))
    for records in (good + bad, bad + good):
        parsed = decode("logs", PROTOBUF, field(1, field(2, records)))
        assert parsed is not None
        assert parsed.records.count == 1
        assert "cut off" in parsed.refused[0].detail


def test_usual_log_records_are_read_in_runs() -> None:
    request = logs(*["x" * size for size in (0, 1, 125, 126, 127, 128, 16_380)])
    records = request.resource_logs[0].scope_logs[0].log_records
    for one in records:
        one.time_unix_nano, one.observed_time_unix_nano, one.flags = 1, 2, 1
        one.severity_number, one.severity_text = 9, "INFO"  # type: ignore[assignment]
        one.trace_id, one.span_id = b"2" * 16, b"\n" * 8
        one.attributes.append(KeyValue(key="a", value=AnyValue(string_value="b" * 200)))
    (group,) = read_groups(SIGNALS["logs"], request.SerializeToString(), 1024**2, 1000)
    found: list[dict[str, Any]] = []
    assert group.runs is not None
    assert group.runs.read_run(group.context, found, 4, 64 * 1024) > 0
    assert len(found) == 4
    group.runs.read_run(group.context, found, 100, 2000)
    assert len(found) == 6
    assert len(list(group.items)) == 1
    assert [one["body"] for one in found] == [one.body.string_value for one in records[:6]]


def test_half_a_character_costs_no_record() -> None:
    """JavaScript's exporter writes `\\ud83d` where a text was cut in the middle of an emoji."""
    logs = [{"body": {"stringValue": text}} for text in ("\ud83d", "\\ud83d", "\U0001f600")]
    body = json.dumps({"resourceLogs": [{"scopeLogs": [{"logRecords": logs}]}]}).encode()
    (part,) = OtlpCodec(SIGNALS["logs"], JSON).decode(body, LIMITS)
    found = [json.loads(item)["body"] for item in part.parsed.records.items()]
    assert found == ["\ufffd", "\\ud83d", "\U0001f600"]


def test_an_invalid_record_costs_no_other_one() -> None:
    request = bad_ids(16, 5, 0, 32)
    for kind in KINDS:
        parsed = decode("logs", kind, encoded(request, kind))
        assert parsed is not None
        found = loads(parsed.records.payload)
        assert [(one["body"], one.get("traceId")) for one in found] == [
            ("16", "01" * 16),
            ("0", None),
        ]
        assert [(one.index, one.detail) for one in parsed.refused] == [
            (1, "traceId: an id has 5 bytes, not 16"), (3, "traceId: an id has 32 bytes, not 16"),
        ]  # fmt: skip
        assert all(b"5" in one.payload or b"32" in one.payload for one in parsed.refused)


@pytest.mark.parametrize(
    ("record", "detail"),
    [
        ({"timeUnixNano": "soon"}, "timeUnixNano: should be an integer from 0 to"),
        ({"timeUnixNano": "18446744073709551616"}, "timeUnixNano: should be an integer"),
        ({"severityNumber": "SEVERITY_NUMBER_INFO"}, "severityNumber: should be an integer"),
        ({"severityText": 5}, "severityText: should be a string"),
        ({"traceId": "xyz"}, "traceId: an id should be hexadecimal digits"),
        ({"attributes": {"a": 1}}, "attributes: should be an array"),
        ({"attributes": [{"key": 1}]}, "attributes: key: should be a string"),
        ({"body": {"bytesValue": "*"}}, "body: bytesValue: should be base64"),
        ({"body": {"boolValue": 1}}, "body: boolValue: should be true or false"),
        ({"body": {"doubleValue": "x"}}, "body: doubleValue: should be a number"),
        ({"body": {"doubleValue": 10**400}}, "body: doubleValue: should be a number of 64 bits"),
        ({"body": "text"}, "body: should be an object"),
        ([], "should be an object"),
    ],
)
def test_faults_of_json_are_told_by_their_place(record: Any, detail: str) -> None:
    good = {"body": {"stringValue": "good"}, "unknown": 1, "severityText": None}
    scopes = [{"logRecords": [good, record]}]
    parsed = decode("logs", JSON, json.dumps({"resourceLogs": [{"scopeLogs": scopes}]}).encode())
    assert parsed is not None
    assert parsed.records.count == 1
    assert parsed.refused[0].detail.startswith(detail)
    assert json.loads(parsed.refused[0].payload) == record


def varint(number: int, size: int) -> bytes:
    """A number in so many bytes, mostly more than it needs."""
    groups = [number >> 7 * at & 127 for at in range(size)]
    return bytes([*[one | 128 for one in groups[:-1]], groups[-1]])


def field(number: int, value: bytes | int, *, padded: bool = False) -> bytes:
    """A field by hand, whose tag has more bytes than it needs if it is padded."""
    tag = varint(number << 3 | (0 if isinstance(value, int) else 2), 3 if padded else 1)
    if isinstance(value, int):
        return tag + varint(value & 2**64 - 1, 10)
    return tag + varint(len(value), 3) + value


WRITTEN = [
    field(2, 2**32 + 9) + field(6, b"\x0a\x01a\x12\x02\x18\x05", padded=True),
    field(2, 2**33 - 1) + field(2, -(2**31)) + field(2, 2**63 + 7),
    field(9, b"1" * 16) + field(9, b"") + field(10, b"\1" * 8) + field(10, bytes(8)),
    field(5, field(3, 1, padded=True) + field(1, b"text", padded=True), padded=True),
    field(6, field(2, field(7, b"\0", padded=True)) + field(1, b"k", padded=True)),
]


@pytest.mark.parametrize("record", WRITTEN)
def test_records_of_other_writers_are_read_as_by_protobuf(record: bytes) -> None:
    """Numbers in more bytes than they need, too large ones, and fields that come twice."""
    for tail in (b"", b"\x59" + bytes(7) + b"\1"):
        body = field(1, field(2, field(2, record + tail)))
        wanted = expected("logs", ExportLogsServiceRequest.FromString(body))
        parsed = decode("logs", PROTOBUF, body)
        assert parsed is not None
        assert loads(parsed.records.payload) == wanted


@pytest.mark.parametrize("name", ["gauge", "sum", "histogram", "summary"])
def test_data_in_pieces_has_the_points_of_all(name: str) -> None:
    """As protobuf merges them; of two kinds the last one counts."""
    request = REQUESTS["metrics"]()
    metric = request.resource_metrics.add().scope_metrics.add().metrics.add(name="m")
    for kind in ("exponential_histogram", name):
        for time in (1, 2):
            getattr(metric, kind).data_points.add(time_unix_nano=time)
    pieces = metric.SerializeToString()
    metric.ClearField(name)
    for time in (3, 4, 5):
        getattr(metric, name).data_points.add(time_unix_nano=time)
    other = REQUESTS["metrics"]()
    other.resource_metrics.add().scope_metrics.add().metrics.add().exponential_histogram.SetInParent()
    first = other.resource_metrics[0].scope_metrics[0].metrics[0].SerializeToString()
    body = field(1, field(2, field(2, first + pieces + metric.SerializeToString())))
    wanted = expected("metrics", REQUESTS["metrics"].FromString(body))
    parsed = decode("metrics", PROTOBUF, body)
    assert parsed is not None
    assert [one["timeUnixNano"] for one in wanted] == [1, 2, 3, 4, 5]
    assert loads(parsed.records.payload) == wanted


def test_a_field_with_the_number_0_is_refused_as_by_protobuf() -> None:
    body = field(1, field(2, field(2, b"\x02\x01x")))
    with pytest.raises(Problem, match="the number 0"):
        decode("logs", PROTOBUF, body)


def test_a_fault_in_a_resource_costs_its_records_alone() -> None:
    request = logs("lost", attributes={"a": "b"})
    request.resource_logs.extend(logs("good").resource_logs)
    body = request.SerializeToString().replace(b"\x0a\x01b", b"\x0a\x01\xff")
    parsed = decode("logs", PROTOBUF, body)
    assert parsed is not None
    assert [one["body"] for one in loads(parsed.records.payload)] == ["good"]
    assert [one.detail for one in parsed.refused] == ["resource: attributes: a text is not UTF-8"]


def test_what_is_larger_or_deeper_than_a_record_may_be_is_invalid() -> None:
    request = logs("x" * 3000, "short")
    deep = AnyValue(string_value="end")
    for _ in range(40):
        deep = AnyValue(array_value=ArrayValue(values=[deep]))
    request.resource_logs[0].scope_logs[0].log_records.add(body=deep)
    limits = LIMITS._replace(record_bytes_max=2000, depth_max=20)
    for kind in KINDS:
        parsed = decode("logs", kind, encoded(request, kind), limits)
        assert parsed is not None
        assert [one["body"] for one in loads(parsed.records.payload)] == ["short"]
        assert [(one.index, one.reason) for one in parsed.refused] == [
            (0, "too_large"), (2, "malformed"),
        ]  # fmt: skip
    wide = logs("a", attributes={"x": "y" * 3000})
    for kind in KINDS:
        with pytest.raises(Problem, match="record_bytes_max") as found:
            decode("logs", kind, encoded(wide, kind), limits)
        assert found.value.kind.status == 400


def field(number: int, value: bytes) -> bytes:
    size, packed = len(value), bytearray()
    while size > 127:
        packed.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2]) + bytes(packed) + bytes([size]) + value


MANY = 1024**2
FEW = LIMITS._replace(records_max=1000)
BOMBS = {
    "resources": field(1, b"") * MANY,
    "scopes": field(1, field(2, b"") * MANY),
    "log records": field(1, field(2, field(2, b"") * MANY)),
    "unknown fields": b"\x20\x01" * MANY,
    "unknown parts": field(1, field(5, b"") * MANY),
    "attributes of a resource": field(1, field(1, field(1, b"") * MANY) + field(2, field(2, b""))),
    "attributes of a record": field(1, field(2, field(2, field(6, b"") * MANY))),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bodies_of_nothing_but_fields_are_refused_in_little_memory(name: str) -> None:
    with peak() as most, pytest.raises(Problem) as found:
        decode("logs", PROTOBUF, BOMBS[name], FEW)
    assert found.value.kind.status in {400, 413}
    assert most.bytes < 10 * 1024**2


@pytest.mark.parametrize("kind", ["array", "map"])
def test_a_large_value_is_nested_in_few_levels_at_a_time(kind: str) -> None:
    """Each level has a copy of it."""

    def nested(size: int, depth: int) -> bytes:
        value = AnyValue(string_value="x" * size)
        for _ in range(depth):
            if kind == "array":
                value = AnyValue(array_value=ArrayValue(values=[value]))
            else:
                pairs = [KeyValue(key="k", value=value)]
                value = AnyValue(kvlist_value=KeyValueList(values=pairs))
        request = logs("")
        request.resource_logs[0].scope_logs[0].log_records[0].body.CopyFrom(value)
        return request.SerializeToString()

    for size, depth in ((10_000, 30), (1_000_000, 12)):
        parsed = decode("logs", PROTOBUF, nested(size, depth))
        assert parsed is not None
        assert parsed.records.count == 1
    body = nested(1_000_000, 30)
    with peak() as most, pytest.raises(Problem, match="nested too deeply"):
        decode("logs", PROTOBUF, body)
    assert most.bytes < 60 * 1024**2
    decode("logs", PROTOBUF, nested(1_000_000, 12))  # nothing is counted any more


@pytest.mark.parametrize("size", [900_000, 1_040_000])
def test_a_large_resource_of_many_records_is_in_few_of_them_at_a_time(size: int) -> None:
    value = field(1, b"k") + field(2, field(1, b"v" * size))
    resource, scope = field(1, field(1, value)), field(2, field(2, b"") * 1000)
    part = field(1, b"s" * (size // 4))
    for body in (field(1, resource + scope), field(1, resource + field(2, field(1, part) + scope))):
        with peak() as most, pytest.raises(Problem) as found:
            decode("logs", PROTOBUF, body, BodyLimits(1000, 1024**2))
        assert found.value.kind.status in {400, 413}
        assert most.bytes < 60 * 1024**2


def test_bodies_of_nothing_but_json_elements_are_refused_in_little_memory() -> None:
    outer, inner, items = NAMES["logs"]
    many = ",".join(["{}"] * MANY)
    for body in (
        f'{{"{outer}":[{{"{inner}":[{{"{items}":[{many}]}}]}}]}}',
        f'{{"{outer}":[{many}]}}',
    ):
        with peak() as most, pytest.raises(Problem) as found:
            decode("logs", JSON, body.encode(), FEW)
        assert found.value.kind.status == 413
        assert most.bytes < 10 * 1024**2


def test_a_text_without_an_end_takes_no_long_time() -> None:
    """The time is linear in it, however many quotes it has."""
    outer = NAMES["logs"][0]
    body = f'{{"{outer}":[{"1," * 200_000}"'.encode() + b'\\"' * 25_000
    begun = process_time()
    found = outcome("logs", JSON, body)
    assert isinstance(found, Problem)
    assert found.kind.status == 400
    assert process_time() - begun < 2


def test_many_json_records_are_taken() -> None:
    outer, inner, items = NAMES["logs"]
    record = '{"body":{"stringValue":"x"},"attributes":[{"key":"a","value":{"intValue":"1"}}]}'
    many = ",".join([record] * 60_000)
    body = f'{{"{outer}":[{{"{inner}":[{{"{items}":[{many}]}}]}}]}}'.encode()
    assert body.count(b",") > 200_000 - 1 - 60_000
    parsed = decode("logs", JSON, body)
    assert parsed is not None
    assert parsed.records.count == 60_000


def test_a_resource_in_many_records_is_bounded() -> None:
    request = logs(*("x" * 1000), attributes={"large": "y" * 50_000})
    with pytest.raises(Problem, match="decompressed_bytes_max") as found:
        decode("logs", PROTOBUF, request.SerializeToString(), LIMITS)
    assert found.value.kind.status == 413


# -- the protocol ----------------------------------------------------------------------------------


async def export(
    source: HttpSource, signal: str, request: Message | bytes, kind: bytes, **headers: str
) -> Reply:
    body = request if isinstance(request, bytes) else encoded(request, kind)
    reply = await ask(
        source, body, f"/v1/{signal}", Content_Type=f"{kind.decode()}; charset=utf-8", **headers
    )
    assert reply.headers["content-type"] == kind.decode()
    return reply


def partial(signal: str, reply: Reply) -> tuple[int, str]:
    """Rejected records and the message of an answer."""
    assert reply.status == 200
    if reply.headers["content-type"] == JSON.decode():
        if reply.body == b"{}":
            return 0, ""
        found = reply.json["partialSuccess"]
        (count,) = (value for name, value in found.items() if name.startswith("rejected"))
        assert isinstance(count, str)
        return int(count), found["errorMessage"]
    answer = RESPONSES[signal]()
    answer.ParseFromString(reply.body)
    found = answer.partial_success
    count = next((value for one, value in found.ListFields() if one.name.startswith("rej")), 0)
    return count, found.error_message


def status(reply: Reply) -> tuple[int, str]:
    """`google.rpc.Status`: code and message."""
    if reply.headers["content-type"] == JSON.decode():
        assert set(reply.json) == {"code", "message"}
        return reply.json["code"], reply.json["message"]
    assert (reply.body[0], reply.body[2]) == (0x08, 0x12)
    size = reply.body[3] if reply.body[3] < 128 else reply.body[3] & 127 | reply.body[4] << 7
    text = reply.body[-size:]
    assert len(reply.body) - len(text) in {4, 5}
    return reply.body[1], text.decode()


@pytest.mark.parametrize("kind", KINDS)
async def test_each_signal_has_its_path_and_may_have_its_pipeline(kind: bytes) -> None:
    intakes = KeyIntake(), KeyIntake("spans"), KeyIntake("points")
    own = {"traces": "spans", "metrics": "points"}
    traces, metrics = REQUESTS["traces"](), REQUESTS["metrics"]()
    traces.resource_spans.add().scope_spans.add().spans.add(name="GET", span_id=b"\2" * 8)
    metric = metrics.resource_metrics.add().scope_metrics.add().metrics.add(name="temperature")
    metric.gauge.data_points.add(as_double=21.5)
    async with serving_endpoint("otlp", *intakes, own=own) as source:
        for signal, request in (("logs", logs("a")), ("traces", traces), ("metrics", metrics)):
            assert partial(signal, await export(source, signal, request, kind)) == (0, "")
    context = {"resource": {"attributes": {}}, "scope": {}, "attributes": {}}
    assert [loads(b"\n".join(one.items)) for one in intakes] == [
        [{"signal": "logs", **context, "body": "a"}],
        [{"signal": "traces", **context, "name": "GET", "spanId": "02" * 8}],
        [
            {
                "signal": "metrics", **context, "metric": {"type": "gauge", "name": "temperature"},
                "value": 21.5,
            }
        ],
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
async def test_invalid_records_beside_good_ones_are_a_partial_success(kind: bytes) -> None:
    intake = KeyIntake()
    async with serving_endpoint("otlp", intake) as source:
        reply = await export(source, "logs", bad_ids(16, 5, 6), kind)
        message = "record 1: traceId: an id has 5 bytes, not 16 (and 1 more)"
        assert partial("logs", reply) == (2, message)
        assert len(intake.items) == 1
        assert [one.index for one in intake.refused] == [1, 2]
        reply = await export(source, "logs", bad_ids(16, *[5] * 300), kind)
        assert partial("logs", reply)[0] == 300
        reply = await export(source, "logs", bad_ids(5), kind)
        assert (reply.status, status(reply)[0]) == (400, 3)
        assert "traceId" in status(reply)[1]


@pytest.mark.parametrize("kind", KINDS)
async def test_requests_without_records_succeed(kind: bytes) -> None:
    intake = KeyIntake()
    empty = b"" if kind == PROTOBUF else b"{}"
    async with serving_endpoint("otlp", intake) as source:
        for request in (empty, logs(), REQUESTS["logs"]()):
            assert partial("logs", await export(source, "logs", request, kind)) == (0, "")
    assert not intake.items


@pytest.mark.parametrize("kind", KINDS)
async def test_bad_bodies_are_told_as_a_status(kind: bytes) -> None:
    body = encoded(logs("a" * 200, "b"), kind)
    async with serving_endpoint("otlp", KeyIntake()) as source:
        for bad, headers in (
            (body[:-1], {}),
            (body[: len(body) // 2], {}),
            (b"\xff" * 20, {}),
            (gzip.compress(body)[:-4], {"Content_Encoding": "gzip"}),
        ):
            reply = await export(source, "logs", bad, kind, **headers)
            assert (reply.status, status(reply)[0]) == (400, 3)
            assert status(reply)[1]
        reply = await export(source, "logs", body, kind, Content_Encoding="lz4")
        assert (reply.status, status(reply)[0]) == (415, 3)


async def test_compressed_bodies_are_read() -> None:
    intake = KeyIntake()
    body = logs("a").SerializeToString()
    async with serving_endpoint("otlp", intake) as source:
        for name, packed in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body))):
            reply = await export(source, "logs", packed, PROTOBUF, Content_Encoding=name)
            assert partial("logs", reply) == (0, "")
    assert len(intake.items) == 2


async def test_another_content_type_is_told_in_json() -> None:
    async with serving_endpoint("otlp", KeyIntake()) as source:
        for headers in ({"Content_Type": "text/plain"}, {}):
            reply = await ask(source, b"x", "/v1/logs", **headers)
            assert (reply.status, reply.headers["accept"]) == (
                415, "application/x-protobuf, application/json",
            )  # fmt: skip
            assert status(reply)[0] == 3


@pytest.mark.parametrize("kind", KINDS)
async def test_what_may_succeed_later_is_503_with_the_time_to_wait(kind: bytes) -> None:
    intake = KeyIntake()
    async with serving_endpoint("otlp", intake) as source:
        for error, code in (
            (Overloaded(what="the journal", retry_after=7), 14),
            (Draining(), 14),
            (KeyInFlight(), 10),
        ):
            intake.errors.append(error)
            reply = await export(source, "logs", logs("a"), kind)
            assert (reply.status, status(reply)[0]) == (503, code)
            assert int(reply.headers["retry-after"]) >= 1
    assert not intake.items


@pytest.mark.parametrize("kind", KINDS)
async def test_tokens_are_those_of_the_daemon(kind: bytes) -> None:
    tokens = {"shop": {"token": TOKEN, "records_per_second": 1}}
    async with serving_endpoint("otlp", KeyIntake(), tokens=tokens) as source:
        reply = await export(source, "logs", logs("a"), kind)
        assert (reply.status, status(reply)[0]) == (401, 16)
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        reply = await export(source, "logs", logs(*"abcdefgh"), kind, **bearer)
        assert partial("logs", reply) == (0, "")
        reply = await export(source, "logs", logs("a"), kind, **bearer)
        assert (reply.status, status(reply)[0]) == (429, 8)
        assert int(reply.headers["retry-after"]) >= 1


@pytest.mark.parametrize("kind", KINDS)
async def test_a_key_gives_the_first_answer_again(kind: bytes) -> None:
    intake = KeyIntake()
    async with serving_endpoint("otlp", intake) as source:
        for _ in range(2):
            reply = await export(source, "logs", bad_ids(16, 5), kind, Idempotency_Key="k")
            assert partial("logs", reply)[0] == 1
    assert len(intake.items) == 1


async def test_records_count_as_held_when_they_are_larger_than_their_body() -> None:
    intake = KeyIntake()
    request = logs(*("x" * 100), attributes={"large": "y" * 20_000})
    async with serving_endpoint("otlp", intake, inflight_bytes_max=1024**2) as source:
        reply = await export(source, "logs", request, PROTOBUF)
        assert (reply.status, status(reply)[0]) == (413, 8)
        few = logs(*("x" * 10), attributes={"large": "y" * 20_000})
        assert partial("logs", await export(source, "logs", few, PROTOBUF)) == (0, "")


def test_pipelines_of_signals_are_checked() -> None:
    kind = HttpSourceKind()
    own = {"pipeline": "default", "logs": "no", "metrics": "text"}
    table = HttpSourceKind.settings(endpoints={"otlp": own})
    formats = {"default": "json", "text": "text"}
    found = dict(kind.problems(table, formats=formats, default="default", runs=True))
    assert found == {
        "endpoints.otlp.logs": "there is no pipeline 'no'",
        "endpoints.otlp.metrics": "'text' has the format text; records of otlp are json",
    }


# -- the page --------------------------------------------------------------------------------------

TRACE, SPAN = bytes.fromhex("5b8efff798038103d269b633813fc60c"), bytes.fromhex("eee19b7ec3c1b174")
AT = 1760000000000000001


def pair(key: str, **value: Any) -> KeyValue:
    return KeyValue(key=key, value=AnyValue(**value))


def example(signal: str) -> Message:
    """The request whose record the page shows."""
    request: Any = REQUESTS[signal]()
    outer, inner, items = (one.name for one in (
        request.DESCRIPTOR.fields[0], request.DESCRIPTOR.fields[0].message_type.fields[1],
        request.DESCRIPTOR.fields[0].message_type.fields[1].message_type.fields[1],
    ))  # fmt: skip
    resource = getattr(request, outer).add()
    resource.resource.attributes.append(pair("service.name", string_value="shop"))
    scope = getattr(resource, inner).add()
    scope.scope.name = "shop.checkout"
    item = getattr(scope, items).add()
    if signal == "logs":
        resource.resource.attributes.append(pair("host.cpus", int_value=4))
        resource.schema_url = "https://opentelemetry.io/schemas/1.37.0"
        scope.scope.version = "1.2"
        item.time_unix_nano, item.observed_time_unix_nano = AT, AT + 899
        item.severity_number, item.severity_text, item.flags = 9, "INFO", 1
        item.body.string_value, item.trace_id, item.span_id = "order 7 accepted", TRACE, SPAN
        numbers = [AnyValue(int_value=1), AnyValue(int_value=2)]
        cart = [pair("total", double_value=12.5)]
        item.attributes.extend(
            [
                pair("user", string_value="u-17"),
                pair("items", array_value={"values": numbers}),
                pair("cart", kvlist_value={"values": cart}),
            ]
        )
    elif signal == "traces":
        item.trace_id, item.span_id, item.parent_span_id = TRACE, SPAN, SPAN[:-1] + b"\x73"
        item.name, item.kind, item.status.code = "POST /orders", 2, 1
        item.start_time_unix_nano, item.end_time_unix_nano = AT, AT + 2_000_000
        item.attributes.append(pair("http.response.status_code", int_value=201))
        by = [pair("by", string_value="card")]
        item.events.add(time_unix_nano=AT + 1_000_000, name="paid", attributes=by)
        item.links.add(trace_id=TRACE[:-1] + b"\x0d", span_id=SPAN[:-1] + b"\x75")
    else:
        item.name, item.unit = "orders", "1"
        item.sum.aggregation_temporality, item.sum.is_monotonic = 2, True
        region = [pair("region", string_value="eu")]
        times = {"start_time_unix_nano": AT, "time_unix_nano": AT + 60_000_000_000}
        item.sum.data_points.add(**times, as_int=17, attributes=region)
    return request


@pytest.mark.parametrize("signal", SIGNALS)
def test_the_page_shows_records_as_they_are(signal: str) -> None:
    page = (ROOT / "docs" / "clients" / "opentelemetry.md").read_text()
    shown = page.partition(f"<!-- example: {signal} -->\n```json\n")[2].partition("```")[0]
    for kind in KINDS:
        parsed = decode(signal, kind, encoded(example(signal), kind))
        assert parsed is not None
        assert loads(parsed.records.payload) == [json.loads(shown)]
