"""The source `kafka`: topics, read by a consumer group. Begin with `source.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SecretStr

from ingestd.config.sections import FilePath, Secret, Section
from ingestd.config.units import Count, Seconds, Size, Words  # noqa: TC001  pydantic reads them
from ingestd.sources.base import KeyNeeds, SourceKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ingestd.base.record import Format

_MIB = 1024**2
_OURS = frozenset({
    "auto.offset.reset", "bootstrap.servers", "enable.auto.commit", "enable.auto.offset.store",
    "group.id", "isolation.level", "metadata.broker.list", "queued.max.messages.kbytes",
})  # fmt: skip
"""Properties that promises and bounds rest on."""


class KafkaSettings(Section):
    """`[kafka]`: brokers, topics and bounds of the source `kafka`."""

    brokers: Words = Field((), max_length=1000, description="HOST:PORT of brokers")
    topics: Words = Field(
        (), max_length=1000, description="topics; one that begins with ^ is a pattern of names"
    )
    group: str = Field("ingestd", min_length=1, max_length=249, description="consumer group")
    start: Literal["earliest", "latest"] = Field(
        "earliest", description="place of the first read of a partition, without an offset"
    )
    isolation: Literal["read_committed", "read_uncommitted"] = Field(
        "read_committed", description="isolation.level: messages of transactions that are read"
    )
    inflight_messages_max: Count = Field(
        10_000,
        ge=1,
        le=10**6,
        description="bound of messages read beyond the first that is not settled",
    )
    inflight_bytes_max: Size = Field(
        64 * _MIB, ge=_MIB, le=1024**4, description="bound of their bytes; then reading waits"
    )
    ids_max: Count = Field(
        200_000, ge=1, le=10**8, description="messages that are known as accepted: the last ones"
    )
    revoke_timeout: Seconds = Field(
        20.0, ge=0, le=240, description="time to settle what is read when a partition is revoked"
    )
    security: Literal["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"] = Field(
        "plaintext", description="security.protocol"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "SCRAM-SHA-512", description="mechanism of authentication, with sasl_…"
    )
    username: str = Field("", description="name, with sasl_…")
    password: Secret = Field(SecretStr(""), description="password of the name")
    tls_ca: FilePath = Field("", description="file of authorities (PEM) instead of the system's")
    tls_certificate: FilePath = Field("", description="file of a client certificate (PEM)")
    tls_key: FilePath = Field("", description="file of its key (PEM)")
    properties: dict[str, str] = Field(
        default_factory=dict, description="more properties of librdkafka; none with a secret in it"
    )


class KafkaSourceKind(SourceKind):
    """`kind = "kafka"`."""

    settings = KafkaSettings
    block_bytes = 4 * _MIB
    source = "ingestd.sources.kafka.source:KafkaSource"

    def problems(
        self,
        settings: KafkaSettings,
        *,
        formats: Mapping[str, str],  # noqa: ARG002
        default: str,  # noqa: ARG002
        runs: bool,
    ) -> Iterator[tuple[str, str]]:
        """See `SourceKind`."""
        if runs and not settings.brokers:
            yield "brokers", "no broker: kafka.brokers has HOST:PORT of some"
        if runs and not settings.topics:
            yield "topics", "no topic: kafka.topics has the names of some"
        if settings.ids_max < settings.inflight_messages_max:
            yield "ids_max", "is below kafka.inflight_messages_max: what is read may come again"
        if settings.security.startswith("sasl") and not settings.username:
            yield "security", f"{settings.security} needs kafka.username and kafka.password"
        if settings.properties:
            from ingestd.host.kafka import property_problem  # noqa: PLC0415  each start asks here

            for name in settings.properties:
                problem = f"{name} is the source's own" if name in _OURS else property_problem(name)
                if problem:
                    yield "properties", problem

    def keys(self, settings: KafkaSettings) -> KeyNeeds:
        """See `SourceKind`."""
        return KeyNeeds(0.0, 0, 0.0, shared=False, ids_max=settings.ids_max)

    def check(
        self,
        settings: Any,  # noqa: ARG002
        formats: Mapping[str, Format],  # noqa: ARG002
        default: str,  # noqa: ARG002
    ) -> list[str]:
        """See `SourceKind`."""
        from ingestd.sources.brokers import demand_package  # noqa: PLC0415  see `build`

        demand_package("confluent_kafka", "kafka")
        return []
