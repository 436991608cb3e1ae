"""How many elements a JSON array has, found out without holding them."""

from __future__ import annotations

import codecs
import json

from ingestd.base.bursts import let_loop_go_first

_ELEMENTS_TOGETHER = 1024
_PREFIX_BYTES = 1024 * 1024


def holds_more(body: bytes, number: int) -> bool:
    """Whether an array has more than so many elements.

    As a list, `[1,1,1,…]` takes 40 times its size. One that is malformed has as many elements as
    stand before that: the decoder stops there, too.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        RecursionError: it is nested too deeply.
    """
    size = _PREFIX_BYTES
    while (more := _look(body, size, number)) is None:
        size *= 4
    return more


def _look(body: bytes, size: int, number: int) -> bool | None:
    """What the first bytes tell; nothing if they do not."""
    scan = json.JSONDecoder(parse_int=len, parse_float=len).raw_decode
    skip = json.decoder.WHITESPACE.match  # type: ignore[attr-defined]
    unknown = None if size < len(body) else False
    text = codecs.utf_8_decode(body[:size], "strict", size >= len(body))[0]
    try:
        at = skip(text, 0).end() + 1
        for at_element in range(number + 1):
            if not at_element % _ELEMENTS_TOGETHER:
                let_loop_go_first()
            at = scan(text, skip(text, at).end())[1]
            at = skip(text, at).end()
            if text[at] != ",":
                return False if text[at] == "]" else unknown
            at += 1
    except (ValueError, IndexError):
        return unknown
    return True
