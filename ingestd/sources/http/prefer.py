"""`Prefer` (RFC 7240): what a client would like, as far as it is known here. No I/O."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER = "Prefer"
APPLIED = "Preference-Applied"

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - the RFC's word
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_WORD = rf"(?:{_TOKEN}|{_QUOTED})"
_PREFERENCE = re.compile(
    rf"[ \t]*(?P<name>{_TOKEN})(?:[ \t]*=[ \t]*(?P<value>{_WORD})?)?[ \t]*"
    rf"(?:;[ \t]*(?:{_TOKEN}(?:[ \t]*=[ \t]*{_WORD}?)?)?[ \t]*)*"
)


class Preferences(NamedTuple):
    """What is known here of what a client prefers.

    Attributes:
        wait: seconds that it would wait to hear what becomes of its records.
        strict: no record is to be accepted if one of them can't be.
    """

    wait: int | None = None
    strict: bool = False

    def applied(self) -> dict[str, str]:
        """The header that says which preferences were followed."""
        names = [f"wait={self.wait}"] if self.wait is not None else []
        names += ["handling=strict"] if self.strict else []
        return {APPLIED: ", ".join(names)} if names else {}


NOTHING = Preferences()


def parse_prefer(values: Sequence[str], wait_max: float) -> Preferences:
    """All the `Prefer`s of a request; what is not known or can't be read is ignored (RFC 7240, 2).

    Args:
        values: the headers as they came.
        wait_max: no wait is longer, in seconds.
    """
    known: dict[str, str] = {}
    for value in values:
        at = 0
        while found := _PREFERENCE.match(value, at):
            # Of a preference that comes twice only the first counts.
            known.setdefault(found["name"].lower(), (found["value"] or "").strip('"').lower())
            at = found.end()
            if value[at : at + 1] != ",":
                break
            at += 1
    seconds = _seconds(known.get("wait", ""), int(wait_max)) if wait_max else None
    return Preferences(seconds, known.get("handling") == "strict")


def _seconds(digits: str, longest: int) -> int | None:
    """A delta-seconds, at most `longest`; nothing if it is none. Any number of digits is read."""
    if not (digits.isascii() and digits.isdigit()):
        return None
    significant = digits.lstrip("0")
    # Python refuses to convert thousands of digits, and longer is larger anyway.
    return (
        longest if len(significant) > len(str(longest)) else min(int(significant or "0"), longest)
    )
