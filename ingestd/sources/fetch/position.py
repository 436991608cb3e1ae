"""How far a URL was accepted, as it is kept in the journal. Pure.

A position counts bytes after decompression, up to the end of the last line that was accepted, so it
means the same however the next server sends the resource. Beside it stands what tells one version
of the resource from another, and a checksum of everything before it: where a download has to begin
at its beginning, what is passed over is compared with what was accepted.
"""

from __future__ import annotations

import hashlib
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

import msgspec

from ingestd.base.bookmark import Bookmark

if TYPE_CHECKING:
    from collections.abc import Mapping

VALIDATOR_CHARS_MAX = 1024
"""A longer validator is as none: it would have to be kept."""
_LAST_MODIFIED_SECONDS = 60
"""So long before the answer makes a date a strong validator (RFC 9110, 8.8.2.2, is laxer)."""


class Position(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where one URL stands.

    Attributes:
        etag: `ETag` of the version, as it was sent; empty if there was none.
        modified: its `Last-Modified`; empty if there was none.
        strong: what `If-Range` may say; empty if nothing is strong enough.
        encoding: how the body came: `identity`, or compressed.
        size: of the whole resource, bytes, where it comes as it is; 0 if that is not known.
        offset: bytes after decompression that are accepted, whole lines.
        crc: CRC-32 of these bytes.
        records: how many records they held, refused ones too.
        done: that was all of it.
        event_id: of a stream of events: `Last-Event-ID`.
    """

    etag: str = ""
    modified: str = ""
    strong: str = ""
    encoding: str = "identity"
    size: int = 0
    offset: int = 0
    crc: int = 0
    records: int = 0
    done: bool = False
    event_id: str = ""

    @property
    def has_version(self) -> bool:
        """Whether a server can be asked for changes."""
        return bool(self.etag or self.modified)

    @property
    def can_range(self) -> bool:
        """Whether the rest alone can be asked for."""
        return bool(self.offset and not self.done and self.strong and self.encoding == "identity")

    def same_version(self, other: Position) -> bool | None:
        """Whether both are of one version of a resource; `None` if nothing tells."""
        if self.etag and other.etag:
            return _weak(self.etag) == _weak(other.etag)
        if self.modified and other.modified:
            return self.modified == other.modified
        return None


_decoder = msgspec.json.Decoder(Position)
_encode = msgspec.json.Encoder().encode


def key_of(url: str) -> str:
    """The name of a URL's position: a hash, because a query may hold secrets.

    Args:
        url: without user, password and fragment.
    """
    return "fetch:" + hashlib.sha256(url.encode()).hexdigest()[:40]


def as_bookmark(key: str, position: Position) -> Bookmark:
    """As the journal keeps it."""
    return Bookmark(key, _encode(position))


def from_bookmark(bookmark: Bookmark | None) -> Position:
    """What the journal kept; the beginning, if that is nothing.

    Raises:
        ValueError: it is not a position.
    """
    return Position() if bookmark is None else _decoder.decode(bookmark.state)


def start_of(headers: Mapping[str, str], encoding: str) -> Position:
    """The beginning of the version that an answer is about."""
    etag = _bounded(headers.get("ETag", "").strip())
    modified = _bounded(headers.get("Last-Modified", "").strip())
    strong = ""
    if etag.startswith('"'):
        strong = etag
    elif not etag and _is_old(modified, headers.get("Date", "")):
        strong = modified
    return Position(etag=etag, modified=modified, strong=strong, encoding=encoding)


def _bounded(validator: str) -> str:
    plain = len(validator) <= VALIDATOR_CHARS_MAX and validator.isascii()
    return validator if plain and validator.isprintable() else ""


def _weak(etag: str) -> str:
    return etag.removeprefix("W/")


def _is_old(modified: str, date: str) -> bool:
    """Whether nothing can have changed within the second that a date names."""
    try:
        age = parsedate_to_datetime(date) - parsedate_to_datetime(modified)
    except (ValueError, TypeError):
        return False
    return age.total_seconds() >= _LAST_MODIFIED_SECONDS
