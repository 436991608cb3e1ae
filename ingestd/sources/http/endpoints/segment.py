"""The HTTP tracking API of Segment and RudderStack: messages of their libraries, unmodified.

https://segment.com/docs/connections/sources/catalog/libraries/server/http-api/

A record is a message as its library made it, less the write key. What a batch says for all of its
messages (`context`, `integrations`, `sentAt`) is put into each, where the message does not say it
itself; a message that came alone gets the `type` of its path. Its `messageId` is the id by which it
is recognised when it comes again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET, Raw, UnsetType

from ingestd.http.credentials import IN_BODY
from ingestd.http.response import JSON, Response
from ingestd.http.routing import path_of
from ingestd.sources.http.endpoints.base import (
    Description,
    Endpoint,
    RouteSpec,
    Target,
)
from ingestd.sources.http.endpoints.messages import (
    VALUE,
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
    from ingestd.http.problem import Problem
    from ingestd.sources.http.endpoints.base import (
        BodyCodec,
        BodyLimits,
        Decoded,
        EndpointContext,
        Head,
    )
    from ingestd.sources.http.result import IngestResult

BATCH = "/v1/batch"
TYPES = ("track", "identify", "page", "screen", "group", "alias")
_WAYS = ("basic", "bearer", IN_BODY)
_ACCEPTED = b'{"success":true}'
_MERGED = ("context", "integrations")


class _SegmentBatch(msgspec.Struct):
    batch: list[Raw] | UnsetType = UNSET
    context: Raw = Raw()
    integrations: Raw = Raw()
    sentAt: Raw = Raw()  # noqa: N815 - the protocol's word
    writeKey: Raw = Raw()  # noqa: N815


class _SegmentMessage(msgspec.Struct, gc=False):
    messageId: Raw = Raw()  # noqa: N815
    sentAt: Raw = Raw()  # noqa: N815
    writeKey: Raw = Raw()  # noqa: N815


_read_batch = msgspec.json.Decoder(_SegmentBatch)
_identify = MessageIds("segment").of
_read_named = msgspec.json.Decoder(_SegmentMessage).decode


class _SegmentCommon:
    """Members that a request has for all of its messages.

    Args:
        batch: the request.
        longest: most bytes of a message.
        kind: the type of its messages, if its path tells it.
    """

    def __init__(self, batch: _SegmentBatch, longest: int, kind: str = "") -> None:
        self._longest = longest
        self.members = {
            name: members for name in _MERGED if (members := read_object(getattr(batch, name)))
        }
        self.sent_at = batch.sentAt
        self.kind = kind
        # Put behind the members of a message that does not say it, and needs nothing else.
        self.tail = b',"sentAt":%b}' % bytes(batch.sentAt) if batch.sentAt else b"}"

    def message(self, raw: bytes) -> tuple[ClientMessage, bytes]:
        """Returns a message on its own, and the write key in it as it is written."""
        if raw[:1] != b"{":
            return ClientMessage(raw, fault="a message is a JSON object"), b""
        named = _read_named(raw)
        identity = _identify(named.messageId)
        if len(raw) > self._longest:
            return unfit(raw, self._longest, keyed=bool(named.writeKey)), bytes(named.writeKey)
        if self.kind or self.members or named.writeKey or not (named.messageId or named.sentAt):
            return ClientMessage(self._merged(raw), identity), bytes(named.writeKey)
        if self.sent_at and not named.sentAt:
            raw = raw[:-1] + self.tail
        return ClientMessage(raw, identity), b""

    def _merged(self, raw: bytes) -> bytes:
        members = read_object(raw) or {}
        members.pop("writeKey", None)
        for name, common in self.members.items():
            own = read_object(members[name]) if name in members else {}
            if own is not None:
                members[name] = Raw(write_object({**common, **own}))
        if self.sent_at:
            members.setdefault("sentAt", self.sent_at)
        if self.kind:
            members.setdefault("type", Raw(b'"%b"' % self.kind.encode()))
        return write_object(members)


class SegmentBatchCodec(MessagesCodec):
    """The messages of a batch."""

    def decode(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded]:
        """See `BodyCodec`."""
        bound_elements(body, limits)
        batch = read_body(_read_batch, body, limits)
        if batch.batch is UNSET:
            raise malformed("a batch is an object with its messages in the array `batch`")
        common_bytes = len(batch.context) + len(batch.integrations) + len(batch.sentAt)
        check_growth(len(batch.batch), common_bytes, limits)
        common = _SegmentCommon(batch, limits.record_bytes_max)
        with bound_depth(limits):
            found = [common.message(bytes(raw)) for raw in batch.batch]
        written = bytes(batch.writeKey) or next((key for _, key in found if key), b"")
        return lay_out([message for message, _ in found], limits, token=read_text(written))


class SegmentMessageCodec(MessagesCodec):
    """A message that came alone.

    Args:
        kind: its type.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def decode(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded]:
        """See `BodyCodec`."""
        raw = read_body(VALUE, body, limits)
        common = _SegmentCommon(_SegmentBatch(), limits.record_bytes_max, self._kind)
        with bound_depth(limits):
            message, written = common.message(bytes(raw))
        return lay_out([message], limits, token=read_text(written))


class SegmentEndpoint(Endpoint):
    """`POST /v1/batch`, `/v1/track`, `/v1/identify` and the like.

    Args:
        context: the pipelines.
    """

    formats = ("json",)

    def __init__(self, context: EndpointContext) -> None:
        to = {"": Target(context.default)}
        self._codecs: dict[str, BodyCodec] = {BATCH: SegmentBatchCodec()}
        self._codecs |= {f"/v1/{kind}": SegmentMessageCodec(kind) for kind in TYPES}
        self.routes = [RouteSpec(path, to, auth=_WAYS) for path in self._codecs]

    def open(self, head: Head) -> BodyCodec:
        """See `Endpoint`."""
        return self._codecs[path_of(head.target, head.method).rstrip("/")]

    def answer(self, result: IngestResult, head: Head) -> Response:  # noqa: ARG002
        """See `Endpoint`."""
        return Response(200, JSON, _ACCEPTED)

    def error(self, problem: Problem, head: Head) -> Response:  # noqa: ARG002
        """See `Endpoint`."""
        kind = problem.kind
        message = f"{kind.title}: {problem.detail}"
        body = msgspec.json.encode({"success": False, "code": kind.slug, "message": message})
        return Response(kind.status, JSON, body, problem.headers)

    def describe(self, route: RouteSpec, target: str, form: Format | None) -> Description:  # noqa: ARG002
        """See `Endpoint`."""
        if route.path == BATCH:
            takes = "application/json (messages of Segment or RudderStack in `batch`)"
            schema = {"required": ["batch"], "properties": {"batch": {"type": "array"}}}
        else:
            takes = "application/json (one message of Segment or RudderStack)"
            schema = {}
        return Description(
            takes,
            operation(
                f"Send messages of Segment to {route.path}",
                "A message is a record. One with a `messageId` is accepted once.",
                {"application/json": {"schema": {"type": "object", **schema}}},
                200,
                {"success": True},
            ),
        )
