"""Whole bodies: the records in them, and the threads in which large ones are decoded."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec

from ingestd.base.bursts import ComputeThread, compute_beside, let_loop_go_first
from ingestd.base.record import InvalidRecord, Layout, Records, pack_sizes
from ingestd.codecs import utf8
from ingestd.codecs.json import has_longer_line, holds_more, is_deeper, without_lone_surrogates
from ingestd.codecs.lines import (
    BOM,
    KEPT_BYTES,
    Parsed,
    json_fault,
    not_utf8,
    parse_canonical,
    parse_lines,
    squeeze,
    too_deep,
    whole_lines,
)
from ingestd.codecs.lines import too_large as refuse_too_large
from ingestd.http import problem
from ingestd.http.body import inflate, inflate_short
from ingestd.http.problem import ERRORS_MAX, Problem
from ingestd.sources.http.endpoints.base import QUICK_BYTES, BodyCodec, Decoded
from ingestd.sources.http.headers import take_fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ingestd.base.record import Format
    from ingestd.http.admission import Reservation
    from ingestd.http.settings import HttpSettings
    from ingestd.sources.http.endpoints.base import BodyLimits, Delivery


PIECE_BYTES = 128 * 1024
"""Lines are checked this many bytes at a time, so that nobody waits long for the interpreter."""

INVALID_FREE = 200
"""So many records of a request may be invalid before they have to be no more than the good ones."""

_ELEMENTS_SURE = 200_000
_JOINED_TOGETHER = 4096
_ELEMENTS_FEW = 20_000
_SURROGATES = (b"\\ud", b"\\uD")  # halves of pairs are looked for one by one
_NONE: Mapping[int, bytes] = MappingProxyType({})
_ELEMENTS = msgspec.json.Decoder(list[msgspec.Raw])
_WHITESPACE = b" \t\r\n"
_OPENED = (b"{", b"[", b"[{")  # a first line of JSON over several lines
_CONTROLS = bytes(range(0x20))


def checked(parsed: Parsed, bounds: BodyLimits) -> tuple[Decoded]:
    """Returns the records of a body, as one part, if they can be accepted.

    Raises:
        Problem: 400 if none can, or most can't, 413 if there are too many.
    """
    if not parsed.total:
        raise Problem(problem.EMPTY, "the body holds no record")
    if parsed.total > bounds.records_max:
        raise too_many(bounds)
    check_good(parsed.records.count, parsed.refused, parsed.unlisted)
    return (Decoded(parsed),)


def check_good(good: int, refused: list[InvalidRecord], unlisted: int = 0) -> None:
    """Refuses a request in which no record can be accepted, or most can't.

    Raises:
        Problem: 400, or 413 if they are all too large.
    """
    if not good:
        raise nothing_good(refused, unlisted)
    if is_mostly_invalid(good, len(refused) + unlisted):
        raise mostly_invalid(refused)


def parse_made(
    lines: bytes, count: int, bounds: BodyLimits, first: int = 0, *, listed_max: int = ERRORS_MAX
) -> Parsed:
    """Returns records that an endpoint has made of a body, less those that are too large.

    Args:
        lines: JSON, each ended by LF.
        count: of them.
        bounds: of the records.
        first: the index of the first one in the body.
        listed_max: so many of those that are too large are listed.
    """
    longest = bounds.record_bytes_max
    if not has_longer_line(lines, longest):
        return Parsed(Records(Layout.LINES, count, lines), [])
    return parse_lines(lines, "json", longest, first, bounds.depth_max, listed_max=listed_max)


def is_mostly_invalid(good: int, invalid: int) -> bool:
    """Tells if a request is refused whole because of its invalid records.

    Each invalid record costs as much as many good ones, and its sender has to look anyway.
    """
    return invalid > INVALID_FREE and invalid > good


def _decode_canonical(body: bytes, bounds: BodyLimits) -> Parsed | None:
    """Returns the records of JSON lines that are all good as they are; `None` of any other body.

    A line that has to be looked at by itself takes 50 times as long as one among many good ones,
    and may have two bytes.

    Raises:
        Problem: 413.
    """
    block = body if body[-1:] == b"\n" else body + b"\n"
    parsed = parse_canonical(block, bounds.record_bytes_max, bounds.depth_max)
    if parsed is not None and parsed.total > bounds.records_max:
        raise too_many(bounds)
    return parsed


def _parse_all_lines(body: bytes, form: Format, bounds: BodyLimits) -> Parsed:
    """Returns the records of lines, at most `bounds.records_max`."""
    if body[:3] == BOM:
        body = body[3:]
    if not body:
        return Parsed(Records.lines([]), [])
    if body[-1:] != b"\n":
        body += b"\n"
    if len(body) <= PIECE_BYTES:
        return parse_lines(
            body, form, bounds.record_bytes_max, 0, bounds.depth_max, listed_max=ERRORS_MAX
        )
    lines_max = body.count(b"\n")
    if lines_max > bounds.records_max:
        # Only lines that are not empty count; more of them than records are not taken apart.
        body = squeeze(body)
        lines_max = body.count(b"\n")
        if lines_max > bounds.records_max:
            raise too_many(bounds)
    return _parse_pieces(body, form, bounds, lines_max)


def _parse_pieces(body: bytes, form: Format, bounds: BodyLimits, lines_max: int) -> Parsed:
    """Lines, a piece at a time; there are at most `lines_max` of them."""
    good: list[bytes] = []  # stays empty as long as all of the body is good as it is
    refused: list[InvalidRecord] = []
    count = invalid = end = 0
    for piece in whole_lines(body, PIECE_BYTES):
        let_loop_go_first()
        part = parse_lines(
            piece,
            form,
            bounds.record_bytes_max,
            count + invalid,
            bounds.depth_max,
            listed_max=ERRORS_MAX - len(refused),
        )
        if part.records.payload is not piece and not good:
            good.append(body[:end])
        if good:
            good.append(part.records.payload)
        count += part.records.count
        invalid += part.invalid
        refused += part.refused
        end += len(piece)
        if count and is_mostly_invalid(lines_max - invalid, invalid):  # whatever may follow
            raise mostly_invalid(refused)
    payload = b"".join(good) if good else body
    return Parsed(Records(Layout.LINES, count, payload), refused, invalid - len(refused))


def _parse_document(body: bytes, bounds: BodyLimits) -> Parsed:
    """Returns the elements of a JSON array, or any other JSON value as one record."""
    if body.lstrip(_WHITESPACE)[:1] != b"[":
        return _parse_value(body, bounds)
    if body.count(b",") >= _ELEMENTS_SURE:
        _bound_elements(body, bounds)
    values, lone = _decode_elements(body, bounds)
    if (at := utf8.find_fault(body)) >= 0:
        raise _malformed(body, not_utf8(at))
    if len(values) > bounds.records_max:
        del values  # the error holds this frame until the event loop has seen it
        raise too_many(bounds)
    return lay_out(values, bounds, lone)


def _decode_elements(body: bytes, bounds: BodyLimits) -> tuple[list[msgspec.Raw], dict[int, bytes]]:
    """Returns the elements of an array, and those with half a surrogate pair as they were sent.

    No decoder takes a body with one of these, and beside good ones they are invalid, as lines are.
    """
    try:
        return _ELEMENTS.decode(body), {}
    except (msgspec.DecodeError, RecursionError):
        mended = without_lone_surrogates(body)
    try:
        values = _ELEMENTS.decode(mended)
    except (msgspec.DecodeError, RecursionError):
        raise _malformed(body, json_fault(mended, bounds.depth_max)) from None
    lone, at = {}, body.index(b"[") + 1
    for index, value in enumerate(values):
        start = mended.find(value, at)  # behind white space and a comma; both bodies are as long
        at = start + memoryview(value).nbytes
        if body[start:at] != mended[start:at]:
            lone[index] = body[start:at]
    return values, lone


def _bound_elements(body: bytes, bounds: BodyLimits) -> None:
    """Refuses an array with too many elements without holding all of them."""
    try:
        many = holds_more(body, bounds.records_max)
    except (UnicodeDecodeError, RecursionError):
        detail = json_fault(body, bounds.depth_max) or too_deep(bounds.depth_max)
        raise _malformed(body, detail) from None
    if many:
        raise too_many(bounds)


def lay_out(
    values: list[msgspec.Raw], bounds: BodyLimits, lone: Mapping[int, bytes] = _NONE
) -> Parsed:
    """Lays out JSON values as records: lines if none holds an LF.

    Args:
        values: all of a body.
        bounds: of the records.
        lone: values with half a surrogate pair, by their index.
    """
    sizes = [memoryview(value).nbytes for value in values]
    refused: list[InvalidRecord] = []
    unlisted = 0
    # Only a long element can be nested deeply; see `ingestd.codecs.json`.
    if lone or (sizes and max(sizes) > min(bounds.record_bytes_max, 2 * bounds.depth_max)):
        refused = _refuse_elements(values, sizes, bounds, lone)
        bad = {one.index for one in refused}.union(lone)
        unlisted = len(bad) - len(refused)
        if bad:
            values = [value for index, value in enumerate(values) if index not in bad]
            sizes = [size for index, size in enumerate(sizes) if index not in bad]
    count = len(values)
    payload = b"\n".join([*_runs(values, b"\n"), b""])
    if payload.count(b"\n") == count:
        return Parsed(Records(Layout.LINES, count, payload), refused, unlisted)
    records = Records(Layout.SIZED, count, b"".join(_runs(values, b"")), pack_sizes(sizes))
    return Parsed(records, refused, unlisted)


def _runs(values: list[msgspec.Raw], between: bytes) -> Iterator[bytes]:
    """Joins values, some at a time: one `join` of all takes 80 bytes more for each of them."""
    for at in range(0, len(values), _JOINED_TOGETHER):
        yield between.join(values[at : at + _JOINED_TOGETHER])


def _refuse_elements(
    values: list[msgspec.Raw], sizes: list[int], bounds: BodyLimits, lone: Mapping[int, bytes]
) -> list[InvalidRecord]:
    """The values that are no records; of those with half a surrogate pair the first ones."""
    refused: list[InvalidRecord] = []
    for index, size in enumerate(sizes):
        if index in lone and len(refused) >= ERRORS_MAX:
            continue
        if size > bounds.record_bytes_max:
            head = lone.get(index) or bytes(memoryview(values[index])[:KEPT_BYTES])
            refused.append(refuse_too_large(index, size, bounds.record_bytes_max, head))
        elif index in lone:
            detail = json_fault(lone[index], bounds.depth_max)
            refused.append(InvalidRecord(index, "malformed", detail, lone[index]))
        elif size > 2 * bounds.depth_max and is_deeper(bytes(values[index]), bounds.depth_max):
            detail = too_deep(bounds.depth_max)
            refused.append(InvalidRecord(index, "malformed", detail, bytes(values[index])))
    return refused


def _parse_value(body: bytes, bounds: BodyLimits) -> Parsed:
    """Returns one JSON value as one record."""
    value = body.strip(_WHITESPACE)
    if not value:
        return Parsed(Records.lines([]), [])
    if len(value) <= bounds.record_bytes_max and (detail := json_fault(body, bounds.depth_max)):
        raise _malformed(value, detail)
    return _parse_one(value, bounds, Layout.SIZED if b"\n" in value else Layout.LINES)


def _parse_one(value: bytes, bounds: BodyLimits, layout: Layout) -> Parsed:
    """Returns bytes as one record."""
    if len(value) > bounds.record_bytes_max:
        detail = f"{len(value)} bytes, more than record_bytes_max = {bounds.record_bytes_max}"
        raise Problem(problem.RECORD_TOO_LARGE, detail)
    if layout is Layout.LINES:
        return Parsed(Records(layout, 1, value + b"\n"), [])
    if not value:
        return Parsed(Records.sized([]), [])
    return Parsed(Records(layout, 1, value, pack_sizes([len(value)])), [])


def _malformed(value: bytes, detail: str) -> Problem:
    return nothing_good([InvalidRecord(0, "malformed", detail, value[:KEPT_BYTES])])


def nothing_good(refused: list[InvalidRecord], unlisted: int = 0) -> Problem:
    """The problem of a body in which no record can be accepted; `refused` is not empty."""
    if all(one.reason == "too_large" for one in refused):
        detail = f"too large: {refused[0].detail}"
        return Problem(problem.RECORD_TOO_LARGE, detail, refused=refused)
    detail = f"record {refused[0].index}: {refused[0].detail}"
    if len(refused) + unlisted > 1:
        detail += f" (and {len(refused) + unlisted - 1} more)"
        if refused[0].payload.strip(_WHITESPACE) in _OPENED:
            detail += (
                "; each line is one record: send JSON over several lines with"
                " Content-Type: application/json"
            )
    return Problem(problem.MALFORMED, detail, refused=refused)


def mostly_invalid(refused: list[InvalidRecord]) -> Problem:
    """The problem of a request with more invalid records than good ones."""
    detail = f"more than {INVALID_FREE} records are invalid, and more than are good"
    if refused:
        detail += f"; record {refused[0].index}: {refused[0].detail}"
    return Problem(problem.MOSTLY_INVALID, detail, refused=refused)


def too_many(bounds: BodyLimits) -> Problem:
    """The problem of a body with more records than there may be."""
    return Problem(problem.TOO_MANY_RECORDS, f"more than http.records_max = {bounds.records_max}")


def too_large_expanded(bounds: BodyLimits) -> Problem:
    """The problem of records that are much larger than their body, as each repeats parts of it."""
    detail = f"as records, more than http.decompressed_bytes_max = {bounds.bytes_max}"
    return Problem(problem.PAYLOAD_TOO_LARGE, detail)


def bound_as_json(text: bytes, bounds: BodyLimits) -> None:
    """Checks what texts take as strings in JSON.

    A control character has six bytes there, and what is not UTF-8 three.

    Raises:
        Problem: 413.
    """
    size = len(text)
    if 6 * size > bounds.bytes_max:
        controls = size - len(text.translate(None, _CONTROLS))
        if 3 * size > bounds.bytes_max:
            size = utf8.size_replaced(text)
        if size + 5 * controls > bounds.bytes_max:
            raise too_large_expanded(bounds)


class LinesCodec(BodyCodec):
    """One record a line.

    Args:
        form: of the records.
    """

    streamable = True

    def __init__(self, form: Format) -> None:
        self._form = form

    def decode(self, body: bytes, limits: BodyLimits) -> tuple[Decoded]:
        """See `BodyCodec`."""
        return checked(_parse_all_lines(body, self._form, limits), limits)

    def decode_quickly(self, body: bytes, limits: BodyLimits) -> tuple[Decoded] | None:
        """See `BodyCodec`."""
        if self._form != "json":
            return self.decode(body, limits)
        parsed = _decode_canonical(body, limits)
        if parsed is not None:
            return (Decoded(parsed),)
        return self.decode(body, limits) if len(body) < QUICK_BYTES else None


class DocumentCodec(BodyCodec):
    """One JSON text: an array is one record an element, anything else is one record."""

    def decode(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded]:
        """See `BodyCodec`."""
        return checked(_parse_document(body, limits), limits)

    def decode_quickly(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded] | None:
        """See `BodyCodec`."""
        quick = len(body) < QUICK_BYTES or not (
            body.count(b",") >= _ELEMENTS_FEW
            or (b"\\" in body and any(one in body for one in _SURROGATES))
        )
        return self.decode(body, limits) if quick else None


class ValueCodec(BodyCodec):
    """One JSON text, one record."""

    def decode(self, body: bytes, limits: BodyLimits) -> tuple[Decoded]:
        """See `BodyCodec`."""
        return checked(_parse_value(body, limits), limits)

    decode_quickly = decode


class WholeCodec(BodyCodec):
    """The body is the record."""

    def decode(self, body: bytes, limits: BodyLimits) -> tuple[Decoded]:
        """See `BodyCodec`."""
        return checked(_parse_one(body, limits, Layout.SIZED), limits)

    decode_quickly = decode


# -- whole bodies ----------------------------------------------------------------------------------
#
# What is done to a whole body: small ones at once, on the event loop, large ones in a thread.

THREAD_BYTES = 256 * 1024
"""From this size on it is a thread's work. Checking 256 KiB of good JSON lines takes 0.3 ms, or 10
ms if they have two bytes each, and going to a thread and back about 0.1 ms, with the interpreter's
lock shared either way."""

LARGE_BYTES = 4 * 1024 * 1024
"""Such bodies, and compressed ones that are not short, are parsed one at a time: what they need
beside themselves is as large as they are, and others have a thread where they do not wait for them.
"""


class BodyDecoder:
    """Decompresses, verifies and decodes bodies: small ones on the event loop, others in threads.

    Args:
        settings: the bounds.

    Attributes:
        stream_thread: the one for pieces of streams, which come at any rate.
    """

    def __init__(self, settings: HttpSettings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._thread = ComputeThread("http-body", self._loop)
        self.stream_thread = self._make_thread("http-stream")
        self._large = self._make_thread("http-large")

    def _make_thread(self, name: str) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(
            1, thread_name_prefix=name, initializer=compute_beside, initargs=(self._loop,)
        )

    def close(self) -> None:
        """Ends the threads; work that was begun is finished and thrown away."""
        self._thread.close()
        for thread in (self.stream_thread, self._large):
            thread.shutdown(wait=False, cancel_futures=True)

    async def decode(
        self, wire: bytes, hold: Reservation, *, encoding: str, codec: BodyCodec, limits: BodyLimits
    ) -> Sequence[Decoded]:
        """Returns the records of a body, which may be larger than it was.

        Raises:
            Problem: see `BodyCodec.decode` and `inflate`, or there is no room for them.
        """
        parts = await self._read(wire, hold, encoding=encoding, codec=codec, limits=limits)
        size = sum(len(part.parsed.records.payload) for part in parts)
        if size > hold.bytes:
            hold.grow(size - hold.bytes)
        return parts

    async def _read(
        self, wire: bytes, hold: Reservation, *, encoding: str, codec: BodyCodec, limits: BodyLimits
    ) -> Sequence[Decoded]:
        if encoding == "identity" or not wire:
            return await self._decode(wire, codec, limits)
        settings = self._settings
        if len(wire) < THREAD_BYTES:
            short = inflate_short(encoding, wire, settings.decompressed_bytes_max)
            if short is not None:
                hold.grow(len(short))
                return await self._decode(short, codec, limits)

        def finish() -> Sequence[Decoded]:
            body = inflate(
                encoding,
                wire,
                settings.decompressed_bytes_max,
                settings.inflate_ratio_max,
                hold.grow,
            )
            return codec.decode(body, limits)

        return await self._loop.run_in_executor(self._large, finish)

    async def _decode(self, body: bytes, codec: BodyCodec, limits: BodyLimits) -> Sequence[Decoded]:
        if len(body) < THREAD_BYTES:
            parts = codec.decode_quickly(body, limits)
            if parts is not None:
                return parts
        if len(body) < LARGE_BYTES:
            return await self._thread.run(codec.decode, body, limits)
        return await self._loop.run_in_executor(self._large, codec.decode, body, limits)

    async def verify(self, codec: BodyCodec, wire: bytes) -> Delivery | None:
        """See `BodyCodec.verify`."""
        if len(wire) < THREAD_BYTES:
            return codec.verify(wire)
        return await self._thread.run(codec.verify, wire)

    async def fingerprint(self, wire: bytes, content_type: str, encoding: str) -> bytes:
        """See `take_fingerprint`."""
        if len(wire) < THREAD_BYTES:
            return take_fingerprint(wire, content_type, encoding)
        return await self._thread.run(take_fingerprint, wire, content_type, encoding)
