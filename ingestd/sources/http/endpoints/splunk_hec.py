"""Splunk's HTTP Event Collector: `/services/collector`, events as JSON objects or raw lines.

https://help.splunk.com/en/splunk-enterprise/get-data-in/collect-http-event-data

An event is a record as it came, with its `time`, `host`, `source`, `sourcetype`, `index` and
`fields`; a raw line becomes one of the same form. Events follow each other with or without white
space between them, or are the elements of an array. Usual bodies are cut as a whole (`_cut`); one
with a fault is taken apart (`_walk`): the events that are good are accepted, and the answer names
the first that is not.

An answer comes after the commit, so `/ack` needs no state: what has an id is stored.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs

import msgspec
from msgspec import UNSET, Raw, UnsetType
from pydantic import Field

from ingestd.base.append import ID_BYTES
from ingestd.base.bursts import let_loop_go_first
from ingestd.base.record import Records
from ingestd.codecs.bulk import PartBuilder, ids_of
from ingestd.codecs.lines import Parsed, json_fault
from ingestd.codecs.utf8 import find_fault
from ingestd.config.units import Switch  # noqa: TC001 - the model needs it
from ingestd.http import problem
from ingestd.http.credentials import TokenScheme, by_authorization, by_query
from ingestd.http.problem import Problem
from ingestd.http.response import JSON, Response
from ingestd.sources.http.decode import lay_out, too_many
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
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from ingestd.base.record import Format
    from ingestd.sources.http.endpoints.base import BodyLimits, EndpointContext, Head
    from ingestd.sources.http.result import IngestResult

PREFIX = "/services/collector"
_CHANNEL = "X-Splunk-Request-Channel"
_TEXTS = {
    0: "Success",
    2: "Token is required",
    3: "Invalid authorization",
    4: "Invalid token",
    5: "No data",
    6: "Invalid data format",
    8: "Internal server error",
    9: "Server is busy",
    10: "Data channel is missing",
    12: "Event field is required",
    13: "Event field cannot be blank",
    14: "ACK is disabled",
    16: "Query string authorization is not enabled",
    17: "HEC is healthy",
    18: "HEC is unhealthy, queues are full",
    27: "Request entity too large",
    404: "The requested URL was not found on this server.",
    405: "Method not allowed",
}
_NUMBER = "invalid-event-number"
_METADATA = ("time", "host", "source", "sourcetype", "index")
_QUERY_FIELDS_MAX = 100
_VALUE_CHARACTERS_MAX = 1024
_QUICK_EVENTS = 2000
_QUICK_EVENT_BYTES = 64 * 1024
_TOKENS_TOGETHER = 4096
_TOKENS_MAX = 2_000_000
"""Brackets and strings of events with a fault: a second's work, or two."""
_FAULTS_MAX = 1000
"""Behind so many faults brackets alone tell events apart: an error of the decoder takes 0.3 ms."""
_EVENTS_TOGETHER = 256
_WHITESPACE = b" \t\r\n"
_SPACE = re.compile(rb"[ \t\r\n]*+")
_OPENERS = (b"{", b"[")
_BLANK = frozenset({b'""', b"null"})
# Strings are passed over as a whole, so that brackets in them do not count; one without an end goes
# to that of the body, or each quote in it would be tried as one.
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[][{}]', re.DOTALL)
_TIME = re.compile(r"(?:0|[1-9][0-9]{0,11})(?:\.[0-9]{1,9})?")
"""A time in a query that is a number in JSON too, which has no leading zeros."""
_encode = msgspec.json.encode
_decode = json.JSONDecoder(parse_int=len, parse_float=len).raw_decode


class SplunkHecSettings(EndpointSettings):
    """`[http.endpoints.splunk_hec]`."""

    indexes: Targets = Field(
        default_factory=dict,
        description="pipeline of the events of an index; * in its name is any characters",
    )
    sourcetypes: Targets = Field(
        default_factory=dict,
        description="pipeline of the events of a sourcetype, where its index has none",
    )
    query_token: Switch = Field(
        False, description="accept the token as a parameter of the query, ?token="
    )
    deduplicate: Switch = Field(
        False,
        description="true: an event that is the same in all it has is accepted once, among the last"
        " http.idempotency_ids_max",
    )
    acks: Switch = Field(True, description="answer /ack, and requests of a channel with an ackId")


class _HecEvent(msgspec.Struct):
    event: Raw | UnsetType = UNSET
    index: str | None = None
    sourcetype: str | None = None


_read_event = msgspec.json.Decoder(_HecEvent).decode
_read_events = msgspec.json.Decoder(_HecEvent).decode_lines
_read_elements = msgspec.json.Decoder(list[_HecEvent]).decode
_cut_values = msgspec.json.Decoder(Raw).decode_lines
_cut_elements = msgspec.json.Decoder(list[Raw]).decode


class _Fault(NamedTuple):
    """The first event that is invalid.

    Attributes:
        code: of the reason.
        number: of the event, from 0.
        detail: a line for the client.
    """

    code: int
    number: int
    detail: str


def _refused(kind: problem.ProblemType, code: int, detail: str, number: int = -1) -> Problem:
    """A problem with a code of the protocol's own."""
    found = Problem(kind, detail)
    found.members = {"code": code} | ({_NUMBER: number} if number >= 0 else {})
    return found


# -- bodies ----------------------------------------------------------------------------------------


class EventsCodec(BodyCodec):
    """Events as JSON objects.

    Args:
        find: gives the pipeline of an index and a sourcetype; empty for that of the endpoint.
        named: events have ids, made from all of their bytes.
    """

    routes = True

    def __init__(
        self, find: Callable[[str | None, str | None], str], *, named: bool = False
    ) -> None:
        self._find = find
        self._named = named

    def decode(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded]:
        """See `BodyCodec`."""
        parts = self._cut(body, limits) or self._walk(body, limits)
        return _named(parts) if self._named else parts

    def decode_quickly(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded] | None:
        """See `BodyCodec`."""
        if len(body) <= _QUICK_EVENT_BYTES and body.count(b"{") <= _QUICK_EVENTS:
            parts = self._cut(body, limits)
            if parts is not None:
                return _named(parts) if self._named else parts
        return self.decode(body, limits) if len(body) < QUICK_BYTES else None

    def _cut(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded] | None:
        """Cuts a body of good events alone; `None` of any other."""
        if body.count(b"{") > limits.records_max:
            return None  # before there is a value for each of them
        is_array = body.lstrip(_WHITESPACE)[:1] == b"["
        try:
            events = (_read_elements if is_array else _read_events)(body)
            values = (_cut_elements if is_array else _cut_values)(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        if find_fault(body) >= 0:
            return None
        if not values or any(one.event is UNSET or bytes(one.event) in _BLANK for one in events):
            return None
        groups: dict[str, list[Raw]] = {}
        names = [(one.index, one.sourcetype) for one in events]
        targets = {name: self._find(*name) for name in set(names)}
        for name, value in zip(names, values, strict=True):
            groups.setdefault(targets[name], []).append(value)
        parts = []
        for to, some in groups.items():
            parsed = lay_out(some, _limits_of(limits, to))
            if parsed.refused:
                return None
            parts.append(Decoded(parsed, to))
        return parts

    def _walk(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded]:
        """Takes a body apart by its brackets."""
        groups: dict[str, PartBuilder] = {}
        fault: _Fault | None = None
        number = -1
        for number, (value, is_whole) in enumerate(_split(body, limits.record_bytes_max)):
            if number >= limits.records_max:
                raise too_many(limits)
            to, code, reason, detail = self._judge(value, limits)
            if not is_whole and not code:
                code, detail = 6, "there is no comma before it"
            group = groups.setdefault(to, PartBuilder())
            if not code:
                group.records.append(value)
                continue
            group.refuse(reason, detail, value)
            fault = fault or _Fault(code, number, detail)
        if number < 0:
            raise Problem(problem.EMPTY, "the body holds no event")
        if fault is not None and not any(group.records for group in groups.values()):
            raise _refused(problem.MALFORMED, fault.code, fault.detail, fault.number)
        return [Decoded(group.parsed(), to, notes=fault) for to, group in groups.items()]

    def _judge(self, value: bytes, limits: BodyLimits) -> tuple[str, int, str, str]:
        """The pipeline of an event; and of its fault, if any, code, reason and detail."""
        to, code, detail = "", 0, ""
        try:
            one = _read_event(value)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            code = 6
            detail = json_fault(value, limits.depth_max) or str(error)
        else:
            to = self._find(one.index, one.sourcetype)
            limits = _limits_of(limits, to)
            if detail := json_fault(value, limits.depth_max):
                code = 6
            elif one.event is UNSET:
                code, detail = 12, "it has no event"
            elif bytes(one.event) in _BLANK:
                code, detail = 13, "its event is blank"
        if len(value) > limits.record_bytes_max:
            detail = f"{len(value)} bytes, more than record_bytes_max = {limits.record_bytes_max}"
            return to, 6, "too_large", detail
        return to, code, "malformed", detail


def _limits_of(limits: BodyLimits, to: str) -> BodyLimits:
    return limits.by_pipeline.get(to, limits) if to else limits


def _split(body: bytes, longest: int) -> Iterator[tuple[bytes, bool]]:
    """Cuts events off; what cannot be told apart comes last, with False."""
    body = body.strip(_WHITESPACE)
    between = b""
    if body[:1] == b"[":
        if body[-1:] != b"]" or len(body) == 1:
            yield body, False
            return
        body, between = body[1:-1].strip(_WHITESPACE), b","
    ends = _EventEnds(body, longest)
    at = end = 0
    while body[at : at + 1] in _OPENERS and (stop := ends.find(at)):
        yield body[at:stop], True
        end, at = stop, ends.skip(stop)
        if between and body[at : at + 1] == between:
            at = ends.skip(at + 1)
        elif between:
            break
    if body[end:].strip(_WHITESPACE):
        yield body[end:], False


class _EventEnds:
    """Finds the ends of events, those of good ones with a decoder, and of others by brackets.

    Args:
        body: the events.
        longest: most bytes of one that a decoder looks at.
    """

    def __init__(self, body: bytes, longest: int) -> None:
        self._body = body
        self._longest = longest
        self._text, self._from = "", 0  # a window of it; in Latin-1 each byte is one character
        self._count = self._tokens = self._faults = 0

    def skip(self, at: int) -> int:
        """The next place without white space."""
        return _SPACE.match(self._body, at).end()  # type: ignore[union-attr]  # of any length

    def find(self, at: int) -> int:
        """The end of the event that begins there; 0 if it cannot be found."""
        self._count += 1
        if not self._count % _EVENTS_TOGETHER:
            let_loop_go_first()
        until = self._from + len(self._text)
        if until < len(self._body) and at > until - self._longest:
            self._text = self._body[at : at + 2 * self._longest].decode("latin-1")
            self._from = at
            let_loop_go_first()
        if self._faults < _FAULTS_MAX:
            try:
                return self._from + _decode(self._text, at - self._from)[1]
            except (ValueError, RecursionError):
                self._faults += 1
        return self._find_by_brackets(at)

    def _find_by_brackets(self, at: int) -> int:
        depth = 0
        for token in _TOKENS.finditer(self._body, at):
            self._tokens += 1
            if not self._tokens % _TOKENS_TOGETHER:
                let_loop_go_first()
            if self._tokens > _TOKENS_MAX:
                break
            first = self._body[token.start()]
            if first in b"[{":
                depth += 1
            elif first in b"]}":
                depth -= 1
                if not depth:
                    return token.end()
        return 0


def _named(parts: Sequence[Decoded]) -> Sequence[Decoded]:
    """Puts ids to records; several that are the same in one body are several."""
    named = []
    for part in parts:
        times: Counter[bytes] = Counter()
        names = []
        for record in part.parsed.records.items():
            name = hashlib.blake2b(record, digest_size=ID_BYTES)
            first = name.digest()
            name.update(b"%d" % times[first])
            times[first] += 1
            names.append(name.digest())
        named.append(part._replace(ids=ids_of(names)))
    return named


class RawCodec(BodyCodec):
    """Lines of text, each an event.

    Args:
        to: the pipeline.
        metadata: of all events, behind the text: JSON members with a comma before each.
        named: see `EventsCodec`.
    """

    routes = True

    def __init__(self, to: str, metadata: bytes, *, named: bool = False) -> None:
        self._to = to
        self._end = metadata + b"}"
        self._named = named

    def decode(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded]:
        """See `BodyCodec`."""
        part = self._read(body, limits)
        return _named([part]) if self._named else [part]

    def _read(self, body: bytes, limits: BodyLimits) -> Decoded:
        if body.count(b"\n") > 2 * limits.records_max:
            raise too_many(limits)
        lines = [line for line in body.replace(b"\r\n", b"\n").split(b"\n") if line.strip()]
        if not lines:
            raise Problem(problem.EMPTY, "the body holds no line")
        if len(lines) > limits.records_max:
            raise too_many(limits)
        size_max = _limits_of(limits, self._to).record_bytes_max
        part, fault, size = PartBuilder(), None, 0
        for number, line in enumerate(lines):
            value = line  # what is too long as it is needs no look
            if len(line) <= size_max:
                value = b'{"event":%b%b' % (_encode(line.decode(errors="replace")), self._end)
                size += len(value)
            if size > limits.bytes_max:
                detail = f"its events have more than {limits.bytes_max} bytes"
                raise Problem(problem.PAYLOAD_TOO_LARGE, detail)
            if len(value) <= size_max:
                part.records.append(value)
                continue
            detail = f"{len(value)} bytes, more than record_bytes_max = {size_max}"
            part.refuse("too_large", detail, value)
            fault = fault or _Fault(6, number, detail)
        if fault is not None and not part.records:
            raise _refused(problem.RECORD_TOO_LARGE, 6, fault.detail, fault.number)
        return Decoded(part.parsed(), self._to, notes=fault)


class _Acks(msgspec.Struct):
    acks: list[int]


_read_acks = msgspec.json.Decoder(_Acks).decode


class AckCodec(BodyCodec):
    """A question after ids of answers; no records."""

    routes = True

    def decode(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded]:
        """See `BodyCodec`."""
        try:
            acks = _read_acks(body).acks
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise _refused(problem.MALFORMED, 6, '{"acks": [0, 1]} is expected') from None
        if len(acks) > limits.records_max:
            raise too_many(limits)
        return (Decoded(Parsed(Records.lines([]), []), notes=acks),)


# -- the endpoint ----------------------------------------------------------------------------------


def _read_password(headers: Mapping[str, str], _target: str) -> str | None:
    """The password of HTTP Basic, for any name."""
    word, _, value = headers.get("Authorization", "").partition(" ")
    if word.lower() != "basic":
        return None
    try:
        return base64.b64decode(value.strip(" "), validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


_WAYS = (
    by_authorization("Splunk"),
    TokenScheme("splunk_basic", _read_password, {"type": "http", "scheme": "basic"}),
    "bearer",
)
_WORDS = frozenset({"splunk", "basic", "bearer"})
_EVENT_PATHS = ("", "/event", "/event/1.0")
_RAW_PATHS = ("/raw", "/raw/1.0")
_ACK_PATHS = ("/ack", "/ack/1.0")
_HEALTH_PATHS = ("/health", "/health/1.0")


def _said(status: int, code: int, **more: object) -> Response:
    return Response(status, JSON, _encode({"text": _TEXTS[code], "code": code, **more}))


class SplunkHecEndpoint(Endpoint):
    """Splunk's HTTP Event Collector.

    Args:
        context: the daemon.
    """

    settings = SplunkHecSettings
    formats = ("json",)
    prefix = PREFIX
    request_headers = (_CHANNEL,)

    def __init__(self, context: EndpointContext) -> None:
        own: SplunkHecSettings = context.own
        self._indexes = TargetTable(own.indexes)
        self._sourcetypes = TargetTable(own.sourcetypes)
        self._acks, self._named = own.acks, own.deduplicate
        self._ids = itertools.count()
        ways = (*_WAYS, by_query("token")) if own.query_token else _WAYS
        here = {"": Target(context.default)}
        self.routes = [
            # Docker's log driver asks with OPTIONS, and wants 200.
            *(
                RouteSpec(PREFIX + path, here, auth=ways, probes=("OPTIONS",))
                for path in (*_EVENT_PATHS, *_RAW_PATHS)
            ),
            *(RouteSpec(PREFIX + path, here, auth=ways) for path in _ACK_PATHS),
            *(RouteSpec(PREFIX + path, here, (), OPEN, ("GET", "HEAD")) for path in _HEALTH_PATHS),
        ]

    @classmethod
    def check(cls, own: Any, formats: Mapping[str, Format]) -> Iterable[tuple[str, str]]:
        """See `Endpoint`."""
        yield from table_problems("indexes", own.indexes, formats, "json")
        yield from table_problems("sourcetypes", own.sourcetypes, formats, "json")

    def open(self, head: Head) -> BodyCodec:
        """See `Endpoint`."""
        path = _below(head)
        if path in _EVENT_PATHS:
            return EventsCodec(self._find, named=self._named)
        if path in _RAW_PATHS:
            query = _query_of(head)
            metadata = {name: query[name] for name in _METADATA if query.get(name)}
            if any(len(value) > _VALUE_CHARACTERS_MAX for value in metadata.values()):
                detail = f"a parameter has more than {_VALUE_CHARACTERS_MAX} characters"
                raise _refused(problem.BAD_REQUEST, 6, detail)
            to = self._find(metadata.get("index"), metadata.get("sourcetype"))
            return RawCodec(to, b"".join(_members(metadata)), named=self._named)
        if not self._acks:
            raise _refused(problem.BAD_REQUEST, 14, "http.endpoints.splunk_hec.acks is false")
        if not _channel_of(head):
            raise _refused(problem.BAD_REQUEST, 10, f"there is no {_CHANNEL}")
        return AckCodec()

    def _find(self, index: str | None, sourcetype: str | None) -> str:
        """The pipeline of an event."""
        to = self._indexes.find(index) if index else ""
        return to or (self._sourcetypes.find(sourcetype) if sourcetype else "")

    def answer(self, result: IngestResult, head: Head) -> Response:
        """See `Endpoint`."""
        for part in result.parts:
            if part.problem is not None:  # the client sends all of it again
                return self.error(part.problem, head)
        notes = result.parts[0].notes
        if isinstance(notes, list):
            acks = {str(one): True for one in notes}
            return Response(200, JSON, _encode({"acks": acks}))
        faults = [part.notes for part in result.parts if isinstance(part.notes, _Fault)]
        if faults:
            return _said(400, faults[0].code, **{_NUMBER: faults[0].number})
        if any(part.rejected for part in result.parts):
            # Of events that go to several pipelines the places in the body are not known any more.
            first = result.errors[0].index if len(result.parts) == 1 and result.errors else None
            return _said(400, 6, **({} if first is None else {_NUMBER: first}))
        if self._acks and _channel_of(head):
            return _said(200, 0, ackId=next(self._ids))
        return _said(200, 0)

    def error(self, problem: Problem, head: Head) -> Response:
        """See `Endpoint`."""
        status, code = _code_of(problem, head)
        more = {_NUMBER: problem.members[_NUMBER]} if _NUMBER in problem.members else {}
        return _said(status, code, **more)._replace(headers=problem.headers)

    def probe(self, head: Head) -> Response:
        """See `Endpoint`."""
        return _said(200, 17 if _below(head) in _HEALTH_PATHS else 0)

    def describe(self, route: RouteSpec, target: str, form: Format | None) -> Description:  # noqa: ARG002
        """See `Endpoint`."""
        path = route.path.removeprefix(PREFIX)
        if path in _RAW_PATHS:
            return Description("text/plain (one event a line)", _describe("Send lines to HEC"))
        if path in _ACK_PATHS:
            return Description('{"acks": [0, 1]}', _describe("Ask HEC for acknowledgements"))
        examples = [("An event of Splunk's", """-d '{"event": {"user": 7}}'""")] if not path else []
        return Description(
            "JSON objects with an event, one after another",
            _describe("Send events to HEC"),
            examples,
        )


def _code_of(found: Problem, head: Head) -> tuple[int, int]:
    """The status and the code of a problem."""
    kind, status = found.kind, found.kind.status
    if "code" in found.members:
        return status, found.members["code"]
    if kind is problem.UNAUTHORIZED:
        if found.without_credentials:
            return (400, 16) if "token" in _query_of(head) else (401, 2)
        word = head.headers.get("Authorization", "splunk").partition(" ")[0].lower()
        return (403, 4) if word in _WORDS else (401, 3)
    if status in {429, 503, 409}:
        return 503, 18 if _below(head) in _HEALTH_PATHS else 9  # all that clients wait for
    if kind is problem.EMPTY:
        return 400, 5
    codes = {403: 4, 404: 404, 405: 405, 413: 27, 500: 8}
    return status, codes.get(status, 6)


def _below(head: Head) -> str:
    return head.target.partition("?")[0].partition(PREFIX)[2]


def _query_of(head: Head) -> dict[str, str]:
    query = head.target.partition("?")[2]
    try:
        found = parse_qs(query, max_num_fields=_QUERY_FIELDS_MAX) if query else {}
    except ValueError:  # more fields than a client means
        found = {}
    return {name: values[0] for name, values in found.items()}


def _channel_of(head: Head) -> str:
    return head.headers.get(_CHANNEL, "") or _query_of(head).get("channel", "")


def _members(metadata: Mapping[str, str]) -> Iterator[bytes]:
    """Metadata as members of a JSON object, with a comma before each; a time is a number."""
    for name, value in metadata.items():
        number = name == "time" and _TIME.fullmatch(value)
        shown = value.encode() if number else _encode(value)
        yield b',"%b":%b' % (name.encode(), shown)


def _describe(summary: str) -> dict[str, Any]:
    body = {"required": True, "content": {"application/json": {"schema": {}}}}
    return {"summary": summary, "requestBody": body}
