"""Messages of clients: JSON objects with ids of their own, which become records as they are.

What a message says and what its request says besides is put together by its endpoint. Here it is
laid out as records, with the ids by which one that comes again is recognised (`Decoded.ids`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from ingestd.base.append import ID_BYTES, SenderIds
from ingestd.base.bursts import let_loop_go_first
from ingestd.base.record import InvalidRecord, Layout, Records
from ingestd.codecs.json import holds_deeper, is_deeper, without_lone_surrogates
from ingestd.codecs.lines import KEPT_BYTES, Parsed, json_fault, not_utf8, too_deep, too_large
from ingestd.codecs.utf8 import find_fault
from ingestd.http import problem
from ingestd.http.problem import Problem
from ingestd.sources.http.decode import checked
from ingestd.sources.http.endpoints.base import QUICK_BYTES, BodyCodec, Decoded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ingestd.sources.http.endpoints.base import BodyLimits

T = TypeVar("T")

_NO_ID = frozenset((b"", b"null", b'""'))
_ELEMENTS_SURE = 500_000
_WINDOW_BYTES = 1024 * 1024
_QUICK_BRACES = 2000
"""With so few braces a body has few enough messages for a few milliseconds."""
_text = msgspec.json.Decoder(str).decode
VALUE = msgspec.json.Decoder(msgspec.Raw)
ARRAY = msgspec.json.Decoder(list[msgspec.Raw])


class _Outer(msgspec.Struct):
    batch: msgspec.Raw = msgspec.Raw()


_OUTER = msgspec.json.Decoder(_Outer)
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
        id: as `MessageIds` makes it.
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


class MessageIds:
    """Makes the ids of an endpoint's messages from how these write them in JSON.

    Args:
        endpoint: its name.
    """

    def __init__(self, endpoint: str) -> None:
        self._begun = hashlib.blake2b(f"{endpoint}\0".encode(), digest_size=ID_BYTES)

    def of(self, raw: bytes | msgspec.Raw) -> bytes:
        """Returns the id of a message; empty if it is missing, empty or null."""
        written = bytes(raw)
        if written in _NO_ID:
            return b""
        digest = self._begun.copy()
        digest.update(written)
        return digest.digest()


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
    """Returns a body as its protocol has it; half a surrogate pair is U+FFFD.

    Raises:
        Problem: 400 if it is not JSON, or not of the protocol's form.
    """
    try:
        read = decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        mended = without_lone_surrogates(body)
        if mended != body:
            return read_body(decoder, mended, limits)
        fault = json_fault(body, limits.depth_max) or str(error)
        raise malformed(fault) from None
    if (at := find_fault(body)) >= 0:
        raise malformed(not_utf8(at))
    return read


@contextlib.contextmanager
def bound_depth(limits: BodyLimits) -> Iterator[None]:
    """Reads the messages of a body, which itself was just not too deep for the decoder.

    Raises:
        Problem: 400 if one of them is: the decoder stops where the interpreter's stack ends, of
            which less is left here.
    """
    try:
        yield
    except RecursionError:
        raise malformed(too_deep(limits.depth_max)) from None


def bound_elements(body: bytes, limits: BodyLimits) -> None:
    """Checks that a body, or its member `batch`, has no more elements than it may have records.

    Before the body is read: as objects, elements of two bytes take fifty times as much.

    Raises:
        Problem: 413, or 400 if the body cannot be read.
    """
    if len(body) < 2 * _ELEMENTS_SURE or body.count(b",") < _ELEMENTS_SURE:
        return
    array = bytes(read_body(VALUE, body, limits))
    if array[:1] == b"{":
        array = bytes(read_body(_OUTER, array, limits).batch)
    if array[:1] == b"[":
        _bound_array(array, limits)


def _bound_array(array: bytes, limits: BodyLimits) -> None:
    """Counts the elements of an array that is well-formed, a window of it in memory at a time."""
    window = max(2 * limits.record_bytes_max, _WINDOW_BYTES)
    decode = json.JSONDecoder(parse_int=len, parse_float=len).raw_decode
    skip = json.decoder.WHITESPACE.match  # type: ignore[attr-defined]
    start, count = 1, 0
    while start < len(array):
        # As Latin-1 each byte is one character, and what parts elements is the same.
        text, at = array[start : start + window].decode("latin-1"), 0
        try:
            while text[skip(text, at).end()] != "]":
                end = skip(text, decode(text, skip(text, at).end())[1]).end()
                if text[end] not in ",]":
                    raise malformed("a batch is an array")
                at, count = end + (text[end] == ","), count + 1
                if count > limits.records_max:
                    raise too_many(limits)
        except (ValueError, IndexError):
            if not at:
                detail = f"a record has more than record_bytes_max = {limits.record_bytes_max}"
                raise Problem(problem.RECORD_TOO_LARGE, detail) from None
        except RecursionError:
            raise malformed(too_deep(limits.depth_max)) from None
        else:
            return
        let_loop_go_first()
        start += at


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
    count = len(payloads)
    if any(b"\n" in payload for payload in payloads):
        records = Records.sized(payloads)
    else:
        records = Records(Layout.LINES, count, block or b"\n".join([*payloads, b""]))
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
