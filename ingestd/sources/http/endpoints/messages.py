"""Messages of clients: JSON objects with ids of their own, which become records as they are.

What a message says and what its request says besides is put together by its endpoint. Here it is
laid out as records, with the ids by which one that comes again is recognised (`Decoded.ids`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from ingestd.base.append import SenderIds, sender_id
from ingestd.base.record import InvalidRecord, Layout, Records
from ingestd.codecs.json import holds_deeper, holds_more, is_deeper
from ingestd.codecs.lines import KEPT_BYTES, Parsed, json_fault, too_deep, too_large
from ingestd.http import problem
from ingestd.http.problem import Problem
from ingestd.sources.http.decode import checked
from ingestd.sources.http.endpoints.base import QUICK_BYTES, BodyCodec, Decoded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ingestd.sources.http.endpoints.base import BodyLimits

T = TypeVar("T")

_NO_ID = frozenset((b"", b"null", b'""'))
_ELEMENTS_SURE = 200_000
_QUICK_BRACES = 2000
"""With so few braces a body has few enough messages for a few milliseconds."""
_text = msgspec.json.Decoder(str).decode
_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.encode


class MessagesCodec(BodyCodec):
    """Reads messages; a subclass has `decode`."""

    def decode_quickly(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded] | None:
        """See `BodyCodec`."""
        quick = len(body) < QUICK_BYTES or body.count(b"{") < _QUICK_BRACES
        return self.decode(body, limits) if quick else None


class ClientMessage(NamedTuple):
    """A message, or what stands in its place.

    Attributes:
        payload: a JSON text; the beginning of what was sent if there is a fault.
        id: as `message_id` makes it.
        fault: why it is no record; empty if it is one.
    """

    payload: bytes
    id: bytes = b""
    fault: str = ""


def unfit(raw: bytes, longest: int, *, keyed: bool) -> ClientMessage:
    """Returns a message that is too large; one that shows a token keeps none in a dead letter."""
    if not keyed:
        return ClientMessage(raw)
    return ClientMessage(b"", fault=f"{len(raw)} bytes, more than record_bytes_max = {longest}")


def message_id(endpoint: bytes, *parts: bytes | msgspec.Raw) -> bytes:
    """Returns the id of a message from its fields as they are written in JSON.

    Empty if one of them is empty or null.
    """
    written = [bytes(part) for part in parts]
    return b"" if _NO_ID.intersection(written) else sender_id(endpoint, *written)


def read_object(raw: bytes | msgspec.Raw) -> dict[str, msgspec.Raw] | None:
    """Returns the members of an object; `None` for any other value."""
    written = bytes(raw)
    return _object(written) if written[:1] == b"{" else None


def read_text(written: bytes | msgspec.Raw) -> str:
    """Returns a text from how it is written in JSON; empty for anything else."""
    try:
        return _text(written) if written else ""
    except msgspec.DecodeError:
        return ""


def write_object(members: Mapping[str, Any]) -> bytes:
    """Returns an object as JSON."""
    return _encode(members)


def read_body(decoder: msgspec.json.Decoder[T], body: bytes, limits: BodyLimits) -> T:
    """Returns a body as its protocol has it.

    Raises:
        Problem: 400 if it is not JSON, or not of the protocol's form.
    """
    try:
        read = decoder.decode(body)
        if not body.isascii():
            body.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        fault = json_fault(body, limits.depth_max) or str(error)
        raise malformed(fault) from None
    return read


def read_array(
    array: bytes | msgspec.Raw, body: bytes, limits: BodyLimits, what: str
) -> list[bytes]:
    """Returns the elements of an array in a body that was read.

    Args:
        array: as it is written.
        body: that has it.
        limits: of the request.
        what: should be the array, for people.

    Raises:
        Problem: 400 if it is no array, 413 if it has too many elements.
    """
    written = bytes(array)
    if written[:1] != b"[":
        raise malformed(what)
    try:
        # As objects, elements of two bytes take fifty times as much.
        if written.count(b",") >= _ELEMENTS_SURE and holds_more(written, limits.records_max):
            raise too_many(limits)
        return [bytes(element) for element in _list(written)]
    except RecursionError:
        raise malformed(json_fault(body, limits.depth_max) or "nested too deeply") from None


def too_many(limits: BodyLimits) -> Problem:
    """The problem of a body with more messages than a request may have."""
    detail = f"more than http.records_max = {limits.records_max}"
    return Problem(problem.TOO_MANY_RECORDS, detail)


def check_growth(count: int, common: int, limits: BodyLimits) -> None:
    """Bounds what a body becomes where each of its messages gets what all have in common.

    Args:
        count: of messages.
        common: bytes that each gets.
        limits: of the request.

    Raises:
        Problem: 413.
    """
    if common > limits.record_bytes_max or count * common > limits.bytes_max:
        detail = f"{common} bytes that are meant for each of {count} messages"
        raise Problem(problem.PAYLOAD_TOO_LARGE, detail)


def malformed(detail: str) -> Problem:
    """The problem of a body in which there is no message."""
    return Problem(problem.MALFORMED, detail)


def lay_out(
    messages: Sequence[ClientMessage], limits: BodyLimits, *, token: str = ""
) -> Sequence[Decoded]:
    """Returns the messages of a body as one part; one whose id came before in it is left out.

    Args:
        messages: in order; may be none.
        limits: of the request.
        token: see `Decoded`.

    Raises:
        Problem: see `checked`.
    """
    if not messages:
        return (Decoded(Parsed(Records.lines([]), []), token=token),)
    if len(messages) > limits.records_max:
        raise too_many(limits)
    payloads, ids, faults = (list(column) for column in zip(*messages, strict=True))
    refused: list[InvalidRecord] = []
    block = b"\n".join([*payloads, b""])
    if (
        any(faults)
        or max(map(len, payloads)) > limits.record_bytes_max
        or holds_deeper(block, payloads, limits.depth_max)
    ):
        refused = _refuse(messages, limits)
        _remove({one.index for one in refused}, payloads, ids)
        block = b""
    known = frozenset(ids) - {b""}
    if len(known) < len(ids) - ids.count(b""):
        _remove(_repeated(ids), payloads, ids)
        block = b""
    block = block or b"\n".join([*payloads, b""])
    count = len(payloads)
    records = (
        Records(Layout.LINES, count, block)
        if block.count(b"\n") == count
        else Records.sized(payloads)
    )
    (part,) = checked(Parsed(records, refused), limits)
    return (part._replace(ids=SenderIds(tuple(ids), known), token=token),)


def _repeated(ids: Sequence[bytes]) -> set[int]:
    """The places of ids that came before."""
    seen: set[bytes] = set()
    places: set[int] = set()
    for place, one in enumerate(ids):
        if one and one in seen:
            places.add(place)
        seen.add(one)
    return places


def _remove(places: set[int], *columns: list[bytes]) -> None:
    for column in columns:
        column[:] = [one for place, one in enumerate(column) if place not in places]


def _refuse(messages: Sequence[ClientMessage], limits: BodyLimits) -> list[InvalidRecord]:
    refused = []
    for index, (payload, _, fault) in enumerate(messages):
        if fault:
            refused.append(InvalidRecord(index, "malformed", fault, payload[:KEPT_BYTES]))
        elif len(payload) > limits.record_bytes_max:
            refused.append(too_large(index, len(payload), limits.record_bytes_max, payload))
        elif is_deeper(payload, limits.depth_max):
            refused.append(InvalidRecord(index, "malformed", too_deep(limits.depth_max), payload))
    return refused


# -- descriptions ----------------------------------------------------------------------------------


def operation(
    summary: str, description: str, content: Mapping[str, Any], status: int, example: object
) -> dict[str, Any]:
    """Returns the OpenAPI operation of a route that takes messages.

    Args:
        summary: in a few words.
        description: in a paragraph.
        content: schemas of bodies by media type.
        status: of the answer to a request that was accepted.
        example: its body.
    """
    as_json = {"application/json": {"schema": {}, "example": example}} if example else {}
    return {
        "summary": summary,
        "description": description,
        "requestBody": {"required": True, "content": dict(content)},
        "responses": {
            str(status): {"description": "Accepted and durable", "content": as_json},
        },
    }
