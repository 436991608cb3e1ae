"""Settings: who may come in at the http source. Files are read in `sources/http/access.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr

from ingestd.base.address import is_loopback
from ingestd.base.section import FilePath, Secret, Section, own_name
from ingestd.base.tokens import hash_of, read_hash
from ingestd.base.units import Count, Seconds, Size, Words  # noqa: TC001  pydantic reads them

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ingestd.base.settings import HttpSettings, PipelineSettings, Settings

ALL = "*"
"""In a list of pipelines: every one."""

_DAY = 86400.0
_CLOCK_STEP = 60.0
"""Seconds by which this machine's clock may be set back without a delivery being taken twice."""
_UNSET = SecretStr("")


def _hashed(value: SecretStr) -> SecretStr:
    """Only the hash stays: settings live as long as the daemon, the token need not."""
    token = value.get_secret_value()
    return SecretStr(hash_of(token)) if token else value


def _hash(value: str) -> str:
    return read_hash(value) if value else value


def token_name(value: str) -> str:
    """See `own_name`."""
    return own_name(value, "a token")


def webhook_name(value: str) -> str:
    """See `own_name`."""
    return own_name(value, "a webhook")


TokenName = Annotated[str, AfterValidator(token_name)]
WebhookName = Annotated[str, AfterValidator(webhook_name)]


class TlsSettings(Section):
    """`[http.tls]`: encryption, and the certificates of clients. Paths are of PEM files."""

    certificate: FilePath = Field(
        "", description="file: certificate and its chain; switches TLS on"
    )
    key: FilePath = Field("", description="file: private key, if it is not in the same file")
    key_password: Secret = Field(_UNSET, description="password of the private key")
    client_ca: FilePath = Field("", description="file: who signs the certificates of clients")
    client_required: bool = Field(False, description="no connection without a client certificate")


class TokenSettings(Section):
    """`[http.tokens.NAME]`: a client that proves who it is, what it may and how much.

    At least one of the first four; whoever has any of them is NAME.
    """

    token: Annotated[Secret, AfterValidator(_hashed)] = Field(
        _UNSET, description="the token itself; only its hash is kept"
    )
    hash: Annotated[str, AfterValidator(_hash)] = Field("", description="the token's hash")
    file: FilePath = Field("", description="file of tokens or hashes, one a line")
    client_certificate: str = Field(
        "", description="a name in a client's certificate: its CN or a subject alternative name"
    )
    pipelines: Words = Field(
        (ALL,), min_length=1, max_length=1001, description="where it may send to; * is everywhere"
    )
    records_per_second: Count = Field(
        0, ge=0, le=10**9, description="records a second; then 429; 0 is no limit"
    )
    bytes_per_second: Size = Field(
        0, ge=0, le=1024**4, description="bytes of records a second; then 429; 0 is no limit"
    )


class WebhookSettings(Section):
    """`[http.webhooks.NAME]`: signed deliveries to `POST /v1/webhooks/NAME`."""

    kind: Literal["standard", "github", "stripe"] = Field(description="how it is signed")
    secret: Secret = Field(_UNSET, description="the secret that it is signed with")
    file: FilePath = Field("", description="file of secrets, one a line; each is good")
    pipeline: str = Field("", description="where deliveries go; empty: the default pipeline")
    tolerance: Seconds = Field(
        300.0, gt=0, le=_DAY, description="how far a signed time may be from now"
    )


def access_contradictions(settings: Settings) -> Iterator[tuple[str, str]]:
    """(dotted key, problem) for each; see `base/contradictions.py`."""
    if settings.source.kind != "http":
        return
    http, pipelines = settings.http, settings.pipeline_settings()
    yield from _at_large(http)
    yield from _of_tls(http)
    for name, token in http.tokens.items():
        yield from _of_a_token(f"http.tokens.{name}", token, pipelines)
        if token.client_certificate and not http.tls.client_ca:
            yield f"http.tokens.{name}.client_certificate", "needs http.tls.client_ca"
    for name, webhook in http.webhooks.items():
        to = webhook.pipeline or settings.source.pipeline
        yield from _of_a_webhook(f"http.webhooks.{name}", webhook, to, pipelines)


def _at_large(http: HttpSettings) -> Iterator[tuple[str, str]]:
    """Nobody shall be open to everybody without having said so."""
    if http.allow_anonymous and (http.tokens or http.tls.client_ca):
        text = "who shows no token would get in without limits; take out this or the tokens"
        yield "http.allow_anonymous", text
    if text := at_large(http, local=is_loopback(http.listen)):
        yield "http.listen", f"{http.listen} {text}"


def at_large(http: HttpSettings, *, local: bool) -> str:
    """What is wrong with an address that is open to everybody; empty if nothing is.

    Args:
        http: who may come in.
        local: whether only this machine can reach the address.
    """
    if local or http.allow_anonymous or demands_proof(http):
        return ""
    return (
        "is not this machine alone, and anybody could send; there are three ways out: a token"
        " (http.tokens.NAME.hash), client certificates (http.tls.client_ca and"
        " http.tls.client_required), or http.allow_anonymous = true"
    )


def demands_proof(http: HttpSettings) -> bool:
    """Whether anything says who may come in; then nobody else may, on loopback neither."""
    return bool(http.tokens or http.webhooks or http.tls.client_ca)


def demands_signatures_alone(http: HttpSettings) -> bool:
    """Whether there is no way in but signed deliveries: whoever set them up meant the network.

    It holds on loopback too, where a proxy or a tunnel brings them, and would bring records.
    """
    return bool(http.webhooks) and not (http.tokens or http.tls.client_ca or http.allow_anonymous)


def has_one_principal(http: HttpSettings) -> bool:
    """Whether all requests are of one principal, whoever sends them."""
    if http.tls.client_ca and not http.tokens:
        return False
    anonymous = http.allow_anonymous or not demands_proof(http)
    return len(http.tokens) + len(http.webhooks) + anonymous == 1


def signatures_valid(http: HttpSettings) -> float:
    """Seconds for which a signed delivery that was accepted could be accepted again at most.

    One of a sender whose clock is ahead is valid from `tolerance` before its time until
    `tolerance` after it.
    """
    timed = [hook.tolerance for hook in http.webhooks.values() if hook.kind != "github"]
    return 2 * max(timed) + _CLOCK_STEP if timed else 0.0


def _of_tls(http: HttpSettings) -> Iterator[tuple[str, str]]:
    tls = http.tls
    for key in ("key", "client_ca"):
        if getattr(tls, key) and not tls.certificate:
            yield f"http.tls.{key}", "needs http.tls.certificate, which switches TLS on"
    if tls.client_required and not tls.client_ca:
        yield "http.tls.client_required", "needs http.tls.client_ca"


def _of_a_token(
    key: str, token: TokenSettings, pipelines: Mapping[str, PipelineSettings]
) -> Iterator[tuple[str, str]]:
    proofs = (token.token.get_secret_value(), token.hash, token.file, token.client_certificate)
    if not any(proofs):
        yield key, "needs one of token, hash, file and client_certificate"
    for name in token.pipelines:
        if name != ALL and name not in pipelines:
            yield f"{key}.pipelines", f"there is no pipeline {name!r}"


def _of_a_webhook(
    key: str, webhook: WebhookSettings, to: str, pipelines: Mapping[str, PipelineSettings]
) -> Iterator[tuple[str, str]]:
    if not (webhook.secret.get_secret_value() or webhook.file):
        yield key, "needs one of secret and file"
    if to not in pipelines:
        yield f"{key}.pipeline", f"there is no pipeline {to!r}"
    elif pipelines[to].format != "json":
        yield (
            f"{key}.pipeline",
            f"{to!r} has the format {pipelines[to].format}; deliveries are json",
        )
