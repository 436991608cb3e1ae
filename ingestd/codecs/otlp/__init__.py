"""Requests of OTLP, record by record: `Export…ServiceRequest` in protobuf and in OTLP/JSON.

`read_groups` and `parse_groups` go through a body, and give what has one scope (of metrics: one
metric) at a time. What the records of a group have in common, their context, is encoded once. The
records are left as they came: each is read by itself, so that its faults are its own.

Bounds, because a body may consist of objects of two or three bytes: `FieldBudget`, and for JSON
`_holds_more`, end one that has far more fields around its records than these need. A part of the
context that is larger than a record may be is not read at all.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ingestd.base.bursts import let_loop_go_first
from ingestd.codecs.json import without_lone_surrogates
from ingestd.codecs.otlp.logs import LogItems
from ingestd.codecs.otlp.messages import MESSAGES, parse_text
from ingestd.codecs.protobuf import (
    FAULTS,
    FieldBudget,
    TooManyFields,
    WireFault,
    fault_of,
    spans,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    Span = tuple[bytes, int, int]  # a body, and the places where a message in it begins and ends


class Signal(NamedTuple):
    """One of logs, traces and metrics.

    Attributes:
        name: of it; each record has it.
        item: the message of a record; `Metric` for metrics.
        rejected: the field of an answer that counts invalid records.
        names: the fields of OTLP/JSON around a record, from the outside.
    """

    name: str
    item: str
    rejected: str
    names: tuple[str, str, str]


SIGNALS = {
    one.name: one
    for one in (
        Signal(
            "logs", "LogRecord", "rejectedLogRecords", ("resourceLogs", "scopeLogs", "logRecords")
        ),
        Signal("traces", "Span", "rejectedSpans", ("resourceSpans", "scopeSpans", "spans")),
        Signal(
            "metrics", "Metric", "rejectedDataPoints",
            ("resourceMetrics", "scopeMetrics", "metrics"),
        ),
    )
}  # fmt: skip
_POINTS = {
    5: ("gauge", "NumberPoint"),
    7: ("sum", "NumberPoint"),
    9: ("histogram", "HistogramPoint"),
    10: ("exponentialHistogram", "ExponentialPoint"),
    11: ("summary", "SummaryPoint"),
}
"""The data of a metric: number, name, message of a data point."""
_ALWAYS: dict[str, dict[str, Any]] = {"sum": {"isMonotonic": False}}
_FIELDS_A_RECORD, _FIELDS_A_HEAD, _FIELDS_MORE = 30, 10, 1000
"""Fields around a record, with a resource and a scope of its own; what reading one of these costs,
in fields; and so many more in a body."""
_ENCODER = msgspec.json.Encoder()


class Group(NamedTuple):
    """Records in one context.

    Attributes:
        items: each as it came.
        read: makes a record of one, in a copy of the context.
        context: what all have, encoded.
        fault: the reason why all are invalid; empty if they are not.
    """

    items: Iterable[bytes]
    read: Callable[[bytes, Mapping[str, Any]], dict[str, Any]]
    context: Mapping[str, Any]
    fault: str = ""

    @property
    def runs(self) -> LogItems | None:
        """The items, if many of them may be read together."""
        return self.items if isinstance(self.items, LogItems) else None

    def of(self, message: str, items: Iterable[bytes], *, json: bool = False) -> Group:
        """The same with records."""
        one = MESSAGES[message]
        read = one.parse_from if json else one.read_from
        return Group(items, read, {**self.context, **one.start}, self.fault)

    def within(
        self, name: str, size: int, size_max: int, make: Callable[[], Mapping[str, Any]]
    ) -> Group:
        """The same with one part more in its context.

        Args:
            name: of the part.
            size: bytes that it takes as it came.
            size_max: a record with a larger part would be too large.
            make: the part; raises one of `FAULTS`.
        """
        try:
            if size > size_max:
                fault = f"{name}: {size} bytes, more than record_bytes_max = {size_max}"
            else:
                part = msgspec.Raw(_ENCODER.encode(make()))
                return self._replace(context={**self.context, name: part})
        except FAULTS as error:
            fault = f"{name}: {fault_of(error)}"
        return self._replace(fault=self.fault or fault)


# -- protobuf --------------------------------------------------------------------------------------


def read_groups(signal: Signal, body: bytes, record_bytes_max: int, most: int) -> Iterator[Group]:
    """Goes through a request in protobuf.

    Args:
        signal: whose request it is.
        body: the message.
        record_bytes_max: bytes of a part of the context.
        most: records in a body.

    Raises:
        WireFault: it is none, as far as what is around records is concerned.
        TooManyFields: it has more fields than that many records need.
    """
    budget = FieldBudget(_FIELDS_A_RECORD * most + _FIELDS_MORE)
    bounds = _Bounds(record_bytes_max, most, budget)
    start = Group((), MESSAGES[signal.item].read_from, {"signal": signal.name})
    for owner in _parts((body, 0, len(body)), 1, budget):
        resource, inner = _head(start, "resource", owner, bounds)
        if not inner:
            yield resource
        for span in inner:
            scope, items = _head(resource, "scope", span, bounds)
            if signal.item != "Metric":
                if signal.item == "LogRecord":
                    yield scope.of(signal.item, LogItems(body, items))
                else:
                    yield scope.of(signal.item, (body[at:end] for _, at, end in items))
                continue
            for item in items:
                yield _read_metric(scope, item, bounds)


class _Bounds(NamedTuple):
    """Bounds of one body: see `read_groups`."""

    size_max: int
    most: int
    budget: FieldBudget


def _parts(span: Span, number: int, budget: FieldBudget) -> Iterator[Span]:
    """The messages of one field."""
    return ((span[0], at, end) for one, at, end in spans(*span, budget) if one == number)


def _head(group: Group, name: str, span: Span, bounds: _Bounds) -> tuple[Group, list[Span]]:
    """A group in the resource or scope of a span, and what belongs to that."""
    data, size, schema = span[0], 0, b""
    found: list[bytes] = []
    inner: list[Span] = []
    bounds.budget.spend(_FIELDS_A_HEAD)
    for number, at, end in spans(*span, bounds.budget):
        if number == 2:
            if len(inner) >= bounds.most:
                raise TooManyFields
            inner.append((data, at, end))
            continue
        size += end - at
        if number == 1:
            found.append(data[at:end])
        elif number == 3:
            schema = data[at:end]

    if not inner:
        return group, inner  # there are no records that it could be told in

    def make() -> dict[str, Any]:
        part = MESSAGES[name].read(b"".join(found))
        return {**part, "schemaUrl": schema.decode()} if schema else part

    return group.within(name, size, bounds.size_max, make), inner


def _read_metric(scope: Group, span: Span, bounds: _Bounds) -> Group:
    data = span[0]
    size, kind, points = 0, 0, (data, 0, 0)
    parts: list[Span] = []  # of data in pieces, which a message may be: their points are its own
    try:
        for number, at, end in spans(*span, bounds.budget):
            if number in _POINTS:
                if number == kind:
                    parts = parts or [points]
                    parts.append((data, at, end))
                else:
                    kind, points, parts = number, (data, at, end), []
            else:
                size += end - at
        if parts:
            whole = b"".join([data[at:end] for _, at, end in parts])
            points = whole, 0, len(whole)
        fields = sum(
            1 for _ in spans(*points, bounds.budget)
        )  # few enough, so that it is read quickly
    except WireFault as error:
        return scope._replace(
            items=[data[span[1] : span[2]]], fault=scope.fault or f"metric: {error}"
        )
    if not fields:
        return scope
    name, message = _POINTS[kind]

    def make() -> dict[str, Any]:
        more = MESSAGES["Data"].read(points[0][points[1] : points[2]])
        metric = MESSAGES["Metric"].read(data[span[1] : span[2]])
        return {"type": name, **metric, **_ALWAYS.get(name, {}), **more}

    items = (of[at:end] for of, at, end in _parts(points, 1, bounds.budget))
    return scope.within("metric", size, bounds.size_max, make).of(message, items)


# -- OTLP/JSON -------------------------------------------------------------------------------------

_NULL = msgspec.Raw(b"null")


def _struct(*fields: tuple[str, Any], **rename: str) -> Any:
    """Objects with these fields, each of which may be missing or null."""
    return msgspec.defstruct(
        "Json",
        [(n, t, _NULL) if t is msgspec.Raw else (n, t | None, None) for n, t in fields],
        rename=rename,
    )


def _decoder(names: tuple[str, str, str]) -> msgspec.json.Decoder[Any]:
    """Reads requests, and leaves records and what is in their context as they came."""
    schema = ("schemaUrl", msgspec.Raw)
    raw = list[msgspec.Raw]
    scope = _struct(("head", msgspec.Raw), schema, ("items", raw), head="scope", items=names[2])
    resource = _struct(
        ("head", msgspec.Raw),
        schema,
        ("items", list[scope]),  # type: ignore[valid-type]
        head="resource",
        items=names[1],
    )
    return msgspec.json.Decoder(
        _struct(("items", list[resource]), items=names[0])  # type: ignore[valid-type]
    )


_DECODERS = {name: _decoder(signal.names) for name, signal in SIGNALS.items()}
_METRIC_FIELDS = ("name", "description", "unit", "metadata")
_DATA_FIELDS = ("aggregationTemporality", "isMonotonic")
_POINTS_OF = _struct(
    ("dataPoints", list[msgspec.Raw]), *((name, msgspec.Raw) for name in _DATA_FIELDS)
)
_METRIC = msgspec.json.Decoder(
    _struct(
        *((name, msgspec.Raw) for name in _METRIC_FIELDS),
        *((name, _POINTS_OF) for name, _ in _POINTS.values()),
    )
)


def parse_groups(signal: Signal, body: bytes, record_bytes_max: int, most: int) -> Iterator[Group]:
    """Goes through a request in OTLP/JSON; see `read_groups`.

    Raises:
        ValueError, RecursionError: it is none, as far as what is around records is concerned.
        TooManyFields: it has more elements than that many records need.
    """
    if body.count(b",") >= _ELEMENTS_SURE:
        depth = _POINTS_DEPTH if signal.item == "Metric" else _ITEMS_DEPTH
        if _holds_more(body, _ELEMENTS_A_RECORD * most + _FIELDS_MORE, depth):
            raise TooManyFields
    start = Group((), MESSAGES[signal.item].parse_from, {"signal": signal.name})
    decode = _DECODERS[signal.name].decode
    try:
        request = decode(body)
    except msgspec.DecodeError:
        mended = without_lone_surrogates(body)  # exporters of protobuf write the same instead
        if mended == body:
            raise
        request = decode(mended)
    for owner in request.items or ():
        resource = _parse_head(start, "resource", owner, record_bytes_max)
        for inner in owner.items or ():
            scope = _parse_head(resource, "scope", inner, record_bytes_max)
            if signal.item != "Metric":
                yield scope.of(signal.item, inner.items or (), json=True)
                continue
            for item in inner.items or ():
                yield _parse_metric(scope, item, record_bytes_max)


def _parse_head(group: Group, name: str, owner: Any, size_max: int) -> Group:
    def make() -> dict[str, Any]:
        part = MESSAGES[name].parse(msgspec.json.decode(owner.head) or {})
        schema = msgspec.json.decode(owner.schemaUrl)
        return {**part, "schemaUrl": parse_text(schema)} if schema else part

    return group.within(name, len(owner.head) + len(owner.schemaUrl), size_max, make)


def _parse_metric(scope: Group, text: bytes, size_max: int) -> Group:
    try:
        metric = _METRIC.decode(text)
    except FAULTS as error:
        return scope._replace(items=[text], fault=scope.fault or f"metric: {fault_of(error)}")
    found = ((*one, getattr(metric, one[0])) for one in _POINTS.values())
    name, message, data = next((one for one in found if one[2] is not None), ("", "", None))
    if data is None or not data.dataPoints:
        return scope
    head, more = _as_object(metric, _METRIC_FIELDS), _as_object(data, _DATA_FIELDS)

    def make() -> dict[str, Any]:
        part = MESSAGES["Metric"].parse_from(head, {})
        return {
            "type": name,
            **part,
            **_ALWAYS.get(name, {}),
            **MESSAGES["Data"].parse_from(more, {}),
        }

    group = scope.within("metric", len(head) + len(more), size_max, make)
    return group.of(message, data.dataPoints, json=True)


def _as_object(owner: Any, names: tuple[str, ...]) -> bytes:
    return b"{%b}" % b",".join([b'"%b":%b' % (n.encode(), getattr(owner, n)) for n in names])


_ELEMENTS_SURE = 200_000
_ELEMENTS_A_RECORD = 8
_ITEMS_DEPTH, _POINTS_DEPTH = 6, 9
"""How deep the arrays of log records and spans, and those of data points, are."""
# A string without an end goes to that of the body: else each quote in it would be tried as one.
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)
_TOKENS_TOGETHER = 4096


def _holds_more(body: bytes, number: int, depth_max: int) -> bool:
    """Tells if a body has more commas down to a depth than that, without reading it.

    As a list, `[{},{},…]` takes 20 times its size.
    """
    depth = commas = 0
    for count, token in enumerate(_TOKENS.finditer(body)):
        if not count % _TOKENS_TOGETHER:
            let_loop_go_first()
        byte = body[token.start()]
        if byte in b"[{":
            depth += 1
        elif byte in b"]}":
            depth -= 1
        elif byte == 44 and depth <= depth_max:
            commas += 1
            if commas > number:
                return True
    return False
