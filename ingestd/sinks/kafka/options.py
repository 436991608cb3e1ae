"""Options of the sink `kafka`, and what they make: clients' configuration, and messages.

Topic, key and headers of a message come from templates, its value is the record as it came.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from ingestd.handlers.options import Seconds, Secret, Size
from ingestd.host.kafka import KafkaAccess, property_problem
from ingestd.sinks.base import TlsOptions
from ingestd.sinks.templates import PLACEHOLDER, Template

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ingestd.handlers.batch import Batch
    from ingestd.handlers.context import Context

TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")
"""Names that a topic can have."""
_OURS = frozenset({
    "acks", "bootstrap.servers", "enable.idempotence", "metadata.broker.list",
    "request.required.acks", "transactional.id", "isolation.level",
})  # fmt: skip
"""Properties that promises rest on."""


class KafkaOptions(TlsOptions, frozen=True, kw_only=True):
    """Options of the sink `kafka`."""

    brokers: Annotated[str, Meta(description="`host:port` of brokers, with commas between them")]
    topic: Annotated[
        str,
        Meta(
            description="topic; placeholders as in `key`, and a record without one is a dead letter"
        ),
    ] = "ingestd-{_pipeline}"
    unknown_topic: Annotated[
        Literal["reject", "wait"],
        Meta(
            description="a topic that a record names and that is not there or may not be written"
            " to: a dead letter of that record, or the pipeline waits for it"
        ),
    ] = "reject"
    key: Annotated[
        str,
        Meta(
            description="key of a message; `{name}` or `{name.inner}` is a value of the record,"
            " `{_id}` its id, `{_batch}` its batch's, `{_pipeline}` the pipeline's name; a record"
            " without one has no key"
        ),
    ] = ""
    headers: Annotated[
        dict[str, str],
        Meta(description="headers of a message, with placeholders as in `key`"),
    ] = msgspec.field(default_factory=lambda: {"ingestd-id": "{_id}"})
    exactly_once: Annotated[
        bool, Meta(description="a batch is a transaction that is known by its id")
    ] = False
    ledger_topic: Annotated[
        str, Meta(description="topic of the ids of batches, for `exactly_once`")
    ] = "ingestd-ledger"
    compression: Annotated[
        Literal["none", "gzip", "snappy", "lz4", "zstd"], Meta(description="compression")
    ] = "lz4"
    message_bytes_max: Annotated[
        Size,
        Meta(description="a larger record is a dead letter; at most the topic's max.message.bytes"),
    ] = Size(1_000_000)
    timeout: Annotated[
        Seconds, Meta(description="bound of the delivery of a batch; below `executor.timeout`")
    ] = Seconds(30)
    security: Annotated[
        Literal["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"],
        Meta(description="security.protocol"),
    ] = "plaintext"
    sasl_mechanism: Annotated[
        Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"], Meta(description="with sasl_…")
    ] = "SCRAM-SHA-512"
    username: Annotated[str | None, Meta(description="name, with sasl_…")] = None
    password: Annotated[Secret | None, Meta(description="password of `username`")] = None
    properties: Annotated[
        dict[str, str],
        Meta(description="more properties of librdkafka; none with a secret in it"),
    ] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("topic", "ledger_topic"):
            if not TOPIC.fullmatch(PLACEHOLDER.sub("x", getattr(self, option))):
                raise ValueError(f"{option}: {getattr(self, option)!r} is no name of a topic")
        if not self.brokers.strip():
            raise ValueError("brokers: there are none")
        if self.timeout < 1:
            raise ValueError("timeout: it has to be at least 1 s")
        if (self.username is None) != (self.password is None):
            raise ValueError("username: username and password belong together")
        if self.security.startswith("sasl") and self.username is None:
            raise ValueError(f"security: {self.security} needs username and password")
        for name in self.properties:
            if name in _OURS or name.endswith("timeout.ms"):
                raise ValueError(f"properties: {name} is the sink's own")
            if problem := property_problem(name):
                raise ValueError(f"properties: {problem}")


def client_config(options: KafkaOptions, error_cb: Callable[[Any], None]) -> dict[str, Any]:
    """The configuration that all clients of a sink share, without the options' `properties`.

    Args:
        options: of the sink.
        error_cb: gets errors that belong to no call, when a client is polled.
    """
    access = KafkaAccess(
        options.brokers, options.security, options.sasl_mechanism,
        options.username or "", options.password or "",
        (options.tls_ca or "", options.tls_certificate or "", options.tls_key or ""),
    )  # fmt: skip
    return {**access.config(), "error_cb": error_cb}


# -- messages --------------------------------------------------------------------------------------

_OVERHEAD = 1024  # of a message, beside its key, value and headers
_decode = msgspec.json.Decoder().decode


class KafkaMessage(NamedTuple):
    """A message of one record.

    Attributes:
        place: of the record in its batch.
        topic: its name.
        key: `None` for none.
        value: the record.
        headers: names and values.
    """

    place: int
    topic: str
    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]]


class KafkaMessages:
    """Makes the messages of batches.

    Args:
        options: of the sink.
        context: format and name of the pipeline.

    Attributes:
        topic: the one topic; `None` where records name it.

    Raises:
        ValueError: a placeholder names a value of records that have none.
    """

    def __init__(self, options: KafkaOptions, context: Context) -> None:
        self._options = options
        self._topic = Template(options.topic, context.pipeline)
        self._key = Template(options.key, context.pipeline)
        self._headers = [
            (name, Template(text, context.pipeline)) for name, text in options.headers.items()
        ]
        self.topic = self._topic.fixed
        templates = [self._topic, self._key, *(one for _, one in self._headers)]
        self._decodes = any(one.has_fields for one in templates)
        if self._decodes and context.record_format != "json":
            raise ValueError(f"records of format {context.record_format} have no values by name")

    def of(self, batch: Batch[bytes]) -> Iterator[KafkaMessage]:
        """A message a record; rejects what can be none."""
        options, batch_id, fixed = self._options, batch.id, self._topic.fixed
        size_max = options.message_bytes_max - _OVERHEAD
        has_key, key, key_of = bool(options.key), None, self._key.render
        headers_of = [(name, template.render) for name, template in self._headers]
        values: Any = None
        for place, (name, item) in enumerate(zip(batch.ids, batch, strict=True)):
            if self._decodes:
                try:
                    values = _decode(item)
                except (ValueError, RecursionError):
                    batch.reject(place, "it is no JSON that can be decoded")
                    continue
            topic = fixed or self._topic.render(name, batch_id, values)
            if fixed is None and (topic is None or not TOPIC.fullmatch(topic)):
                why = "has no value for" if topic is None else "gives no name of a topic for"
                batch.reject(place, f"it {why} {options.topic}")
                continue
            size, headers = len(item), []
            if has_key and (text := key_of(name, batch_id, values)) is not None:
                key = text.encode()
                size += len(key)
            else:
                key = None
            for header, render in headers_of:
                if (text := render(name, batch_id, values)) is not None:
                    headers.append((header, text.encode()))
                    size += len(header) + 4 * len(text)
            if size > size_max:
                batch.reject(place, f"it has {size} bytes, more than message_bytes_max")
                continue
            yield KafkaMessage(place, topic or "", key, item, headers)
