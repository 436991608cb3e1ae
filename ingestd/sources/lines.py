"""Lines as records: checked, counted and bounded without taking a good block apart.

The usual block is canonical: every line is one JSON value and nothing else. That is found out for
the whole block at once, and then the block itself is the run of records. msgspec reads all values
of the block; if they, joined by LF, are the block again and none of them holds an LF, then every
line is exactly one value. Blank lines and CRs are taken out and the block is tried again; what is
not canonical then goes line by line.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ingestd.base.record import Layout, Records, Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from ingestd.sources.intake import Format

BOM = b"\xef\xbb\xbf"
KEPT_BYTES = 64 * 1024
"""What is kept of a record that was too large."""

_JSON = msgspec.json.Decoder(msgspec.Raw)
_BLANKS = re.compile(rb"\n{2,}")


class Parsed(NamedTuple):
    """What a body or a block of lines holds.

    Attributes:
        records: the good ones; may be none.
        refused: the others, in order.
    """

    records: Records
    refused: list[Refused]

    @property
    def total(self) -> int:
        """Good and refused records together."""
        return self.records.count + len(self.refused)


def parse_lines(block: bytes, form: Format, record_bytes_max: int, first: int = 0) -> Parsed:
    """One record a line.

    `json` and `text`: blank lines are skipped, a CR before the LF is removed. `json`: a line is
    blank if there is nothing but JSON's whitespace in it. `bytes`: a line is what stands before the
    LF, whatever it is.

    Args:
        block: lines, each ended by LF; the last LF may be missing.
        form: what the records are.
        record_bytes_max: a longer record is refused.
        first: the index of the first record.
    """
    if block[-1:] != b"\n":
        block += b"\n"
    if form == "json":
        return _parse_json(block, record_bytes_max, first)
    lines = block.split(b"\n")
    lines.pop()
    if form == "text" and (b"\r" in block or b"" in lines):
        block = squeeze(block)
        lines = block.split(b"\n")
        lines.pop()
    if len(block) <= record_bytes_max + 1 or max(map(len, lines), default=0) <= record_bytes_max:
        return Parsed(Records(Layout.LINES, len(lines), block), [])
    return _sort_out(block, _anything, record_bytes_max, first)


def json_fault(value: bytes) -> str:
    """What is wrong with a JSON text (RFC 8259), in one line; empty if nothing is."""
    try:
        _JSON.decode(value)
        if not value.isascii():
            value.decode()
    except msgspec.DecodeError as error:
        return str(error)
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start})"
    except RecursionError:
        return "nested too deeply"
    return ""


def too_large(index: int, size: int, record_bytes_max: int, head: bytes) -> Refused:
    """A record of `size` bytes, of which `head` is the beginning or the whole."""
    detail = f"{size} bytes, more than record_bytes_max = {record_bytes_max}"
    return Refused(index, "too_large", detail, head[:KEPT_BYTES])


def squeeze(block: bytes) -> bytes:
    """LF for CR LF, and no empty lines; the block itself if it is like that already."""
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    if b"\n\n" in block:
        block = _BLANKS.sub(b"\n", block)
    return block[1:] if block[:1] == b"\n" else block


def _parse_json(block: bytes, record_bytes_max: int, first: int) -> Parsed:
    count = 0 if b"\r" in block else _count_json(block, record_bytes_max)
    if not count:
        squeezed = squeeze(block)
        if squeezed is not block:
            block = squeezed
            count = _count_json(block, record_bytes_max)
    if count:
        return Parsed(Records(Layout.LINES, count, block), [])
    return _sort_out(block, json_fault, record_bytes_max, first)


def _count_json(block: bytes, record_bytes_max: int) -> int:
    """How many records a canonical block holds; 0 for any other."""
    try:
        values = _JSON.decode_lines(block)
        if not block.isascii():
            block.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0
    count = len(values)
    values.append(_NOTHING)
    # Searching for one LF is several times faster than counting all of them.
    canonical = b"\n".join(values) == block and b"\n" not in b"".join(values)
    fits = (
        len(block) <= record_bytes_max + 1 or max(map(len, block.split(b"\n"))) <= record_bytes_max
    )
    return count if canonical and fits else 0


def _sort_out(
    block: bytes, fault: Callable[[bytes], str], record_bytes_max: int, first: int
) -> Parsed:
    good: list[bytes] = []
    refused: list[Refused] = []
    lines = block.split(b"\n")
    lines.pop()
    blank = fault is json_fault
    for line in lines:
        index = first + len(good) + len(refused)
        if len(line) > record_bytes_max:
            refused.append(too_large(index, len(line), record_bytes_max, line))
        elif blank and not line.strip(b" \t\r"):
            continue
        elif detail := fault(line):
            refused.append(Refused(index, "malformed", detail, line))
        else:
            good.append(line)
    return Parsed(Records.lines(good), refused)


def _anything(_line: bytes) -> str:
    return ""


_NOTHING = msgspec.Raw(b"")
