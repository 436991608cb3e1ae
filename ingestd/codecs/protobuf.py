"""Protobuf messages, read into plain dicts by a table of their fields.

https://protobuf.dev/programming-guides/encoding/

Classes that protoc generates are not used for what clients send: they build all objects of a body
before one can be counted.

1. Fields that the table does not have are skipped, and so are those with another wire type.
2. A field that comes twice counts the last time, a message too: the two are not merged. A repeated
   one is a list, packed or not.
3. Nothing is read behind the end of its message; what is cut off is `WireFault`. So are groups,
   which no message here has, and texts that are not UTF-8.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    WireField = tuple[str, Callable[..., Any]]

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
"""Wire types."""
UNSET: Any = object()
"""A value that is as good as none; the field is left out."""
MANY_MAX = 65_536
"""Messages in one repeated field: each takes two bytes at least, and is a dict of some hundred."""
_VARINT_BYTES_MAX = 10
_CUT_OFF = "a field is cut off"
_NUMBER = "a field has the number 0"


class WireFault(ValueError):  # noqa: N818 - reads as what happened
    """Bytes that are not the message; its text says where."""


FAULTS = (ValueError, RecursionError)
"""What reading a message raises if it is none: here, in what makes values, and of JSON."""


def fault_of(error: BaseException) -> str:
    """Describes one of `FAULTS` in a line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a text is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


class TooManyFields(ValueError):  # noqa: N818 - reads as what happened
    """A message with more fields than may be."""


class WireTable(NamedTuple):
    """The fields of one message, by tag (`tag_of`).

    A field is its name in the dict, and what makes its value: of the number, if it is a varint, of
    body and place, if it is of fixed size, else of its bytes.

    Attributes:
        single: fields that are there once.
        many: repeated ones, and whether this tag is that of their packed form, of whose bytes a
            list is made.
        pairs_tag: of a repeated message of key and value; they become a dict.
        pairs_name: its name.
        pair: makes key and value of the bytes of one.
    """

    single: Mapping[int, WireField]
    many: Mapping[int, tuple[str, Callable[..., Any], bool]]
    pairs_tag: int
    pairs_name: str
    pair: Callable[[bytes], tuple[str, Any]]


def tag_of(number: int, wire_type: int) -> int:
    """The tag of a field."""
    return number << 3 | wire_type


def varint(data: bytes, pos: int) -> tuple[int, int]:
    """The number at a place, and the place behind it.

    Raises:
        IndexError: it is cut off.
        WireFault: it is longer than 64 bits.
    """
    byte = data[pos]
    if byte < 128:
        return byte, pos + 1
    more = data[pos + 1]
    if more < 128:  # as most lengths of texts
        return byte + ((more - 1) << 7), pos + 2
    number = shift = 0
    for at in range(pos, pos + _VARINT_BYTES_MAX):
        byte = data[at]
        number |= (byte & 127) << shift
        if byte < 128:
            return number & 0xFFFF_FFFF_FFFF_FFFF, at + 1
        shift += 7
    raise WireFault("a number has more than 64 bits")


class FieldBudget:
    """The fields that `spans` may still meet in one body.

    Args:
        most: of them; a field may have two bytes, and each takes half a microsecond.
    """

    __slots__ = ("left",)

    def __init__(self, most: int) -> None:
        self.left = most

    def spend(self, fields: int) -> None:
        """Counts what takes as long as so many fields.

        Raises:
            TooManyFields: there are no more.
        """
        self.left -= fields
        if self.left < 0:
            raise TooManyFields


def spans(data: bytes, start: int, end: int, budget: FieldBudget) -> Iterator[tuple[int, int, int]]:
    """Number, first byte and end of each field with a length between two places; no copy is made.

    Raises:
        WireFault: what stands there is no message.
        TooManyFields: the budget is used up.
    """
    pos = start
    try:
        while pos < end:
            budget.left -= 1
            if budget.left < 0:
                raise TooManyFields
            tag = data[pos]
            pos += 1
            if tag > 127:
                tag, pos = varint(data, pos - 1)
            if tag & 7 != LENGTH:
                pos = _skip(data, pos, tag)
                continue
            if tag < 8:
                raise WireFault(_NUMBER)
            size = data[pos]
            pos += 1
            if size > 127:  # mostly of two bytes, for which a call takes as long as the rest
                more = data[pos]
                if more < 128:
                    size += (more - 1) << 7
                    pos += 1
                else:
                    size, pos = varint(data, pos - 1)
            stop = pos + size
            if stop > end:
                pos = -1
                break
            yield tag >> 3, pos, stop
            pos = stop
    except IndexError:
        pos = -1
    if pos != end:
        raise WireFault(_CUT_OFF)


def _skip(data: bytes, pos: int, tag: int) -> int:
    """The place behind a field that has no length."""
    wire = tag & 7
    if not tag >> 3:
        raise WireFault(_NUMBER)
    if wire == VARINT:
        return varint(data, pos)[1]
    if wire == FIXED64:
        return pos + 8
    if wire == FIXED32:
        return pos + 4
    raise WireFault(f"a field has the wire type {wire}")


def read(  # noqa: PLR0912, PLR0915 - a call for each field would take as long as all of this
    table: WireTable, data: bytes, start: Mapping[str, Any]
) -> dict[str, Any]:
    """Reads a message into a copy of a dict, and returns that.

    Args:
        table: of its fields.
        data: the whole message.
        start: is copied.

    Raises:
        WireFault: it is none, or has a value that cannot be.
    """
    single, many, pairs_tag, pairs_name, pair = table
    found = dict(start)
    pairs: list[bytes] = []
    name = ""
    pos, end = 0, len(data)
    try:
        while pos < end:
            tag = data[pos]
            pos += 1
            if tag == pairs_tag:
                size = data[pos]
                pos += 1
                if size > 127:
                    size, pos = varint(data, pos - 1)
                stop = pos + size
                pairs.append(data[pos:stop])
                pos = stop
                continue
            if tag > 127:
                tag, pos = varint(data, pos - 1)
                if tag == pairs_tag:  # in more bytes than it needs
                    size, pos = varint(data, pos)
                    pairs.append(data[pos : pos + size])
                    pos += size
                    continue
            field = single.get(tag)
            if field is None:
                pos = _read_other(data, pos, tag, many, found)
                continue
            name, make = field
            wire = tag & 7
            if wire == 2:
                size = data[pos]
                pos += 1
                if size > 127:
                    size, pos = varint(data, pos - 1)
                stop = pos + size
                value = make(data[pos:stop])
                pos = stop
                if value is UNSET:
                    found.pop(name, None)
                    continue
            elif wire == 0:
                number, pos = varint(data, pos)
                value = make(number)
            else:
                (value,) = make(data, pos)
                pos += 8 if wire == 1 else 4
            found[name] = value
        if pairs and pos == end:
            name = pairs_name
            found[name] = dict(map(pair, pairs))
    except WireFault:
        raise
    except ValueError as error:
        raise WireFault(f"{name}: {fault_of(error)}") from None
    except (IndexError, struct.error):
        raise WireFault(_CUT_OFF) from None
    if pos != end:
        raise WireFault(_CUT_OFF)
    return found


def _read_other(
    data: bytes,
    pos: int,
    tag: int,
    many: Mapping[int, tuple[str, Callable[..., Any], bool]],
    found: dict[str, Any],
) -> int:
    """Reads a repeated field, or skips one that is not known; the place behind it."""
    name, make, packed = many.get(tag, ("", None, False))
    wire, stop = tag & 7, pos
    if wire == LENGTH:
        size, pos = varint(data, pos)
        stop = pos + size
    elif make is None:
        return _skip(data, pos, tag)
    if make is None:
        if tag < 8:
            raise WireFault(_NUMBER)
        return stop
    values = found.setdefault(name, [])
    if len(values) >= MANY_MAX:
        raise WireFault(f"{name}: more than {MANY_MAX}")
    try:
        if wire == LENGTH:
            made = make(data[pos:stop])
        elif wire == VARINT:
            number, stop = varint(data, pos)
            made = make(number)
        else:
            (made,) = make(data, pos)
            stop = pos + (8 if wire == FIXED64 else 4)
    except ValueError as error:
        raise WireFault(f"{name}: {fault_of(error)}") from None
    if packed:
        values += made
    else:
        values.append(made)
    return stop


# -- values of fields ------------------------------------------------------------------------------

unsigned64 = struct.Struct("<Q").unpack_from
signed64 = struct.Struct("<q").unpack_from
unsigned32 = struct.Struct("<I").unpack_from
double = struct.Struct("<d").unpack_from


def low32(number: int) -> int:
    """A varint as `uint32`."""
    return number & 0xFFFF_FFFF


def signed(number: int) -> int:
    """A varint as `int64`."""
    return number - 2**64 if number >> 63 else number


def signed_low32(number: int) -> int:
    """A varint as `int32`."""
    return number if number < 2**31 else (number & 0xFFFF_FFFF ^ 0x8000_0000) - 0x8000_0000


def zigzag(number: int) -> int:
    """A varint as `sint32`."""
    return (number & 0xFFFF_FFFF) >> 1 ^ -(number & 1)


def varints(data: bytes) -> list[int]:
    """Packed `uint64`s."""
    found, pos = [], 0
    while pos < len(data):
        number, pos = varint(data, pos)
        found.append(number)
    return found


def unpack_all(code: str, data: bytes) -> list[Any]:
    """Packed numbers of fixed size, by their code in `struct`."""
    return [number for (number,) in struct.iter_unpack(code, data)]


# -- messages that are written ---------------------------------------------------------------------


def pack(number: int, value: int | bytes) -> bytes:
    """A field: a varint that is not negative, or a text or message; nothing if that is unset."""
    if not value:
        return b""
    if isinstance(value, int):
        return _pack_varint(number << 3 | VARINT) + _pack_varint(value)
    return _pack_varint(number << 3 | LENGTH) + _pack_varint(len(value)) + value


def _pack_varint(number: int) -> bytes:
    packed = bytearray()
    while number > 127:
        packed.append(number & 127 | 128)
        number >>= 7
    packed.append(number)
    return bytes(packed)
