"""Framing of lines in reads of any size, and detection of inputs that are no UTF-8 lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ingestd.base.envelope import joined, numbered
from ingestd.base.record import InvalidRecord, Records
from ingestd.codecs.json import DEPTH_MAX
from ingestd.codecs.lines import (
    BOM,
    KEPT_BYTES,
    LISTED_MAX,
    Parsed,
    json_fault,
    parse_lines,
    too_large,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ingestd.base.record import Format


class Framer:
    """Cuts a stream of bytes into records, however it was divided into reads.

    Holds at most `record_bytes_max` bytes; the time is linear in what is fed. Indices of refused
    records count all records of the stream.

    Args:
        form: what the records are; see `parse_lines`.
        record_bytes_max: a longer line is refused, with its beginning kept.
        depth_max: `json` that is nested deeper is refused.
        begun: the stream was begun before: no byte order mark comes.
        index: of the first record.
        listed_max: see `parse_lines`.

    Attributes:
        index: of the next record.
    """

    def __init__(
        self,
        form: Format,
        record_bytes_max: int,
        depth_max: int = DEPTH_MAX,
        *,
        begun: bool = False,
        index: int = 0,
        listed_max: int = LISTED_MAX,
    ) -> None:
        self._form = form
        self._record_bytes_max = record_bytes_max
        self._depth_max = depth_max
        self._listed_max = listed_max
        self.index = index
        self._tail = bytearray()
        self._bom = BOM if form != "bytes" and not begun else b""
        # Of a line that is too long already: how long, and whether a CR was its last byte.
        self._over = 0
        self._over_cr = False

    @property
    def held(self) -> int:
        """Bytes of the unfinished line."""
        return len(self._tail)

    def feed(self, data: bytes) -> Parsed | None:
        """Returns the records that `data` completes; `None` if it completes none."""
        if self._bom:
            data = self._skip_bom(data)
        end = data.rfind(b"\n") + 1
        if not end:
            self._hold(data)
            return None
        refused: list[InvalidRecord] = []
        start = 0
        if self._over:
            start = data.index(b"\n") + 1
            self._hold(data[: start - 1])
            refused.append(self._end_over())
        block = b"".join((self._tail, memoryview(data)[start:end]))
        self._tail.clear()
        parsed = self._parse(block, refused)
        if end < len(data):
            self._hold(data[end:])
        return parsed

    def end(self) -> Parsed | None:
        """Returns the last record, at the end of the input: its LF may be missing."""
        refused = [self._end_over()] if self._over else []
        block = bytes(self._tail)
        self._tail.clear()
        return self._parse(block, refused)

    def cut(self) -> Parsed | None:
        """Refuses the unfinished line, where the input is left before its end."""
        if self._over or not self._tail:
            return self.end()
        head = bytes(self._tail[:KEPT_BYTES])
        detail = f"reading stopped after {len(self._tail)} bytes of the line"
        self._tail.clear()
        self.index += 1
        return _only([InvalidRecord(self.index - 1, "unfinished", detail, head)])

    def _parse(self, block: bytes, refused: list[InvalidRecord]) -> Parsed | None:
        if block:
            parsed = parse_lines(
                block,
                self._form,
                self._record_bytes_max,
                self.index,
                self._depth_max,
                listed_max=self._listed_max,
            )
            self.index += parsed.total
            if refused:
                parsed = parsed._replace(refused=refused + parsed.refused)
        else:
            parsed = _only(refused)
        return parsed if parsed.total else None

    def _hold(self, data: bytes) -> None:
        """Adds to the unfinished line."""
        if not self._over:
            self._tail += data
            # One more than the bound may still be a CR.
            if len(self._tail) <= self._record_bytes_max + 1:
                return
            self._over = len(self._tail)
            self._over_cr = self._tail[-1:] == b"\r"
            del self._tail[KEPT_BYTES:]
        elif data:
            self._tail += data[: KEPT_BYTES - len(self._tail)]
            self._over += len(data)
            self._over_cr = data[-1:] == b"\r"

    def _end_over(self) -> InvalidRecord:
        size = self._over - (self._over_cr and self._form != "bytes")
        refused = too_large(self.index, size, self._record_bytes_max, bytes(self._tail[:size]))
        self.index += 1
        self._over = 0
        self._tail.clear()
        return refused

    def _skip_bom(self, data: bytes) -> bytes:
        """Removes the mark at the very beginning; holds back bytes that may become one."""
        data = bytes(self._tail) + data
        self._tail.clear()
        if len(data) < len(BOM) and BOM.startswith(data):
            self._tail += data
            return b""
        self._bom = b""
        return data.removeprefix(BOM)


def _only(refused: list[InvalidRecord]) -> Parsed:
    """Refused records alone."""
    return Parsed(Records.lines([]), refused)


# -- numbers of lines ------------------------------------------------------------------------------


class LineNumbers:
    """Counts the lines of an input, and puts the number of its line into each record's envelope.

    Lines count from 1, blank ones too. Where it is not known which lines are records (more were
    refused than a piece lists) the records have no numbers.

    Args:
        form: what the records are.
        packed: the envelope of all of them, which names the attribute of the number; empty if the
            lines are only counted.
        lines: that ended before; `None` if that is not known: then there are no numbers.
    """

    def __init__(self, form: Format, packed: bytes, lines: int | None = 0) -> None:
        self._form = form
        self._packed = packed
        self._known = lines is not None
        self._lines = lines or 0

    @property
    def lines(self) -> int:
        """Lines that ended so far; 0 if that is not known."""
        return self._lines if self._known else 0

    def number(
        self, piece: bytes, parsed: Parsed | None, *, size: int, index: int
    ) -> Parsed | None:
        """Numbers the records that a piece has completed.

        Args:
            piece: of the input.
            parsed: what it completed.
            size: bytes of that as they came.
            index: of its first record.
        """
        before = self._lines
        if parsed is not None and not parsed.invalid and len(parsed.records.payload) == size:
            ended = parsed.records.count  # nothing was left out; counting reads every byte again
        else:
            ended = piece.count(b"\n")
        self._lines += ended
        if parsed is None or parsed.unlisted or not (self._known and self._packed):
            return parsed
        lines: Sequence[int] = range(before + 1, before + 1 + ended)
        if parsed.total != ended:
            lines = self._lines_of_records(piece, parsed.total, before)
        return self._numbered(parsed, lines, index) if lines else parsed

    def _lines_of_records(self, piece: bytes, records: int, before: int) -> Sequence[int]:
        """The lines of a piece's records, where there are blank lines; none if that is unclear."""
        others = piece[: piece.rfind(b"\n") + 1].split(b"\n")[1:-1]
        lines = [
            number
            for number, line in enumerate(others, before + 2)
            if (line.strip(b" \t\r") if self._form == "json" else line not in {b"", b"\r"})
        ]
        # The beginning of the first line came before; the number of records tells if it is blank.
        return {0: lines, 1: [before + 1, *lines]}.get(records - len(lines), ())

    def _numbered(self, parsed: Parsed, lines: Sequence[int], index: int) -> Parsed:
        packed, place = self._packed, 0
        refused = [
            one._replace(envelope=numbered(packed, 1, lines[one.index - index]))
            for one in parsed.refused
        ]
        runs = list[tuple[int, bytes]]()
        for end in [*(one.index - index for one in parsed.refused), len(lines)]:
            for first, count in _stretches(lines[place:end]):
                runs.append((count, numbered(packed, count, first)))
            place = end + 1
        return Parsed(parsed.records._replace(envelopes=joined(runs)), refused)


def _stretches(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Growing numbers as stretches without a gap: the first one of each, and how many."""
    if isinstance(numbers, range):
        if numbers:
            yield numbers.start, len(numbers)
        return
    start = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            yield numbers[start], end - start
            start = end


# -- detection of other formats --------------------------------------------------------------------

HEAD_BYTES = 64
"""Bytes that `guess` needs."""
MARK_BYTES = 10
"""Bytes that `marked` needs."""

_NUL_SHARE = 4  # one byte of so many; text has none


class ContentGuess(NamedTuple):
    """The likely format of an input, and advice.

    Attributes:
        what: a few words that follow "it is".
        advice: what makes lines of it.
    """

    what: str
    advice: str


_COMPRESSED = (
    (b"\x1f\x8b", ContentGuess("compressed (gzip)", "zcat FILE |")),
    (b"\x28\xb5\x2f\xfd", ContentGuess("compressed (zstd)", "zstdcat FILE |")),
    (b"\xfd7zXZ\0", ContentGuess("compressed (xz)", "xzcat FILE |")),
    (b"BZh91AY&SY", ContentGuess("compressed (bzip2)", "bzcat FILE |")),
    (b"PK\x03\x04", ContentGuess("compressed (zip)", "unzip -p FILE |")),
)
_ENCODED = (
    # UTF-32 first: the mark of UTF-16 is its beginning.
    (b"\xff\xfe\0\0", ContentGuess("UTF-32 text", "iconv -f UTF-32 -t UTF-8 FILE |")),
    (b"\0\0\xfe\xff", ContentGuess("UTF-32 text", "iconv -f UTF-32 -t UTF-8 FILE |")),
    (b"\xff\xfe", ContentGuess("UTF-16 text", "iconv -f UTF-16 -t UTF-8 FILE |")),
    (b"\xfe\xff", ContentGuess("UTF-16 text", "iconv -f UTF-16 -t UTF-8 FILE |")),
)
_OPENED = (b"{", b"[", b"[{")
_DOCUMENT = ContentGuess("JSON over several lines", "jq -c . FILE | (or jq -c '.[]' of an array)")
_PLAIN = ContentGuess("not JSON", "--format text makes a record of each line as it is")
_BINARY = ContentGuess("not text: there are zero bytes in it", "")


def guess(head: bytes, form: str) -> ContentGuess | None:
    """Guesses the format of an input that is not lines of records; `None` if it seems to be.

    Args:
        head: its first bytes, `HEAD_BYTES` or more if it is as long.
        form: what its records are to be: `json`, `text` or `bytes`.
    """
    if form == "bytes":
        return None
    if found := marked(head):
        return found
    if head.count(0) * _NUL_SHARE > len(head):
        return _wide(head) or _BINARY
    line, end, _ = head.partition(b"\n")
    line = line.strip(b"\xef\xbb\xbf \t\r")
    if form != "json" or not end or not line:
        return None
    if line in _OPENED:
        return _DOCUMENT
    # A line that begins like an object or an array is JSON with a mistake in it.
    return _PLAIN if line[:1] not in b"{[" and json_fault(line, DEPTH_MAX) else None


def marked(head: bytes) -> ContentGuess | None:
    """Recognises a compressed file or another encoding by its first bytes."""
    tables = (*_COMPRESSED, *_ENCODED)
    return next((found for mark, found in tables if head.startswith(mark)), None)


def _wide(head: bytes) -> ContentGuess | None:
    """UTF-16 without its mark, if most of it is ASCII."""
    for first, name in ((0, "UTF-16BE"), (1, "UTF-16LE")):
        if not any(head[first::2]):
            return ContentGuess(f"{name} text", f"iconv -f {name} -t UTF-8 FILE |")
    return None
