"""Requests of OTLP for tests: made with opentelemetry-proto, and what is expected of them.

`expected` says it by another way than the code that is tested: protobuf's own JSON.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.json_format import MessageToDict
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
    ExportLogsServiceRequest,
    ExportLogsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

if TYPE_CHECKING:
    from google.protobuf.message import Message

REQUESTS: dict[str, type[Message]] = {
    "logs": ExportLogsServiceRequest,
    "traces": ExportTraceServiceRequest,
    "metrics": ExportMetricsServiceRequest,
}
RESPONSES: dict[str, type[Message]] = {
    "logs": ExportLogsServiceResponse,
    "traces": ExportTraceServiceResponse,
    "metrics": ExportMetricsServiceResponse,
}
NAMES = {
    "logs": ("resourceLogs", "scopeLogs", "logRecords"),
    "traces": ("resourceSpans", "scopeSpans", "spans"),
    "metrics": ("resourceMetrics", "scopeMetrics", "metrics"),
}
IDS = {"traceId": 16, "spanId": 8, "parentSpanId": 8}
WIDE = {FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_FIXED64, FieldDescriptor.TYPE_SFIXED64}
WIDE |= {FieldDescriptor.TYPE_UINT64}


def otlp_json(request: Message) -> Any:
    """A request in OTLP/JSON, decoded: ids are hexadecimal digits, enumerations numbers."""
    return _with_hex_ids(MessageToDict(request, use_integers_for_enums=True))


def _with_hex_ids(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_hex_ids(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        name: base64.b64decode(one).hex() if name in IDS else _with_hex_ids(one)
        for name, one in value.items()
        if not (name in IDS and not one)
    }


def expected(signal: str, request: Message) -> list[dict[str, Any]]:
    """The records of a valid request."""
    outer, inner, items = NAMES[signal]
    found = []
    for resource in otlp_json(request).get(outer, []):
        head = {"attributes": {}, **_plain(resource.get("resource", {}))}
        if "schemaUrl" in resource:
            head["schemaUrl"] = resource["schemaUrl"]
        for scope in resource.get(inner, []):
            context: dict[str, Any] = {"signal": signal, "resource": head}
            context["scope"] = _plain(scope.get("scope", {}))
            if "schemaUrl" in scope:
                context["scope"]["schemaUrl"] = scope["schemaUrl"]
            for item in scope.get(items, []):
                found += _points(context, item) if signal == "metrics" else [_record(context, item)]
    return found


def _record(context: dict[str, Any], item: dict[str, Any], **start: Any) -> dict[str, Any]:
    return {**context, "attributes": {}, **start, **_plain(item)}


STARTS: dict[str, dict[str, Any]] = {
    "gauge": {},
    "sum": {},
    "histogram": {"count": 0},
    "exponentialHistogram": {"count": 0, "scale": 0, "zeroCount": 0},
    "summary": {"count": 0, "sum": 0.0},
}


def _points(context: dict[str, Any], metric: dict[str, Any]) -> list[dict[str, Any]]:
    for name, start in STARTS.items():
        data = metric.pop(name, None)
        if data is not None:
            points = data.pop("dataPoints", [])
            more = {"isMonotonic": False} if name == "sum" else {}
            head = {"type": name, **_plain(metric), **more, **data}
            return [_record({**context, "metric": head}, one, **start) for one in points]
    return []


NUMBERS = {
    *("timeUnixNano", "observedTimeUnixNano", "startTimeUnixNano", "endTimeUnixNano"),
    *("count", "zeroCount"),
}


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """A message: attributes become objects, integers numbers."""
    found: dict[str, Any] = {}
    for name, one in value.items():
        if name in {"attributes", "metadata", "filteredAttributes"}:
            found[name] = _pairs(one)
        elif name == "body":
            found[name] = _any(one)
        elif name in {"asInt", "asDouble"}:
            found["value"] = int(one) if name == "asInt" else one
        elif name in IDS:
            if one.strip("0"):
                found[name] = one
        elif name in NUMBERS:
            found[name] = int(one)
        elif name == "bucketCounts":
            found[name] = [int(each) for each in one]
        elif name == "quantileValues":
            found[name] = [{"quantile": 0.0, "value": 0.0, **each} for each in one]
        elif isinstance(one, dict):
            found[name] = _plain(one)
        elif isinstance(one, list):
            found[name] = [_plain(each) if isinstance(each, dict) else each for each in one]
        else:
            found[name] = one
    return found


def _pairs(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    return {one.get("key", ""): _any(one.get("value", {})) for one in pairs}


def _any(value: dict[str, Any]) -> Any:
    for name, one in value.items():
        if name == "intValue":
            return int(one)
        if name == "arrayValue":
            return [_any(each) for each in one.get("values", [])]
        if name == "kvlistValue":
            return _pairs(one.get("values", []))
        return one
    return None


# -- any request -----------------------------------------------------------------------------------

TEXTS = st.text(max_size=5) | st.sampled_from(["x" * 125, "ä" * 64, "y" * 20_000])
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_STRING: TEXTS,
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=5),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_SFIXED64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_FIXED64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.TYPE_FIXED32: st.integers(0, 2**32 - 1),
    FieldDescriptor.TYPE_SINT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_ENUM: st.integers(-(2**31), 2**31 - 1),
}
PATH = {
    *("resource_logs", "scope_logs", "log_records", "resource_spans", "scope_spans", "spans"),
    *("resource_metrics", "scope_metrics", "metrics", "data_points"),
    *("gauge", "sum", "histogram", "exponential_histogram", "summary"),
}
"""Fields on the way to records: each request has some."""
PROFILES = ("strindex", "key_ref")
"""In names of fields of `KeyValue` and `AnyValue` that only profiles have."""


def fill(draw: Any, message: Message, depth: int = 0) -> Message:
    """Sets some fields of a message."""
    descriptor: Descriptor = message.DESCRIPTOR
    fields = [one for one in descriptor.fields if not any(p in one.name for p in PROFILES)]
    if not fields:
        return message
    chance = st.sampled_from((True, True, False)) if depth < 5 else st.sampled_from((False,))
    if descriptor.name in {"AnyValue", "Metric"}:
        one_of = [one for one in fields if one.containing_oneof is not None]
        fields = [one for one in fields if one not in one_of] + [draw(st.sampled_from(one_of))]
    for field in fields:
        leads = field.name in PATH
        if not leads and field.message_type is not None and not draw(chance):
            continue
        how_many = draw(st.integers(int(leads), 2)) if field.is_repeated else 1
        for _ in range(how_many):
            own = getattr(message, field.name)
            if field.message_type is not None:
                own = own.add() if field.is_repeated else own
                own.SetInParent()
                fill(draw, own, depth + 1)
                continue
            value = draw(_scalar(field))
            if field.is_repeated:
                own.append(value)
            else:
                setattr(message, field.name, value)
    return message


def _scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    size = IDS.get(field.json_name)
    if size is not None and field.type == FieldDescriptor.TYPE_BYTES:
        return st.sampled_from((b"", bytes(size))) | st.binary(min_size=size, max_size=size)
    return SCALARS[field.type]


@st.composite
def requests(draw: Any, signal: str) -> Message:
    """Any valid request of a signal."""
    return fill(draw, REQUESTS[signal]())


def loads(payload: bytes) -> list[Any]:
    """Lines of JSON."""
    return [json.loads(line) for line in payload.splitlines()]
