"""A whole body: what its type says about it, and the records in it. No I/O."""

from __future__ import annotations

import asyncio
import enum
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from ingestd.base.bursts import compute_beside, let_loop_go_first
from ingestd.base.record import InvalidRecord, Layout, Records, pack_sizes
from ingestd.codecs.json import DEPTH_MAX, holds_more, is_deeper, is_json
from ingestd.codecs.lines import (
    BOM,
    KEPT_BYTES,
    Parsed,
    json_fault,
    parse_canonical,
    parse_lines,
    squeeze,
    too_deep,
)
from ingestd.codecs.lines import too_large as refuse_too_large
from ingestd.http import problem
from ingestd.http.body import inflate, inflate_short
from ingestd.http.problem import ERRORS_MAX, Problem
from ingestd.sources.http.headers import take_fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiohttp import web

    from ingestd.base.record import Format
    from ingestd.http.admission import Reservation
    from ingestd.http.settings import HttpSettings
    from ingestd.sources.http.endpoints.webhooks import Delivery, Webhook


PIECE_BYTES = 128 * 1024
"""Lines are checked this many bytes at a time, so that nobody waits long for the interpreter."""

QUICK_BYTES = 4 * 1024
"""A body of this size is parsed quickly whatever is in it."""

INVALID_FREE = 200
"""So many records of a request may be invalid before they have to be no more than the good ones."""

INVALID_KEPT = 10
"""The default of `http.invalid_kept`."""

_ELEMENTS_SURE = 200_000
_ELEMENTS_FEW = 20_000
_ELEMENTS = msgspec.json.Decoder(list[msgspec.Raw])
_WHITESPACE = b" \t\r\n"


class BodyFormat(enum.Enum):
    """How the records lie in a body."""

    LINES = "one record a line"
    DOCUMENT = "one JSON text"
    WHOLE = "the body is the record"
    VALUE = "one JSON text, one record"


class BodyLimits(NamedTuple):
    """Of one request to one pipeline.

    Attributes:
        records_max: most records in a body.
        record_bytes_max: a longer record is refused.
        depth_max: JSON that is nested deeper is refused.
        invalid_kept: so many refused records are kept as dead letters.
    """

    records_max: int
    record_bytes_max: int
    depth_max: int = DEPTH_MAX
    invalid_kept: int = INVALID_KEPT


_NDJSON = (
    "application/x-ndjson",
    "application/ndjson",
    "application/jsonl",
    "application/x-jsonlines",
)
_UNSAID = ("", "application/x-www-form-urlencoded")  # curl says the second one by itself
_TYPES: dict[Format, dict[str, BodyFormat]] = {
    "json": {
        "application/json": BodyFormat.DOCUMENT,
        **dict.fromkeys((*_NDJSON, *_UNSAID), BodyFormat.LINES),
    },
    "text": dict.fromkeys(("text/plain", *_UNSAID), BodyFormat.LINES),
    "bytes": dict.fromkeys(("application/octet-stream", *_UNSAID), BodyFormat.WHOLE),
}
_CHARSETS = ("", "utf-8", "utf8", "us-ascii")
_CHARSET = re.compile(r';[ \t]*charset[ \t]*=[ \t]*("[^"]*"|[^;\s]*)', re.IGNORECASE)
_TYPE_CHARACTERS_MAX = 1024


def format_of(content_type: str, form: Format) -> BodyFormat:
    """What a `Content-Type` (empty if there is none) means to a pipeline of a format.

    Raises:
        Problem: 415.
    """
    if len(content_type) > _TYPE_CHARACTERS_MAX:
        raise Problem(
            problem.MEDIA_TYPE, f"Content-Type has more than {_TYPE_CHARACTERS_MAX} characters"
        )
    return _reading_of(content_type, form)


@lru_cache(maxsize=256)
def _reading_of(content_type: str, form: Format) -> BodyFormat:
    said, _, parameters = content_type.partition(";")
    said = said.strip().lower()
    reading = _TYPES[form].get(said)
    if reading is None and form == "json" and is_json(said):
        reading = BodyFormat.DOCUMENT
    if reading is None:
        takes = ", ".join(kind for kind in _TYPES[form] if kind not in _UNSAID)
        takes += ", application/*+json" if form == "json" else ""
        detail = f"{said[:80]!r} sent to a {form} pipeline, which takes {takes}"
        raise Problem(problem.MEDIA_TYPE, detail, headers={"Accept": takes})
    found = _CHARSET.search(";" + parameters)
    charset = found[1].strip('"').lower() if found else ""
    if reading is not BodyFormat.WHOLE and charset not in _CHARSETS:
        raise Problem(problem.MEDIA_TYPE, f"charset {charset[:40]!r}; only utf-8 is read")
    return reading


def parse_body(body: bytes, reading: BodyFormat, form: Format, bounds: BodyLimits) -> Parsed:
    """The records of a body, at least one of them good.

    Raises:
        Problem: 400 if nothing can be accepted, 413 if it is too much.
    """
    if reading is BodyFormat.LINES:
        parsed = _parse_all_lines(body, form, bounds)
    elif reading is BodyFormat.DOCUMENT:
        parsed = _parse_document(body, bounds)
    elif reading is BodyFormat.VALUE:
        parsed = _parse_value(body, bounds)
    else:
        parsed = _parse_one(body, bounds, Layout.SIZED)
    if not parsed.total:
        raise Problem(problem.EMPTY, "the body holds no record")
    if parsed.total > bounds.records_max:
        raise _too_many(bounds)
    if not parsed.records.count:
        raise nothing_good(parsed.refused, parsed.unlisted)
    if is_mostly_invalid(parsed.records.count, parsed.invalid):
        raise mostly_invalid(parsed.refused)
    return parsed


def is_mostly_invalid(good: int, invalid: int) -> bool:
    """Whether a request is refused whole because of what is in it beside good records.

    Each invalid record costs as much as many good ones, and its sender has to look anyway.
    """
    return invalid > INVALID_FREE and invalid > good


def parse_quickly(
    body: bytes, reading: BodyFormat, form: Format, bounds: BodyLimits
) -> Parsed | None:
    """The same in a few milliseconds, or nothing if it may take longer.

    A line that has to be looked at by itself takes 50 times as long as one among many good ones,
    and may have two bytes.

    Raises:
        Problem: see `parse_body`.
    """
    if form != "json" or reading is BodyFormat.WHOLE or reading is BodyFormat.VALUE:
        return parse_body(body, reading, form, bounds)
    small = len(body) < QUICK_BYTES
    if reading is BodyFormat.DOCUMENT:
        quick = small or body.count(b",") < _ELEMENTS_FEW
        return parse_body(body, reading, form, bounds) if quick else None
    block = body if body[-1:] == b"\n" else body + b"\n"
    count = 0
    for piece in _pieces(block) if len(block) > PIECE_BYTES else (block,):
        parsed = parse_canonical(piece, bounds.record_bytes_max, bounds.depth_max)
        if parsed is None:
            return parse_body(body, reading, form, bounds) if small else None
        count += parsed.total
    if count > bounds.records_max:
        raise _too_many(bounds)
    return Parsed(Records(Layout.LINES, count, block), [])


def _parse_all_lines(body: bytes, form: Format, bounds: BodyLimits) -> Parsed:
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
            raise _too_many(bounds)
    return _parse_pieces(body, form, bounds, lines_max)


def _parse_pieces(body: bytes, form: Format, bounds: BodyLimits, lines_max: int) -> Parsed:
    """Lines, a piece at a time; there are at most `lines_max` of them."""
    good: list[bytes] = []  # stays empty as long as all of the body is good as it is
    refused: list[InvalidRecord] = []
    count = invalid = end = 0
    for piece in _pieces(body):
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


def _pieces(body: bytes) -> Iterator[bytes]:
    """Whole lines, about `PIECE_BYTES` at a time."""
    start = 0
    while start < len(body):
        end = body.rfind(b"\n", start, start + PIECE_BYTES) + 1
        if not end:
            end = body.index(b"\n", start) + 1
        yield body[start:end]
        start = end


def _parse_document(body: bytes, bounds: BodyLimits) -> Parsed:
    if body.lstrip(_WHITESPACE)[:1] != b"[":
        return _parse_value(body, bounds)
    if body.count(b",") >= _ELEMENTS_SURE:
        _bound_elements(body, bounds)
    try:
        values = _ELEMENTS.decode(body)
        if not body.isascii():
            body.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _malformed(body, json_fault(body, bounds.depth_max)) from None
    if len(values) > bounds.records_max:
        raise _too_many(bounds)
    return _lay_out(values, bounds)


def _bound_elements(body: bytes, bounds: BodyLimits) -> None:
    """Refuses an array with too many elements without holding all of them."""
    try:
        many = holds_more(body, bounds.records_max)
    except (UnicodeDecodeError, RecursionError):
        detail = json_fault(body, bounds.depth_max) or too_deep(bounds.depth_max)
        raise _malformed(body, detail) from None
    if many:
        raise _too_many(bounds)


def _lay_out(values: list[msgspec.Raw], bounds: BodyLimits) -> Parsed:
    """The elements of an array as records: lines if none holds an LF."""
    sizes = [memoryview(value).nbytes for value in values]
    refused: list[InvalidRecord] = []
    # Only a long element can be nested deeply; see `ingestd.codecs.json`.
    if sizes and max(sizes) > min(bounds.record_bytes_max, 2 * bounds.depth_max):
        refused = _refuse_elements(values, sizes, bounds)
        bad = {one.index for one in refused}
        if bad:
            values = [value for index, value in enumerate(values) if index not in bad]
            sizes = [size for index, size in enumerate(sizes) if index not in bad]
    count = len(values)
    payload = b"\n".join([*values, msgspec.Raw(b"")])
    if payload.count(b"\n") == count:
        return Parsed(Records(Layout.LINES, count, payload), refused)
    records = Records(Layout.SIZED, count, b"".join(values), pack_sizes(sizes))
    return Parsed(records, refused)


def _refuse_elements(
    values: list[msgspec.Raw], sizes: list[int], bounds: BodyLimits
) -> list[InvalidRecord]:
    refused: list[InvalidRecord] = []
    for index, size in enumerate(sizes):
        if size > bounds.record_bytes_max:
            head = bytes(memoryview(values[index])[:KEPT_BYTES])
            refused.append(refuse_too_large(index, size, bounds.record_bytes_max, head))
        elif size > 2 * bounds.depth_max and is_deeper(bytes(values[index]), bounds.depth_max):
            detail = too_deep(bounds.depth_max)
            refused.append(InvalidRecord(index, "malformed", detail, bytes(values[index])))
    return refused


def _parse_value(body: bytes, bounds: BodyLimits) -> Parsed:
    value = body.strip(_WHITESPACE)
    if not value:
        return Parsed(Records.lines([]), [])
    if len(value) <= bounds.record_bytes_max and (detail := json_fault(body, bounds.depth_max)):
        raise _malformed(value, detail)
    return _parse_one(value, bounds, Layout.SIZED if b"\n" in value else Layout.LINES)


def _parse_one(value: bytes, bounds: BodyLimits, layout: Layout) -> Parsed:
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
    return Problem(problem.MALFORMED, detail, refused=refused)


def mostly_invalid(refused: list[InvalidRecord]) -> Problem:
    """The problem of a request with more invalid records than good ones."""
    detail = f"more than {INVALID_FREE} records are invalid, and more than are good"
    if refused:
        detail += f"; record {refused[0].index}: {refused[0].detail}"
    return Problem(problem.MOSTLY_INVALID, detail, refused=refused)


def _too_many(bounds: BodyLimits) -> Problem:
    return Problem(problem.TOO_MANY_RECORDS, f"more than http.records_max = {bounds.records_max}")


# -- what is done to a whole body ------------------------------------------------------------------
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

T = TypeVar("T")


class BodyDecoder:
    """Owns the threads.

    Args:
        settings: the bounds.

    Attributes:
        stream_thread: the one for pieces of streams, which come at any rate.
    """

    def __init__(self, settings: HttpSettings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._thread = self._make_thread("http-body")
        self.stream_thread = self._make_thread("http-stream")
        self._large = self._make_thread("http-large")

    def _make_thread(self, name: str) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(
            1, thread_name_prefix=name, initializer=compute_beside, initargs=(self._loop,)
        )

    def close(self) -> None:
        """Ends the threads; what they are at is finished and thrown away."""
        for thread in (self._thread, self.stream_thread, self._large):
            thread.shutdown(wait=False, cancel_futures=True)

    async def parse(
        self,
        wire: bytes,
        hold: Reservation,
        *,
        encoding: str,
        reading: BodyFormat,
        form: Format,
        bounds: BodyLimits,
    ) -> Parsed:
        """The records of a body.

        Raises:
            Problem: see `parse_body` and `inflate`.
        """
        if encoding == "identity" or not wire:
            return await self._parse(wire, reading, form, bounds)
        settings = self._settings
        if len(wire) < THREAD_BYTES:
            short = inflate_short(encoding, wire, settings.body_bytes_max)
            if short is not None:
                hold.grow(len(short))
                return await self._parse(short, reading, form, bounds)

        def finish() -> Parsed:
            body = inflate(
                encoding, wire, settings.body_bytes_max, settings.inflate_ratio_max, hold.grow
            )
            return parse_body(body, reading, form, bounds)

        return await self._loop.run_in_executor(self._large, finish)

    async def _parse(
        self, body: bytes, reading: BodyFormat, form: Format, bounds: BodyLimits
    ) -> Parsed:
        if len(body) < THREAD_BYTES:
            parsed = parse_quickly(body, reading, form, bounds)
            if parsed is not None:
                return parsed
        thread = self._thread if len(body) < LARGE_BYTES else self._large
        return await self._loop.run_in_executor(thread, parse_body, body, reading, form, bounds)

    async def verify(self, webhook: Webhook, request: web.BaseRequest, wire: bytes) -> Delivery:
        """See `Webhook.check`."""
        now = time.time()
        return await self._do(len(wire), lambda: webhook.check(request.headers, wire, now))

    async def fingerprint(self, wire: bytes, content_type: str, encoding: str) -> bytes:
        """See `take_fingerprint`."""
        return await self._do(len(wire), lambda: take_fingerprint(wire, content_type, encoding))

    async def _do(self, size: int, work: Callable[[], T]) -> T:
        if size < THREAD_BYTES:
            return work()
        return await self._loop.run_in_executor(self._thread, work)
