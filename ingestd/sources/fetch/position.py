"""Positions of downloads: stored state, request headers from it, and the meaning of answers. Pure.

A position counts bytes after decompression, up to the end of the last line that was accepted, so it
means the same however the next server sends the resource. Beside it stands what tells one version
of the resource from another, and a checksum of everything before it: where a download has to begin
at its beginning, what is passed over is compared with what was accepted.
"""

from __future__ import annotations

import hashlib
import re
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec.structs import replace

from ingestd.base.append import SourceOffset
from ingestd.sources.fetch.failure import DownloadFailed, ResourceChanged, TryAgain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from yarl import URL


VALIDATOR_CHARS_MAX = 1024
"""Bound of a validator that is kept; a longer one counts as none."""
_LAST_MODIFIED_SECONDS = 60
"""Age from which on a date is a strong validator (RFC 9110, 8.8.2.2, is laxer)."""


class Position(msgspec.Struct, frozen=True, omit_defaults=True):
    """The accepted part of one URL.

    Attributes:
        etag: `ETag` of the version, as it was sent; empty if there was none.
        modified: its `Last-Modified`; empty if there was none.
        strong: validator for `If-Range`; empty if none is strong enough.
        encoding: how the body came: `identity`, or compressed.
        size: of the whole resource, bytes, where it comes as it is; 0 if that is not known.
        offset: bytes after decompression that are accepted, whole lines.
        crc: CRC-32 of these bytes.
        records: records in them, refused ones too.
        lines: lines in them; 0 if they were not counted, as by earlier versions.
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
    lines: int = 0
    done: bool = False
    event_id: str = ""

    @property
    def has_version(self) -> bool:
        """Returns True if a conditional request is possible."""
        return bool(self.etag or self.modified)

    @property
    def can_range(self) -> bool:
        """Returns True if a range request is possible."""
        return bool(self.offset and not self.done and self.strong and self.encoding == "identity")

    def same_version(self, other: Position) -> bool | None:
        """Compares the versions of a resource; `None` if that is unknown."""
        if self.etag and other.etag:
            return _weak(self.etag) == _weak(other.etag)
        if self.modified and other.modified:
            return self.modified == other.modified
        return None


_decoder = msgspec.json.Decoder(Position)
_encode = msgspec.json.Encoder().encode


def key_of(url: str) -> str:
    """The key of a URL's position: a hash, because a query may hold secrets.

    Args:
        url: without user, password and fragment.
    """
    return "fetch:" + hashlib.sha256(url.encode()).hexdigest()[:40]


def to_offset(key: str, position: Position) -> SourceOffset:
    """Encodes a position for the journal."""
    return SourceOffset(key, _encode(position))


def from_offset(offset: SourceOffset | None) -> Position:
    """Decodes a position from the journal; the beginning if there is none.

    Raises:
        ValueError: it is not a position.
    """
    return Position() if offset is None else _decoder.decode(offset.state)


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
    """Returns True if the date is old enough that no change can hide in its second."""
    try:
        age = parsedate_to_datetime(date) - parsedate_to_datetime(modified)
    except (ValueError, TypeError, OverflowError):
        return False
    return age.total_seconds() >= _LAST_MODIFIED_SECONDS


# -- requests and answers --------------------------------------------------------------------------

_CODINGS = {"": "identity", "x-gzip": "gzip"}
_READ = frozenset({"identity", "gzip", "deflate", "zstd"})
_BY_NAME = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_BY_TYPE = {
    "application/gzip": "gzip",
    "application/x-gzip": "gzip",
    "application/zstd": "zstd",
    "application/x-zstd": "zstd",
}
EVENT_STREAM = "text/event-stream"
_SEVERAL_PARTS = "multipart/byteranges"
_LENGTH_DIGITS_MAX = 19
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)
_UNSATISFIED = re.compile(r"bytes \*/(\d{1,19})", re.ASCII)
_AGAIN = frozenset({408, 421, 425, 429})
_NEVER = frozenset({501, 505, 510, 511})


class BodyToRead(NamedTuple):
    """A body to read.

    Attributes:
        position: where its first byte that is taken lies.
        skip: bytes after decompression that come before it.
        length: of the body as it is sent, if its head says so.
        whole: the body reaches to the end of the resource.
        changed: it is a new version of something that was accepted before, or begun.
    """

    position: Position
    skip: int = 0
    length: int | None = None
    whole: bool = True
    changed: bool = False


class Finished(NamedTuple):
    """No body to read: all of it is accepted, in the version that the position names."""

    position: Position


def headers_for(
    position: Position, *, url: URL, ranges: bool, endless: bool = False
) -> dict[str, str]:
    """The headers of a request.

    Args:
        position: of the URL.
        url: of the request.
        ranges: a range may be requested.
        endless: it is a stream. It would hold the window that zstd needs for as long as it lasts.
    """
    is_packed = _by_name(url) is not None
    headers = {"Accept-Encoding": "gzip" if endless else "gzip, zstd"}
    if is_packed:
        headers["Accept-Encoding"] = "identity"
    if position.event_id:
        headers["Last-Event-ID"] = position.event_id
    if position.done:
        if position.etag:
            headers["If-None-Match"] = position.etag
        if position.modified:
            headers["If-Modified-Since"] = position.modified
    elif ranges and position.can_range:
        headers["Range"] = f"bytes={position.offset}-"
        headers["If-Range"] = position.strong
        headers["Accept-Encoding"] = "identity"
    return headers


def interpret(
    status: int,
    headers: Mapping[str, str],
    *,
    asked: Mapping[str, str],
    position: Position,
    encoding: str,
) -> BodyToRead | Finished:
    """Interprets the head of an answer.

    Args:
        status: its status.
        headers: its headers.
        asked: the headers of the request, from `headers_for`.
        position: of the URL.
        encoding: of its body, see `encoding_of`.

    Raises:
        ResourceChanged: the range is not of the version that was begun.
        TryAgain: it may succeed another time.
        DownloadFailed: it would not.
    """
    here = start_of(headers, encoding)
    ranged = "Range" in asked
    if status == HTTPStatus.OK:
        if _names_a_part(headers):
            raise TryAgain("the server answered 200 with a Content-Range that is not the whole")
        return _whole(here, position, content_length(headers))
    if status == HTTPStatus.PARTIAL_CONTENT and ranged:
        return _part(headers, here, position)
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and ranged:
        if _is_at_the_end(headers, here, position):
            return Finished(replace(position, done=True))
        raise ResourceChanged
    if status == HTTPStatus.NOT_MODIFIED and position.done:
        return Finished(position)
    if status in (HTTPStatus.NO_CONTENT, HTTPStatus.RESET_CONTENT):
        if position.offset and not position.done:
            raise TryAgain(f"the server answered {status} in place of the rest")
        return Finished(position)  # a stream of events ends like this; nothing is written down
    raise _refusal(status)


def _whole(here: Position, position: Position, length: int | None) -> BodyToRead | Finished:
    same = position.same_version(here)
    if here.encoding == "identity" and length:
        here = replace(here, size=length)
    if position.done:
        return (
            Finished(position) if same else BodyToRead(here, length=length, changed=same is False)
        )
    if not position.offset:
        here = replace(here, event_id=position.event_id, records=position.records)
        return BodyToRead(here, length=length)
    if same is False:
        return BodyToRead(here, length=length, changed=True)
    begun = replace(here, offset=position.offset, crc=position.crc, records=position.records)
    return BodyToRead(begun, skip=position.offset, length=length)


def _names_a_part(headers: Mapping[str, str]) -> bool:
    """Returns True if a `Content-Range`, which has no meaning in a 200, contradicts it."""
    found = _RANGE.fullmatch(headers.get("Content-Range", ""))
    return found is not None and (int(found[1]) > 0 or found[3] != str(int(found[2]) + 1))


def _part(headers: Mapping[str, str], here: Position, position: Position) -> BodyToRead:
    found = _RANGE.fullmatch(headers.get("Content-Range", ""))
    if not found or here.encoding != "identity" or media_type(headers) == _SEVERAL_PARTS:
        raise ResourceChanged
    first, last = int(found[1]), int(found[2])
    total = None if found[3] == "*" else int(found[3])
    length = last - first + 1
    fits = first == position.offset and length > 0 and (total is None or last < total)
    # A head that contradicts itself says nothing about the end of its body.
    if not fits or content_length(headers) not in (None, length):
        raise ResourceChanged
    if not _continues(position, here, total):
        raise ResourceChanged
    return BodyToRead(position, length=length, whole=total == last + 1)


def _continues(position: Position, here: Position, total: int | None) -> bool:
    """Returns True if a part is of the version that was begun: RFC 9110, 15.3.7.3, and the size."""
    if position.etag and here.etag:
        same: bool | None = position.etag == here.etag
    else:
        same = position.same_version(here)
    if same is False or (total and position.size and total != position.size):
        return False
    return same is True or (total is not None and total == position.size)


def _is_at_the_end(headers: Mapping[str, str], here: Position, position: Position) -> bool:
    """Returns True if a 416 means that nothing comes behind the accepted bytes."""
    found = _UNSATISFIED.fullmatch(headers.get("Content-Range", ""))
    if not found or position.same_version(here) is False:
        return False
    return int(found[1]) == position.offset and position.size in (0, position.offset)


def _refusal(status: int) -> TryAgain | DownloadFailed:
    name = HTTPStatus(status).phrase if status in _STATUSES else ""
    reason = f"the server answered {status} {name}".rstrip()
    passes = status in _AGAIN or (status >= HTTPStatus.INTERNAL_SERVER_ERROR)
    return TryAgain(reason) if passes and status not in _NEVER else DownloadFailed(reason)


_STATUSES = frozenset(HTTPStatus)


def encoding_of(headers: Mapping[str, str], *urls: URL) -> str:
    """The compression of a body: by its header, else by a name, else by its type.

    Args:
        headers: of the answer.
        urls: of the request and of its redirects.

    Raises:
        DownloadFailed: it is not supported.
    """
    coding = headers.get("Content-Encoding", "").strip().lower()
    coding = _CODINGS.get(coding, coding)
    if coding not in _READ:
        raise DownloadFailed("its Content-Encoding is none of gzip, deflate, zstd")
    if coding != "identity":
        return coding
    for url in urls:
        if named := _by_name(url):
            return named
    return _BY_TYPE.get(media_type(headers), "identity")


def media_type(headers: Mapping[str, str]) -> str:
    """`Content-Type` without its parameters."""
    return headers.get("Content-Type", "").partition(";")[0].strip().lower()


def content_length(headers: Mapping[str, str]) -> int | None:
    """Length of a body before decompression; `None` if its head does not give it."""
    text = headers.get("Content-Length", "").strip()
    is_number = text.isascii() and text.isdigit() and len(text) <= _LENGTH_DIGITS_MAX
    return int(text) if is_number and not _is_chunked(headers) else None


def ends_by_itself(headers: Mapping[str, str]) -> bool:
    """Returns True if the end of a body differs from that of a broken connection."""
    return _is_chunked(headers) or content_length(headers) is not None


def _is_chunked(headers: Mapping[str, str]) -> bool:
    return headers.get("Transfer-Encoding", "").rpartition(",")[2].strip().lower() == "chunked"


def _by_name(url: URL) -> str | None:
    name = url.path.lower()
    return next((coding for end, coding in _BY_NAME.items() if name.endswith(end)), None)
