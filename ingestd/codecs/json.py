"""Nesting depth, array sizes and escapes of JSON, without building objects.

A record's depth is bounded when it is accepted, so that no decoder behind it, in no version of
Python, meets a limit of its own: on 3.11 msgspec gives up at 1,000 levels less what is on the
stack, pydantic at 200.

The exact count is only made where it may matter. What costs little comes first: a line that is
nested deeper than N holds more than N opening brackets, and is longer than 2 N.
"""

from __future__ import annotations

import codecs
import json
import re
from itertools import accumulate
from typing import TYPE_CHECKING

from ingestd.base.bursts import let_loop_go_first

if TYPE_CHECKING:
    from collections.abc import Sequence, Sized


DEPTH_MAX = 128
"""The default of `json_depth_max`."""

_GROUP_BYTES = 16 * 1024
_GROUP_BYTES_MIN = 512
_TINY = 24
SMALL = 200
"""Bytes of values, on average, from which on `holds_deeper` looks at no length of one."""
_ROUNDS = 3
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPES = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a pair
    rb"|\\u(?P<lone>[dD][89a-fA-F][0-9a-fA-F]{2})"
    rb"|(?:\\(?!u[dD][89a-fA-F]).[^\\]*+){1,4096}",  # many that are none, for speed
    re.DOTALL,
)
_MENDED_MAX = 100_000
"""A text with more is not one that was cut in some places."""
_NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
_NO_BRACKET_OR_QUOTE = bytes(set(_NO_BRACKET) - set(b'"'))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def without_lone_surrogates(text: bytes) -> bytes:
    """Returns a JSON text with U+FFFD in place of each escape that is half a surrogate pair.

    JavaScript writes it where a text was cut in the middle of a character, and no decoder takes it.
    """
    if _SURROGATE.search(text) is None:
        return text
    found, mended = bytearray(text), 0
    for escape in _ESCAPES.finditer(text):
        let_loop_go_first()
        if escape["lone"]:
            mended += 1
            if mended > _MENDED_MAX:
                return text
            found[escape.start("lone") : escape.end("lone")] = b"fffd"
    return bytes(found)


def is_deeper(value: bytes, depth_max: int) -> bool:
    """Returns True if a valid JSON text is nested deeper than that; `[]` has the depth 1."""
    if len(value) <= 2 * depth_max or _openers(value) <= depth_max:
        return False
    brackets = value.translate(None, _NO_BRACKET_OR_QUOTE).replace(b'""', b"")
    if b'"' in brackets or b"\\" in value:  # there may be brackets in strings
        brackets = _STRINGS.sub(b"", value).translate(None, _NO_BRACKET)
    flat = brackets
    for _ in range(_ROUNDS):  # most large records are many small containers in one
        flat = flat.replace(b"{}", b"").replace(b"[]", b"")
    # A round takes two levels at most.
    if len(flat) <= 2 * (depth_max - 2 * _ROUNDS):
        return False
    return max(accumulate(map(_STEP.__getitem__, brackets)), default=0) > depth_max


def holds_deeper(block: bytes, values: Sequence[Sized], depth_max: int) -> bool:
    """Returns True if any line of a block is nested deeper than that.

    Args:
        block: valid JSON texts without an LF in them, each ended by LF.
        values: the texts, for their lengths.
        depth_max: levels.
    """
    size, count = len(block), len(values)
    if size <= 2 * depth_max + 1:
        return False
    if size < _TINY * count:
        return has_longer_line(block, 2 * depth_max) and _any_deeper(block, depth_max)
    if size < SMALL * count and max(map(len, values)) <= 2 * depth_max:
        return False
    start, step = 0, _GROUP_BYTES
    while start < size:
        end = block.rfind(b"\n", start, start + step) + 1 or block.index(b"\n", start) + 1
        group = block[start:end]
        openers = _openers(group)
        if openers > depth_max:
            if step > _GROUP_BYTES_MIN and end - start <= step:
                # As large as it can be with few enough of them, if all of it is like this.
                step = max(_GROUP_BYTES_MIN, (end - start) * depth_max * 3 // (openers * 4))
                continue
            if _any_deeper(group, depth_max):
                return True
        start = end
    return False


def _openers(text: bytes) -> int:
    # Deleting and measuring goes by memchr; `count` looks at each byte.
    count = len(text) - len(text.replace(b"{", b""))
    if b"[" in text:
        count += len(text) - len(text.replace(b"[", b""))
    return count


def has_longer_line(block: bytes, length: int) -> bool:
    """Returns True if a line of a block, each ended by LF, has more bytes than that."""
    start, size = 0, len(block)
    while start < size:
        end = block.rfind(b"\n", start, start + length + 1) + 1
        if not end:
            return True
        start = end
    return False


def _any_deeper(lines: bytes, depth_max: int) -> bool:
    return any(is_deeper(line, depth_max) for line in lines.split(b"\n"))


# -- sizes of arrays -------------------------------------------------------------------------------

_ELEMENTS_TOGETHER = 1024
_PREFIX_BYTES = 1024 * 1024


def holds_more(body: bytes, number: int) -> bool:
    """Returns True if an array has more than so many elements.

    As a list, `[1,1,1,…]` takes 40 times its size. One that is malformed has as many elements as
    stand before that: the decoder stops there, too.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        RecursionError: it is nested too deeply.
    """
    size = _PREFIX_BYTES
    while (more := _scan(body, size, number)) is None:
        size *= 4
    return more


def _scan(body: bytes, size: int, number: int) -> bool | None:
    """Scans the first bytes; `None` if they do not decide."""
    decode = json.JSONDecoder(parse_int=len, parse_float=len).raw_decode
    skip = json.decoder.WHITESPACE.match  # type: ignore[attr-defined]
    unknown = None if size < len(body) else False
    text = codecs.utf_8_decode(body[:size], "strict", size >= len(body))[0]
    try:
        at = skip(text, 0).end() + 1
        for at_element in range(number + 1):
            if not at_element % _ELEMENTS_TOGETHER:
                let_loop_go_first()
            at = decode(text, skip(text, at).end())[1]
            at = skip(text, at).end()
            if text[at] != ",":
                return False if text[at] == "]" else unknown
            at += 1
    except (ValueError, IndexError):
        return unknown
    return True


def is_json(media_type: str) -> bool:
    """Returns True for JSON media types (RFC 6839, 3.1), in small letters, without parameters."""
    return media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )
