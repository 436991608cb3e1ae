"""Settings of the source `http`: address, bounds, TLS, credentials."""

from __future__ import annotations

import re
import socket
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, SecretStr

from ingestd.config.network import (
    check_address,
    check_hosts,
    check_origins,
    is_loopback,
    split_address,
)
from ingestd.config.sections import (
    Choice,
    FilePath,
    OtherName,
    Own,
    Reloadable,
    Secret,
    Section,
    defaults_of,
    own_name,
)
from ingestd.config.units import Count, Seconds, Share, Size, Switch, Words, show_size
from ingestd.http.credentials import hash_of, read_hash

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ingestd.http.signatures import Scheme

ALL = "*"
"""In a list of pipelines: every one."""

_DAY = 86400.0
_MIB = 1024**2
_GIB = 1024**3
_TIB = 1024**4
_CLOCK_STEP = 60.0
"""Seconds by which this machine's clock may be set back without a delivery being taken twice."""
_UNSET = SecretStr("")


def _hashed(value: SecretStr) -> SecretStr:
    """Only the hash stays: settings live as long as the daemon, the token need not."""
    token = value.get_secret_value()
    return SecretStr(hash_of(token)) if token else value


def _hash(value: str) -> str:
    return read_hash(value) if value else value


KEPT_HEADERS_MAX = 16
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
_SECRET = re.compile(
    r"authori[sz]ation|cookie|signature|token|secret|passw|credential|api-?key|hmac", re.IGNORECASE
)


def secret_header(name: str) -> str:
    """Tells why a request header can't be kept in envelopes; empty if it can."""
    if not _HEADER.fullmatch(name):
        return f"{name[:80]!r} is no name of a header"
    if found := _SECRET.search(name):
        return f"{name} is not kept, because headers with {found[0]!r} in their names hold secrets"
    return ""


def check_kept(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of headers that may be kept; as they are.

    Raises:
        ValueError: one is no name, or holds a secret.
    """
    for name in names:
        if fault := secret_header(name):
            raise ValueError(fault)
    return names


def _header_name(value: str) -> str:
    if value and not _HEADER.fullmatch(value):
        raise ValueError("should be the name of a header")
    return value


HeaderName = Annotated[str, AfterValidator(_header_name)]
TokenName = Annotated[str, AfterValidator(partial(own_name, what="a token"))]
WebhookName = Annotated[str, AfterValidator(partial(own_name, what="a webhook"))]


def _schemes() -> Mapping[str, type[Scheme]]:
    from ingestd.http.schemes import SCHEMES  # noqa: PLC0415  for those that have a webhook

    return SCHEMES


class TlsSettings(Section):
    """`[http.tls]` and others: encryption, certificates of clients. Paths are of PEM files."""

    certificate: FilePath = Field(
        "", description="PEM file: certificate and its chain; enables TLS"
    )
    key: FilePath = Field("", description="PEM file: private key, if it is not in the same file")
    key_password: Secret = Field(_UNSET, description="password of the private key")
    client_ca: FilePath = Field("", description="PEM file: CA that signs client certificates")
    client_required: bool = Field(
        False, description="refuse connections without a client certificate"
    )


class CredentialSettings(Section):
    """Tokens of one name: as such, hashed, or in a file."""

    token: Annotated[Secret, AfterValidator(_hashed)] = Field(
        _UNSET, description="the token itself; only its hash is kept"
    )
    hash: Annotated[str, AfterValidator(_hash)] = Field("", description="the token's hash")
    file: FilePath = Field("", description="file of tokens or hashes, one a line")

    @property
    def has_token(self) -> bool:
        """Tells if there is one."""
        return bool(self.token.get_secret_value() or self.hash or self.file)


class TokenSettings(CredentialSettings):
    """`[http.tokens.NAME]`: a client with credentials, its pipelines and its rate limits.

    At least one of the first four is needed; each of them identifies NAME.
    """

    EXAMPLE = ("shop", ("file",))

    client_certificate: str = Field(
        "", description="name in a client's certificate: its CN or a subject alternative name"
    )
    pipelines: Words = Field(
        (ALL,), min_length=1, max_length=1001, description="pipelines that it may send to; * is all"
    )
    records_per_second: Count = Field(
        0, ge=0, le=10**9, description="rate limit in records per second (429); 0: no limit"
    )
    bytes_per_second: Size = Field(
        0,
        ge=0,
        le=1024**4,
        description="rate limit in bytes of records per second (429); 0: no limit",
    )


class WebhookSettings(Section):
    """`[http.webhooks.NAME]`: signed deliveries to `POST /v1/webhooks/NAME`."""

    EXAMPLE = ("github", ("secret",))

    kind: Annotated[str, Choice(lambda: list(_schemes()))] = Field(
        description="scheme of the signature"
    )
    secret: Secret = Field(_UNSET, description="secret of the signature")
    file: FilePath = Field("", description="file of secrets, one a line; each is accepted")
    pipeline: str = Field("", description="pipeline of the deliveries; empty: the default pipeline")
    tolerance: Seconds = Field(
        300.0, gt=0, le=_DAY, description="largest difference of a signed time from now"
    )
    public_url: str = Field("", description="twilio: URL that deliveries are sent to")
    signature_header: HeaderName = Field("", description="hmac: header with the signature")
    signature_prefix: str = Field("", description="hmac: text before the signature in its header")
    algorithm: Literal["sha256", "sha1", "sha384", "sha512"] = Field(
        "sha256", description="hmac: hash function"
    )
    encoding: Literal["hex", "base64"] = Field("hex", description="hmac: form of the signature")
    signed: str = Field(
        "{body}", description="hmac: text that is signed, with {body}, {timestamp} and {id}"
    )
    timestamp_header: HeaderName = Field(
        "", description="hmac: header with the time, in seconds or milliseconds since the epoch"
    )
    id_header: HeaderName = Field("", description="hmac: header with the id of a delivery")
    id_field: str = Field("", description="hmac: field of the body with the id, names with dots")


class HttpSettings(Section):
    """`[http]`: address and bounds of the HTTP source."""

    listen: Annotated[str, AfterValidator(check_address)] = Field(
        "127.0.0.1:8080", description="listen address for records, HOST:PORT"
    )
    reuse_port: Switch = Field(
        False, description="share the port with other daemons (SO_REUSEPORT)"
    )
    request_bytes_max: Size = Field(
        16 * _MIB, ge=1, le=_TIB, description="largest body before decompression"
    )
    decompressed_bytes_max: Annotated[Size, OtherName("body_bytes_max")] = Field(
        32 * _MIB, ge=1, le=_TIB, description="largest body after decompression"
    )
    records_max: Count = Field(
        100_000, ge=1, le=10**9, description="maximum of records in one request"
    )
    invalid_kept: Count = Field(
        10,
        ge=0,
        le=100,
        description="maximum of invalid records of one request that are kept as dead letters",
    )
    inflight_bytes_max: Size = Field(
        40 * _MIB,
        ge=1,
        le=_TIB,
        description="bound of all bodies being read or waiting for their commit",
    )
    connections_max: Count = Field(
        4096, ge=1, le=1_000_000, description="maximum of open connections"
    )
    connections_per_client_max: Count = Field(
        1024,
        ge=0,
        le=1_000_000,
        description="maximum of open connections of one client; 0: no bound",
    )
    header_timeout: Seconds = Field(
        10.0, gt=0, le=_DAY, description="timeout of reading a request's header"
    )
    body_rate_min: Size = Field(
        1024, ge=0, le=_GIB, description="minimum rate of a body, bytes per second; 0: no bound"
    )
    inflate_ratio_max: Count = Field(
        200,
        ge=0,
        le=1_000_000,
        description="maximum ratio of decompressed to compressed size; 0: no bound",
    )
    body_timeout: Seconds = Field(30.0, gt=0, le=_DAY, description="timeout of reading a body")
    keepalive_timeout: Seconds = Field(
        15.0, ge=0, le=_DAY, description="timeout of idle connections"
    )
    requests_max: Count = Field(
        1024, ge=1, le=1_000_000, description="maximum of requests in progress (503)"
    )
    client_share: Share = Field(
        0.5,
        gt=0,
        le=1,
        description="share of requests and bytes in flight of one client while others wait",
    )
    wait_max: Seconds = Field(
        60.0,
        ge=0,
        le=3600,
        description="longest wait for Prefer: wait; 0s ignores it",
    )
    streams_max: Count = Field(
        64,
        ge=0,
        le=100_000,
        description="maximum of chunked bodies of lines that are accepted in pieces at once",
    )
    stream_silence_max: Seconds = Field(
        300.0, gt=0, le=_DAY, description="timeout of a stream that sends nothing"
    )
    idempotency_ttl: Seconds = Field(
        _DAY, gt=0, le=366 * _DAY, description="lifetime of an Idempotency-Key"
    )
    idempotency_keys_max: Count = Field(
        1_000_000,
        ge=1,
        le=10**9,
        description="maximum of stored Idempotency-Keys per pipeline (503)",
    )
    idempotency_ids_max: Count = Field(
        200_000,
        ge=0,
        le=10**8,
        description="number of records per pipeline whose senders' ids are stored, the last ones",
    )
    cors_origins: Annotated[Words, AfterValidator(check_origins)] = Field(
        (), max_length=1000, description="CORS: origins whose pages may read the answers; * is all"
    )
    hosts: Annotated[Words, AfterValidator(check_hosts)] = Field(
        (),
        max_length=1000,
        description="accepted Host names, beside IP addresses and localhost; * is all",
    )
    keep_headers: Annotated[Words, AfterValidator(check_kept), Reloadable()] = Field(
        (),
        max_length=KEPT_HEADERS_MAX,
        description="request headers that the envelopes of records keep",
    )
    allow_anonymous: Annotated[bool, Reloadable()] = Field(
        False, description="accept requests without credentials, also on a public address"
    )
    tls: Annotated[Own[TlsSettings], Reloadable()] = defaults_of(TlsSettings)
    tokens: Annotated[dict[TokenName, Own[TokenSettings]], Reloadable()] = Field(
        default_factory=dict, max_length=1000, description="clients with credentials, by name"
    )
    webhooks: Annotated[dict[WebhookName, Own[WebhookSettings]], Reloadable()] = Field(
        default_factory=dict, max_length=1000, description="signed webhooks, by name"
    )
    # `sources/http/__init__.py` says which tables there are.
    endpoints: Annotated[dict[str, Any], Reloadable()] = Field(
        default_factory=dict, description="endpoints that are switched on, by name"
    )


def problems_of(
    http: HttpSettings, formats: Mapping[str, str], default: str
) -> Iterator[tuple[str, str]]:
    """Finds settings that cannot work together: (key below `http`, what is wrong) for each.

    Args:
        http: the section.
        formats: of the records of each pipeline.
        default: the pipeline of requests that name none.
    """
    if http.reuse_port:
        for text in _without_sharing(http.listen):
            yield "reuse_port", text
    if http.inflight_bytes_max < http.decompressed_bytes_max:
        room, body = show_size(http.inflight_bytes_max), show_size(http.decompressed_bytes_max)
        yield (
            "inflight_bytes_max",
            f"{room} has no room for one body of http.decompressed_bytes_max ({body})",
        )
    yield from _at_large(http)
    for key, text in problems_of_tls(http.tls, "http.tls"):
        yield f"tls.{key}", text
    for name, token in http.tokens.items():
        yield from _of_a_token(f"tokens.{name}", token, formats)
        if token.client_certificate and not http.tls.client_ca:
            yield f"tokens.{name}.client_certificate", "needs http.tls.client_ca"
    for name, webhook in http.webhooks.items():
        yield from _of_a_webhook(f"webhooks.{name}", webhook, webhook.pipeline or default, formats)


def _without_sharing(listen: str) -> Iterator[str]:
    """Finds reasons that a port can't be shared."""
    if not hasattr(socket, "SO_REUSEPORT"):
        yield "this platform has no SO_REUSEPORT"
    if split_address(listen)[1] == 0:
        yield f"http.listen is {listen}: port 0 is another one for each daemon, say which to share"


def _at_large(http: HttpSettings) -> Iterator[tuple[str, str]]:
    """Refuses to be open to all clients without an explicit setting."""
    if http.allow_anonymous and (http.tokens or http.tls.client_ca):
        text = "clients without a token would have no limits; remove this or the tokens"
        yield "allow_anonymous", text
    if text := at_large(http, local=is_loopback(http.listen)):
        yield "listen", f"{http.listen} {text}"


def at_large(http: HttpSettings, *, local: bool) -> str:
    """Explains an address that is open to all clients without a setting; empty if it is not.

    Args:
        http: the section.
        local: only this machine can reach the address.
    """
    if local or http.allow_anonymous or demands_proof(http):
        return ""
    return (
        "is reachable from other machines, and every client could send; configure a token"
        " (http.tokens.NAME.hash), client certificates (http.tls.client_ca and"
        " http.tls.client_required), or http.allow_anonymous = true"
    )


def demands_proof(http: HttpSettings) -> bool:
    """Returns True if credentials are configured; then all clients need them, on loopback too."""
    return bool(http.tokens or http.webhooks or http.tls.client_ca)


def demands_signatures_alone(http: HttpSettings) -> bool:
    """Returns True if only signed deliveries may come in.

    It holds on loopback too, where a proxy or a tunnel brings them, and would bring records.
    """
    return bool(http.webhooks) and not (http.tokens or http.tls.client_ca or http.allow_anonymous)


def has_one_principal(http: HttpSettings) -> bool:
    """Returns True if all requests are of one principal."""
    if http.tls.client_ca and not http.tokens:
        return False
    anonymous = http.allow_anonymous or not demands_proof(http)
    return len(http.tokens) + len(http.webhooks) + anonymous == 1


def signatures_valid(http: HttpSettings) -> float:
    """Seconds for which a signed delivery that was accepted could be accepted again at most.

    One of a sender whose clock is ahead is valid from `tolerance` before its time until
    `tolerance` after it.
    """
    hooks = http.webhooks.values()
    timed = [hook.tolerance for hook in hooks if _schemes()[hook.kind](hook).timed]
    return 2 * max(timed) + _CLOCK_STEP if timed else 0.0


def problems_of_tls(tls: TlsSettings, table: str) -> Iterator[tuple[str, str]]:
    """Finds settings of TLS that need others: (key below `table`, what is wrong) for each."""
    for key in ("key", "client_ca"):
        if getattr(tls, key) and not tls.certificate:
            yield key, f"needs {table}.certificate, which switches TLS on"
    if tls.client_required and not tls.client_ca:
        yield "client_required", f"needs {table}.client_ca"


def _of_a_token(
    key: str, token: TokenSettings, formats: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    if not (token.has_token or token.client_certificate):
        yield key, "needs one of token, hash, file and client_certificate"
    for name in token.pipelines:
        if name != ALL and name not in formats:
            yield f"{key}.pipelines", f"there is no pipeline {name!r}"


def _of_a_webhook(
    key: str, webhook: WebhookSettings, to: str, formats: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    if not (webhook.secret.get_secret_value() or webhook.file):
        yield key, "needs one of secret and file"
    from ingestd.http.schemes import problems_of_scheme  # noqa: PLC0415  see `_schemes`

    for name, text in problems_of_scheme(webhook):
        yield f"{key}.{name}", text
    if to not in formats:
        yield f"{key}.pipeline", f"there is no pipeline {to!r}"
    elif formats[to] != "json":
        yield (
            f"{key}.pipeline",
            f"{to!r} has the format {formats[to]}; deliveries are json",
        )
