"""The source `nats`: a stream of JetStream, read by a durable consumer. Begin with `source.py`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SecretStr

from ingestd.base.errors import ConfigError
from ingestd.config.sections import FilePath, Secret, Section
from ingestd.config.units import Count, Seconds, Size, Words  # noqa: TC001  pydantic reads them
from ingestd.sources.base import KeyNeeds, SourceKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ingestd.base.record import Format

_MIB = 1024**2
_NAME = re.compile(r"[^\s.*>/\\]{1,255}")


class NatsSettings(Section):
    """`[nats]`: servers, stream and bounds of the source `nats`."""

    servers: Words = Field(
        (), max_length=1000, description="nats:// or tls://HOST:PORT of servers of one cluster"
    )
    stream: str = Field("", description="stream of JetStream")
    durable: str = Field(
        "ingestd", description="durable consumer; daemons with the same one share the stream"
    )
    create: bool = Field(True, description="make the consumer if it is not there")
    subjects: Words = Field(
        (), max_length=1000, description="subjects of a consumer that is made; none: all"
    )
    start: Literal["all", "new"] = Field(
        "all", description="first message of a consumer that is made: the oldest, or the next"
    )
    ack_wait: Seconds = Field(
        30.0,
        ge=1,
        le=86400,
        description="wait before a message is delivered again, of a consumer that is made",
    )
    ack_pending_max: Count = Field(
        100_000,
        ge=1,
        le=10**8,
        description="bound of messages that are not acknowledged, of a consumer that is made",
    )
    inflight_messages_max: Count = Field(
        10_000, ge=1, le=10**6, description="bound of messages read and not settled"
    )
    inflight_bytes_max: Size = Field(
        64 * _MIB, ge=_MIB, le=1024**4, description="bound of their bytes; then reading waits"
    )
    ids_max: Count = Field(
        200_000, ge=1, le=10**8, description="messages that are known as accepted: the last ones"
    )
    id_header: str = Field(
        "", description="header that names a message instead of its sequence: Nats-Msg-Id"
    )
    username: str = Field("", description="name, with a password")
    password: Secret = Field(SecretStr(""), description="password of the name")
    token: Secret = Field(SecretStr(""), description="token, instead of name and password")
    credentials: FilePath = Field("", description="file of credentials (JWT and NKey)")
    tls_ca: FilePath = Field("", description="file of authorities (PEM) instead of the system's")
    tls_certificate: FilePath = Field("", description="file of a client certificate (PEM)")
    tls_key: FilePath = Field("", description="file of its key (PEM)")


class NatsSourceKind(SourceKind):
    """`kind = "nats"`."""

    settings = NatsSettings
    block_bytes = 4 * _MIB
    source = "ingestd.sources.nats.source:NatsSource"

    def problems(
        self,
        settings: NatsSettings,
        *,
        formats: Mapping[str, str],  # noqa: ARG002
        default: str,  # noqa: ARG002
        runs: bool,
    ) -> Iterator[tuple[str, str]]:
        """See `SourceKind`."""
        if runs and not settings.servers:
            yield "servers", "no server: nats.servers has nats://HOST:PORT of some"
        if runs and not settings.stream:
            yield "stream", "no stream: nats.stream has its name"
        for key in ("stream", "durable"):
            name = getattr(settings, key)
            if (name or key == "durable") and not _NAME.fullmatch(name):
                yield key, f"{name[:80]!r} is no name of a {key}: no dots, blanks, * or >"
        if settings.ids_max < settings.inflight_messages_max:
            yield "ids_max", "is below nats.inflight_messages_max: what is read may come again"
        if bool(settings.username) != bool(settings.password.get_secret_value()):
            yield "username", "nats.username and nats.password belong together"
        if settings.tls_key and not settings.tls_certificate:
            yield "tls_key", "it needs nats.tls_certificate"

    def keys(self, settings: NatsSettings) -> KeyNeeds:
        """See `SourceKind`."""
        return KeyNeeds(0.0, 0, 0.0, shared=False, ids_max=settings.ids_max)

    def check(
        self,
        settings: Any,
        formats: Mapping[str, Format],  # noqa: ARG002
        default: str,  # noqa: ARG002
    ) -> list[str]:
        """See `SourceKind`."""
        from ingestd.host.nats import demand_nats, fault_of_servers  # noqa: PLC0415  see `build`

        demand_nats(settings.credentials)
        if fault := fault_of_servers(settings.servers):
            raise ConfigError(problem=f"nats.servers: {fault}")
        return []
