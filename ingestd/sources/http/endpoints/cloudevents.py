"""CloudEvents over HTTP: one event in headers and body (binary), as JSON (structured), or a batch.

HTTP binding: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md
Webhooks:     https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/http-webhook.md

A record is an event in the JSON format, whichever way it came; what came in headers is put together
as the format has it, with data that is not JSON as `data_base64`. `source` and `id` together are
the id by which an event is recognised when it comes again.
"""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import msgspec
from msgspec import Raw
from pydantic import Field

from ingestd.base.append import sender_id
from ingestd.codecs.json import is_json
from ingestd.codecs.lines import json_fault
from ingestd.config.units import Words  # noqa: TC001  pydantic reads it
from ingestd.http import problem
from ingestd.http.credentials import TOKEN_SCHEMES, by_query
from ingestd.http.problem import Problem
from ingestd.http.response import Response
from ingestd.sources.http.endpoints.base import (
    Description,
    Endpoint,
    EndpointSettings,
    RouteSpec,
    Target,
)
from ingestd.sources.http.endpoints.messages import (
    ARRAY,
    VALUE,
    ClientMessage,
    MessagesCodec,
    bound_elements,
    lay_out,
    malformed,
    operation,
    read_body,
    write_object,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ingestd.base.record import Format
    from ingestd.sources.http.endpoints.base import (
        BodyCodec,
        BodyLimits,
        Decoded,
        EndpointContext,
        Head,
    )

PATH = "/v1/cloudevents"
STRUCTURED = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"
ORIGIN = "WebHook-Request-Origin"
_PREFIX = "ce-"
_REQUIRED = ("id", "source", "specversion", "type")
_NAME = re.compile(r"[a-z0-9]{1,64}", re.ASCII)
_OWN = ("data", "data_base64", "datacontenttype")
_TAKES = f"an event with {_PREFIX}* headers, {STRUCTURED}, {BATCH}"


class CloudeventsSettings(EndpointSettings):
    """`[http.endpoints.cloudevents]`."""

    origins: Words = Field(
        ("*",),
        max_length=1000,
        description="origins of webhooks that may deliver (WebHook-Request-Origin); * is all",
    )


class _CloudEvent(msgspec.Struct, gc=False):
    id: str
    source: str
    specversion: str
    type: str


_read_event = msgspec.json.Decoder(_CloudEvent).decode


def _fault(attributes: Mapping[str, Any]) -> str:
    """Tells why these are not the attributes of an event; empty if they are."""
    for name in _REQUIRED:
        value = attributes.get(name)
        if not isinstance(value, str) or not value:
            return f"an event has the attribute `{name}`, a text that is not empty"
    if attributes["specversion"] != "1.0":
        return f"specversion {attributes['specversion'][:20]!r}; only 1.0 is read"
    return ""


def _identity(source: str, event_id: str) -> bytes:
    return sender_id(b"cloudevents", msgspec.json.encode((source, event_id)))


def _message(raw: bytes) -> ClientMessage:
    """An event in the JSON format."""
    try:
        event = _read_event(raw)
    except msgspec.DecodeError as error:
        return ClientMessage(raw, fault=f"an event: {error}")
    if not (event.id and event.source and event.type and event.specversion == "1.0"):
        attributes = {name: getattr(event, name) for name in _REQUIRED}
        return ClientMessage(raw, fault=_fault(attributes))
    return ClientMessage(raw, _identity(event.source, event.id))


class StructuredEventCodec(MessagesCodec):
    """One event in the JSON format."""

    def decode(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded]:
        """See `BodyCodec`."""
        return lay_out([_message(bytes(read_body(VALUE, body, limits)))], limits)


class EventBatchCodec(MessagesCodec):
    """Events in the JSON format, in an array; may be none."""

    def decode(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded]:
        """See `BodyCodec`."""
        bound_elements(body, limits)
        raws = read_body(ARRAY, body, limits)
        return lay_out([_message(bytes(raw)) for raw in raws], limits)


class BinaryEventCodec(MessagesCodec):
    """One event whose attributes are headers and whose data is the body.

    Args:
        attributes: of the event.
        content_type: of the body; empty if there is none.
    """

    def __init__(self, attributes: Mapping[str, str], content_type: str) -> None:
        self._attributes = attributes
        self._content_type = content_type

    def decode(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded]:
        """See `BodyCodec`."""
        members: dict[str, Any] = dict(self._attributes)
        if self._content_type:
            members["datacontenttype"] = self._content_type
        said = self._content_type.partition(";")[0].strip().lower()
        if body and (is_json(said) or said == "text/json"):
            members["data"] = read_body(VALUE, body, limits)
        elif body and not said and not json_fault(body, limits.depth_max):
            members["data"] = Raw(body)  # data of which nothing is said is JSON, where it can be
        elif body:
            members["data_base64"] = base64.b64encode(body).decode()
        identity = _identity(members["source"], members["id"])
        return lay_out([ClientMessage(write_object(members), identity)], limits)


def _attributes(headers: Mapping[str, str]) -> dict[str, str]:
    """The attributes in headers, whose values are percent-encoded (3.1.3.2 of the binding)."""
    found = {}
    for header, value in headers.items():
        name = header.lower().removeprefix(_PREFIX)
        if len(name) < len(header) and _NAME.fullmatch(name) and name not in _OWN:
            found[name] = unquote(_text(value), errors="replace")
    return found


def _text(value: str) -> str:
    """A header's value, with U+FFFD for bytes that are no UTF-8, which no record can hold."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class CloudeventsEndpoint(Endpoint):
    """`POST /v1/cloudevents`, and the handshake of webhooks.

    Args:
        context: the pipelines.
    """

    settings = CloudeventsSettings
    formats = ("json",)

    def __init__(self, context: EndpointContext) -> None:
        self._own: CloudeventsSettings = context.own
        ways = (*TOKEN_SCHEMES, by_query("access_token"))
        to = {"": Target(context.default)}
        self.routes = [RouteSpec(PATH, to, auth=ways, probes=("OPTIONS",))]

    def open(self, head: Head) -> BodyCodec:
        """See `Endpoint`."""
        content_type = head.headers.get("Content-Type", "")
        said = content_type.partition(";")[0].strip().lower()
        if said == STRUCTURED:
            return StructuredEventCodec()
        if said == BATCH:
            return EventBatchCodec()
        if said.startswith("application/cloudevents"):
            raise Problem(problem.MEDIA_TYPE, f"{said[:80]!r}; this takes {_TAKES}")
        attributes = _attributes(head.headers)
        if not attributes:
            raise malformed(f"{said[:80]!r} without {_PREFIX}* headers; this takes {_TAKES}")
        if fault := _fault(attributes):
            raise malformed(f"{_PREFIX}* headers: {fault}")
        return BinaryEventCodec(attributes, _text(content_type))

    def probe(self, head: Head) -> Response:
        """See `Endpoint`: consent to deliveries, if they come from a known origin."""
        origin = head.headers.get(ORIGIN, "")
        headers = {"Allow": "POST, OPTIONS"}
        known = {origin.lower(), "*"} & set(self._own.origins)
        if known and origin.isascii() and origin.isprintable() and origin:
            headers |= {"WebHook-Allowed-Origin": origin, "WebHook-Allowed-Rate": "*"}
        return Response(204, b"", b"", headers)

    def describe(self, route: RouteSpec, target: str, form: Format | None) -> Description:  # noqa: ARG002
        """See `Endpoint`."""
        event = {"type": "object", "required": list(_REQUIRED)}
        described = operation(
            "Send CloudEvents",
            "An event is a record, in the JSON format. One whose `source` and `id` were accepted"
            " before is accepted once.",
            {
                STRUCTURED: {"schema": event},
                BATCH: {"schema": {"type": "array", "items": event}},
                "application/json": {"schema": {}},
            },
            202,
            {"accepted": 1, "invalid": 0, "errors": []},
        )
        return Description(_TAKES, described)
