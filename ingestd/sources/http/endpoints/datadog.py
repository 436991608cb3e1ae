"""Datadog's intake of logs: what its agent, its API clients and log shippers send.

https://docs.datadoghq.com/api/latest/logs/#send-logs

A log of a JSON body is a record as it came; a line of text becomes `{"message": …}`. Attributes in
the query (`ddtags`, `ddsource`, `service`, `hostname`) go into records that have no such member.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import msgspec

from ingestd.base.record import InvalidRecord, Records
from ingestd.codecs.json import is_json
from ingestd.codecs.lines import KEPT_BYTES, Parsed, squeeze
from ingestd.http import problem
from ingestd.http.credentials import TokenScheme, by_header, by_query
from ingestd.http.problem import ERRORS_MAX, Problem
from ingestd.http.response import JSON, Response
from ingestd.http.routing import path_of
from ingestd.sources.http.decode import (
    DocumentCodec,
    bound_as_json,
    checked,
    parse_made,
    too_large_expanded,
    too_many,
)
from ingestd.sources.http.endpoints.base import (
    ANY,
    BodyCodec,
    Decoded,
    Description,
    Endpoint,
    RouteSpec,
    Target,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ingestd.base.record import Format
    from ingestd.sources.http.endpoints.base import BodyLimits, EndpointContext, Head
    from ingestd.sources.http.result import IngestResult

LOGS = "/api/v2/logs"
INPUT = "/v1/input"
VALIDATE = "/api/v1/validate"
KEY_HEADER = "DD-API-KEY"
KEY_PARAMETER = "dd-api-key"
_ATTRIBUTES = ("ddtags", "ddsource", "service", "hostname")
_FIELDS_MAX = 100
_UNSAID = ("", "application/x-www-form-urlencoded")
_TEXT, _LOGPLEX = "text/plain", "application/logplex-1"
_TAKES = f"application/json, {_TEXT}, {_LOGPLEX}"
_NO_LOGS = (b"", b"{}", b"[]")
_FRAME = re.compile(rb"([0-9]{1,7}) ")
_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENCODER = msgspec.json.Encoder()


class LogsCodec(DocumentCodec):
    """A log, or an array of logs, in JSON.

    Args:
        attributes: of the query, as JSON.
        encoding: of the body, if `Content-Encoding` has a name for it that is Datadog's own.
    """

    def __init__(self, attributes: Mapping[str, bytes], encoding: str) -> None:
        self._attributes = {name: msgspec.Raw(value) for name, value in attributes.items()}
        self._more = sum(map(len, attributes.values()))
        self.encoding = encoding

    def decode(self, body: bytes, limits: BodyLimits) -> tuple[Decoded, ...]:
        """See `BodyCodec`."""
        if len(body) < 16 and b"".join(body.split()) in _NO_LOGS:
            return ()  # the agent asks in this way if it can reach the intake
        (part,) = super().decode(body, limits)
        parsed = part.parsed
        items = parsed.records.items()
        if any(item[:1] != b"{" for item in items):
            parsed = _objects(parsed, items)
            items = parsed.records.items()
        if self._attributes:
            if self._more * len(items) > limits.bytes_max:
                raise too_large_expanded(limits)
            lines = b"".join([self._completed(item) for item in items])
            made = parse_made(lines, len(items), limits)
            parsed = made._replace(
                refused=parsed.refused + made.refused, unlisted=parsed.unlisted + made.unlisted
            )
        return checked(parsed, limits)

    def _completed(self, item: bytes) -> bytes:
        log = _ENCODER.encode({**self._attributes, **_MEMBERS.decode(item)})
        return log.replace(b"\n", b" ") + b"\n"


def _objects(parsed: Parsed, items: Sequence[bytes]) -> Parsed:
    """Sorts out what is no log."""
    skipped = {one.index for one in parsed.refused}
    places = (place for place in range(parsed.total) if place not in skipped)
    good, refused = [], list(parsed.refused)
    for place, item in zip(places, items, strict=False):
        if item[:1] == b"{":
            good.append(item)
        else:
            detail = "a log is a JSON object"
            refused.append(InvalidRecord(place, "malformed", detail, item[:KEPT_BYTES]))
    records = Records.sized(good) if any(b"\n" in item for item in good) else Records.lines(good)
    refused.sort(key=lambda one: one.index)
    return Parsed(records, refused[:ERRORS_MAX], len(refused[ERRORS_MAX:]) + parsed.unlisted)


class TextCodec(BodyCodec):
    """A log a line, or a log a frame of Heroku's Logplex.

    Args:
        attributes: of the query, as JSON.
        encoding: see `LogsCodec`.
        framed: there may be frames.
    """

    def __init__(self, attributes: Mapping[str, bytes], encoding: str, *, framed: bool) -> None:
        members = [b',"%b":%b' % (name.encode(), value) for name, value in attributes.items()]
        self._end = b"".join(members) + b"}\n"
        self._framed = framed
        self.encoding = encoding

    def decode(self, body: bytes, limits: BodyLimits) -> tuple[Decoded, ...]:
        """See `BodyCodec`."""
        texts = _frames(body, limits) if self._framed else None
        if texts is None:
            body = squeeze(body)
            if body.count(b"\n") > limits.records_max:
                raise too_many(limits)
            texts = body.split(b"\n")
        bound_as_json(body, limits)
        count = 0
        for text in texts:
            if text.strip():
                texts[count] = _string(text)  # in place: together they are as large as the body
                count += 1
        if count * len(self._end) > limits.bytes_max:
            raise too_large_expanded(limits)
        if not count:
            return ()
        pieces = [b'{"message":', b"", self._end] * count
        pieces[1::3] = texts[:count]
        lines = b"".join(pieces)
        del pieces, texts
        return checked(parse_made(lines, count, limits), limits)


def _string(text: bytes) -> bytes:
    return _ENCODER.encode(text.decode(errors="replace").rstrip("\r"))


def _frames(body: bytes, limits: BodyLimits) -> list[bytes] | None:
    """The messages of frames, length and space before each; `None` if there is anything else."""
    at, end = 0, len(body)
    frames: list[bytes] = []
    while at < end:
        head = _FRAME.match(body, at)
        if head is None or (at := head.end() + int(head[1])) > end:
            return None
        frames.append(body[head.end() : at].rstrip(b"\r\n"))
        if len(frames) > limits.records_max:
            raise too_many(limits)
    return frames


def _read_path(_headers: Mapping[str, str], target: str) -> str | None:
    return path_of(target, "POST").removeprefix(f"{INPUT}/") or None


_KEYS = (by_header(KEY_HEADER), by_query(KEY_PARAMETER))
"""The one in the header counts where there are several."""
_PATH_KEY = TokenScheme("path_key", _read_path, _KEYS[0].security)


class DatadogEndpoint(Endpoint):
    """Datadog's intake of logs, and the probe of its agent.

    Args:
        context: the pipelines.
    """

    formats = ("json",)
    is_pure = True
    request_headers = (KEY_HEADER, "DD-EVP-ORIGIN", "DD-EVP-ORIGIN-VERSION")

    def __init__(self, context: EndpointContext) -> None:
        to = {"": Target(context.default)}
        self.routes = [
            RouteSpec(LOGS, to, auth=_KEYS),
            RouteSpec(INPUT, to, auth=_KEYS),
            RouteSpec(f"{INPUT}/", to, auth=_KEYS),
            RouteSpec(f"{INPUT}/{{key}}", {ANY: Target(context.default)}, auth=(*_KEYS, _PATH_KEY)),
            RouteSpec(VALIDATE, to, (), _KEYS, ("GET",)),
        ]

    def open(self, head: Head) -> BodyCodec:
        """See `Endpoint`."""
        query = head.target.partition("#")[0].partition("?")[2]
        try:
            fields = dict(parse_qsl(query, max_num_fields=_FIELDS_MAX, errors="replace"))
        except ValueError:
            raise Problem(
                problem.MALFORMED, f"more than {_FIELDS_MAX} fields in the query"
            ) from None
        attributes = {
            name: msgspec.json.encode(fields[name]) for name in _ATTRIBUTES if name in fields
        }
        named = head.headers.get("Content-Encoding", "").strip().lower()
        encoding = "zstd" if named == "zstd1" else ""
        kind = head.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if is_json(kind) or kind in _UNSAID:
            return LogsCodec(attributes, encoding)
        if kind in (_TEXT, _LOGPLEX):
            return TextCodec(attributes, encoding, framed=kind == _LOGPLEX)
        detail = f"{kind[:80]!r}; one of {_TAKES} is read"
        raise Problem(problem.MEDIA_TYPE, detail, headers={"Accept": _TAKES})

    def answer(self, result: IngestResult, head: Head) -> Response:  # noqa: ARG002
        """See `Endpoint`."""
        return Response(202 if path_of(head.target, "POST") == LOGS else 200, JSON, b"{}")

    def error(self, found: Problem, head: Head) -> Response:
        """See `Endpoint`."""
        status, title = found.kind.status, found.kind.title
        if status == 401 and not found.without_credentials:
            status, title = 403, problem.FORBIDDEN.title
        path = path_of(head.target, "POST")
        said: object
        if path == LOGS:
            said = {"errors": [{"status": str(status), "title": title, "detail": found.detail}]}
        elif path == VALIDATE:
            said = {"errors": [title]}
        else:
            said = {"code": status, "message": f"{title}: {found.detail}"}
        headers = dict(found.headers)
        if "Retry-After" in headers:
            headers["X-RateLimit-Reset"] = headers["Retry-After"]  # its API clients wait so long
        return Response(status, JSON, msgspec.json.encode(said), headers)

    def probe(self, head: Head) -> Response:  # noqa: ARG002
        """See `Endpoint`."""
        return Response(200, JSON, b'{"valid":true}')

    def describe(self, route: RouteSpec, target: str, form: Format | None) -> Description:  # noqa: ARG002
        """See `Endpoint`."""
        status = "202" if route.path == LOGS else "200"
        operation: dict[str, Any] = {
            "summary": "Send logs as to Datadog",
            "description": "The answer comes once all logs are durable.",
            "requestBody": {"required": True, "content": _CONTENT},
            "responses": {status: {"description": "`{}`: all logs are durable."}},
        }
        if route.path == f"{INPUT}/":
            operation["operationId"] = "datadog_v1_input_without_key"
        if route.variable:
            operation["security"] = [{}, *({way.name: []} for way in _KEYS)]
        examples = (("A log as Datadog takes it", """--json '{"message": "a line"}'"""),)
        return Description(_TAKES, operation, examples if route.path == LOGS else ())


_LOG = {"type": "object"}
_CONTENT = {
    "application/json": {"schema": {"oneOf": [_LOG, {"type": "array", "items": _LOG}]}},
    _TEXT: {"schema": {"type": "string"}},
    _LOGPLEX: {"schema": {"type": "string"}},
}
