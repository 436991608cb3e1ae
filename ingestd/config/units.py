"""Sizes, times and lists as people write them: `"64MiB"` is bytes, `"250ms"` is seconds.

A bare number is bytes or seconds. `k`, `M` and `G` alone are refused: half of the tools people
know read them as 1000, the other half as 1024.
"""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BeforeValidator

if TYPE_CHECKING:
    from collections.abc import Callable

_DECIMAL = ("B", "kB", "MB", "GB", "TB")
_BINARY = ("KiB", "MiB", "GiB", "TiB")
_BYTES = {name.lower(): 1000**power for power, name in enumerate(_DECIMAL)} | {
    name.lower(): 1024**power for power, name in enumerate(_BINARY, start=1)
}
_SECONDS = {
    "d": Fraction(86400),
    "h": Fraction(3600),
    "m": Fraction(60),
    "s": Fraction(1),
    "ms": Fraction(1, 1000),
    "us": Fraction(1, 1_000_000),
}

_AMBIGUOUS = frozenset("kKmMgGtT")
_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_SIZE = re.compile(rf"({_NUMBER})\s*([A-Za-z]*)", re.ASCII)
_TIME = re.compile(rf"({_NUMBER})\s*([a-z]*)", re.ASCII)
_DIGITS_MAX = 40  # longer than any number that means something; keeps hostile input cheap

SIZE_FORMS = "a size: a number of bytes, or one with B, kB, MB, GB, TB, KiB, MiB, GiB or TiB"
TIME_FORMS = "a time: a number of seconds, or numbers with us, ms, s, m, h or d, largest first"
COUNT_FORMS = "a whole number"
SWITCH_FORMS = "true or false"
SHARE_FORMS = "a share: a number from 0 to 1"
RATE_FORMS = "a rate: a number"
WORDS_FORMS = "a list of words: an array of text, or text with commas or white space between them"


class NotUnderstoodError(ValueError):
    """A value that is not in any form we read.

    Attributes:
        expected: what would have been understood, for people; does not contain the value.
    """

    def __init__(self, written: object, expected: str) -> None:
        self.expected = expected
        super().__init__(f"{_shorten(written)} is not {expected}")


class UnquotedError(ValueError):
    """A wrong value, in words that do not contain it: they may be shown of a secret."""


def _shorten(written: object) -> str:
    shown = repr(written)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


def parse_size(written: object) -> int:
    """Bytes from `"64MiB"`, `"64 MB"`, `"512"` or a whole number.

    Raises:
        NotUnderstoodError: any other form, or a fraction of a byte.
    """
    if isinstance(written, int | float) and not isinstance(written, bool):
        if isinstance(written, int) or written.is_integer():
            return int(written)
    elif isinstance(written, str) and len(written) <= _DIGITS_MAX:
        match = _SIZE.fullmatch(written.strip())
        factor = _BYTES.get((match[2] or "B").lower()) if match else None
        if match and factor:
            size = Fraction(match[1]) * factor
            if size.denominator == 1:
                return int(size)
        if match and match[2] in _AMBIGUOUS:
            unit = match[2].upper()
            raise NotUnderstoodError(
                written,
                f"a size: {match[2]} alone is 1000 to some and 1024 to others, write"
                f" {'k' if unit == 'K' else unit}B ({_BYTES[f'{unit}b'.lower()]:,} bytes)"
                f" or {'K' if unit == 'K' else unit}iB ({_BYTES[f'{unit}ib'.lower()]:,} bytes)",
            )
    raise NotUnderstoodError(written, SIZE_FORMS)


def parse_seconds(written: object) -> float:
    """Seconds from `"250ms"`, `"1.5s"`, `"1h30m"`, `"30"` or a number.

    Raises:
        NotUnderstoodError: any other form, a unit that comes twice or after a smaller one.
    """
    if isinstance(written, int | float) and not isinstance(written, bool):
        try:
            seconds = float(written)
        except OverflowError:
            seconds = math.inf
        if math.isfinite(seconds):
            return seconds
    elif isinstance(written, str) and len(written) <= _DIGITS_MAX:
        parsed = _sum_of_parts(written.strip())
        if parsed is not None:
            return float(parsed)
    raise NotUnderstoodError(written, TIME_FORMS)


def _sum_of_parts(text: str) -> Fraction | None:
    if re.fullmatch(_NUMBER, text):
        return Fraction(text)
    total, position, smallest = Fraction(0), 0, _SECONDS["d"] + 1
    while position < len(text):
        match = _TIME.match(text, position)
        unit = _SECONDS.get(match[2]) if match else None
        if match is None or unit is None or unit >= smallest:
            return None
        total, smallest = total + Fraction(match[1]) * unit, unit
        position = match.end()
        while text[position : position + 1] == " ":
            position += 1
    return total if position else None


def parse_count(written: object) -> int:
    """A whole number, or the same as text; `true` is not 1.

    Raises:
        NotUnderstoodError: anything else.
    """
    if isinstance(written, int) and not isinstance(written, bool):
        return written
    if isinstance(written, str) and len(written) <= _DIGITS_MAX:
        text = written.strip()
        if re.fullmatch(r"[0-9]+(?:_[0-9]+)*", text, re.ASCII):
            return int(text)
    raise NotUnderstoodError(written, COUNT_FORMS)


def parse_share(written: object) -> float:
    """A part of a whole: `0.5`, or the same as text.

    Raises:
        NotUnderstoodError: anything else.
    """
    return _number(written, 1, SHARE_FORMS)


def parse_rate(written: object) -> float:
    """A number of things a second: `0.5`, `20`, or the same as text.

    Raises:
        NotUnderstoodError: anything else.
    """
    return _number(written, 1e12, RATE_FORMS)


def _number(written: object, most: float, expected: str) -> float:
    if isinstance(written, int | float) and not isinstance(written, bool):
        if 0 <= written <= most:
            return float(written)
    elif isinstance(written, str) and len(written) <= _DIGITS_MAX:
        text = written.strip()
        if re.fullmatch(_NUMBER, text) and float(text) <= most:
            return float(text)
    raise NotUnderstoodError(written, expected)


def parse_words(written: object) -> tuple[str, ...]:
    """Words from `["a", "b"]`, from the same as JSON text, or from `"a, b"` or `"a b"`.

    A word has at least one character and no white space; one with a comma needs an array.

    Raises:
        NotUnderstoodError: anything else.
    """
    words = written
    if isinstance(written, str):
        text = written.strip()
        words = _json_array(text) if text.startswith("[") else re.split(r"[,\s]+", text.strip(", "))
        if words == [""]:
            words = []
    if isinstance(words, list | tuple) and all(map(_is_word, words)):
        return tuple(words)
    raise NotUnderstoodError(written, WORDS_FORMS)


def _json_array(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value.split() == [value]


def parse_switch(written: object) -> bool:
    """`true` or `false`, or the same as text.

    Raises:
        NotUnderstoodError: anything else.
    """
    if isinstance(written, bool):
        return written
    if isinstance(written, str) and written.strip().lower() in ("true", "false"):
        return written.strip().lower() == "true"
    raise NotUnderstoodError(written, SWITCH_FORMS)


def show_size(size: int) -> str | int:
    """The shortest exact form: `"64MiB"`, or the bare number where no unit fits."""
    for power in range(len(_BINARY), 0, -1):
        if size and size % 1024**power == 0:
            return f"{size // 1024**power}{_BINARY[power - 1]}"
    return size


def show_seconds(seconds: float) -> str:
    """The usual exact form: `"500ms"`, `"60s"`, `"5m"`, `"1h"`."""
    for unit, factor, least in (("h", 3600, 3600), ("m", 60, 120), ("s", 1, 0)):
        if seconds % factor == 0 and seconds >= least:
            return f"{int(seconds // factor)}{unit}"
    exact = Decimal(repr(seconds))
    if seconds < 1 and exact * 1000 == int(exact * 1000):
        return f"{int(exact * 1000)}ms"
    return f"{exact:f}s"


def show_plain(value: object) -> object:
    """A value that needs no unit."""
    return value


def show_words(words: tuple[str, ...]) -> list[str]:
    """As the array that TOML has for them."""
    return list(words)


class Unit(NamedTuple):
    """Rides on a setting's type: how to write its value, in `check`, `--help` and errors."""

    name: str
    show: Callable[[Any], object]


Size = Annotated[int, BeforeValidator(parse_size), Unit("bytes", show_size)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Unit("seconds", show_seconds)]
Count = Annotated[int, BeforeValidator(parse_count), Unit("", show_plain)]
Switch = Annotated[bool, BeforeValidator(parse_switch)]
Share = Annotated[float, BeforeValidator(parse_share), Unit("", show_plain)]
PerSecond = Annotated[float, BeforeValidator(parse_rate), Unit("", show_plain)]
Words = Annotated[tuple[str, ...], BeforeValidator(parse_words), Unit("words", show_words)]
