"""Credentials: bearer tokens and their hashes, files of secrets, principals of certificates.

A token is random and long, so it can't be found by trying, and one round of SHA-256 keeps it as
safe as a slow hash would: slow hashes make up for passwords that people think up.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import math
import re
import secrets
import ssl
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs

from ingestd.base.files import read_file
from ingestd.config.units import UnquotedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from ingestd.http.settings import CredentialSettings


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
    """Returns True if a text has the form of a token."""
    return _TOKEN.fullmatch(shown) is not None


def digest_of(token: str) -> bytes:
    """Its SHA-256; 32 bytes."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def hash_of(token: str) -> str:
    """Its hash as settings write it.

    Raises:
        UnquotedError: it is no token.
    """
    if _HASH.fullmatch(token.lower()):
        raise UnquotedError("is the hash of a token, not a token")
    if not _TOKEN.fullmatch(token):
        raise UnquotedError(f"should be {FORM}")
    return f"sha256:{digest_of(token).hex()}"


def read_hash(written: str) -> str:
    """A hash as it was written, in lower case.

    Raises:
        UnquotedError: it is none; it may be a token.
    """
    lower = written.strip().lower()
    if not _HASH.fullmatch(lower):
        raise UnquotedError(f"should be {HASH_FORM}")
    if digest_in(lower) in _OF_NOTHING:
        raise UnquotedError("is the hash of no token at all: the text that was hashed was empty")
    return lower


def digest_in(hashed: str) -> bytes:
    """The 32 bytes in a hash as `hash_of` or `read_hash` gave it."""
    return bytes.fromhex(hashed.removeprefix("sha256:"))


# -- ways to show a token -------------------------------------------------------------------------

API_KEY = "X-API-Key"
TOKEN_SCHEMES = ("bearer", "basic", "key")
"""The ways to show a token: two of `Authorization`, and the header `API_KEY`."""
IN_BODY = "body"
"""Among the ways to authenticate: there is a token in the body, for `Authenticator.identify_by`."""
_FIELDS_MAX = 100


class TokenScheme(NamedTuple):
    """A way of a protocol's own to show a token in the head of a request.

    Attributes:
        name: of the way.
        read: gives the token in headers and target; `None` if it is not shown in this way.
        security: the way as an OpenAPI security scheme.
    """

    name: str
    read: Callable[[Mapping[str, str], str], str | None]
    security: Mapping[str, Any]


def by_authorization(word: str) -> TokenScheme:
    """`Authorization: WORD token`."""
    prefix = f"{word.lower()} "

    def read(headers: Mapping[str, str], _target: str) -> str | None:
        value = headers.get("Authorization", "")
        return value[len(prefix) :].strip(" ") if value.lower().startswith(prefix) else None

    return TokenScheme(word.lower(), read, {"type": "http", "scheme": word})


def by_header(name: str) -> TokenScheme:
    """A header with the bare token."""
    security = {"type": "apiKey", "in": "header", "name": name}
    return TokenScheme(name.lower(), lambda headers, _: headers.get(name), security)


def by_query(name: str) -> TokenScheme:
    """A parameter of the query; nothing of a query is logged or kept."""

    def read(_headers: Mapping[str, str], target: str) -> str | None:
        query = target.partition("#")[0].partition("?")[2]
        try:
            found = parse_qs(query, max_num_fields=_FIELDS_MAX).get(name) if name in query else None
        except ValueError:  # more fields than a client means
            return None
        return found[0] if found else None

    return TokenScheme(f"query_{name}", read, {"type": "apiKey", "in": "query", "name": name})


# -- files of secrets ------------------------------------------------------------------------------

BYTES_MAX = 1024**2


def read_lines(path: str, key: str, problems: list[str]) -> list[tuple[int, str]]:
    """Number and text of every line that is not blank, without white space around it.

    Args:
        path: of the file.
        key: the setting that names it.
        problems: gets a line if it can't be read, or if there is nothing in it.
    """
    try:
        text = read_file(Path(path), BYTES_MAX).decode()
    except OSError as error:
        problems.append(f"{key}: cannot read {path}: {error.strerror}")
        return []
    except UnicodeDecodeError:
        problems.append(f"{key}: {path} is not UTF-8 text")
        return []
    lines = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        problems.append(f"{key}: there is nothing in {path}")
    return lines


# -- principals ------------------------------------------------------------------------------------

DIGESTS_MAX = 2000
"""Tokens, all names together: each request is compared with all of them, 0.1 µs each."""


class Tokens:
    """Digests of tokens and names in certificates, with their principals.

    Args:
        digests: (name, SHA-256 of one of its tokens).
        certificates: (name in a certificate, name).
    """

    def __init__(
        self, digests: Sequence[tuple[str, bytes]], certificates: Mapping[str, str]
    ) -> None:
        self._digests = tuple(digests)
        self._certificates = dict(certificates)

    def owner_of(self, token: str) -> str | None:
        """The name that a token belongs to. How long this takes says nothing about which."""
        if not is_token(token):
            return None
        shown = digest_of(token)
        owner = None
        for name, digest in self._digests:
            if hmac.compare_digest(shown, digest):
                owner = name
        return owner

    def owner_by(self, authorization: str, schemes: Sequence[str | TokenScheme]) -> str | None:
        """The name that the token in an `Authorization` belongs to; bearer and basic are known.

        Args:
            authorization: the value of the header.
            schemes: the ways to show a token that count.
        """
        scheme, _, rest = authorization.partition(" ")
        scheme, rest = scheme.lower(), rest.strip(" ")
        if scheme not in schemes:
            return None
        if scheme == "bearer":
            return self.owner_of(rest)
        if scheme != "basic":
            return None
        try:
            user, colon, token = base64.b64decode(rest, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            return None
        if colon and not token:
            return self.owner_of(user)  # as many clients send a key: `-u KEY:`
        owner = self.owner_of(token)
        return owner if owner == user else None

    def owner_of_certificate(self, certificate: Mapping[str, Any]) -> str | None:
        """The name that a certificate belongs to.

        Args:
            certificate: as `ssl.SSLSocket.getpeercert` gives it; it has been verified.
        """
        for name in names_in(certificate):
            owner = self._certificates.get(name)
            if owner is not None:
                return owner
        return None


@lru_cache(maxsize=1024)
def _fingerprint(name: object) -> str:
    return hashlib.blake2b(repr(name).encode("utf-8", "replace"), digest_size=12).hexdigest()


def principal_of_certificate(certificate: Mapping[str, Any]) -> str:
    """The principal of a certificate that no token names: its subject, which outlives renewals."""
    name = certificate.get("subject") or next(iter(certificate.get("subjectAltName", ())), "")
    return f"certificate {_fingerprint(name)}"


def has_expired(certificate: Mapping[str, Any], now: float) -> bool:
    """Returns True if a certificate has expired since its handshake, at seconds of the epoch."""
    return now > _until(str(certificate.get("notAfter", "")))


@lru_cache(maxsize=1024)
def _until(not_after: str) -> float:
    return ssl.cert_time_to_seconds(not_after) if not_after else math.inf


def names_in(certificate: Mapping[str, Any]) -> Iterable[str]:
    """The subject alternative names, whatever their kind, then the common names."""
    for _, name in certificate.get("subjectAltName", ()):
        yield name
    for part in certificate.get("subject", ()):
        for key, value in part:
            if key == "commonName":
                yield value


def read_tokens(
    settings: Mapping[str, CredentialSettings], problems: list[str], table: str = "http.tokens"
) -> Tokens:
    """Everything in a table of tokens, and in the files that it names.

    Args:
        settings: by name.
        problems: gets a line for everything that is wrong, which is left out of the result.
        table: the dotted name of the table.
    """
    owners: dict[bytes, tuple[str, str]] = {}
    certificates: dict[str, str] = {}
    for name, token in settings.items():
        for key, digest in _digests(f"{table}.{name}", token, problems):
            other = owners.setdefault(digest, (name, key))
            if other[0] != name:
                problems.append(f"{key}: has a token of {other[1]} too")
        if certificate := getattr(token, "client_certificate", ""):
            holder = certificates.setdefault(certificate, name)
            if holder != name:
                key = f"{table}.{name}.client_certificate"
                problems.append(f"{key}: is that of {table}.{holder} too")
    if len(owners) > DIGESTS_MAX:
        problems.append(f"{table}: {len(owners)} tokens, more than {DIGESTS_MAX}")
    return Tokens([(name, digest) for digest, (name, _) in owners.items()], certificates)


def _digests(
    key: str, token: CredentialSettings, problems: list[str]
) -> Iterable[tuple[str, bytes]]:
    for hashed in (token.token.get_secret_value(), token.hash):
        if hashed:
            yield key, digest_in(hashed)
    if token.file:
        for number, line in read_lines(token.file, f"{key}.file", problems):
            try:
                yield f"{key}.file", digest_in(_hash(line))
            except ValueError as error:
                where = f"{key}.file: line {number} of {token.file}"
                problems.append(f"{where} {error}")


def _hash(line: str) -> str:
    if line.lower().startswith("sha256:"):
        return read_hash(line)
    try:
        return hash_of(line)
    except ValueError:
        raise ValueError(f"is neither a token ({FORM}) nor the hash of one") from None
