"""The source `forward`: the protocol of Fluentd and Fluent Bit, over TCP. No I/O here.

https://github.com/fluent/fluentd/wiki/Forward-Protocol-Specification-v1#message-modes

A message is an array: tag, then

* a time, a record: **Message**;
* an array of events: **Forward**;
* events one behind the other in a bin or a str: **PackedForward**; compressed, as the option
  `compressed` says: **CompressedPackedForward**;

and then, in any of them, a map of options. Invariants:

1. An option `chunk` names the message: its id is the key of its records, and `{"ack": id}` is the
   reply, as a text or as bytes, as it came. So a chunk that is sent again, because its
   acknowledgement was lost, is accepted once. A chunk with other content under an id that is known
   is accepted, too.
2. What cannot be read of the events of a message is an invalid record, and the message is
   acknowledged: to send it again would change nothing. What goes beyond a bound of a message ends
   the connection without an acknowledgement, and nothing of it is accepted: its client keeps it
   until the bound is raised. So does what is no message at all.
3. Before the handshake is done, where there is one, nothing longer than a PING is taken.
4. What decompression and JSON make of a message beyond its size is taken from the account of the
   source before it is there.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from ingestd.base.envelope import EnvelopeRuns, pack
from ingestd.base.record import InvalidRecord, Records
from ingestd.codecs.compression import Corrupt, Inflater, TooMuch
from ingestd.codecs.fluent import RecordBounds, RecordList, TooManyRecords, parse_events
from ingestd.codecs.lines import KEPT_BYTES, Parsed
from ingestd.codecs.msgpack import (
    ARRAY,
    MessagePackFault,
    Scanner,
    encode_json,
    read_head,
    spans,
    to_object,
)
from ingestd.http.problem import Problem
from ingestd.sources.forward.handshake import PING_BYTES_MAX, Handshake
from ingestd.sources.tcp import UNFINISHED, Frames, Received, StreamCodec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ingestd.sources.base import Intake
    from ingestd.sources.forward import ForwardSettings
    from ingestd.sources.forward.handshake import Secrets
    from ingestd.sources.tcp import Peer

TAG_BYTES_MAX = 1024
INVALID_KEPT = 10
"""So many invalid records of a message are kept as dead letters; others are counted."""
OPTIONS_BYTES_MAX = 64 * 1024
"""Bound of the options of a message, and so of its id: one without a reply comes again for ever."""
APPEND_BYTES = 2048
"""What the append of a message with an id costs beside its records, about."""
FREE_BYTES = 8 * 1024
"""So much a few bytes may become where there is no room: a small message is never refused."""
GROWN_BYTES = 16 * 1024
"""The least that is taken from the account at a time."""
_PARTS_MAX = 4
_CHUNK_KEY = b"\xa5chunk"
_ARRAYS = frozenset((*range(0x90, 0xA0), 0xDC, 0xDD))
_NIL = 0xC0
_MAPS = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))
_LOGS = b"\x00"
_MAGICS = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd")
_ENCODINGS = ("gzip", "zstd")
_NOTHING = Parsed(Records.lines([]), [])


class MessageOptions(NamedTuple):
    """Options of a message that mean something here.

    Attributes:
        chunk: id of the message, as it came: a str or a bin in MessagePack; empty without one.
        compressed: name of the compression of packed events.
        signal: what the events are, in MessagePack: Fluent Bit has more than logs.
    """

    chunk: bytes = b""
    compressed: bytes = b""
    signal: bytes = _LOGS


class ForwardCodec(StreamCodec):
    """Reads the messages of one connection.

    Args:
        peer: its other side.
        settings: the bounds.
        intake: of the pipeline.
        secrets: of the handshake.
    """

    def __init__(
        self, peer: Peer, settings: ForwardSettings, intake: Intake, secrets: Secrets
    ) -> None:
        self._peer = peer
        self._settings = settings
        self._bounds = RecordBounds(
            settings.records_max,
            intake.record_bytes_max,
            intake.json_depth_max,
            settings.decompressed_bytes_max,
            INVALID_KEPT,
        )
        # -- of one `feed`
        self._received: list[Received] = []
        self._run = self._make_run()
        self._room = 0
        self._handshake = Handshake(secrets) if secrets.keys else None
        self._principal, self._envelope = "", b""
        self._has_ids = False
        self._buffer = bytearray()
        self._scanner: Scanner | None = None  # of the message that was begun

    @property
    def held(self) -> int:  # type: ignore[override]
        """See `StreamCodec`."""
        return len(self._buffer)

    @property
    def replies(self) -> bool:  # type: ignore[override]
        """See `StreamCodec`: a client without ids learns as early as it can that a drain began."""
        return self._has_ids or self._handshake is not None

    def greet(self) -> bytes:
        """See `StreamCodec`."""
        return self._handshake.helo() if self._handshake is not None else b""

    def is_quick(self, data: bytes) -> bool:
        """See `StreamCodec`: a little that is compressed may be much."""
        whole = bytes(self._buffer) + data if self._buffer else data
        return not any(magic in whole for magic in _MAGICS)

    def cost(self, data: bytes) -> int:
        """See `StreamCodec`; many tiny messages with ids are decoded a few at a time.

        What was begun becomes records when its end may be in there.
        """
        size, scanner, begun = len(data), self._scanner, len(self._buffer)
        more = begun if scanner is not None and scanner.at <= begun + size else 0
        return 2 * size + more + APPEND_BYTES * data.count(_CHUNK_KEY)

    def feed(self, data: bytes) -> Frames:
        """See `StreamCodec`."""
        fault = ""
        self._room = self.cost(data) - len(data) + FREE_BYTES
        self._run = self._make_run()
        try:
            for whole, at, end in self._messages(data):
                if self._handshake is not None:
                    if fault := self._answer(self._handshake, whole[at:end]):
                        break
                elif whole[at] != _NIL:  # which is a heartbeat
                    self._read(whole[at:end])
        except MessagePackFault as found:
            fault = f"malformed message: {found}"
        except (TooMuch, TooManyRecords) as found:
            fault = f"a message beyond its bounds: {found}"
        except Problem as problem:
            fault = f"no room for what a message becomes: {problem.kind.slug}"
        self._flush()
        received, self._received = self._received, []
        return Frames(received, fault)

    def end(self, why: str | None) -> Frames:
        """See `StreamCodec`."""
        head = bytes(self._buffer[:KEPT_BYTES])
        self._buffer.clear()
        if not head or self._handshake is not None:
            return Frames()
        detail = f"the message was not complete: {why or 'the connection was closed'}"
        return Frames(
            [Received(_NOTHING._replace(refused=[InvalidRecord(0, UNFINISHED, detail, head)]))]
        )

    def _answer(self, handshake: Handshake, message: bytes) -> str:
        """Answers a PING; returns why its client is refused."""
        welcome = handshake.answer(message)
        self._received.append(Received(_NOTHING, welcome.reply))
        if not welcome.fault:
            self._handshake = None
            if welcome.user:
                envelope = EnvelopeRuns(self._peer.envelope, 1).of(0)
                self._envelope = pack(replace(envelope, client=welcome.user))
                self._principal = f"user {welcome.user}"
        return welcome.fault

    # -- framing -------------------------------------------------------------------------------

    def _messages(self, data: bytes) -> Iterator[tuple[bytes, int, int]]:
        """Yields (bytes, offset, offset of the end) of each value that is complete.

        Raises:
            MessagePackFault: what comes is none, or too long.
        """
        while True:
            longest = PING_BYTES_MAX if self._handshake else self._settings.message_bytes_max
            if self._scanner is not None:
                self._buffer += data
                if not self._scanner.run(self._buffer):
                    return
                whole, end = bytes(self._buffer), self._scanner.at
                self._scanner = None
                self._buffer.clear()
                yield whole, 0, end
                data = whole[end:]
                continue
            at = 0
            if self._handshake is None:
                try:
                    for at, end in spans(data):
                        if end - at > longest:
                            raise TooMuch(f"more than message_bytes_max = {longest}")
                        yield data, at, end
                        at = end  # noqa: PLW2901 - where the rest begins
                except MessagePackFault:
                    pass  # what is not complete is scanned, and a fault found again
            if at >= len(data):
                return
            self._scanner, data = Scanner(0, longest), data[at:]

    # -- messages ------------------------------------------------------------------------------

    def _read(self, message: bytes) -> None:
        """Reads a message.

        Raises:
            MessagePackFault: it is none of the protocol.
            TooMuch: it is more than the bounds allow.
            TooManyRecords: see `TooMuch`.
            Problem: there is no room for it.
        """
        parts = _parts(message)
        tag = _tag(message, *parts[0])
        events = _head_of(message, parts[1][0])
        options = _options(message, parts[2:] if events is not None else parts[3:])
        gathered = self._run
        if options.chunk:
            self._has_ids = True
            self._flush()
            self._take(APPEND_BYTES)
            gathered = self._make_run()
        gathered.begin()
        try:
            data, values = self._events(message, parts, events, options)
            parse_events(data, values, tag, gathered)
        except (_Unreadable, Corrupt) as fault:
            gathered.refuse(str(fault), message)
        except (TooMuch, TooManyRecords, Problem):
            gathered.give_up()
            raise
        if options.chunk:
            self._received.append(self._acknowledged(self._parsed(gathered), options.chunk))

    def _events(
        self,
        message: bytes,
        parts: Sequence[tuple[int, int]],
        events: tuple[int, int, int] | None,
        options: MessageOptions,
    ) -> tuple[bytes | bytearray, Iterable[tuple[int, int]]]:
        """The events of a message: bytes, and the offsets of each in there.

        Args:
            message: the whole.
            parts: offsets of its elements.
            events: head of several; `None` for one.
            options: of the message.
        """
        if options.signal != _LOGS:
            raise _Unreadable("metrics, traces or others of Fluent Bit: only logs are records")
        at, end = parts[1]
        if events is None:
            event = b"\x92" + message[at : parts[2][1]]
            return event, [(0, len(event))]
        if events[0] == ARRAY:
            return message, spans(message, events[2], end)
        data = self._inflate(message[events[2] : end], options.compressed)
        return data, spans(data)

    def _inflate(self, payload: bytes, compressed: bytes) -> bytes | bytearray:
        """Decompresses packed events, where they are compressed."""
        if compressed in (b"", b"text"):
            return payload
        encoding = compressed.decode("utf-8", "replace")
        if encoding not in _ENCODINGS:
            raise _Unreadable(f"events are compressed as {encoding[:40]!r}")
        settings = self._settings
        inflater = Inflater(
            encoding,
            settings.decompressed_bytes_max,
            settings.inflate_ratio_max,
            members_free=settings.records_max,  # Fluentd compresses each event that it gets alone
        )
        events = bytearray()
        for piece in inflater.feed(payload):
            self._take(len(piece))
            events += piece
        inflater.finish()
        return events

    # -- records -------------------------------------------------------------------------------

    def _make_run(self) -> RecordList:
        return RecordList(self._bounds, self._take)

    def _take(self, size: int) -> None:
        """Takes bytes of the account, many at a time; there is room for as many as came."""
        self._room -= size
        if self._room < 0:
            more = max(GROWN_BYTES, -self._room)
            self.grow(more)
            self._room += more

    def _flush(self) -> None:
        """Ends the messages without an id that came one behind the other: they share an append."""
        parsed = self._parsed(self._run)
        if parsed.total:
            self._received.append(Received(parsed))
            self._run = self._make_run()

    def _parsed(self, gathered: RecordList) -> Parsed:
        parsed = gathered.parsed()
        if not self._envelope:
            return parsed
        return parsed._replace(records=parsed.records._replace(envelopes=self._envelope))

    def _acknowledged(self, parsed: Parsed, chunk: bytes) -> Received:
        key = hashlib.blake2b(chunk, digest_size=16).hexdigest()
        content = hashlib.blake2b(parsed.records.payload, digest_size=16).digest()
        return Received(parsed, b"\x81\xa3ack" + chunk, key, content, self._principal)


class _Unreadable(Exception):  # noqa: N818 - names the condition
    """The events of a message are none that could be records."""


def _parts(message: bytes) -> list[tuple[int, int]]:
    """The offsets of the elements of a message.

    Raises:
        MessagePackFault: it is none of the protocol.
    """
    head = read_head(message, 0) if message[0] in _ARRAYS else None
    if head is None or not 2 <= head[1] <= _PARTS_MAX:
        raise MessagePackFault("it is no array of a tag, events and options")
    parts = list(spans(message, head[2]))
    if head[1] == 2 and _head_of(message, parts[1][0]) is None:
        raise MessagePackFault("there is no record behind the time")
    return parts


def _tag(message: bytes, at: int, end: int) -> bytes:
    """The tag as a JSON text.

    Raises:
        MessagePackFault: it is none.
    """
    if not _is_text(message, at) or end - at > TAG_BYTES_MAX:
        raise MessagePackFault(f"its tag is no text of up to {TAG_BYTES_MAX} bytes")
    return encode_json(to_object(message, at, end))


def _is_text(message: bytes, at: int) -> bool:
    head = _head_of(message, at)
    return head is not None and head[0] != ARRAY


def _head_of(message: bytes, at: int) -> tuple[int, int, int] | None:
    """The head of an array, a str or a bin; `None` for any other value."""
    byte = message[at]
    if 0x90 <= byte < 0xC0 or 0xC4 <= byte <= 0xC6 or 0xD9 <= byte <= 0xDD:
        return read_head(message, at)
    return None


def _options(message: bytes, rest: Sequence[tuple[int, int]]) -> MessageOptions:
    """Reads the options of a message.

    Raises:
        MessagePackFault: they are no map, or there is more.
    """
    if not rest or message[rest[0][0]] == _NIL:
        return MessageOptions()
    (at, end), *more = rest
    if end - at > OPTIONS_BYTES_MAX:
        raise MessagePackFault(f"the options are more than {OPTIONS_BYTES_MAX} bytes")
    head = read_head(message, at) if message[at] in _MAPS else None
    if head is None or more:
        raise MessagePackFault("the options are no map, or something follows them")
    found = iter(spans(message, head[2], end))
    options = MessageOptions()
    for name, value in zip(found, found, strict=True):
        key, token = _text_of(message, *name), message[slice(*value)]
        if message[value[0]] == _NIL:  # as good as not there
            continue
        if key == b"chunk" and _text_of(message, *value):
            options = options._replace(chunk=token)
        elif key == b"compressed":
            options = options._replace(compressed=_text_of(message, *value) or token)
        elif key == b"fluent_signal":
            options = options._replace(signal=token)
    return options


def _text_of(message: bytes, at: int, end: int) -> bytes:
    """The bytes of a str or a bin; nothing of any other value."""
    head = _head_of(message, at)
    return message[head[2] : end] if head is not None and head[0] != ARRAY else b""
