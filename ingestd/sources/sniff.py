"""What an input is that is not lines of UTF-8, told by its first bytes. Pure."""

from __future__ import annotations

from typing import NamedTuple

HEAD_BYTES = 64
"""So many bytes are enough."""
MARK_BYTES = 10
"""So many are, where there is a mark."""

_NUL_SHARE = 4  # one byte of so many; text has none


class Guess(NamedTuple):
    """What an input seems to be.

    Attributes:
        what: a few words that follow "it is".
        advice: what makes lines of it.
    """

    what: str
    advice: str


_COMPRESSED = (
    (b"\x1f\x8b", Guess("compressed (gzip)", "zcat FILE |")),
    (b"\x28\xb5\x2f\xfd", Guess("compressed (zstd)", "zstdcat FILE |")),
    (b"\xfd7zXZ\0", Guess("compressed (xz)", "xzcat FILE |")),
    (b"BZh91AY&SY", Guess("compressed (bzip2)", "bzcat FILE |")),
    (b"PK\x03\x04", Guess("compressed (zip)", "unzip -p FILE |")),
)
_ENCODED = (
    # UTF-32 first: the mark of UTF-16 is its beginning.
    (b"\xff\xfe\0\0", Guess("UTF-32 text", "iconv -f UTF-32 -t UTF-8 FILE |")),
    (b"\0\0\xfe\xff", Guess("UTF-32 text", "iconv -f UTF-32 -t UTF-8 FILE |")),
    (b"\xff\xfe", Guess("UTF-16 text", "iconv -f UTF-16 -t UTF-8 FILE |")),
    (b"\xfe\xff", Guess("UTF-16 text", "iconv -f UTF-16 -t UTF-8 FILE |")),
)
_OPENED = (b"{", b"[", b"[{")
_DOCUMENT = Guess("JSON over several lines", "jq -c . FILE | (or jq -c '.[]' of an array)")
_BINARY = Guess("not text: there are zero bytes in it", "")


def guess(head: bytes, form: str) -> Guess | None:
    """What an input seems to be that would not be read as it was meant; `None` if nothing tells.

    Args:
        head: its first bytes, `HEAD_BYTES` or more if it is as long.
        form: what its records are to be: `json`, `text` or `bytes`.
    """
    if form == "bytes":
        return None
    if found := marked(head):
        return found
    if head.count(0) * _NUL_SHARE > len(head):
        return _wide(head) or _BINARY
    line, end, _ = head.partition(b"\n")
    if form == "json" and end and line.strip(b"\xef\xbb\xbf \t\r") in _OPENED:
        return _DOCUMENT
    return None


def marked(head: bytes) -> Guess | None:
    """What an input is that begins with the mark of a compressed file or of another encoding."""
    tables = (*_COMPRESSED, *_ENCODED)
    return next((found for mark, found in tables if head.startswith(mark)), None)


def _wide(head: bytes) -> Guess | None:
    """UTF-16 without its mark, if most of it is ASCII."""
    for first, name in ((0, "UTF-16BE"), (1, "UTF-16LE")):
        if not any(head[first::2]):
            return Guess(f"{name} text", f"iconv -f {name} -t UTF-8 FILE |")
    return None
