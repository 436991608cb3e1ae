"""A bearer token: what it looks like, how one is made, and its hash.

A token is random and long, so nobody finds it by trying, and one round of SHA-256 keeps it as safe
as a slow hash would: slow hashes make up for passwords that people think up.
"""

from __future__ import annotations

import hashlib
import re
import secrets

PREFIX = "ingestd_"
RANDOM_BYTES = 32
FORM = "16 to 512 visible ASCII characters without spaces"
HASH_FORM = "sha256: and 64 hexadecimal digits, as `ingestd token --hash` prints them"

_TOKEN = re.compile(r"[!-~]{16,512}", re.ASCII)
_HASH = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_OF_NOTHING = frozenset(hashlib.sha256(text).digest() for text in (b"", b"\n"))


def make_token() -> str:
    """A new one; its prefix tells scanners of source code what they have found."""
    return PREFIX + secrets.token_urlsafe(RANDOM_BYTES)


def is_token(shown: str) -> bool:
    """Whether a text has the form of a token at all."""
    return _TOKEN.fullmatch(shown) is not None


def digest_of(token: str) -> bytes:
    """Its SHA-256; 32 bytes."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def hash_of(token: str) -> str:
    """Its hash as settings write it.

    Raises:
        ValueError: it is no token; the message does not quote it.
    """
    if _HASH.fullmatch(token.lower()):
        raise ValueError("is the hash of a token, not a token")
    if not _TOKEN.fullmatch(token):
        raise ValueError(f"should be {FORM}")
    return f"sha256:{digest_of(token).hex()}"


def read_hash(written: str) -> str:
    """A hash as it was written, in lower case.

    Raises:
        ValueError: it is none; the message does not quote it, for it may be a token.
    """
    lower = written.strip().lower()
    if not _HASH.fullmatch(lower):
        raise ValueError(f"should be {HASH_FORM}")
    if digest_in(lower) in _OF_NOTHING:
        raise ValueError("is the hash of no token at all: the text that was hashed was empty")
    return lower


def digest_in(hashed: str) -> bytes:
    """The 32 bytes in a hash as `hash_of` or `read_hash` gave it."""
    return bytes.fromhex(hashed.removeprefix("sha256:"))
