"""MessagePack (https://github.com/msgpack/msgpack/blob/master/spec.md): framing, and its JSON.

msgspec decodes whole values and has no call for where one ends. `Scanner` finds the end in a
stream, token by token; `spans` finds the ends of values one behind the other, many at once, by
msgspec's own walk over them. Invariants:

* A length is believed as far as bytes are there. `Scanner` allocates nothing for it and refuses one
  beyond its bound before the bytes come. A value is decoded only after its end was found: then
  it holds what its lengths say, and the lists and dicts made of it are no larger than they are.
* The work is linear in the bytes, however they were divided into reads.
* Each value has a JSON text, without an LF in it, also where MessagePack can say more than JSON:

  ================================== ===============================================================
  NaN, infinity                      `null`
  str                                a string; bytes that are no UTF-8 are U+FFFD
  bin                                its text if it is UTF-8, else `"data:;base64,…"` (RFC 2397)
  key that is no str, int or float   its JSON text: `"null"`, `"[1]"`; a bin, a timestamp as here
  equal keys                         the last one counts
  EventTime (ext 0 of 8 bytes)       seconds since the epoch, with nine digits behind the point
  timestamp (ext -1)                 `"2026-11-29T10:36:59.123456Z"`; nanoseconds are cut off
  other ext                          `{"ext": 5, "data": "data:;base64,…"}`
  ================================== ===============================================================
"""

from __future__ import annotations

import base64
import re
import struct
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

DEPTH_MAX = 600
"""A value in a stream that is nested deeper is refused: `json_depth_max` is 512 at most."""

ARRAY, MAP, STR, BIN, EXT = range(5)
"""Kinds of tokens with a length."""

_FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_SCALARS = {0xC0: 1, 0xC2: 1, 0xC3: 1, 0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9}
_SCALARS |= {0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9}
_LENGTHS = {0xC4: (BIN, 1), 0xC5: (BIN, 2), 0xC6: (BIN, 4)}
_LENGTHS |= {0xC7: (EXT, 1), 0xC8: (EXT, 2), 0xC9: (EXT, 4)}
_LENGTHS |= {0xD9: (STR, 1), 0xDA: (STR, 2), 0xDB: (STR, 4)}
_LENGTHS |= {0xDC: (ARRAY, 2), 0xDD: (ARRAY, 4), 0xDE: (MAP, 2), 0xDF: (MAP, 4)}


def _size_of(byte: int) -> int:
    """The size of a token, head included, if its first byte tells it; 0 else."""
    if byte < 0x80 or byte >= 0xE0:
        return 1
    return 1 + (byte & 0x1F) if 0xA0 <= byte < 0xC0 else _SCALARS.get(byte, 0)


_STEPS = tuple(map(_size_of, range(256)))


class MessagePackFault(Exception):  # noqa: N818 - names the condition
    """The bytes are no MessagePack, or go beyond a bound."""


def read_head(data: bytes | bytearray, at: int) -> tuple[int, int, int] | None:
    """Reads the head of an array, a map, a str, a bin or an ext; `None` if it is not whole.

    Args:
        data: with at least the first byte of the head.
        at: its offset.

    Returns:
        The kind; how many elements it has (two for each pair of a map), or bytes; the offset
        behind the head, and behind the type of an ext.

    Raises:
        MessagePackFault: there is no such head.
    """
    byte = data[at]
    if 0x80 <= byte < 0x90:
        return MAP, 2 * (byte & 0x0F), at + 1
    if 0x90 <= byte < 0xA0:
        return ARRAY, byte & 0x0F, at + 1
    if 0xA0 <= byte < 0xC0:
        return STR, byte & 0x1F, at + 1
    if byte in _FIXED_EXT:
        return EXT, _FIXED_EXT[byte], at + 2
    if byte not in _LENGTHS:
        raise MessagePackFault(f"malformed MessagePack: byte 0x{byte:02x} at offset {at}")
    kind, width = _LENGTHS[byte]
    behind = at + 1 + width
    if behind > len(data):
        return None
    count = int.from_bytes(data[at + 1 : behind], "big")
    return kind, 2 * count if kind == MAP else count, behind + (kind == EXT)


class Scanner:
    """Finds the end of one value in bytes that may grow; goes on where it stopped.

    Args:
        at: offset of the value.
        bytes_max: a value that ends behind this offset is refused as soon as a length says so.

    Attributes:
        at: offset up to which it is scanned: behind the value, at its end. It may lie beyond the
            bytes that are there.
    """

    __slots__ = ("_around", "_bytes_max", "_left", "at")

    def __init__(self, at: int, bytes_max: int) -> None:
        self.at = at
        self._bytes_max = bytes_max
        self._left = 1  # values that are left in the innermost container
        self._around: list[int] = []  # and in those around it

    def run(self, data: bytes | bytearray) -> bool:
        """Scans what is there; tells if the value is complete.

        Raises:
            MessagePackFault: it is none, or beyond a bound.
        """
        at, left, around, size = self.at, self._left, self._around, len(data)
        while left or around:
            if not left:
                left = around.pop()
                continue
            if at >= size:
                break
            step = _STEPS[data[at]]
            if step:
                at += step
                left -= 1
                continue
            head = read_head(data, at)
            if head is None:
                break
            kind, count, at = head
            left -= 1
            if at + count > self._bytes_max:  # each element has a byte at least
                raise MessagePackFault(f"a length goes beyond {self._bytes_max} bytes")
            if kind >= STR:
                at += count
                continue
            around.append(left)
            left = count
            if len(around) > DEPTH_MAX:
                raise MessagePackFault(f"nested deeper than {DEPTH_MAX} levels")
        self.at, self._left = at, left
        return not left and not around and at <= size


# -- many values -----------------------------------------------------------------------------------

_WINDOW_BYTES = 64 * 1024
_TOGETHER = 1024
_raw = msgspec.msgpack.Decoder(msgspec.Raw).decode
_raws = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
# Behind as many values as an array has, msgspec tells where something more begins. What it does
# not tell in these words is scanned.
_MORE = re.compile(r"trailing characters \(byte ([0-9]+)\)$")


def end_of(data: bytes | bytearray, at: int = 0) -> int:
    """Returns the offset behind the value at an offset.

    Raises:
        MessagePackFault: there is no complete value.
    """
    try:
        _raw(memoryview(data)[at:])
    except (msgspec.DecodeError, RecursionError) as error:
        more = _MORE.search(str(error))
        return at + int(more[1]) if more else _scan(data, at, len(data))
    return len(data)


def _scan(data: bytes | bytearray, at: int, end: int) -> int:
    scanner = Scanner(at, end)
    if not scanner.run(data) or scanner.at > end:
        raise MessagePackFault("the MessagePack is cut off")
    return scanner.at


def spans(
    data: bytes | bytearray, at: int = 0, end: int | None = None
) -> Iterator[tuple[int, int]]:
    """Yields the offsets of values one behind the other, and of their ends.

    Args:
        data: holds them.
        at: offset of the first one.
        end: the offset behind the last one; by default the end of the data.

    Raises:
        MessagePackFault: what comes next is no complete value.
    """
    last = len(data) if end is None else end
    together = min(_TOGETHER, (last - at) // 64 + 1)
    while at < last:
        head = b"\xdc%b" % together.to_bytes(2, "big")
        window = head + data[at : min(last, at + _WINDOW_BYTES)]
        try:
            found = _raws(window)
        except (msgspec.DecodeError, RecursionError) as error:
            more = _MORE.search(str(error))
            if more is None and together > 1:
                together //= 2
                continue
            if more is None:
                start, at = at, _scan(data, at, last)
                yield start, at
                continue
            found = _raws(window[: int(more[1])])
        for raw in found:
            start = at
            at += memoryview(raw).nbytes
            yield start, at
        if last - at > _WINDOW_BYTES:
            together = min(2 * together, _TOGETHER)


# -- values as JSON --------------------------------------------------------------------------------

_EVENT_TIME = struct.Struct(">II")
_BILLION = 10**9
_encode = msgspec.json.Encoder().encode


def to_object(data: bytes | bytearray, at: int, end: int, *, sure: int = 0) -> Any:
    """Decodes a value whose end was found into what `encode_json` takes.

    Args:
        data: holds it.
        at: its offset.
        end: the offset behind it.
        sure: up to this offset there is no bin.

    Raises:
        MessagePackFault: it is nested too deeply.
    """
    try:
        try:
            value = _decode(memoryview(data)[at:end])
        except (UnicodeDecodeError, msgspec.DecodeError):  # a str is no UTF-8, or a key is a map
            return _Reader(data, at).value()
        start = max(at, sure)
        if (  # the first bytes of bins; other tokens have them too
            data.find(b"\xc4", start, end) >= 0
            or data.find(b"\xc5", start, end) >= 0
            or data.find(b"\xc6", start, end) >= 0
        ) and _holds_bin(value):
            return _with_text(value)
    except RecursionError:
        raise MessagePackFault("nested too deeply") from None
    return value


def encode_json(value: Any) -> bytes:
    """Returns the JSON text of what `to_object` gave.

    Raises:
        MessagePackFault: it is nested too deeply.
    """
    try:
        try:
            return _encode(value)
        except TypeError:  # there is a key that msgspec does not write
            return _encode(_with_text(value))
    except RecursionError:
        raise MessagePackFault("nested too deeply") from None


def event_time(payload: bytes | bytearray | memoryview) -> bytes:
    """Returns the JSON text of the 8 bytes of an EventTime: seconds and nanoseconds, 32 bits each.

    https://github.com/fluent/fluentd/wiki/Forward-Protocol-Specification-v1#eventtime-ext-format
    """
    seconds, nanoseconds = _EVENT_TIME.unpack(payload)
    more, nanoseconds = divmod(nanoseconds, _BILLION)
    return b"%d.%09d" % (seconds + more, nanoseconds)


def _ext(code: int, payload: bytes | bytearray | memoryview) -> Any:
    if code == 0 and len(payload) == _EVENT_TIME.size:
        return msgspec.Raw(event_time(payload))
    return {"ext": code, "data": _data_url(payload)}


_decode = msgspec.msgpack.Decoder(ext_hook=_ext).decode


class _Reader:
    """Decodes what msgspec does not; slower.

    Args:
        data: holds a value whose end was found.
        at: its offset.
    """

    def __init__(self, data: bytes | bytearray, at: int) -> None:
        self._data = data
        self._at = at

    def value(self) -> Any:
        """The next value."""
        data, at = self._data, self._at
        if data[at] in _SCALARS or data[at] < 0x80 or data[at] >= 0xE0:
            self._at = at + _STEPS[data[at]]
            return _decode(data[at : self._at])
        head = read_head(data, at)
        if head is None:
            raise MessagePackFault("the MessagePack is cut off")
        kind, count, self._at = head
        if kind == ARRAY:
            return [self.value() for _ in range(count)]
        if kind == MAP:
            return {_key(self.value()): self.value() for _ in range(count // 2)}
        payload = data[self._at : self._at + count]
        self._at += count
        if kind == EXT:
            try:
                return _decode(data[at : self._at])
            except msgspec.DecodeError:  # a timestamp that is none
                return _ext(-1, payload)
        return payload.decode("utf-8", "replace") if kind == STR else _text(payload)


def _text(payload: bytes | bytearray) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError:
        return _data_url(payload)


def _data_url(payload: bytes | bytearray | memoryview) -> str:
    return "data:;base64," + base64.b64encode(payload).decode()


def _key(key: Any) -> str | int | float:
    if isinstance(key, str) or (isinstance(key, int | float) and not isinstance(key, bool)):
        return key
    if isinstance(key, bytes):
        return _text(key)
    return encode_json(_with_text(key)).decode().strip('"')  # a timestamp as msgspec writes it


_PLAIN = frozenset((str, int, float, bool, type(None)))
_TEXT = {str}


def _holds_bin(value: Any) -> bool:
    """Tells if there may be bytes, or keys that are no str, in a value."""
    inner: Collection[Any]
    if isinstance(value, dict):
        if not _TEXT.issuperset(map(type, value)):
            return True
        inner = value.values()
    elif isinstance(value, list):
        inner = value
    else:
        return isinstance(value, bytes)
    return not _PLAIN.issuperset(map(type, inner)) and any(map(_holds_bin, inner))


def _with_text(value: Any) -> Any:
    """The same with texts for bytes and for keys that JSON does not have."""
    if isinstance(value, dict):
        return {
            _key(key): one if isinstance(one, str) else _with_text(one)
            for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [_with_text(one) for one in value]
    return _text(value) if isinstance(value, bytes) else value
