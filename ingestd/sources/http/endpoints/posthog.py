"""The capture API of PostHog: events of its libraries, unmodified.

https://posthog.com/docs/api/capture

A record is an event as its library made it, less the key of the project. What a request says for
all of its events (`sent_at`, `historical_migration`) is put into each, where the event does not say
it itself. Its `uuid` is the id by which it is recognised when it comes again. Feature flags are
none: what asks for them is told so.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

import msgspec
from msgspec import UNSET, Raw, UnsetType

from ingestd.http import problem
from ingestd.http.credentials import IN_BODY
from ingestd.http.problem import Problem
from ingestd.http.response import JSON, Response
from ingestd.sources.http.endpoints.base import (
    OPEN,
    Description,
    Endpoint,
    RouteSpec,
    Target,
)
from ingestd.sources.http.endpoints.messages import (
    ARRAY,
    ClientMessage,
    MessageIds,
    MessagesCodec,
    bound_depth,
    bound_elements,
    check_growth,
    lay_out,
    malformed,
    operation,
    read_body,
    read_object,
    read_text,
    unfit,
    write_object,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ingestd.base.record import Format
    from ingestd.sources.http.endpoints.base import (
        BodyCodec,
        BodyLimits,
        Decoded,
        EndpointContext,
        Head,
    )
    from ingestd.sources.http.result import IngestResult

PATHS = ("/batch", "/capture", "/e", "/i/v0/e", "/i/v0/ai/batch")
FLAGS = ("/flags", "/decide")
_WAYS = ("bearer", IN_BODY)
_ACCEPTED = b'{"status":1}'
_FIELDS_MAX = 20
_FORM_BYTES_MAX = 1024 * 1024
"""While it is taken apart, a form can take fifty times as much."""
_TYPES = {400: "validation_error", 401: "authentication_error", 413: "validation_error"}


class _PosthogBody(msgspec.Struct):
    """A batch, or an event that came alone.

    Attributes:
        batch: the events; unset if the body is one.
    """

    batch: list[Raw] | UnsetType = UNSET
    api_key: Raw = Raw()
    token: Raw = Raw()
    sent_at: Raw = Raw()
    historical_migration: Raw = Raw()


class _PosthogKeys(msgspec.Struct):
    api_key: Raw = Raw()
    token: Raw = Raw()


class _PosthogProperties(msgspec.Struct, gc=False):
    token: Raw = Raw()


class _PosthogEvent(msgspec.Struct, gc=False):
    event: Raw = Raw()
    uuid: Raw = Raw()
    api_key: Raw = Raw()
    token: Raw = Raw()
    sent_at: Raw = Raw()
    historical_migration: Raw = Raw()
    properties: _PosthogProperties | list[Raw] | str | float | bool | None = None


_read_body = msgspec.json.Decoder(_PosthogBody)
_identify = MessageIds("posthog").of
_read_keys = msgspec.json.Decoder(_PosthogKeys).decode
_read_event = msgspec.json.Decoder(_PosthogEvent).decode


class _PosthogCommon:
    """Members that a request has for all of its events.

    Args:
        body: the request.
        longest: most bytes of an event.

    Attributes:
        key: of the project; that of an event if the request shows none.
    """

    def __init__(self, body: _PosthogBody, longest: int) -> None:
        self.key = read_text(body.api_key) or read_text(body.token)
        self._longest = longest
        self._members = {"sent_at": body.sent_at} if body.sent_at else {}
        if bytes(body.historical_migration) == b"true":
            self._members["historical_migration"] = body.historical_migration
        # Put behind the members of an event that needs nothing else.
        self._tail = (b"," if self._members else b"") + write_object(self._members)[1:]

    def message(self, raw: bytes) -> ClientMessage:
        """Returns an event on its own."""
        if len(raw) > self._longest:
            if raw[:1] == b"{":
                keys = _read_keys(raw)
                self.key = self.key or read_text(keys.api_key) or read_text(keys.token)
            return unfit(raw, self._longest, keyed=True)
        try:
            event = _read_event(raw)
        except msgspec.DecodeError as error:
            keyed = b"token" in raw or b"api_key" in raw
            return ClientMessage(b"" if keyed else raw, fault=f"an event: {error}")
        keyed = bool(event.api_key or event.token)
        if not keyed and type(event.properties) is _PosthogProperties:
            keyed = bool(event.properties.token)
        if not read_text(event.event):
            # A dead letter keeps no key.
            fault = "an event is a JSON object with a name in `event`"
            return ClientMessage(b"" if keyed else raw, fault=fault)
        identity = _identify(event.uuid)
        if not keyed and not event.sent_at and not event.historical_migration:
            return ClientMessage(raw[:-1] + self._tail, identity)
        return ClientMessage(self._merged(raw), identity)

    def _merged(self, raw: bytes) -> bytes:
        members = read_object(raw) or {}
        shown = [read_text(members.pop(name, b"")) for name in ("api_key", "token")]
        inner = read_object(members.get("properties", b""))
        held = read_text(inner["token"]) if inner and "token" in inner else ""
        self.key = self.key or next(filter(None, [*shown, held]), "")
        if inner and held and held == self.key:
            del inner["token"]  # as posthog-js shows its key
            members["properties"] = Raw(write_object(inner))
        return write_object({**self._members, **members})


class PosthogCodec(MessagesCodec):
    """A batch of events, an array of them, or one; as JSON, or as a form with JSON in `data`.

    Args:
        encoding: of the body, if its query tells it.
    """

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding

    def decode(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded]:
        """See `BodyCodec`."""
        if body[:5] == b"data=":
            if len(body) > _FORM_BYTES_MAX:
                detail = f"a form of more than {_FORM_BYTES_MAX} bytes"
                raise Problem(problem.PAYLOAD_TOO_LARGE, detail)
            body = _form_data(body)
        body = body.strip(b" \t\r\n")
        bound_elements(body, limits)
        if body[:1] == b"{":
            outer = read_body(_read_body, body, limits)
            if outer.batch is UNSET:
                outer = _PosthogBody([Raw(body)], outer.api_key, outer.token)
        else:
            outer = _PosthogBody(read_body(ARRAY, body, limits))
        raws = outer.batch or []
        check_growth(len(raws), len(outer.sent_at), limits)
        common = _PosthogCommon(outer, limits.record_bytes_max)
        with bound_depth(limits):
            messages = [common.message(bytes(raw)) for raw in raws]
        return lay_out(messages, limits, token=common.key)


def _form_data(body: bytes) -> bytes:
    """The JSON in a form's field `data`: as it is, or in base64."""
    try:
        data = parse_qs(body.decode("ascii"), max_num_fields=_FIELDS_MAX)["data"][0]
        if data[:1] in ("{", "["):
            return data.encode()
        data = data.replace(" ", "+").rstrip("=")
        return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except (ValueError, KeyError, binascii.Error):
        raise malformed("the field `data` of a form is JSON, or JSON in base64") from None


class PosthogEndpoint(Endpoint):
    """`POST /batch/`, `/capture/`, `/e/`, `/i/v0/e/`, and answers to what asks for flags.

    Args:
        context: the pipelines.
    """

    formats = ("json",)

    def __init__(self, context: EndpointContext) -> None:
        to = {"": Target(context.default)}
        self.routes = [
            RouteSpec(path + slash, to, auth=_WAYS) for path in PATHS for slash in ("", "/")
        ]
        self.routes += [
            RouteSpec(path + slash, to, (), OPEN, ("GET", "POST"))
            for path in FLAGS
            for slash in ("", "/")
        ]

    def open(self, head: Head) -> BodyCodec:
        """See `Endpoint`."""
        query = head.target.partition("?")[2]
        said = "compression=gzip" in query and "Content-Encoding" not in head.headers
        return PosthogCodec("gzip" if said else "")

    def answer(self, result: IngestResult, head: Head) -> Response:  # noqa: ARG002
        """See `Endpoint`."""
        return Response(200, JSON, _ACCEPTED)

    def error(self, problem: Problem, head: Head) -> Response:  # noqa: ARG002
        """See `Endpoint`."""
        kind = problem.kind
        document = {
            "type": _TYPES.get(kind.status, "server_error"),
            "code": kind.slug.replace("-", "_"),
            "detail": f"{kind.title}: {problem.detail}",
            "attr": None,
        }
        return Response(kind.status, JSON, msgspec.json.encode(document), problem.headers)

    def probe(self, head: Head) -> Response:  # noqa: ARG002
        """See `Endpoint`."""
        return Response(200, JSON, b"{}")

    def describe(self, route: RouteSpec, target: str, form: Format | None) -> Description:  # noqa: ARG002
        """See `Endpoint`."""
        form_schema = {"type": "object", "properties": {"data": {"type": "string"}}}
        return Description(
            "application/json (events of PostHog: a batch, an array, or one)",
            operation(
                f"Send events of PostHog to {route.path}",
                "An event is a record. One with a `uuid` is accepted once.",
                {
                    "application/json": {"schema": {"type": ["object", "array"]}},
                    "application/x-www-form-urlencoded": {"schema": form_schema},
                },
                200,
                {"status": 1},
            ),
        )
