"""Framing of syslog over TCP (RFC 6587, RFC 5425), and messages as records.

The framing of a connection is told by its first bytes, and only then:

* *counted*: `LENGTH SP MESSAGE`, if they are a number, a space and `<`. White space and NULs before
  a length are skipped: some senders put an LF behind each message. Where there is no length the
  count before it was wrong. What follows up to the next LF is a record as it is, and the
  connection goes on: a wrong count costs no more than the messages that it covers.
* *terminated*: anything else. Messages end with LF. From a NUL on that stands before a `<`, or at
  the end of a piece, they end with NUL (as Python's `SysLogHandler` has them) and may have LFs in
  them; if that is in the first piece, so do those before it.

A message that is longer than `record_bytes_max` is an invalid record, `too_large`, with its
beginning. So is one that was not received to its end: `unfinished`. Everything else is a record.

Blocks of messages are lines, ended by LF. In a block whose messages hold LFs a control character
that none of them has stands for each of these until the block is parsed (`fold`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ingestd.base.record import InvalidRecord, Layout, Records
from ingestd.codecs.framing import Framer
from ingestd.codecs.lines import KEPT_BYTES, Parsed, too_large
from ingestd.sources.tcp import UNFINISHED, Frames, Received, StreamCodec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ingestd.sources.syslog.parser import MessageParser

COUNT_BYTES = 9
"""The longest length of a frame, in digits; a longer number is no length."""
_ZERO = ord("0")
OBJECT_BYTES = 512
"""What the object of a message takes beside its text, about: as JSON, and while it is made."""
QUICK_BYTES = 256
QUICK_MESSAGES = 64
"""So few bytes or messages are parsed on the event loop; one of an unusual form takes 0.03 ms."""
_COUNTED = re.compile(rb"[1-9]\d{0,8} <")
_MAY_BE_COUNTED = re.compile(rb"(?:[1-9]\d{0,8} ?)?")
_NUL_END = re.compile(rb"\0(?=<|\Z)")
_SWAPPED = bytes.maketrans(b"\n\0", b"\0\n")
_FILLERS = b"\n\r\0 "
_STAND_INS = [bytes([code]) for code in (*range(9), *range(14, 32))]


class RecordMaker:
    """Makes records of messages, as the settings say.

    Args:
        parser: of messages; `None` for records that are the messages themselves.
        record_bytes_max: a longer record is invalid.
    """

    def __init__(self, parser: MessageParser | None, record_bytes_max: int) -> None:
        self._parser = parser
        self.record_bytes_max = record_bytes_max

    def make(self, parsed: Parsed, peers: Sequence[bytes], stand_in: bytes) -> Parsed:
        """Returns the records of a block.

        Args:
            parsed: lines, and what was refused before.
            peers: the JSON text of the peer's address, one for all lines or one for each.
            stand_in: the character that stands for LF in them, if any.
        """
        block, count = parsed.records.payload, parsed.records.count
        if self._parser is None:
            if stand_in:
                block = block.replace(stand_in, b"#012")  # as rsyslog writes it
            return parsed._replace(records=Records(Layout.LINES, count, block))
        if not count:
            return parsed
        found = self._parser.parse(block, stand_in)
        if len(peers) == 1:
            tail = b',"peer":%b}\n' % peers[0]
            found.append(b"")
            payload = tail.join(found)
        else:
            pairs = zip(found, peers, strict=True)
            payload = b"".join([b'%b,"peer":%b}\n' % pair for pair in pairs])
        if len(payload) <= self.record_bytes_max:
            return parsed._replace(records=Records(Layout.LINES, count, payload))
        return self._bounded(payload, parsed)

    def _bounded(self, payload: bytes, parsed: Parsed) -> Parsed:
        """Refuses objects that are too large, although their messages were not."""
        objects = payload[:-1].split(b"\n")
        if max(map(len, objects)) <= self.record_bytes_max:
            return parsed._replace(records=Records(Layout.LINES, len(objects), payload))
        good, refused = [], list(parsed.refused)
        for index, one in enumerate(objects):
            if len(one) <= self.record_bytes_max:
                good.append(one)
            else:
                refused.append(too_large(index, len(one), self.record_bytes_max, one))
        return parsed._replace(records=Records.lines(good), refused=refused)


def fold(messages: Sequence[bytes]) -> tuple[bytes, bytes]:
    """A block of messages that may hold anything: (lines, what stands for LF in them, if any).

    Where they have every control character it is NUL, and their NULs become LFs, too.
    """
    if not any(b"\n" in one for one in messages):  # ten times as fast as to count them
        return b"\n".join([*messages, b""]), b""
    free = (one for one in _STAND_INS if not any(one in message for message in messages))
    stand_in = next(free, _STAND_INS[0])
    return b"\n".join([*[one.replace(b"\n", stand_in) for one in messages], b""]), stand_in


class SyslogCodec(StreamCodec):
    """The messages of one connection.

    Args:
        maker: of their records.
        peer: the JSON text of its address.
        on_fault: called where a length was wrong.
    """

    def __init__(self, maker: RecordMaker, peer: bytes, on_fault: Callable[[], None]) -> None:
        self._maker = maker
        self._peers = (peer,)
        self._on_fault = on_fault
        self._framing: CountedFraming | TerminatedFraming | None = None
        self._begun = b""
        self._counted: tuple[bytes, int] = (b"", 0)  # what was counted last

    @property
    def held(self) -> int:  # type: ignore[override]
        """See `StreamCodec`."""
        return len(self._begun) if self._framing is None else self._framing.held

    def is_quick(self, data: bytes) -> bool:
        """See `StreamCodec`."""
        return len(data) <= QUICK_BYTES or self._messages(data) <= QUICK_MESSAGES

    def cost(self, data: bytes) -> int:
        """See `StreamCodec`."""
        return 2 * len(data) + OBJECT_BYTES * self._messages(data)

    def _messages(self, data: bytes) -> int:
        """The most messages that bytes complete, about."""
        if self._framing is None:
            return len(data) // 2
        if data is not self._counted[0]:  # a connection asks several times before it feeds them
            self._counted = data, self._framing.messages_in(data)
        return self._counted[1]

    def feed(self, data: bytes) -> Frames:
        """See `StreamCodec`."""
        framing = self._framing
        self._counted = b"", 0
        if framing is None:
            data = (self._begun + data).lstrip(_FILLERS)
            may_be = _MAY_BE_COUNTED.fullmatch(data)
            if may_be is not None:
                self._begun = data
                return Frames()
            self._begun = b""
            framing = self._framing = self._choose(data)
        return self._framed(framing.feed(data))

    def _choose(self, data: bytes) -> CountedFraming | TerminatedFraming:
        bound = self._maker.record_bytes_max
        if _COUNTED.match(data):
            return CountedFraming(bound, self._on_fault)
        return TerminatedFraming(bound)

    def end(self, why: str | None) -> Frames:
        """See `StreamCodec`."""
        if self._framing is None:
            if not self._begun:
                return Frames()
            self._framing = TerminatedFraming(self._maker.record_bytes_max)
            self._framing.feed(self._begun)
        return self._framed(self._framing.end(why))

    def _framed(self, parsed: Parsed | None) -> Frames:
        if parsed is None or not parsed.total:
            return Frames()
        stand_in = b"" if self._framing is None else self._framing.stand_in
        return Frames([Received(self._maker.make(parsed, self._peers, stand_in))])


class TerminatedFraming:
    """Messages with a terminator.

    Args:
        record_bytes_max: a longer message is refused.

    Attributes:
        stand_in: see `RecordMaker.make`; NUL once messages end with NUL.
    """

    def __init__(self, record_bytes_max: int) -> None:
        self._record_bytes_max = record_bytes_max
        self._framer = Framer("text", record_bytes_max)
        self._is_decided = False
        self.stand_in = b""

    @property
    def held(self) -> int:
        """Bytes of the message that was begun."""
        return self._framer.held

    def feed(self, data: bytes) -> Parsed | None:
        """Returns lines, and messages that were too long."""
        if not self._is_decided:
            self._decide(data)
        if self.stand_in:
            return _without_nuls(self._framer.feed(data.translate(_SWAPPED)))
        # Where there is none a search by the pattern takes ten times as long as one for the byte.
        end = _NUL_END.search(data) if b"\0" in data else None
        if end is None:
            return _without_nuls(self._framer.feed(data))
        parsed = _joined(self._framer.feed(data[: end.start()]), self._framer.end())
        self.stand_in = b"\0"
        self._framer = Framer("text", self._record_bytes_max, begun=True, index=self._framer.index)
        more = self._framer.feed(data[end.end() :].translate(_SWAPPED))
        return _without_nuls(_joined(parsed, more))

    def messages_in(self, data: bytes) -> int:
        """The most messages that bytes complete."""
        return data.count(b"\n") + (data.count(b"\0") if b"\0" in data else 0)

    def _decide(self, data: bytes) -> None:
        """Looks for the first terminator."""
        if b"\0" in data and _NUL_END.search(data) is not None:
            self.stand_in = b"\0"
        self._is_decided = self.stand_in != b"" or b"\n" in data

    def end(self, why: str | None) -> Parsed | None:
        """Returns what is held: a message if the peer has ended, else an invalid record."""
        if why is None:
            return _without_nuls(self._framer.end())
        parsed = self._framer.cut()
        if parsed is None:
            return None
        return parsed._replace(refused=[_with_reason(one, why) for one in parsed.refused])


def _with_reason(record: InvalidRecord, why: str) -> InvalidRecord:
    return record._replace(detail=why) if record.reason == UNFINISHED else record


def _without_nuls(parsed: Parsed | None) -> Parsed | None:
    """Takes NULs away that stand at the beginning and the end of lines."""
    block = parsed.records.payload if parsed is not None else b""
    if b"\0" not in block or not (b"\0\n" in block or b"\n\0" in block or block[:1] == b"\0"):
        return parsed
    lines = [line.strip(b"\0") for line in block[:-1].split(b"\n")]
    return parsed and parsed._replace(records=Records.lines([line for line in lines if line]))


def _joined(first: Parsed | None, last: Parsed | None) -> Parsed | None:
    if first is None or last is None:
        return first or last
    payload = first.records.payload + last.records.payload
    count = first.records.count + last.records.count
    records = Records(Layout.LINES, count, payload)
    return Parsed(records, first.refused + last.refused, first.unlisted + last.unlisted)


class CountedFraming:
    """Messages with their lengths before them.

    Args:
        record_bytes_max: a longer message is refused.
        on_fault: called where there is no length.

    Attributes:
        stand_in: see `RecordMaker.make`; of the lines that it gave last.
    """

    def __init__(self, record_bytes_max: int, on_fault: Callable[[], None]) -> None:
        self._record_bytes_max = record_bytes_max
        self._on_fault = on_fault
        self._tail = bytearray()
        self._needed = 0  # bytes of the message that was begun, with its length
        self._index = 0
        self._over_left = 0  # bytes of a message that is too long that are still to come
        self._line: Framer | None = None  # of what has no length, up to the next LF
        self.stand_in = b""

    @property
    def held(self) -> int:
        """Bytes of the message that was begun."""
        return len(self._tail) + (0 if self._line is None else self._line.held)

    def feed(self, data: bytes) -> Parsed | None:
        """Returns lines, and messages that were too long."""
        if self._over_left:
            skipped = min(self._over_left, len(data))
            self._over_left -= skipped
            data = data[skipped:]
        tail = self._tail
        if len(tail) + len(data) < self._needed:
            tail += data
            return None
        messages: list[bytes] = []
        refused: list[InvalidRecord] = []
        self._needed = 0
        whole = bytes(tail) + data if tail else data
        tail[:] = whole[self._split(whole, messages, refused) :]
        return self._parsed(messages, refused)

    def messages_in(self, data: bytes) -> int:
        """The most messages that bytes complete, about."""
        at, count = max(self._needed - len(self._tail), self._over_left, 0), 1
        if self._line is not None:
            at = data.find(b"\n") + 1 or len(data)
        elif self._tail and not self._needed:
            data = bytes(self._tail) + data  # the rest of a length
        size = len(data)
        while at < size:
            space = data.find(b" ", at, at + COUNT_BYTES + 2)
            digits = data[at:space].lstrip(_FILLERS) if space >= 0 else b""
            if not digits.isdigit() or digits[0] == _ZERO or len(digits) > COUNT_BYTES:
                return count + data.count(b" ", at) + data.count(b"\n", at)
            count += 1
            at = space + 1 + int(digits)
        return count

    def _parsed(self, messages: list[bytes], refused: list[InvalidRecord]) -> Parsed | None:
        messages = [one for one in messages if one]
        if not messages and not refused:
            return None
        block, self.stand_in = fold(messages)
        return Parsed(Records(Layout.LINES, len(messages), block if messages else b""), refused)

    def _split(self, data: bytes, messages: list[bytes], refused: list[InvalidRecord]) -> int:
        """Cuts messages off; returns where the rest begins."""
        at, size, bound = 0, len(data), self._record_bytes_max
        while at < size:
            if self._line is not None:
                at = self._read_line(self._line, data, at, messages, refused)
                continue
            if data[at] in _FILLERS:
                at += 1
                continue
            space = data.find(b" ", at, at + COUNT_BYTES + 1)
            digits = data[at:space] if space >= 0 else b""
            if digits.isdigit() and digits[0] != _ZERO:
                length = int(digits)
                start, end = space + 1, space + 1 + length
                if length > bound:
                    end = min(end, start + KEPT_BYTES)
                if end > size:
                    self._needed = end - at
                    return at
                if length > bound:
                    at = self._begin_over(data, start, length, refused)
                    continue
                messages.append(data[start:end].rstrip(b"\n\r\0"))
                at = end
            elif size - at <= COUNT_BYTES and data[at:].isdigit():
                return at
            else:
                self._on_fault()
                self._line = Framer("text", bound, begun=True)
        return at

    def _read_line(
        self,
        line: Framer,
        data: bytes,
        at: int,
        messages: list[bytes],
        refused: list[InvalidRecord],
    ) -> int:
        """Takes what has no length up to the next LF; returns the place behind."""
        end = data.find(b"\n", at) + 1
        if end:
            self._line = None
        parsed = line.feed(data[at:end] if end else data[at:])
        if parsed is not None:
            messages += [one.rstrip(b"\r\0") for one in parsed.records.items()]
            refused += [one._replace(index=self._next()) for one in parsed.refused]
        return end or len(data)

    def _begin_over(
        self, data: bytes, start: int, length: int, refused: list[InvalidRecord]
    ) -> int:
        """Refuses a message that is too long, of which all or the beginning is here."""
        here = data[start : start + length]
        refused.append(too_large(self._next(), length, self._record_bytes_max, here))
        self._over_left = length - len(here)
        return start + len(here)

    def _next(self) -> int:
        self._index += 1
        return self._index - 1

    def end(self, why: str | None) -> Parsed | None:
        """Returns the message that was begun, as an invalid record."""
        if self._line is not None:
            return self._end_line(self._line, why)
        size, tail = len(self._tail), bytes(self._tail[:KEPT_BYTES]).strip(_FILLERS)
        self._tail.clear()
        if not tail:
            return None
        detail = why or f"the connection ended after {size} bytes of the message"
        return Parsed(Records.lines([]), [InvalidRecord(self._next(), UNFINISHED, detail, tail)])

    def _end_line(self, line: Framer, why: str | None) -> Parsed | None:
        messages: list[bytes] = []
        refused: list[InvalidRecord] = []
        if why is None:
            self._read_line(line, b"\n", 0, messages, refused)
        elif (parsed := line.cut()) is not None:
            one = _with_reason(parsed.refused[0], why)
            refused = [one._replace(index=self._next())]
        self._line = None
        return self._parsed(messages, refused)
