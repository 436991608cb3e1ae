"""Parses lines into records; a block of good lines is checked and counted as a whole.

The usual block is canonical: every line is one JSON value and nothing else. That is found out for
the whole block at once, and then the block itself is the run of records. msgspec reads all values
of the block with spaces for its LFs; if they, joined by LF, are the block again, then every line is
exactly one value. Blank lines and CRs are taken out and the block is tried again; what is
not canonical then goes line by line.
"""

from __future__ import annotations

import re
import sys
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ingestd.base.bursts import let_loop_go_first
from ingestd.base.record import InvalidRecord, Layout, Records
from ingestd.codecs.json import DEPTH_MAX, holds_deeper, is_deeper
from ingestd.codecs.utf8 import find_fault

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ingestd.base.record import Format

BOM = b"\xef\xbb\xbf"
KEPT_BYTES = 64 * 1024
"""Bound of the beginning that is kept of a record that was too large."""
CANONICAL_BYTES = 64 * 1024
"""Lines of JSON are checked together, about so many bytes at a time."""
LISTED_MAX = 10_000
"""Bound of the refused records that are listed, and kept, of one piece; others are counted."""

_JSON = msgspec.json.Decoder(msgspec.Raw)
_BLANKS = re.compile(rb"\n{2,}")
_ESCAPES = re.compile(rb"\\(?:u([0-9A-Fa-f]{0,4})|.)", re.DOTALL)
_DIGITS = 4
_LINES_TOGETHER = 256
_SPLIT_BYTES = 16 * 1024
_TRUNCATED = "Input data was truncated"


class Parsed(NamedTuple):
    """Records and refused records of a body or a block of lines.

    Attributes:
        records: the good ones; may be none.
        refused: the others, in order; the first ones alone where a bound says so.
        unlisted: how many more were refused.
    """

    records: Records
    refused: list[InvalidRecord]
    unlisted: int = 0

    @property
    def invalid(self) -> int:
        """All refused records, listed or not."""
        return len(self.refused) + self.unlisted

    @property
    def total(self) -> int:
        """Good and refused records together."""
        return self.records.count + len(self.refused) + self.unlisted


def parse_lines(
    block: bytes,
    form: Format,
    record_bytes_max: int,
    first: int = 0,
    depth_max: int = DEPTH_MAX,
    *,
    listed_max: int = sys.maxsize,
) -> Parsed:
    """Parses one record a line.

    `json` and `text`: blank lines are skipped, a CR before the LF is removed. `json`: a line is
    blank if there is nothing but JSON's whitespace in it. `bytes`: a line is what stands before the
    LF, whatever it is.

    Args:
        block: lines, each ended by LF; the last LF may be missing.
        form: what the records are.
        record_bytes_max: a longer record is refused.
        first: the index of the first record.
        depth_max: `json` that is nested deeper is refused.
        listed_max: this many refused records are listed, the others are only counted: as an object
            a line of one byte takes some hundred.
    """
    if block[-1:] != b"\n":
        block += b"\n"
    if form == "json":
        return _parse_json(block, record_bytes_max, first, depth_max, listed_max)
    lines = block.split(b"\n")
    lines.pop()
    if form == "text" and (b"\r" in block or b"" in lines):
        block = squeeze(block)
        lines = block.split(b"\n")
        lines.pop()
    if len(block) <= record_bytes_max + 1 or max(map(len, lines), default=0) <= record_bytes_max:
        return Parsed(Records(Layout.LINES, len(lines), block), [])
    return _sort_out(block, None, record_bytes_max, first, listed_max)


def parse_canonical(
    block: bytes, record_bytes_max: int, depth_max: int = DEPTH_MAX
) -> Parsed | None:
    """Parses JSON lines, each ended by LF, if all are good and nothing else is there; or `None`.

    The fast path of `parse_lines`, where no line has to be looked at by itself. It goes through
    the block in pieces: no other thread waits long for the interpreter, and what is made of a
    piece fits into the processor's cache, which saves a third of the time.
    """
    if b"\r" in block:
        return None
    total = 0
    for piece in whole_lines(block, CANONICAL_BYTES):
        count = _count_json(piece, record_bytes_max, depth_max)
        if not count:
            return None
        total += count
    return Parsed(Records(Layout.LINES, total, block), []) if total else None


def whole_lines(block: bytes, size: int) -> Iterator[bytes]:
    """Cuts lines, each ended by LF, into pieces of about `size` bytes; a small block is one."""
    if len(block) <= size:
        yield block
        return
    start = 0
    while start < len(block):
        end = block.rfind(b"\n", start, start + size) + 1
        if not end:
            end = block.index(b"\n", start) + 1
        yield block[start:end]
        start = end


def json_fault(value: bytes, depth_max: int = DEPTH_MAX) -> str:
    """Describes the fault of a JSON text (RFC 8259) in one line; empty if there is none."""
    try:
        _JSON.decode(value)
    except msgspec.DecodeError as error:
        return _explain(str(error), value)
    except RecursionError:
        return too_deep(depth_max)
    if (at := find_fault(value)) >= 0:
        return not_utf8(at)
    return too_deep(depth_max) if is_deeper(value, depth_max) else ""


def _explain(fault: str, value: bytes) -> str:
    """Translates msgspec's message, which takes some bad escapes for truncation."""
    if fault != _TRUNCATED:
        return fault
    for escape in _ESCAPES.finditer(value):
        digits, rest = escape[1], value[escape.end() : escape.end() + 2]
        if digits is None or not rest:
            continue
        if len(digits) < _DIGITS:
            return f"JSON is malformed: \\u without four digits (byte {escape.start()})"
        if digits[:1] in b"dD" and digits[1:2] in b"89abAB" and rest not in (b"\\u", b"\\"):
            return f"JSON is malformed: lone surrogate \\u{digits.decode()} (byte {escape.start()})"
    return fault


def record_fault(
    value: bytes, form: Format, record_bytes_max: int, depth_max: int = DEPTH_MAX
) -> str:
    """Describes in one line why bytes are no record of a pipeline; empty if they are one.

    For records that were refused once and are to be accepted after all.
    """
    if len(value) > record_bytes_max:
        return f"{len(value)} bytes, more than record_bytes_max = {record_bytes_max}"
    if form == "json":
        return json_fault(value, depth_max)
    return "more than one line" if form == "text" and b"\n" in value else ""


def not_utf8(at: int) -> str:
    """The fault of a record that is not UTF-8 from byte `at` on."""
    return f"not UTF-8 (byte {at})"


def too_deep(depth_max: int) -> str:
    """The fault of a record that is nested too deeply."""
    return f"nested deeper than json_depth_max = {depth_max}"


def too_large(index: int, size: int, record_bytes_max: int, head: bytes) -> InvalidRecord:
    """An invalid record of `size` bytes, of which `head` is the beginning or the whole."""
    detail = f"{size} bytes, more than record_bytes_max = {record_bytes_max}"
    return InvalidRecord(index, "too_large", detail, head[:KEPT_BYTES])


def squeeze(block: bytes) -> bytes:
    """Replaces CR LF by LF and drops empty lines; returns the block itself if there are none."""
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    if b"\n\n" in block:
        block = _BLANKS.sub(b"\n", block)
    return block[1:] if block[:1] == b"\n" else block


def _parse_json(
    block: bytes, record_bytes_max: int, first: int, depth_max: int, listed_max: int
) -> Parsed:
    parsed = parse_canonical(block, record_bytes_max, depth_max)
    if parsed is None:
        squeezed = squeeze(block)
        if squeezed is not block:
            block = squeezed
            parsed = parse_canonical(block, record_bytes_max, depth_max)
    return parsed or _sort_out(block, depth_max, record_bytes_max, first, listed_max)


def _count_json(block: bytes, record_bytes_max: int, depth_max: int) -> int:
    """Counts the records of a canonical block; 0 for any other."""
    try:
        # A space also parts values, but the block is no value's any more if an LF was in one.
        values = _JSON.decode_lines(block.replace(b"\n", b" "))
        if not block.isascii():
            block.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0
    count = len(values)
    values.append(_NOTHING)
    if b"\n".join(values) != block or holds_deeper(block, values, depth_max):
        return 0
    fits = (
        len(block) <= record_bytes_max + 1 or max(map(len, block.split(b"\n"))) <= record_bytes_max
    )
    return count if fits else 0


def _sort_out(
    block: bytes, depth_max: int | None, record_bytes_max: int, first: int, listed_max: int
) -> Parsed:
    """Parses line by line: JSON if there is a depth, else any bytes."""
    good: list[bytes] = []
    refused: list[InvalidRecord] = []
    unlisted = 0
    details: dict[str, str] = {}  # many lines have the same fault; it is kept once
    # A line of two bytes takes 42 as an object, so not all of them are there at once.
    pieces = (piece.split(b"\n")[:-1] for piece in whole_lines(block, _SPLIT_BYTES))
    for number, line in enumerate(chain.from_iterable(pieces)):
        if not number % _LINES_TOGETHER:
            let_loop_go_first()
        if len(line) > record_bytes_max:
            detail = ""
        elif depth_max is None:
            good.append(line)
            continue
        elif not line.strip(b" \t\r"):
            continue
        elif not (detail := json_fault(line, depth_max)):
            good.append(line)
            continue
        if len(refused) >= listed_max:
            unlisted += 1
            continue
        index = first + len(good) + len(refused)
        if detail:
            detail = details.setdefault(detail, detail)
            refused.append(InvalidRecord(index, "malformed", detail, line))
        else:
            refused.append(too_large(index, len(line), record_bytes_max, line))
    return Parsed(Records.lines(good), refused, unlisted)


_NOTHING = msgspec.Raw(b"")
