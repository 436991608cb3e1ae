"""The sink `kafka` produces a message a record, at least once or in transactions exactly once.

Without `exactly_once` the producer is idempotent: a message that the client itself sends again is
in the log once. A batch that comes again after a crash or a lost answer is there twice, and each
message has its record's id in a header to tell that by.

With `exactly_once` a batch is one transaction: its messages, and a row in the ledger topic under
the batch's id. Before it produces, a worker reads the ledger to its end, whatever is committed:

* No row under the ids of the batch: no earlier try can be committed any more. A try writes its row
  before it asks for the commit, and the worker that made it has ended, or this batch would not be
  here.
* A row: its transaction is committed, aborted or still open. The worker reads the ledger as far as
  is committed until that is known. An open one ends when its worker comes back under the same
  `transactional.id`, or with the transaction's timeout.

A `transactional.id` is made of the journal's id, the pipeline's name and a number that no other
worker of the data directory has. A worker that starts aborts with it what the last one left open.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from ingestd.handlers.batch import Batch, Blocked, Unavailable
from ingestd.handlers.context import Context
from ingestd.handlers.options import Extra, FilePath, Seconds, Secret, Size
from ingestd.handlers.outcome import SinkFinding
from ingestd.handlers.text import one_line
from ingestd.sinks.base import BatchHints, SinkOptions, ids_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_HERE = Context()
_CONNECT_SECONDS = 5.0
_ROUNDS_MAX = 16
"""Tries of one call, each without the records that the broker refused in those before."""
_LEDGER_ROWS = 200_000
"""Newest rows of the ledger that a worker knows."""
_LEDGER_DAYS = 7
_OVERHEAD = 1024  # of a message, beside its key, value and headers
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")
_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
# librdkafka would write to standard error; what matters of it is told with the failure.
_LOGGER = logging.getLogger("ingestd.sinks.kafka")
_LOGGER.addHandler(logging.NullHandler())
_LOGGER.propagate = False
_OURS = frozenset({
    "acks", "bootstrap.servers", "enable.idempotence", "metadata.broker.list",
    "request.required.acks", "transactional.id", "isolation.level",
})  # fmt: skip
"""Properties that promises rest on."""
_BLOCKING = frozenset({
    "TOPIC_AUTHORIZATION_FAILED", "CLUSTER_AUTHORIZATION_FAILED", "GROUP_AUTHORIZATION_FAILED",
    "TRANSACTIONAL_ID_AUTHORIZATION_FAILED", "SASL_AUTHENTICATION_FAILED", "_AUTHENTICATION",
    "UNSUPPORTED_SASL_MECHANISM", "ILLEGAL_SASL_STATE", "SECURITY_DISABLED", "_SSL",
    "UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_TOPIC", "TOPIC_EXCEPTION",
    "_INVALID_ARG", "_UNSUPPORTED_FEATURE", "UNSUPPORTED_VERSION", "MSG_SIZE_TOO_LARGE",
    "INVALID_TIMESTAMP", "INVALID_TRANSACTION_TIMEOUT", "POLICY_VIOLATION",
})  # fmt: skip
"""Errors that last until an operator acts."""
_DIFFERENT = "_INVALID_DIFFERENT_RECORD"
_RECORDS = frozenset({"INVALID_RECORD", _DIFFERENT})


class KafkaOptions(SinkOptions, frozen=True, kw_only=True):
    """Options of the sink `kafka`."""

    brokers: Annotated[str, Meta(description="`host:port` of brokers, with commas between them")]
    topic: Annotated[
        str,
        Meta(
            description="topic; placeholders as in `key`, and a record without one is a dead letter"
        ),
    ] = "ingestd-{_pipeline}"
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
    tls_ca: Annotated[
        FilePath | None, Meta(description="file of authorities (PEM) instead of the system's")
    ] = None
    tls_certificate: Annotated[
        FilePath | None, Meta(description="file of a client certificate (PEM), with its chain")
    ] = None
    tls_key: Annotated[FilePath | None, Meta(description="file of its key (PEM)")] = None
    properties: Annotated[
        dict[str, str],
        Meta(description="more properties of librdkafka; none with a secret in it"),
    ] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        for option in ("topic", "ledger_topic"):
            if not _TOPIC.fullmatch(_PLACEHOLDER.sub("x", getattr(self, option))):
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
            if "password" in name or "secret" in name:
                raise ValueError(f"properties: {name} would be shown; no secret belongs there")


class _Message(NamedTuple):
    place: int
    topic: str
    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]]


class KafkaSink:
    """Produces each batch and waits for all acknowledgements, with `acks=all`.

    The value of a message is the record as it came, its time is that of the batch's acceptance.
    """

    EXTRA = Extra("kafka", ("confluent_kafka",))
    BATCH = BatchHints(records_max=20_000, bytes_max=16 * 1024 * 1024, age_max=1.0)

    def __init__(self, options: KafkaOptions, context: Context = _HERE) -> None:
        self._options = options
        self._context = context
        self._timeout = float(options.timeout)
        self._topic = _Template(options.topic, context.pipeline)
        self._key = _Template(options.key, context.pipeline)
        self._headers = [
            (name, _Template(text, context.pipeline)) for name, text in options.headers.items()
        ]
        templates = [self._topic, self._key, *(one for _, one in self._headers)]
        self._decodes = any(one.has_fields for one in templates)
        if self._decodes and context.record_format != "json":
            raise ValueError(f"records of format {context.record_format} have no values by name")
        self._open: Any = None
        self._ledger: _Ledger | None = None
        self._slot: int | None = None
        self._last_error: Any = None

    def __call__(self, batch: Batch[bytes]) -> None:
        """Produces the batch, and with `exactly_once` unless it is there.

        Raises:
            Unavailable: not all is acknowledged, or the outcome of a transaction is not known.
            Blocked: a topic or a right is missing.
            RuntimeError: the broker refuses records without an end.
        """
        from confluent_kafka import KafkaException  # noqa: PLC0415  an extra

        messages = list(self._messages(batch))
        if not messages:
            return
        try:
            producer = self._producer(batch)
            at = int(batch.accepted_at.timestamp() * 1000)
            if self._ledger is None:
                refused = self._deliver(producer, batch, messages, at)
            else:
                found = self._ledger.find(ids_of(batch))
                refused = self._commit(producer, batch, messages, at) if found is None else found
        except KafkaException as error:
            raise self._class_of(error.args[0]) from None
        for place, name in enumerate(batch.ids) if refused else ():
            if name in refused:
                batch.reject(place, refused[name])

    def close(self) -> None:
        """Gives up what is not delivered; an open transaction is aborted by the next worker."""
        producer, self._open = self._open, None
        ledger, self._ledger = self._ledger, None
        if producer is not None:
            with suppress(Exception):  # it may be in a fatal state
                producer.purge()
                producer.flush(0.1)
        if ledger is not None:
            ledger.close()
        if self._slot is not None:
            os.close(self._slot)
            self._slot = None

    # -- messages ------------------------------------------------------------------------------

    def _messages(self, batch: Batch[bytes]) -> Iterator[_Message]:
        """A message a record; rejects what can be none."""
        size_max = self._options.message_bytes_max - _OVERHEAD
        for place, (name, item) in enumerate(zip(batch.ids, batch, strict=True)):
            values: Any = None
            if self._decodes:
                try:
                    values = msgspec.json.decode(item)
                except (ValueError, RecursionError):
                    batch.reject(place, "it is no JSON that can be decoded")
                    continue
            topic = self._topic.render(name, batch.id, values)
            if topic is None or not _TOPIC.fullmatch(topic):
                why = "has no value for" if topic is None else "gives no name of a topic for"
                batch.reject(place, f"it {why} {self._options.topic}")
                continue
            key = self._key.render(name, batch.id, values) if self._options.key else None
            headers = [
                (header, text.encode())
                for header, template in self._headers
                if (text := template.render(name, batch.id, values)) is not None
            ]
            sized = sum(len(header) + len(text) for header, text in headers) + len(key or "") * 4
            if len(item) + sized > size_max:
                batch.reject(place, f"it has {len(item)} bytes, more than message_bytes_max")
                continue
            yield _Message(place, topic, None if key is None else key.encode(), item, headers)

    # -- producing -----------------------------------------------------------------------------

    def _send(self, producer: Any, messages: Sequence[_Message], at: int) -> dict[int, Any]:
        """Produces messages and waits for all of them.

        Returns:
            The errors of those that the broker refuses, by place.

        Raises:
            KafkaException: an error that is no record's.
        """
        from confluent_kafka import KafkaException  # noqa: PLC0415

        failed: dict[int, Any] = {}

        def told(place: int, error: Any, _: Any) -> None:
            if error is not None:
                failed[place] = error

        end = time.monotonic() + self._timeout
        for number, one in enumerate(messages):
            report = partial(told, one.place)
            while True:
                try:
                    producer.produce(one.topic, one.value, one.key, on_delivery=report,
                                     timestamp=at, headers=one.headers)  # fmt: skip
                    break
                except BufferError:
                    if time.monotonic() > end:
                        raise Unavailable("the queue of messages stays full") from None
                    producer.poll(0.1)
            if number % 1000 == 0:
                producer.poll(0)
        if left := producer.flush(max(0.0, end - time.monotonic()) + 1):
            raise Unavailable(f"{left} of {len(messages)} messages are not acknowledged in time")
        for error in failed.values():
            if error.name() not in _RECORDS:
                raise KafkaException(error)
        return failed

    def _deliver(
        self, producer: Any, batch: Batch[bytes], messages: list[_Message], at: int
    ) -> dict[str, str]:
        """Produces without a transaction; gives reasons of records that are refused, by id."""
        refused: dict[str, str] = {}
        left = messages
        for _ in range(_ROUNDS_MAX):
            failed = self._send(producer, left, at)
            refused |= _reasons(failed, batch.ids)
            left = [one for one in left if _is_different(failed, one)]
            if not left:
                return refused
        raise RuntimeError("the broker refuses records again and again")

    def _commit(
        self, producer: Any, batch: Batch[bytes], messages: list[_Message], at: int
    ) -> dict[str, str]:
        """Produces a batch and its row in the ledger in one transaction.

        Returns:
            The reasons of records that are refused, by id, as they stand in the row.
        """
        refused: dict[str, str] = {}
        left = messages
        end = time.monotonic() + 2 * self._timeout
        for _ in range(_ROUNDS_MAX):
            producer.begin_transaction()
            failed = self._send(producer, left, at)
            if not failed:
                row = _Message(
                    -1, self._options.ledger_topic, batch.id.encode(),
                    msgspec.json.encode(refused), [],
                )  # fmt: skip
                self._send(producer, [row], at)
                self._end(producer, end)
                return refused
            producer.abort_transaction(self._timeout)
            refused |= _reasons(failed, batch.ids)
            left = [one for one in left if one.place not in failed or _is_different(failed, one)]
        raise RuntimeError("the broker refuses records again and again")

    def _end(self, producer: Any, end: float) -> None:
        """Commits; what is interrupted is taken up again, as librdkafka asks for."""
        from confluent_kafka import KafkaException  # noqa: PLC0415

        while True:
            try:
                producer.commit_transaction(max(0.1, end - time.monotonic()))
            except KafkaException as error:
                if not error.args[0].retriable() or time.monotonic() > end:
                    raise
            else:
                return

    # -- connection ----------------------------------------------------------------------------

    def _producer(self, batch: Batch[bytes]) -> Any:
        """The producer, connected; its ledger is read."""
        from confluent_kafka import Producer  # noqa: PLC0415

        if self._open is not None:
            return self._open
        options = self._options
        more = {
            "partitioner": "murmur2_random",  # as Java's client
            "topic.metadata.propagation.max.ms": 5000, "queue.buffering.max.messages": 1_000_000,
            **options.properties,
            "acks": "all", "enable.idempotence": True, "compression.type": options.compression,
            "message.max.bytes": int(options.message_bytes_max),
            "message.timeout.ms": int(self._timeout * 1000),
        }  # fmt: skip
        if options.exactly_once:
            more["transactional.id"] = self._transactional_id(batch)
            more["transaction.timeout.ms"] = max(10_000, int(self._timeout * 2000))
        producer = Producer(self._config(**more), logger=_LOGGER)
        try:
            self._look(producer)
            if options.exactly_once:
                producer.init_transactions(self._timeout)
                self._ledger = _Ledger(self._config(), options.ledger_topic, self._timeout)
        except BaseException:
            producer.poll(0)  # what its threads met
            raise
        self._open = producer
        return producer

    def _look(self, producer: Any) -> None:
        """Asks for the topic, which tells soon if the brokers do not answer."""
        from confluent_kafka import KafkaException  # noqa: PLC0415

        name = None if self._topic.has_fields else self._topic.render("", "", None)
        topics = producer.list_topics(name or "", timeout=_CONNECT_SECONDS).topics
        error = topics[name].error if name in topics else None
        if error is not None and error.name() in {"TOPIC_AUTHORIZATION_FAILED", "TOPIC_EXCEPTION"}:
            raise KafkaException(error)

    def _transactional_id(self, batch: Batch[bytes]) -> str:
        """A name that no other worker has, and that the next life's workers have again."""
        folder = Path(self._context.data_dir)
        journal, pipeline = batch.id.rpartition("-")[0], self._context.pipeline
        for number in range(4096):
            path = folder / f"kafka-{pipeline}-{number}.lock"
            slot = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(slot)
                continue
            self._slot = slot
            return f"ingestd-{journal}-{pipeline}-{number}"
        raise Blocked(f"too many workers of this pipeline write to {folder}")

    def _config(self, **more: object) -> dict[str, Any]:
        options = self._options
        config: dict[str, Any] = {
            "bootstrap.servers": options.brokers, "client.id": "ingestd",
            "security.protocol": options.security, "error_cb": self._note,
            "socket.connection.setup.timeout.ms": int(_CONNECT_SECONDS * 1000),
            "reconnect.backoff.max.ms": 1000,
        }  # fmt: skip
        if options.security.startswith("sasl"):
            config["sasl.mechanism"] = options.sasl_mechanism
            config["sasl.username"], config["sasl.password"] = options.username, options.password
        for name, value in (("ca", options.tls_ca), ("certificate", options.tls_certificate),
                            ("key", options.tls_key)):  # fmt: skip
            if value:
                config[f"ssl.{name}.location"] = str(value)
        return {**config, **options.properties, **more}

    def _note(self, error: Any) -> None:
        if error.name() != "_ALL_BROKERS_DOWN":
            self._last_error = error

    def _class_of(self, error: Any) -> Exception:
        """The class of a sink's errors that an error of Kafka's belongs to."""
        last = self._last_error
        told = f"{error.name()}: {error.str()}"
        if last is not None:
            told += f" ({last.name()}: {last.str()})"
        told = one_line(told, 600)
        is_lasting = error.name() in _BLOCKING or (last is not None and last.name() in _BLOCKING)
        return Blocked(told) if is_lasting else Unavailable(told)

    # -- check ---------------------------------------------------------------------------------

    def check(self) -> Iterator[SinkFinding]:
        """Asks the brokers for the topics, their replicas and their settings.

        Raises:
            Unavailable: they do not answer.
            Blocked: they refuse the name and the password.
        """
        from confluent_kafka import KafkaException  # noqa: PLC0415
        from confluent_kafka.admin import AdminClient  # noqa: PLC0415

        admin = None
        try:
            admin = AdminClient(self._config(**{"allow.auto.create.topics": False}), logger=_LOGGER)
            found = admin.list_topics(timeout=_CONNECT_SECONDS)
            yield SinkFinding("info", f"brokers: {len(found.brokers)}")
            if not self._topic.has_fields:
                yield from self._findings_of(admin, self._topic.render("", "", None) or "")
            if self._options.exactly_once:
                yield from _ledger_findings(admin, self._options.ledger_topic)
        except KafkaException as error:
            if admin is not None:
                admin.poll(0)  # what its threads met
            raise self._class_of(error.args[0]) from None

    def _findings_of(self, admin: Any, name: str) -> Iterator[SinkFinding]:
        topic = admin.list_topics(name, timeout=_CONNECT_SECONDS).topics[name]
        if topic.error is not None and topic.error.name() == "UNKNOWN_TOPIC_OR_PART":
            text = f"there is no topic {name}; it is made if the brokers make topics by themselves"
            yield SinkFinding("warning", text)
            return
        if topic.error is not None:
            yield SinkFinding("error", f"topic {name}: {topic.error.str()}")
            return
        replicas = min((len(one.replicas) for one in topic.partitions.values()), default=0)
        if replicas < 2:
            text = f"topic {name} has one replica: what is acknowledged goes with its broker"
            yield SinkFinding("warning", text)
        settings = _settings_of(admin, name)
        if replicas >= 2 and settings.get("min.insync.replicas") == "1":
            text = f"topic {name}: min.insync.replicas is 1, so one broker's word is enough"
            yield SinkFinding("warning", text)
        size = settings.get("max.message.bytes", "")
        if size.isdigit() and int(size) < self._options.message_bytes_max:
            text = f"topic {name}: max.message.bytes is {size}, below message_bytes_max"
            yield SinkFinding("error", text)
        if "compact" in settings.get("cleanup.policy", "") and not self._options.key:
            text = f"topic {name} is compacted and takes no message without a key: set key"
            yield SinkFinding("error", text)


class _Ledger:
    """The ids of the newest batches that a transaction was begun for, and what became of it."""

    def __init__(self, config: dict[str, Any], topic: str, timeout: float) -> None:
        from confluent_kafka import TopicPartition  # noqa: PLC0415

        self._at = partial(TopicPartition, topic, 0)
        self._timeout = timeout
        _make_ledger(config, topic)
        self._all = self._consumer(config, "read_uncommitted")
        self._committed: Any = None
        self._config = config
        self._seen: dict[str, int] = {}
        low, high = self._all.get_watermark_offsets(self._at(), timeout=timeout)
        self._next: int = max(low, high - 2 * _LEDGER_ROWS)  # each row has a mark behind it
        self._read(high)

    def find(self, names: Sequence[str]) -> dict[str, str] | None:
        """The row of the first of some batches that is committed; `None` if none is.

        Raises:
            Unavailable: that is not known yet.
        """
        self._read(self._all.get_watermark_offsets(self._at(), timeout=self._timeout)[1])
        for name in names:
            offset = self._seen.get(name)
            if offset is None:
                continue
            row = self._row(offset)
            if row is not None:
                return msgspec.json.decode(row, type=dict[str, str])
            del self._seen[name]
        return None

    def close(self) -> None:
        for one in (self._all, self._committed):
            if one is not None:
                one.close()

    def _read(self, high: int) -> None:
        """Reads on up to an offset, whatever is committed."""
        if self._next >= high:
            return
        for offset, message in self._from(self._all, self._next):
            if message is not None:
                self._seen[message.key().decode()] = offset
            self._next = offset + (message is not None)
            if self._next >= high:
                break
        while len(self._seen) > _LEDGER_ROWS:
            del self._seen[next(iter(self._seen))]

    def _row(self, offset: int) -> bytes | None:
        """The row at an offset if it is committed; `None` if it is aborted."""
        if self._committed is None:
            self._committed = self._consumer(self._config, "read_committed")
        for reached, message in self._from(self._committed, offset):
            if message is not None and reached == offset:
                row: bytes = message.value()
                return row
            if reached > offset:
                return None
        raise AssertionError  # pragma: no cover  `_from` ends with an exception

    def _from(self, consumer: Any, offset: int) -> Iterator[tuple[int, Any]]:
        """Offsets from one on, with their messages; and without one the end that was reached.

        Raises:
            Unavailable: nothing more came in time.
        """
        from confluent_kafka import KafkaException  # noqa: PLC0415

        end = time.monotonic() + self._timeout
        consumer.assign([self._at(offset)])
        try:
            while (left := end - time.monotonic()) > 0:
                message = consumer.poll(left)
                if message is None:
                    break
                error = message.error()
                if error is None:
                    yield message.offset(), message
                elif error.name() == "_PARTITION_EOF":
                    yield message.offset(), None
                else:
                    raise KafkaException(error)
        finally:
            consumer.unassign()
        raise Unavailable("the ledger does not tell yet what became of an earlier try")

    @staticmethod
    def _consumer(config: dict[str, Any], isolation: str) -> Any:
        from confluent_kafka import Consumer  # noqa: PLC0415

        more = {
            "group.id": "ingestd", "enable.auto.commit": False, "isolation.level": isolation,
            "enable.partition.eof": True, "auto.offset.reset": "earliest", "fetch.wait.max.ms": 5,
        }  # fmt: skip
        return Consumer({**config, **more}, logger=_LOGGER)


class _Template:
    """A text with placeholders."""

    def __init__(self, text: str, pipeline: str) -> None:
        text = text.replace("{_pipeline}", pipeline)
        # Literal text and placeholders by turns.
        self._parts = _PLACEHOLDER.split(text)
        names = self._parts[1::2]
        self.has_fields = any(name not in {"_id", "_batch"} for name in names)

    def render(self, name: str, batch: str, values: Any) -> str | None:
        """The text of one record; `None` if it has no value for a placeholder."""
        if len(self._parts) == 1:
            return self._parts[0]
        found = []
        for number, part in enumerate(self._parts):
            if not number % 2:
                found.append(part)
                continue
            text = name if part == "_id" else batch if part == "_batch" else _value(values, part)
            if text is None:
                return None
            found.append(text)
        return "".join(found)


def _value(values: Any, path: str) -> str | None:
    for name in path.split("."):
        values = values.get(name) if type(values) is dict else None
    if values is None or isinstance(values, dict | list):
        return None
    return values if isinstance(values, str) else msgspec.json.encode(values).decode()


def _reasons(failed: dict[int, Any], names: Sequence[str]) -> dict[str, str]:
    """The reasons of the records that are refused for what they are, by id."""
    return {
        names[place]: one_line(error.str(), 300)
        for place, error in failed.items()
        if error.name() != _DIFFERENT
    }


def _is_different(failed: dict[int, Any], one: _Message) -> bool:
    return one.place in failed and failed[one.place].name() == _DIFFERENT


def _make_ledger(config: dict[str, Any], topic: str) -> None:
    """Makes the ledger's topic unless it is there.

    Raises:
        Blocked: it is not there and cannot be made.
    """
    from confluent_kafka import KafkaException  # noqa: PLC0415
    from confluent_kafka.admin import AdminClient, NewTopic  # noqa: PLC0415

    admin = AdminClient({**config, "allow.auto.create.topics": False}, logger=_LOGGER)
    if _is_there(admin, topic):
        return
    settings = {
        "cleanup.policy": "compact,delete",
        "retention.ms": str(_LEDGER_DAYS * 86400 * 1000),
    }
    new = NewTopic(topic, 1, config=settings)
    try:
        admin.create_topics([new], operation_timeout=10)[topic].result(15)
    except KafkaException as error:
        if error.args[0].name() == "TOPIC_ALREADY_EXISTS":
            return
        raise Blocked(f"the topic {topic} cannot be made: {error.args[0].str()}") from None


def _is_there(admin: Any, topic: str) -> bool:
    from confluent_kafka import KafkaException  # noqa: PLC0415

    error = admin.list_topics(topic, timeout=_CONNECT_SECONDS).topics[topic].error
    if error is not None and error.name() != "UNKNOWN_TOPIC_OR_PART":
        raise KafkaException(error)
    return error is None


def _ledger_findings(admin: Any, topic: str) -> Iterator[SinkFinding]:
    if not _is_there(admin, topic):
        yield SinkFinding("info", f"there is no topic {topic} yet; the sink makes it")
        return
    partitions = admin.list_topics(topic, timeout=_CONNECT_SECONDS).topics[topic].partitions
    if len(partitions) != 1:
        yield SinkFinding("error", f"topic {topic} has {len(partitions)} partitions, not 1")


def _settings_of(admin: Any, topic: str) -> dict[str, str]:
    """The settings of a topic; none if they cannot be read."""
    from confluent_kafka import KafkaException  # noqa: PLC0415
    from confluent_kafka.admin import ConfigResource  # noqa: PLC0415

    resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
    asked = admin.describe_configs([resource], request_timeout=2)
    try:
        return {name: str(one.value) for name, one in asked[resource].result(10).items()}
    except KafkaException:
        return {}
