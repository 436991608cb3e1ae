"""Who a token, or a client's certificate, belongs to."""

from __future__ import annotations

import hashlib
import hmac
import math
import ssl
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ingestd.base.tokens import FORM, digest_in, digest_of, hash_of, is_token, read_hash
from ingestd.sources.http.files import read_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ingestd.http.settings import TokenSettings

DIGESTS_MAX = 2000
"""Tokens, all names together: each request is compared with all of them, 0.1 µs each."""


class Tokens:
    """Digests of tokens and names in certificates, with whom they belong to.

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
    """Whose requests those with a certificate are that no token names: its subject's.

    It stays the same when the certificate is renewed.
    """
    name = certificate.get("subject") or next(iter(certificate.get("subjectAltName", ())), "")
    return f"certificate {_fingerprint(name)}"


def has_expired(certificate: Mapping[str, Any], now: float) -> bool:
    """Whether a certificate that was good at its handshake is no more, at seconds of the epoch."""
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


def read_tokens(settings: Mapping[str, TokenSettings], problems: list[str]) -> Tokens:
    """Everything in `[http.tokens]`, and in the files that it names.

    Args:
        settings: by name.
        problems: gets a line for everything that is wrong, which is left out of the result.
    """
    owners: dict[bytes, tuple[str, str]] = {}
    certificates: dict[str, str] = {}
    for name, token in settings.items():
        for key, digest in _digests(f"http.tokens.{name}", token, problems):
            other = owners.setdefault(digest, (name, key))
            if other[0] != name:
                problems.append(f"{key}: has a token of {other[1]} too")
        if token.client_certificate:
            holder = certificates.setdefault(token.client_certificate, name)
            if holder != name:
                key = f"http.tokens.{name}.client_certificate"
                problems.append(f"{key}: is that of http.tokens.{holder} too")
    if len(owners) > DIGESTS_MAX:
        problems.append(f"http.tokens: {len(owners)} tokens, more than {DIGESTS_MAX}")
    return Tokens([(name, digest) for digest, (name, _) in owners.items()], certificates)


def _digests(key: str, token: TokenSettings, problems: list[str]) -> Iterable[tuple[str, bytes]]:
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
