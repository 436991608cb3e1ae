"""Form bodies (`application/x-www-form-urlencoded`), as fields and as one JSON object. No I/O.

https://url.spec.whatwg.org/#urlencoded-parsing, in UTF-8 alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

FORM = "application/x-www-form-urlencoded"
FORM_BYTES_MAX = 1024**2
"""An escape of three bytes becomes an object of 40 while it is decoded: 15 MB for such a form."""
FIELDS_MAX = 1000


def parse_form(body: bytes) -> list[tuple[str, str]]:
    """Returns the fields of a form: (name, value), in their order, empty ones too.

    Raises:
        ValueError: it is too large, has too many fields, or is not UTF-8.
    """
    if len(body) > FORM_BYTES_MAX:
        raise ValueError(f"the form has {len(body)} bytes, more than {FORM_BYTES_MAX}")
    if body.count(b"&") >= FIELDS_MAX:
        raise ValueError(f"the form has more than {FIELDS_MAX} fields")
    try:
        return parse_qsl(body.decode(), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise ValueError("the form is not UTF-8") from None


def to_object(fields: Iterable[tuple[str, str]]) -> bytes:
    """Returns fields as a JSON object; the values of a name that comes again are an array."""
    found: dict[str, list[str]] = {}
    for name, value in fields:
        found.setdefault(name, []).append(value)
    return msgspec.json.encode({k: v[0] if len(v) == 1 else v for k, v in found.items()})
