"""OTLP over HTTP: logs, traces and metrics of OpenTelemetry's SDKs, collectors and agents.

https://opentelemetry.io/docs/specs/otlp/#otlphttp

A record is a log record, a span, or a data point of a metric, with its resource, scope and metric
in it: one JSON object with the names of OTLP/JSON (`codecs/otlp`).

Protobuf is read by tables of our own and not by the classes of opentelemetry-proto, after measuring
both. Those build all objects of a body before one can be counted (8 MiB of empty log records take
530 MB), they take or leave a body as a whole, and they are hardly faster: each field is a call from
Python all the same (6.9 million instructions for 100 records of 1 KB without any check of ours, 7.5
million by the tables with all of them), while attributes, most of which come again with each
record, are looked up here. Usual log records are read in runs, without a call for a field, which
takes a fifth less (`codecs/otlp/logs`).

Clients drop what is answered with 4xx, and send the same again on 429, 502, 503 and 504 alone. So
an invalid record beside good ones is told in a 200 (`partial_success`), and what may succeed later
is always 429 or 503 with `Retry-After`.
"""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import msgspec
from pydantic import Field

from ingestd.base.bursts import let_loop_go_first
from ingestd.base.record import InvalidRecord, Layout, Records
from ingestd.codecs.json import SMALL, holds_deeper, is_deeper
from ingestd.codecs.lines import KEPT_BYTES, Parsed, too_deep, too_large
from ingestd.codecs.protobuf import FAULTS, TooManyFields, fault_of, pack
from ingestd.http import problem
from ingestd.http.problem import ERRORS_MAX, Problem, retry_after
from ingestd.http.response import JSON, Response
from ingestd.http.routing import path_of
from ingestd.sources.http.decode import nothing_good
from ingestd.sources.http.endpoints.base import (
    BodyCodec,
    Decoded,
    Description,
    Endpoint,
    EndpointSettings,
    RouteSpec,
    Target,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ingestd.base.record import Format
    from ingestd.codecs.otlp import Group, Signal
    from ingestd.codecs.otlp.logs import LogItems
    from ingestd.sources.http.endpoints.base import BodyLimits, EndpointContext, Head
    from ingestd.sources.http.result import IngestResult

PROTOBUF = b"application/x-protobuf"
_TYPES = {one.decode(): one for one in (PROTOBUF, JSON)}
_DETAIL_CHARACTERS_MAX = 1000
_GRPC_CODES = {
    400: 3, 401: 16, 403: 7, 404: 5, 405: 12, 408: 4, 409: 10, 413: 8, 429: 8, 500: 13, 503: 14,
}  # fmt: skip
"""Of `google.rpc.Status`, by HTTP status (https://grpc.io/docs/guides/status-codes/)."""
_LATER = frozenset({408, 409})
"""Statuses of requests that may be sent again, which clients do on 503 only."""


class OtlpSettings(EndpointSettings):
    """`[http.endpoints.otlp]`."""

    logs: str = Field("", description='pipeline of log records; "": that of the endpoint')
    traces: str = Field("", description='pipeline of spans; "": that of the endpoint')
    metrics: str = Field("", description='pipeline of data points; "": that of the endpoint')


class OtlpCodec(BodyCodec):
    """Requests of one signal in one encoding.

    Args:
        signal: the one.
        content_type: `PROTOBUF` or `JSON`.
    """

    def __init__(self, signal: Signal, content_type: bytes) -> None:
        from ingestd.codecs import otlp  # noqa: PLC0415  only if it is in use

        self._signal = signal
        is_json = content_type == JSON
        self._groups = otlp.parse_groups if is_json else otlp.read_groups

    def decode(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded]:
        """See `BodyCodec`."""
        found = _RecordLines(limits)
        try:
            for group in self._groups(
                self._signal, body, limits.record_bytes_max, limits.records_max
            ):
                found.add(group)
        except TooManyFields:
            raise _too_many(limits) from None
        except FAULTS as error:
            raise Problem(problem.MALFORMED, fault_of(error)[:_DETAIL_CHARACTERS_MAX]) from None
        parsed = found.parsed()
        if not parsed.total:
            return ()
        if not parsed.records.count:
            raise nothing_good(parsed.refused, parsed.unlisted)
        return (Decoded(parsed),)

    def decode_quickly(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded] | None:
        """See `BodyCodec`; a large context makes many records of a small body."""
        parts = super().decode_quickly(body, limits)
        if parts and len(parts[0].parsed.records.payload) > _QUICK_RECORDS_BYTES:
            return None
        return parts


_QUICK_RECORDS_BYTES = 64 * 1024
_TOGETHER = 128
_TOGETHER_BYTES = 64 * 1024
_CONTEXT_BYTES = 1024 * 1024
"""Records are encoded and checked together, so many at most: their dicts are there until then. So
much is what they have in common, which is in each of them only then."""
_ENCODER = msgspec.json.Encoder()


class _RecordLines:
    """The records of one body, as lines of JSON.

    Args:
        limits: of the body. `bytes_max` bounds the records: each has its context in it.
    """

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._sink = BytesIO()
        self._good = self._index = self._first = self._unlisted = 0
        self._size = self._common = 0  # of the batch: bytes of its records, and of their contexts
        self._batch: list[dict[str, Any]] = []
        self._refused: list[InvalidRecord] = []

    def add(self, group: Group) -> None:
        """Adds the records of a group.

        Raises:
            Problem: there are too many, or they are too large.
        """
        let_loop_go_first()
        records_max, record_bytes_max = self._limits.records_max, self._limits.record_bytes_max
        batch = self._batch
        common = sum(len(part) for part in group.context.values() if isinstance(part, msgspec.Raw))
        if common > record_bytes_max and not group.fault:
            detail = f"{common} bytes of its context, more than record_bytes_max"
            group = group._replace(fault=f"{detail} = {record_bytes_max}")
        items, runs = iter(group.items), None if group.fault else group.runs
        while True:
            if runs is not None:
                self._read_runs(runs, group.context, common)
            item = next(items, None)
            if item is None:
                return
            if self._index >= records_max:
                raise _too_many(self._limits)
            self._index += 1
            size = len(item)
            if group.fault:
                self._refuse(item, group.fault)
                continue
            if size > record_bytes_max:
                self._refuse(item, "")
                continue
            try:
                batch.append(group.read(item, group.context))
            except FAULTS as error:
                self._refuse(item, fault_of(error))
                continue
            self._size += size
            self._common += common
            self._flush_full()

    def _read_runs(self, items: LogItems, context: Mapping[str, Any], common: int) -> None:
        """Adds log records as long as they have the usual form."""
        limits, batch = self._limits, self._batch
        bytes_max = min(_TOGETHER_BYTES, limits.record_bytes_max)
        while True:
            before = len(batch)
            most = min(_TOGETHER - before, limits.records_max - self._index)
            if common:
                most = min(most, (_CONTEXT_BYTES - self._common) // common + 1)
            self._size += items.read_run(context, batch, most, bytes_max)
            count = len(batch) - before
            if not count:
                return
            self._index += count
            self._common += count * common
            self._flush_full()

    def _flush_full(self) -> None:
        if (
            self._size >= _TOGETHER_BYTES
            or self._common >= _CONTEXT_BYTES
            or len(self._batch) >= _TOGETHER
        ):
            self._flush()

    def parsed(self) -> Parsed:
        """All of them."""
        self._flush()
        records = Records(Layout.LINES, self._good, self._sink.getvalue())
        return Parsed(records, self._refused, self._unlisted)

    def _flush(self) -> None:
        """Encodes what is read, and looks for records that are too large or nested too deeply."""
        limits, payload = self._limits, _ENCODER.encode_lines(self._batch)
        count, lines = len(self._batch), None
        if len(payload) > limits.record_bytes_max or len(payload) < SMALL * count:
            lines = payload.split(b"\n")[:-1]
        # Else there is none that is too large, and only the number of lines is looked at.
        if (lines and max(map(len, lines)) > limits.record_bytes_max) or holds_deeper(
            payload, lines or self._batch, limits.depth_max
        ):
            lines = payload.split(b"\n")[:-1]
            good = [line for at, line in enumerate(lines, self._first) if self._fits(at, line)]
            payload, count = b"".join([line + b"\n" for line in good]), len(good)
        self._sink.write(payload)
        if self._sink.tell() > limits.bytes_max:
            detail = f"its records are more than http.decompressed_bytes_max = {limits.bytes_max}"
            raise Problem(problem.PAYLOAD_TOO_LARGE, f"{detail} with their resources and scopes")
        self._good += count
        self._batch.clear()
        self._size = self._common = 0
        self._first = self._index
        let_loop_go_first()

    def _fits(self, index: int, line: bytes) -> bool:
        if len(line) > self._limits.record_bytes_max:
            self._list(too_large(index, len(line), self._limits.record_bytes_max, line))
        elif is_deeper(line, self._limits.depth_max):
            detail = too_deep(self._limits.depth_max)
            self._list(InvalidRecord(index, "malformed", detail, line[:KEPT_BYTES]))
        else:
            return True
        return False

    def _refuse(self, item: bytes, detail: str) -> None:
        """Lists the record that was read last; without a detail it is too large."""
        index, size = self._index - 1, len(item)
        self._index = index
        self._flush()
        self._index = self._first = index + 1
        kept = bytes(memoryview(item)[:KEPT_BYTES])
        if detail:
            self._list(InvalidRecord(index, "malformed", detail[:_DETAIL_CHARACTERS_MAX], kept))
        else:
            self._list(too_large(index, size, self._limits.record_bytes_max, kept))

    def _list(self, one: InvalidRecord) -> None:
        if len(self._refused) < ERRORS_MAX:
            self._refused.append(one)
        else:
            self._unlisted += 1


def _too_many(limits: BodyLimits) -> Problem:
    return Problem(problem.TOO_MANY_RECORDS, f"more than http.records_max = {limits.records_max}")


class OtlpEndpoint(Endpoint):
    """`POST /v1/logs`, `/v1/traces` and `/v1/metrics`.

    Args:
        context: has its settings.
    """

    settings = OtlpSettings
    formats = ("json",)
    is_pure = True

    def __init__(self, context: EndpointContext) -> None:
        from ingestd.codecs.otlp import SIGNALS  # noqa: PLC0415

        self._signals = {f"/v1/{name}": signal for name, signal in SIGNALS.items()}
        self._codecs = {
            (path, kind): OtlpCodec(signal, kind)
            for path, signal in self._signals.items()
            for kind in _TYPES.values()
        }
        self.routes = [
            RouteSpec(path, {"": Target(getattr(context.own, signal.name) or context.default)})
            for path, signal in self._signals.items()
        ]

    @classmethod
    def check(cls, own: OtlpSettings, formats: Mapping[str, Format]) -> Iterable[tuple[str, str]]:
        """See `Endpoint`."""
        for key in ("logs", "traces", "metrics"):
            to = getattr(own, key)
            if to and to not in formats:
                yield key, f"there is no pipeline {to!r}"
            elif to and formats[to] != "json":
                yield key, f"{to!r} has the format {formats[to]}; records of otlp are json"

    def open(self, head: Head) -> BodyCodec:
        """See `Endpoint`."""
        kind = _type_of(head)
        if kind:
            return self._codecs[path_of(head.target, head.method), kind]
        takes = ", ".join(_TYPES)
        detail = f"{head.headers.get('Content-Type', '')[:80]!r}; one of {takes} is read"
        raise Problem(problem.MEDIA_TYPE, detail, headers={"Accept": takes})

    def answer(self, result: IngestResult, head: Head) -> Response:
        """See `Endpoint`."""
        kind = _type_of(head)
        if result.stored is not None:
            return Response(200, kind, result.stored)
        rejected, message = result.invalid, ""
        if rejected:
            unlisted = rejected - len(result.errors)
            message = nothing_good(list(result.errors), unlisted).detail
        if result.waiter is not None and result.waiter.dead:
            rejected += result.waiter.dead
            message += f"{'; ' if message else ''}{result.waiter.dead} were given up when processed"
        name = self._signals[path_of(head.target, head.method)].rejected
        return Response(200, kind, _partial_success(kind, name, rejected, message))

    def error(self, problem: Problem, head: Head) -> Response:
        """See `Endpoint`; JSON for a client that shows no type that is known."""
        kind, status = _type_of(head) or JSON, problem.kind.status
        code, message = _GRPC_CODES.get(status, _GRPC_CODES[400]), problem.detail.encode()
        headers = problem.headers
        if status in _LATER:
            status, headers = 503, {**retry_after(1.0), **headers}
        if kind == JSON:
            body = msgspec.json.encode({"code": code, "message": problem.detail})
        else:
            body = pack(1, code) + pack(2, message)
        return Response(status, kind, body, headers)

    def describe(self, route: RouteSpec, target: str, form: Format | None) -> Description:  # noqa: ARG002
        """See `Endpoint`."""
        signal = self._signals[route.path]
        return Description(f"{', '.join(_TYPES)} (OTLP)", _operation(signal))


def _type_of(head: Head) -> bytes:
    """The encoding of a request, which is that of its answer; empty if it is none of the two."""
    said = head.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    return _TYPES.get(said, b"")


def _partial_success(kind: bytes, name: str, rejected: int, message: str) -> bytes:
    """`Export…ServiceResponse`; without rejected records it is empty."""
    if kind == JSON:
        if not rejected:
            return b"{}"
        partial = {name: str(rejected), "errorMessage": message}
        return msgspec.json.encode({"partialSuccess": partial})
    return pack(1, pack(1, rejected) + pack(2, message.encode()) if rejected else b"")


def _operation(signal: Signal) -> dict[str, Any]:
    """The OpenAPI operation."""
    binary = {"schema": {"type": "string", "format": "binary"}}

    def both(schema: dict[str, Any]) -> dict[str, Any]:
        return {"application/json": {"schema": schema}, "application/x-protobuf": binary}

    status = {
        "type": "object",
        "properties": {"code": {"type": "integer"}, "message": {"type": "string"}},
    }
    failed = {"description": "`google.rpc.Status`", "content": both(status)}
    found = {"description": "Accepted; `partialSuccess` tells of invalid records"}
    return {
        "operationId": f"export_{signal.name}",
        "summary": f"Export {signal.name} (OTLP)",
        "requestBody": {
            "description": f"`Export{signal.name.title()}ServiceRequest`",
            "required": True,
            "content": both({"type": "object"}),
        },
        "responses": {
            "200": {**found, "content": both({"type": "object"})},
            "4XX": failed,
            "5XX": failed,
        },
    }
