"""Loki's push API: streams of lines with labels.

https://grafana.com/docs/loki/latest/reference/loki-http-api/#ingest-logs

Each entry is a record of its own with the labels of its stream in it; see `docs/clients/loki.md`.

Labels stand in a body once and in each record, so what the records of a body take together is
bounded before they are put together.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ingestd.base.append import ID_BYTES, SenderIds
from ingestd.base.bursts import let_loop_go_first
from ingestd.base.record import InvalidRecord, Layout, Records
from ingestd.codecs.json import is_json
from ingestd.codecs.lines import KEPT_BYTES, Parsed
from ingestd.codecs.loki import (
    FEW_COMMAS,
    PushFault,
    PushStream,
    TooManyEntries,
    read_json,
    read_protobuf,
)
from ingestd.codecs.utf8 import size_replaced
from ingestd.http import problem
from ingestd.http.body import SNAPPY, demand_snappy
from ingestd.http.problem import ERRORS_MAX, Problem
from ingestd.http.response import Response
from ingestd.sources.http.decode import (
    bound_as_json,
    is_mostly_invalid,
    mostly_invalid,
    nothing_good,
    parse_made,
    too_large_expanded,
    too_many,
)
from ingestd.sources.http.endpoints.base import (
    OPEN,
    QUICK_BYTES,
    BodyCodec,
    Decoded,
    Description,
    Endpoint,
    EndpointSettings,
    RouteSpec,
    Target,
)
from ingestd.sources.targets import Targets, TargetTable, table_problems

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ingestd.base.record import Format
    from ingestd.sources.http.endpoints.base import BodyLimits, EndpointContext, Head
    from ingestd.sources.http.result import IngestResult

PUSH = "/loki/api/v1/push"
TENANT_HEADER = "X-Scope-OrgID"
_TEXT = b"text/plain; charset=utf-8"
_TENANT = re.compile(r"[A-Za-z0-9!\-_.*'()]{1,150}", re.ASCII)
_QUICK_RECORDS_BYTES = 1024 * 1024
_QUICK_ENTRIES = 300
"""So many in protobuf take a millisecond, and a thread as long until its turn comes."""
_BAD = 400
_AGAIN = (408, 409, 429, 500, 503)
_TO_503 = (408, 409)
_OF_RECORDS = (problem.RECORD_TOO_LARGE, problem.TOO_MANY_RECORDS)
_PROTOBUF = ("", "application/x-protobuf", "application/protobuf")
_TAKES = "application/json, application/x-protobuf"


class LokiSettings(EndpointSettings):
    """`[http.endpoints.loki]`."""

    label: str = Field("", description="label of a stream that chooses its pipeline in routes")
    routes: Targets = Field(
        default_factory=dict,
        description="pipelines of streams by the value of that label; others go to pipeline",
    )
    deduplicate: bool = Field(
        False,
        description="accept an entry with the same time, line, labels, metadata and tenant once",
    )


# -- records ---------------------------------------------------------------------------------------


class _PipelineRecords:
    """Records on their way to one pipeline.

    Args:
        limits: of its records.
    """

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._blocks: list[bytes] = []
        self.refused: list[InvalidRecord] = []
        self.count = self.unlisted = 0

    def add(self, lines: bytes, count: int, index: int) -> None:
        """Adds `count` records, each ended by LF; the first is record `index` of the body."""
        listed = ERRORS_MAX - len(self.refused)
        parsed = parse_made(lines, count, self._limits, index, listed_max=listed)
        self.refused += parsed.refused
        self.unlisted += parsed.unlisted
        self._blocks.append(parsed.records.payload)
        self.count += parsed.records.count

    def refuse(self, lines: bytes, count: int, index: int, why: str) -> None:
        """Adds records that are invalid."""
        listed = min(ERRORS_MAX - len(self.refused), count)
        for at, line in enumerate(lines.split(b"\n", listed)[:listed]):
            self.refused.append(InvalidRecord(index + at, "malformed", why, line[:KEPT_BYTES]))
        self.unlisted += count - listed

    def parsed(self) -> Parsed:
        """All of them."""
        payload = self._blocks[0] if len(self._blocks) == 1 else b"".join(self._blocks)
        return Parsed(Records(Layout.LINES, self.count, payload), self.refused, self.unlisted)


class PushCodec(BodyCodec):
    """Reads a push in JSON; a subclass, one in protobuf.

    Args:
        own: the endpoint's settings.
        tenant: of the request; empty if it has none.
    """

    def __init__(self, own: LokiSettings, tenant: str) -> None:
        self._label, self._targets = own.label, TargetTable(own.routes)
        self._deduplicates = own.deduplicate
        self.routes = bool(own.routes)
        self._end = b',"tenant":"%b"}\n' % tenant.encode() if tenant else b"}\n"

    def _streams(self, body: bytes, limits: BodyLimits) -> Iterator[PushStream]:
        if 3 * len(body) > limits.bytes_max and size_replaced(body) > max(
            len(body), limits.bytes_max
        ):
            raise too_large_expanded(limits)
        return read_json(body, limits.records_max, limits.record_bytes_max)

    def decode(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded]:
        """See `BodyCodec`."""
        parts: dict[str, _PipelineRecords] = {}
        try:
            self._fill(parts, body, limits)
        except PushFault as fault:
            raise Problem(problem.MALFORMED, f"the push is malformed: {fault}") from None
        except TooManyEntries:
            raise too_many(limits) from None
        refused = [one for part in parts.values() for one in part.refused]
        invalid = len(refused) + sum(part.unlisted for part in parts.values())
        good = sum(part.count for part in parts.values())
        if invalid and not good:
            raise nothing_good(refused, invalid - len(refused))
        if is_mostly_invalid(good, invalid):
            raise mostly_invalid(refused)
        return [self._decoded(part.parsed(), to) for to, part in parts.items()]

    def _fill(self, parts: dict[str, _PipelineRecords], body: bytes, limits: BodyLimits) -> None:
        total, left = 0, limits.bytes_max
        for stream in self._streams(body, limits):
            let_loop_go_first()
            if not (count := len(stream.times)):
                continue
            lines = self._records(stream, left, limits)
            left -= len(lines)
            if total + count > limits.records_max:
                raise TooManyEntries
            to = self._targets.find(stream.labels.get(self._label, "")) if self.routes else ""
            part = parts.get(to)
            if part is None:
                part = parts[to] = _PipelineRecords(limits.by_pipeline.get(to, limits))
            if stream.fault:
                part.refuse(lines, count, total, stream.fault)
            else:
                part.add(lines, count, total)
            total += count

    def _records(self, stream: PushStream, bytes_max: int, limits: BodyLimits) -> bytes:
        """Puts the records of a stream together, each ended by LF."""
        count, tail = len(stream.times), b',"labels":' + stream.written
        if count * (len(tail) + len(self._end)) > bytes_max:
            raise too_large_expanded(limits)
        end = tail + self._end
        pieces: list[Any] = [b'{"timestamp":', b"", b',"line":', b"", end] * count
        pieces[1::5] = stream.times
        pieces[3::5] = stream.lines
        if stream.metadata is not None:
            tail += b',"metadata":'
            pieces[4::5] = [tail + one + self._end if one else end for one in stream.metadata]
        return b"".join(pieces)

    def _decoded(self, parsed: Parsed, to: str) -> Decoded:
        if not self._deduplicates or not parsed.records.count:
            return Decoded(parsed, to)
        by_id = {_id_of(item): item for item in parsed.records.items()}
        if len(by_id) < parsed.records.count:
            parsed = parsed._replace(records=Records.lines(list(by_id.values())))
        return Decoded(parsed, to, ids=SenderIds(tuple(by_id), frozenset(by_id)))

    def decode_quickly(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded] | None:
        """See `BodyCodec`."""
        if len(body) >= QUICK_BYTES and body.count(b",") >= FEW_COMMAS:
            return None
        try:
            return self.decode(body, limits._replace(bytes_max=_QUICK_RECORDS_BYTES))
        except Problem as found:
            if found.kind is problem.PAYLOAD_TOO_LARGE:  # of labels that each record repeats
                return None
            raise


class ProtobufPushCodec(PushCodec):
    """Reads a push in protobuf, which is always a snappy block."""

    encoding = SNAPPY

    def _streams(self, body: bytes, limits: BodyLimits) -> Iterator[PushStream]:
        bound_as_json(body, limits)
        return read_protobuf(body, limits.records_max, limits.record_bytes_max)

    def decode_quickly(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded] | None:
        """See `BodyCodec`."""
        few = limits._replace(
            bytes_max=_QUICK_RECORDS_BYTES, records_max=min(limits.records_max, _QUICK_ENTRIES)
        )
        try:
            return self.decode(body, few)
        except Problem as found:
            if found.kind in (problem.PAYLOAD_TOO_LARGE, problem.TOO_MANY_RECORDS):
                return None
            raise


def _id_of(record: bytes) -> bytes:
    return hashlib.blake2b(record, digest_size=ID_BYTES).digest()


# -- the endpoint ----------------------------------------------------------------------------------


class LokiEndpoint(Endpoint):
    """Loki's push API, and the probe of its clients.

    Args:
        context: the pipelines and the settings.
    """

    settings = LokiSettings
    formats = ("json",)
    is_pure = True
    prefix = "/loki"
    request_headers = (TENANT_HEADER,)

    def __init__(self, context: EndpointContext) -> None:
        self._own: LokiSettings = context.own
        to = {"": Target(context.default)}
        self.routes = [
            RouteSpec(PUSH, to),
            RouteSpec("/ready", to, (), OPEN, ("GET", "HEAD")),
        ]

    @classmethod
    def check(cls, own: LokiSettings, formats: Mapping[str, Format]) -> Iterator[tuple[str, str]]:
        """See `Endpoint`."""
        yield from table_problems("routes", own.routes, formats, "json")
        if bool(own.routes) != bool(own.label):
            yield "label", "label and routes need each other"

    def open(self, head: Head) -> BodyCodec:
        """See `Endpoint`."""
        tenant = head.headers.get(TENANT_HEADER, "")
        if tenant and not _TENANT.fullmatch(tenant):
            detail = f"{TENANT_HEADER} has up to 150 letters, digits and characters of !-_.*'()"
            raise Problem(problem.MALFORMED, detail)
        kind = head.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if is_json(kind):
            return PushCodec(self._own, tenant)
        if kind not in _PROTOBUF:
            detail = f"{kind[:80]!r}; one of {_TAKES} is read"
            raise Problem(problem.MEDIA_TYPE, detail, headers={"Accept": _TAKES})
        # Clients say it or not; Loki takes it for granted.
        named = head.headers.get("Content-Encoding", "").strip().lower()
        if named not in ("", SNAPPY):
            raise Problem(problem.ENCODING, f"{named[:80]!r}; protobuf comes as a snappy block")
        demand_snappy()
        return ProtobufPushCodec(self._own, tenant)

    def answer(self, result: IngestResult, head: Head) -> Response:  # noqa: ARG002
        """See `Endpoint`."""
        problems = [part.problem for part in result.parts if part.problem is not None]
        if problems:
            # One that passes comes first: then the client sends all of it again.
            found = max(problems, key=lambda one: one.kind.status in _AGAIN)
            return _said(found, f"{found.detail}; {result.accepted} other entries were accepted")
        if result.stored:  # the text of the first answer
            return Response(_BAD, _TEXT, result.stored)
        if not result.invalid:
            return Response(204, b"", b"")
        text = f"{result.invalid} of {result.accepted + result.invalid} entries were not accepted"
        if result.errors:
            text += f"; entry {result.errors[0].index}: {result.errors[0].detail}"
        return Response(_BAD, _TEXT, f"{text}\n".encode())

    def error(self, problem: Problem, head: Head) -> Response:  # noqa: ARG002
        """See `Endpoint`."""
        return _said(problem, f"{problem.kind.title}: {problem.detail}")

    def probe(self, head: Head) -> Response:  # noqa: ARG002
        """See `Endpoint`."""
        return Response(200, _TEXT, b"ready\n")

    def describe(self, route: RouteSpec, target: str, form: Format | None) -> Description:  # noqa: ARG002
        """See `Endpoint`."""
        return Description(_TAKES, _OPERATION, (("A line as Loki takes it", _EXAMPLE),))


def _said(found: Problem, text: str) -> Response:
    """An error as Loki writes it: after 429 and 5xx clients send the push again, else they drop it.

    Fluent Bit drops it after 400 alone.
    """
    status = _BAD if found.kind in _OF_RECORDS else found.kind.status
    status = 503 if status in _TO_503 else status
    return Response(status, _TEXT, f"{text}\n".encode(), found.headers)


_STREAM_SCHEMA = {
    "type": "object",
    "required": ["values"],
    "properties": {
        "stream": {"type": "object", "additionalProperties": {"type": "string"}},
        "values": {
            "type": "array",
            "items": {
                "type": "array",
                "prefixItems": [
                    {"type": "string", "pattern": "^-?[0-9]{1,19}$"},
                    {"type": "string"},
                    {"type": "object", "additionalProperties": {"type": "string"}},
                ],
                "minItems": 2,
                "maxItems": 3,
            },
        },
    },
}
_PUSH_SCHEMA = {
    "type": "object",
    "required": ["streams"],
    "properties": {"streams": {"type": "array", "items": _STREAM_SCHEMA}},
}
_OPERATION = {
    "summary": "Push log lines as to Loki",
    "description": "204 comes once all entries are durable; errors are plain text.",
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _PUSH_SCHEMA}, "application/x-protobuf": {}},
    },
    "responses": {"204": {"description": "All entries are durable."}},
}
_EXAMPLE = (
    """--json '{"streams": [{"stream": {"app": "web"},"""
    """ "values": [["1760000000000000000", "a line"]]}]}'"""
)
