"""Messages of OTLP as plain JSON, from protobuf and from OTLP/JSON, by one schema.

https://github.com/open-telemetry/opentelemetry-proto
https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding

A message is a dict of its fields by their names in OTLP/JSON. Attributes are one object, `AnyValue`
is the value itself, bytes are base64, ids are hexadecimal digits, integers of 64 bits are numbers,
and what is unset, or an id of zeros, is left out.
"""

from __future__ import annotations

import base64
import re
import threading
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ingestd.codecs import protobuf as wire
from ingestd.codecs.protobuf import FIXED32, FIXED64, LENGTH, VARINT, WireTable, fault_of, tag_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# -- values ----------------------------------------------------------------------------------------


class FieldKind(NamedTuple):
    """The type of a field.

    Attributes:
        wire: its wire type.
        read: see `WireTable`.
        parse: makes the value of a JSON value.
        packed: `read` of its packed form, which makes a list.
    """

    wire: int
    read: Callable[..., Any]
    parse: Callable[[Any], Any]
    packed: Callable[[bytes], list[Any]] | None = None


_DIGITS = re.compile(r"-?[0-9]{1,20}", re.ASCII)
_HEX = re.compile(r"(?:[0-9A-Fa-f]{2})*", re.ASCII)
_UNREAL = ("NaN", "Infinity", "-Infinity")
_TEXT_TAG = tag_of(1, LENGTH)
_VALUE_TAG = tag_of(2, LENGTH)
_INT_TAG = tag_of(3, VARINT)
_KNOWN_MAX, _KNOWN_BYTES_MAX = 4096, 128
_SMALL_BYTES = 4096
_NESTED_BYTES_MAX, _NESTED_TIMES_MAX = 16 * 1024**2, 16
"""Bytes of values in one another, and so many times the outermost if that is more."""


def parse_text(value: Any) -> str:
    """A string of JSON."""
    if type(value) is not str:
        raise ValueError("should be a string")
    return value


def _parse_bool(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("should be true or false")
    return value


def _parse_integer(low: int, high: int, value: Any) -> int:
    """Those of 64 bits are strings; either form is read of all."""
    if type(value) is str and _DIGITS.fullmatch(value):
        value = int(value)
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"should be an integer from {low} to {high}")
    return value


def _show_double(value: float) -> float | str:
    """A number that JSON cannot write is a string, as in OTLP/JSON."""
    if isfinite(value):
        return value
    return _UNREAL[0] if value != value else _UNREAL[1 if value > 0 else 2]  # noqa: PLR0124


def _parse_double(value: Any) -> float | str:
    if type(value) in {int, float} or (type(value) is str and value in _UNREAL):
        try:
            return _show_double(float(value))
        except OverflowError:
            raise ValueError("should be a number of 64 bits") from None
    raise ValueError("should be a number")


def _show_bytes(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _parse_bytes(value: Any) -> str:
    """Base64 with either alphabet, padded or not, as the padded standard one."""
    text = parse_text(value).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return _show_bytes(base64.b64decode(text + "=" * (-len(text) % 4), validate=True))
    except ValueError:
        raise ValueError("should be base64") from None


def _id_kind(size: int) -> FieldKind:
    """Ids of so many bytes; one of zeros is none."""
    zeros = bytes(size)

    def read(value: bytes) -> Any:
        if len(value) == size and value != zeros:
            return value.hex()
        if len(value) not in {0, size}:
            raise ValueError(f"an id has {len(value)} bytes, not {size}")
        return wire.UNSET

    def parse(value: Any) -> Any:
        if not _HEX.fullmatch(parse_text(value)):
            raise ValueError("an id should be hexadecimal digits")
        return read(bytes.fromhex(value))

    return FieldKind(LENGTH, read, parse)


def _read_any(value: bytes) -> Any:
    size = len(value)
    if size > 2 and value[0] == _TEXT_TAG:  # a text, as nearly all are
        length, at = value[1], 2
        if length > 127:
            length, at = wire.varint(value, 1)
        if length == size - at:
            return value[at:].decode()
    elif size > 1 and value[0] == _INT_TAG:
        number, end = wire.varint(value, 1)
        if end == size:
            return wire.signed(number)
    if size > _SMALL_BYTES:
        return _read_large(value)
    return MESSAGES["AnyValue"].read(value).get("value")


class _Nested(threading.local):
    """The large values that one thread is in.

    Attributes:
        held: bytes of them: each is there as long as those in it are read.
        most: bound of that.
    """

    held = most = 0


_nested = _Nested()


def _read_large(value: bytes) -> Any:
    """Reads a value that has a copy in each level around it.

    Raises:
        RecursionError: it is nested too deeply for its size.
    """
    if not _nested.held:
        _nested.most = max(_NESTED_BYTES_MAX, _NESTED_TIMES_MAX * len(value))
    if _nested.held + len(value) > _nested.most:
        raise RecursionError
    _nested.held += len(value)
    try:
        return MESSAGES["AnyValue"].read(value).get("value")
    finally:
        _nested.held -= len(value)


def _parse_any(value: Any) -> Any:
    return MESSAGES["AnyValue"].parse(value).get("value")


def _read_pair(value: bytes) -> tuple[str, Any]:
    found = MESSAGES["KeyValue"].read(value)
    return found.get("key", ""), found.get("value")


def _parse_pairs(value: Any) -> dict[str, Any]:
    found = [MESSAGES["KeyValue"].parse(one) for one in _elements(value)]
    return {one.get("key", ""): one.get("value") for one in found}


def _elements(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError("should be an array")
    return value


class _KnownPairs(dict[bytes, tuple[str, Any]]):
    """Attributes of before, by their bytes: most come again with each record.

    Records share their values, and nothing changes these.
    """

    def __missing__(self, value: bytes) -> tuple[str, Any]:
        size = len(value)
        if size > _KNOWN_BYTES_MAX:
            return _read_pair(value)
        # As most are: a short name, and a text or an integer behind it. All of it in this one call.
        pair: tuple[str, Any] | None = None
        at = value[1] + 4 if size > 4 and value[0] == _TEXT_TAG else size
        if at < size and value[at - 2] == _VALUE_TAG and value[at - 1] == size - at > 1:
            kind = value[at]
            if kind == _TEXT_TAG and value[at + 1] == size - at - 2:
                pair = value[2 : at - 2].decode(), value[at + 2 :].decode()
            elif kind == _INT_TAG:
                number, end = wire.varint(value, at + 1)
                if end == size:
                    pair = value[2 : at - 2].decode(), wire.signed(number)
        if pair is None:
            pair = _read_pair(value)
        if len(self) >= _KNOWN_MAX:
            self.clear()
        self[value] = pair
        return pair


known_pair = _KnownPairs().__getitem__
"""Key and value of an attribute in protobuf."""
_INT32 = FieldKind(VARINT, wire.signed_low32, partial(_parse_integer, -(2**31), 2**31 - 1))
_UINT32 = FieldKind(VARINT, wire.low32, partial(_parse_integer, 0, 2**32 - 1))
_INT64 = FieldKind(VARINT, wire.signed, partial(_parse_integer, -(2**63), 2**63 - 1))
_UINT64 = FieldKind(VARINT, int, partial(_parse_integer, 0, 2**64 - 1), wire.varints)
_KINDS = {
    "string": FieldKind(LENGTH, bytes.decode, parse_text),
    "bytes": FieldKind(LENGTH, _show_bytes, _parse_bytes),
    "bool": FieldKind(VARINT, bool, _parse_bool),
    "int32": _INT32,
    "sint32": _INT32._replace(read=wire.zigzag),
    "uint32": _UINT32,
    "fixed32": _UINT32._replace(wire=FIXED32, read=wire.unsigned32),
    "int64": _INT64,
    "uint64": _UINT64,
    "sfixed64": _INT64._replace(wire=FIXED64, read=wire.signed64),
    "fixed64": _UINT64._replace(
        wire=FIXED64, read=wire.unsigned64, packed=partial(wire.unpack_all, "<Q")
    ),
    "double": FieldKind(
        FIXED64,
        lambda data, at: (_show_double(*wire.double(data, at)),),
        _parse_double,
        lambda data: [_show_double(one) for one in wire.unpack_all("<d", data)],
    ),
    "trace_id": _id_kind(16),
    "span_id": _id_kind(8),
    "any": FieldKind(LENGTH, _read_any, _parse_any),
    "array": FieldKind(
        LENGTH,
        lambda data: MESSAGES["ArrayValue"].read(data).get("values", []),
        lambda value: MESSAGES["ArrayValue"].parse(value).get("values", []),
    ),
    "map": FieldKind(
        LENGTH,
        lambda data: MESSAGES["KeyValueList"].read(data)["values"],
        lambda value: MESSAGES["KeyValueList"].parse(value)["values"],
    ),
    "pairs": FieldKind(LENGTH, known_pair, _parse_pairs),
}

# -- messages --------------------------------------------------------------------------------------

_SCHEMA = """
AnyValue        1 stringValue=value string!  2 boolValue=value bool!  3 intValue=value int64!
                4 doubleValue=value double!  5 arrayValue=value array!  6 kvlistValue=value map!
                7 bytesValue=value bytes!
ArrayValue      1 values any[]
KeyValueList    1 values pairs+
KeyValue        1 key string  2 value any!
EntityRef       1 schemaUrl string  2 type string  3 idKeys string[]  4 descriptionKeys string[]
resource        1 attributes pairs+  2 droppedAttributesCount uint32  3 entityRefs EntityRef[]
scope           1 name string  2 version string  3 attributes pairs
                4 droppedAttributesCount uint32
LogRecord       1 timeUnixNano fixed64  2 severityNumber int32  3 severityText string  5 body any!
                6 attributes pairs+  7 droppedAttributesCount uint32  8 flags fixed32
                9 traceId trace_id  10 spanId span_id  11 observedTimeUnixNano fixed64
                12 eventName string
Event           1 timeUnixNano fixed64  2 name string  3 attributes pairs
                4 droppedAttributesCount uint32
Link            1 traceId trace_id  2 spanId span_id  3 traceState string  4 attributes pairs
                5 droppedAttributesCount uint32  6 flags fixed32
Status          2 message string  3 code int32
Span            1 traceId trace_id  2 spanId span_id  3 traceState string  4 parentSpanId span_id
                5 name string  6 kind int32  7 startTimeUnixNano fixed64
                8 endTimeUnixNano fixed64  9 attributes pairs+  10 droppedAttributesCount uint32
                11 events Event[]  12 droppedEventsCount uint32  13 links Link[]
                14 droppedLinksCount uint32  15 status Status!  16 flags fixed32
Exemplar        2 timeUnixNano fixed64  3 asDouble=value double!  4 spanId span_id
                5 traceId trace_id  6 asInt=value sfixed64!  7 filteredAttributes pairs
NumberPoint     2 startTimeUnixNano fixed64  3 timeUnixNano fixed64  4 asDouble=value double!
                5 exemplars Exemplar[]  6 asInt=value sfixed64!  7 attributes pairs+
                8 flags uint32
HistogramPoint  2 startTimeUnixNano fixed64  3 timeUnixNano fixed64  4 count fixed64+
                5 sum double!  6 bucketCounts fixed64[]  7 explicitBounds double[]
                8 exemplars Exemplar[]  9 attributes pairs+  10 flags uint32  11 min double!
                12 max double!
Buckets         1 offset sint32  2 bucketCounts uint64[]
ExponentialPoint 1 attributes pairs+  2 startTimeUnixNano fixed64  3 timeUnixNano fixed64
                4 count fixed64+  5 sum double!  6 scale sint32+  7 zeroCount fixed64+
                8 positive Buckets!  9 negative Buckets!  10 flags uint32
                11 exemplars Exemplar[]  12 min double!  13 max double!  14 zeroThreshold double!
Quantile        1 quantile double+  2 value double+
SummaryPoint    2 startTimeUnixNano fixed64  3 timeUnixNano fixed64  4 count fixed64+
                5 sum double+  6 quantileValues Quantile[]  7 attributes pairs+  8 flags uint32
Metric          1 name string  2 description string  3 unit string  12 metadata pairs
Data            2 aggregationTemporality int32  3 isMonotonic bool
"""
"""A message and its fields: number, name (`=` the name in records), type; `[]` is repeated. `!` is
told if it is zero, too, because that is not the same as unset. `+` is there even if it is unset."""
_MESSAGE = re.compile(r"^(\w+)((?:\s+\d+ \S+ \S+)+)$", re.MULTILINE)
_FIELD = re.compile(r"(\d+) (\w+)(?:=(\w+))? (\w+)(\[\])?([!+]?)")
_EMPTY: dict[str, Any] = {"pairs": {}, "double": 0.0}


class _Member(NamedTuple):
    """One field in OTLP/JSON; see `_SCHEMA`."""

    name: str
    parse: Callable[[Any], Any]
    many: bool
    shown: bool


class OtlpMessage:
    """One message, in both encodings.

    Args:
        fields: of `_SCHEMA`, as a text.

    Attributes:
        start: what a message has that is empty.
        read_from: reads protobuf into a copy of a dict, both its arguments.
        kind: of fields that are this message.
    """

    def __init__(self, fields: str) -> None:
        self.start: dict[str, Any] = {}
        self._members: dict[str, _Member] = {}
        single: dict[int, Any] = {}
        repeated: dict[int, Any] = {}
        pairs, pairs_name = 0, ""
        for number, name, other, kind, many, mark in _FIELD.findall(fields):
            called = other or name
            how = _KINDS[kind] if kind in _KINDS else MESSAGES[kind].kind
            self._members[name] = _Member(called, how.parse, bool(many), mark != "")
            if mark == "+":
                self.start[called] = _EMPTY.get(kind, 0)
            if kind == "pairs":
                pairs, pairs_name = int(number), name
                continue
            if not many:
                single[tag_of(int(number), how.wire)] = called, how.read
                continue
            repeated[tag_of(int(number), how.wire)] = called, how.read, False
            if how.packed is not None:
                repeated[tag_of(int(number), LENGTH)] = called, how.packed, True
        table = WireTable(single, repeated, tag_of(pairs, LENGTH), pairs_name, known_pair)
        self.read_from = partial(wire.read, table)
        self.kind: FieldKind = FieldKind(LENGTH, self.read, self.parse)

    def read(self, data: bytes) -> dict[str, Any]:
        """Reads protobuf.

        Raises:
            WireFault, RecursionError: it is not this message.
        """
        return self.read_from(data, self.start)

    def parse_from(self, text: bytes, start: Mapping[str, Any]) -> dict[str, Any]:
        """Reads a JSON text into a copy of `start`.

        Raises:
            ValueError, RecursionError: it is not this message.
        """
        return self._parse(_JSON.decode(text), start)

    def parse(self, value: Any) -> dict[str, Any]:
        """Reads a JSON value; null and unknown fields are ignored.

        Raises:
            ValueError, RecursionError: it is not this message.
        """
        return self._parse(value, self.start)

    def _parse(self, value: Any, start: Mapping[str, Any]) -> dict[str, Any]:
        if type(value) is not dict:
            raise ValueError("should be an object")
        found = dict(start)
        for name, one in value.items():
            member = self._members.get(name)
            if member is None or one is None:
                continue
            try:
                made: Any = (
                    [member.parse(each) for each in _elements(one)]
                    if member.many
                    else member.parse(one)
                )
            except ValueError as error:
                raise ValueError(f"{name}: {fault_of(error)}") from None
            if made is not wire.UNSET and (made or member.shown):
                found[member.name] = made
        return found


_JSON = msgspec.json.Decoder()
MESSAGES: dict[str, OtlpMessage] = {}
for _name, _fields in _MESSAGE.findall(_SCHEMA):
    MESSAGES[_name] = OtlpMessage(_fields)
