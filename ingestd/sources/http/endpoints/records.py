"""Our own protocol: `POST /v1/records` and `POST /v1/records/{pipeline}`."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from ingestd.base.record import InvalidRecord
from ingestd.codecs.compression import TooMuch
from ingestd.codecs.json import is_json
from ingestd.codecs.lines import KEPT_BYTES
from ingestd.http import problem
from ingestd.http.problem import ERRORS_MAX, Problem
from ingestd.sources.http.decode import (
    DocumentCodec,
    LinesCodec,
    WholeCodec,
    checked,
    nothing_good,
)
from ingestd.sources.http.endpoints.base import (
    PIPELINE,
    BodyCodec,
    Decoded,
    Description,
    Endpoint,
    RouteSpec,
    Target,
)

if TYPE_CHECKING:
    from ingestd.base.record import Format
    from ingestd.sources.http.endpoints.base import BodyLimits, EndpointContext, Head

RECORDS = "/v1/records"


class MessagePackCodec(BodyCodec):
    """MessagePack: an array of records, or values one behind the other."""

    def decode(self, body: bytes, limits: BodyLimits) -> tuple[Decoded]:
        """See `BodyCodec`."""
        from ingestd.codecs import fluent, msgpack  # noqa: PLC0415  few clients send it

        bounds = fluent.RecordBounds(
            limits.records_max,
            limits.record_bytes_max,
            limits.depth_max,
            limits.bytes_max,
            ERRORS_MAX,
        )
        try:
            parsed = fluent.parse_body(body, bounds)
        except msgpack.MessagePackFault as fault:
            refused = InvalidRecord(0, "malformed", str(fault), body[:KEPT_BYTES])
            raise nothing_good([refused]) from None
        except fluent.TooManyRecords as fault:
            raise Problem(problem.TOO_MANY_RECORDS, str(fault)) from None
        except TooMuch as fault:
            raise Problem(problem.PAYLOAD_TOO_LARGE, str(fault)) from None
        return checked(parsed, limits)


_UNSAID = ("", "application/x-www-form-urlencoded")  # curl says the second one by itself
_NDJSON = (
    "application/x-ndjson",
    "application/ndjson",
    "application/jsonl",
    "application/x-jsonlines",
    *_UNSAID,
)
_MSGPACK = ("application/msgpack", "application/vnd.msgpack", "application/x-msgpack")
_DOCUMENT = DocumentCodec()
_CODECS: dict[Format, dict[str, BodyCodec]] = {
    "json": {
        "application/json": _DOCUMENT,
        **dict.fromkeys(_NDJSON, LinesCodec("json")),
        **dict.fromkeys(_MSGPACK, MessagePackCodec()),
    },
    "text": dict.fromkeys(("text/plain", *_UNSAID), LinesCodec("text")),
    "bytes": dict.fromkeys(("application/octet-stream", *_UNSAID), WholeCodec()),
}
_CHARSETS = ("", "utf-8", "utf8", "us-ascii")
_CHARSET = re.compile(r';[ \t]*charset[ \t]*=[ \t]*("[^"]*"|[^;\s]*)', re.IGNORECASE)
_TYPE_CHARACTERS_MAX = 1024


def codec_of(content_type: str, form: Format) -> BodyCodec:
    """Returns the codec of a `Content-Type` (empty if there is none) in a pipeline of a format.

    Raises:
        Problem: 415.
    """
    if len(content_type) > _TYPE_CHARACTERS_MAX:
        detail = f"Content-Type has more than {_TYPE_CHARACTERS_MAX} characters"
        raise Problem(problem.MEDIA_TYPE, detail)
    return _codec_of(content_type, form)


@lru_cache(maxsize=256)
def _codec_of(content_type: str, form: Format) -> BodyCodec:
    said, _, parameters = content_type.partition(";")
    said = said.strip().lower()
    codec = _CODECS[form].get(said)
    if codec is None and form == "json" and is_json(said):
        codec = _DOCUMENT
    if codec is None:
        takes = ", ".join(kind for kind in _CODECS[form] if kind not in _UNSAID)
        takes += ", application/*+json" if form == "json" else ""
        detail = f"{said[:80]!r} sent to a {form} pipeline, which takes {takes}"
        if takers := [f'"{other}"' for other, codecs in _CODECS.items() if said in codecs]:
            detail += f"; a pipeline with format = {' or '.join(takers)} takes it"
        raise Problem(problem.MEDIA_TYPE, detail, headers={"Accept": takes})
    found = _CHARSET.search(";" + parameters)
    charset = found[1].strip('"').lower() if found else ""
    if not isinstance(codec, WholeCodec | MessagePackCodec) and charset not in _CHARSETS:
        raise Problem(problem.MEDIA_TYPE, f"charset {charset[:40]!r}; only utf-8 is read")
    return codec


_TAKES: dict[Format, str] = {
    "json": "application/x-ndjson (one value a line), application/json, application/msgpack",
    "text": "text/plain (one record a line)",
    "bytes": "application/octet-stream (the whole body is one record)",
}
_EXAMPLES: dict[Format, tuple[tuple[str, str], ...]] = {
    "json": (
        ("One record", """-d '{"user": 7}'"""),
        ("A JSON array is one record an element", """--json '[{"user": 7}, {"user": 8}]'"""),
        ("A file, line by line", "--data-binary @events.ndjson"),
    ),
    "text": (
        ("One record", "-d 'a line of text'"),
        ("A file, line by line", "--data-binary @access.log"),
    ),
    "bytes": (("The whole file is one record", "--data-binary @picture.png"),),
}


class RecordsEndpoint(Endpoint):
    """Our own protocol.

    Args:
        context: the pipelines.
    """

    settings = None

    is_pure = True

    def __init__(self, context: EndpointContext) -> None:
        self.routes = [
            RouteSpec(RECORDS, {"": Target(context.default)}),
            RouteSpec(f"{RECORDS}/{PIPELINE}", {name: Target(name) for name in context.formats}),
        ]

    def open(self, head: Head) -> BodyCodec:
        """See `Endpoint`."""
        return codec_of(head.headers.get("Content-Type", ""), head.format)

    def describe(self, route: RouteSpec, target: str, form: Format | None) -> Description:
        """See `Endpoint`."""
        operation: dict[str, object] = {
            "requestBody": {"$ref": f"#/components/requestBodies/{form or 'any'}"}
        }
        if not route.variable:
            operation |= {
                "operationId": "send_records",
                "summary": "Send records to the default pipeline",
            }
        elif target:
            operation |= {
                "operationId": f"send_records_to_{target}",
                "summary": f"Send records to the pipeline {target}",
            }
        else:
            operation |= {"operationId": "send_records_to", "summary": "Send records by name"}
        takes = _TAKES[form] if form else "as the pipeline takes them"
        examples = _EXAMPLES[form or "json"] if not route.variable else ()
        return Description(takes, operation, examples)
