"""The handshake of the forward protocol: HELO, PING and PONG. No I/O.

https://github.com/fluent/fluentd/wiki/Forward-Protocol-Specification-v1#handshake-messages

The server sends a nonce; the client answers with the digest of its salt, its name, the nonce and
the shared key, and with that of the user's password; the server proves that it has the key, too.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ingestd.base.errors import ConfigError
from ingestd.codecs.msgpack import ARRAY, BIN, STR, MessagePackFault, read_head, spans
from ingestd.http.credentials import read_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic import SecretStr

    from ingestd.sources.forward import ForwardSettings

PING_BYTES_MAX = 4096
_FIELDS = 6
_encode = msgspec.msgpack.encode


class Secrets(NamedTuple):
    """The secrets that clients are held against.

    Attributes:
        hostname: of this server.
        keys: shared keys, each is accepted; without one there is no handshake.
        users: passwords by name; without one users are not asked for.
    """

    hostname: str
    keys: Sequence[str]
    users: Mapping[str, Sequence[str]]


def read_secrets(settings: ForwardSettings) -> Secrets:
    """Reads the shared keys, and the passwords of each user, also from their files.

    Raises:
        ConfigError: with one line for everything that is wrong; no secret is quoted.
    """
    problems: list[str] = []

    def read(secret: SecretStr, path: str, key: str) -> list[str]:
        found = [secret.get_secret_value()] if secret.get_secret_value() else []
        return found + [line for _, line in read_lines(path, key, problems)] if path else found

    keys = read(settings.shared_key, settings.shared_key_file, "forward.shared_key_file")
    users = {
        name: read(user.password, user.file, f"forward.users.{name}.file")
        for name, user in settings.users.items()
    }
    if problems:
        raise ConfigError(problem="\n".join(problems))
    return Secrets(settings.hostname, keys, users)


class Welcome(NamedTuple):
    """The outcome of a handshake.

    Attributes:
        reply: a PONG.
        fault: a reason to refuse the client; empty if it may send.
        user: that it showed; empty without one.
    """

    reply: bytes
    fault: str = ""
    user: str = ""


class Handshake:
    """The server's side, for one connection.

    Args:
        secrets: the keys and users.
    """

    def __init__(self, secrets_: Secrets) -> None:
        self._secrets = secrets_
        self._nonce = secrets.token_hex(16)
        self._salt = secrets.token_hex(16) if secrets_.users else ""

    def helo(self) -> bytes:
        """Returns the first message, which the server sends."""
        options = {"nonce": self._nonce, "auth": self._salt, "keepalive": True}
        return _encode(["HELO", options])

    def answer(self, message: bytes) -> Welcome:
        """Checks a PING.

        Args:
            message: one value.
        """
        try:
            kind, name, salt, digest, user, password = _fields(message)
        except (MessagePackFault, ValueError):
            return _refuse("the first message is no PING")
        if kind != b"PING":
            return _refuse("the first message is no PING")
        shared = [key.encode() for key in self._secrets.keys]
        key = next((one for one in shared if _same(digest, salt, name, self._nonce, one)), None)
        if key is None:
            return _refuse("shared_key mismatch")
        owner = ""
        if self._secrets.users:
            owner = user.decode("utf-8", "replace")
            known = self._secrets.users.get(owner, ())
            if not any(_same(password, self._salt, user, one.encode()) for one in known):
                return _refuse("username/password mismatch")
        host = self._secrets.hostname
        proof = _digest(salt, host.encode(), self._nonce, key)
        return Welcome(_encode(["PONG", True, "", host, proof]), user=owner)


def _fields(message: bytes) -> list[bytes]:
    """The texts of a PING; some are bytes that are no UTF-8."""
    head = read_head(message, 0)
    if head is None or head[:2] != (ARRAY, _FIELDS):
        raise ValueError("it is no array of that length")
    fields = []
    for at, end in spans(message, head[2]):
        token = read_head(message, at)
        if token is None or token[0] not in (STR, BIN):
            raise ValueError("a field is no text")
        fields.append(message[token[2] : end])
    return fields


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha512()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
    return digest.hexdigest()


def _same(shown: bytes, *parts: str | bytes) -> bool:
    return hmac.compare_digest(shown.lower(), _digest(*parts).encode())


def _refuse(why: str) -> Welcome:
    return Welcome(_encode(["PONG", False, why, "", ""]), fault=f"the handshake failed: {why}")
