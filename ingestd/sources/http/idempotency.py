"""`Idempotency-Key`: what the header says, and what makes two requests the same one. No I/O.

The header is an RFC 8941 string, as the HTTP API working group's draft "The Idempotency-Key HTTP
Header Field" has it; the bare form that most clients send is read too, and means the same key.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from ingestd.sources.http import problem
from ingestd.sources.http.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER = "Idempotency-Key"
REPLAYED = {"Idempotent-Replayed": "true"}
KEY_CHARACTERS_MAX = 255

_QUOTED = re.compile(r'"((?:[!#-\[\]-~]|\\["\\])*)"', re.ASCII)
_BARE = re.compile(r"[!#-+\--:<-\[\]-~]*", re.ASCII)  # visible, but for " , ; and \
_ESCAPED = re.compile(r"\\(.)")


def parse_key(values: Sequence[str]) -> str:
    """The key, from all the `Idempotency-Key`s of a request (at least one).

    Raises:
        Problem: 400.
    """
    if len(values) > 1:
        raise Problem(problem.KEY_INVALID, "there is more than one")
    value = values[0].strip(" \t")
    quoted = _QUOTED.fullmatch(value)
    if quoted is not None:
        key = _ESCAPED.sub(r"\1", quoted[1])
    elif _BARE.fullmatch(value):
        key = value
    else:
        detail = 'it is a string in quotes ("…") or one word, of visible ASCII characters'
        raise Problem(problem.KEY_INVALID, detail)
    if not 1 <= len(key) <= KEY_CHARACTERS_MAX:
        raise Problem(problem.KEY_INVALID, f"it has 1 to {KEY_CHARACTERS_MAX} characters")
    return key


def take_fingerprint(wire: bytes, content_type: str, encoding: str) -> bytes:
    """16 bytes that another body, `Content-Type` or `Content-Encoding` does not have.

    Args:
        wire: the body as it came.
        content_type: as it came.
        encoding: what it is encoded with.
    """
    head = f"{encoding}\0{content_type}\0".encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(head, digest_size=16)
    digest.update(wire)
    return digest.digest()
