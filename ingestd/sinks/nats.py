"""The sink `nats` publishes a message a record into a stream of JetStream, and waits for its word.

A message has its record's id as `Nats-Msg-Id`, the same in every try: a stream forgets a message
that comes again within its `duplicate_window`, and acknowledges it. So a batch that comes again, in
parts or whole, is in the stream once within that window, and again after it.

Messages of a call are published in order, with so many of them not acknowledged yet at most that no
server drops some. Each has a reply subject of its own; the answers come to one subscription.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from ingestd.base.errors import ConfigError
from ingestd.handlers.batch import Batch, Blocked, Unavailable
from ingestd.handlers.context import Context
from ingestd.handlers.options import Extra, FilePath, Seconds, Secret
from ingestd.handlers.outcome import SinkFinding
from ingestd.handlers.text import one_line
from ingestd.host.nats import (
    REQUEST_SECONDS,
    NatsAccess,
    close_nats,
    connect_nats,
    demand_nats,
    fault_of_servers,
)
from ingestd.sinks.base import BatchHints, TlsOptions
from ingestd.sinks.templates import PLACEHOLDER, Template

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WINDOW = 500
"""Messages of a call that are published and not acknowledged."""
MESSAGE_ID = "Nats-Msg-Id"
_SUBJECT = re.compile(r"(?![$]|_INBOX\.)[^\s.*>\x00-\x20\x7f]+(\.[^\s.*>\x00-\x20\x7f]+)*")
_SUBJECT_CHARACTERS_MAX = 512
_HEADER = re.compile(r"[!-9;-~]+")
_HEAD_BYTES = len("NATS/1.0\r\n\r\n")
_NOT_THERE = "503"
_NOBODY = -1
_OF_RECORD = frozenset({10054, 10097})  # a message or its headers are larger than the stream takes
_LASTING = frozenset({10060, 10109, 10026, 10039})  # another stream, a sealed one, no JetStream
_BUSY = frozenset({10158})  # the same message is being stored
_decode = msgspec.json.Decoder().decode
_HERE = Context()


class NatsSinkOptions(TlsOptions, frozen=True, kw_only=True):
    """Options of the sink `nats`."""

    servers: Annotated[
        str, Meta(description="`nats://` or `tls://host:port` of servers, with commas between them")
    ]
    subject: Annotated[
        str,
        Meta(
            description="subject; `{name}` or `{name.inner}` is a value of the record, `{_id}` its"
            " id, `{_batch}` its batch's, `{_pipeline}` the pipeline's name; a record without one"
            " is a dead letter"
        ),
    ] = "ingestd.{_pipeline}"
    stream: Annotated[
        str, Meta(description="stream that has to take the messages; empty: whichever does")
    ] = ""
    message_id: Annotated[
        str,
        Meta(description="`Nats-Msg-Id` with placeholders as in `subject`; empty for none"),
    ] = "{_id}"
    headers: Annotated[
        dict[str, str],
        Meta(description="headers of a message, with placeholders as in `subject`"),
    ] = msgspec.field(default_factory=lambda: {"ingestd-id": "{_id}", "ingestd-batch": "{_batch}"})
    timeout: Annotated[
        Seconds, Meta(description="bound of the publishing of a batch; below `executor.timeout`")
    ] = Seconds(30)
    username: Annotated[str | None, Meta(description="name, with a password")] = None
    password: Annotated[Secret | None, Meta(description="password of `username`")] = None
    token: Annotated[Secret | None, Meta(description="token, instead of both")] = None
    credentials: Annotated[
        FilePath | None, Meta(description="file of credentials (JWT and NKey)")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if fault := fault_of_servers(self.addresses):
            raise ValueError(f"servers: {fault}")
        if not self.addresses:
            raise ValueError("servers: there are none")
        if not is_subject(PLACEHOLDER.sub("x", self.subject)):
            raise ValueError(f"subject: {self.subject!r} is no subject to publish to")
        if (self.username is None) != (self.password is None):
            raise ValueError("username: username and password belong together")
        if self.timeout < 1:
            raise ValueError("timeout: it has to be at least 1 s")
        for name in self.headers:
            if not _HEADER.fullmatch(name) or name.lower().startswith("nats-"):
                raise ValueError(f"headers: {name!r} is no name, or one of the server's own")

    @property
    def addresses(self) -> tuple[str, ...]:
        """The servers one by one."""
        return tuple(one for part in self.servers.split(",") if (one := part.strip()))


def is_subject(text: str) -> bool:
    """Tells if messages can be published to a subject: no wildcards, and none of the server's."""
    return len(text) <= _SUBJECT_CHARACTERS_MAX and _SUBJECT.fullmatch(text) is not None


class _NatsMessage(NamedTuple):
    """The message of one record.

    Attributes:
        place: of the record in its batch.
        subject: to publish to.
        payload: the record.
        headers: names and values.
        size: bytes of payload and headers.
    """

    place: int
    subject: str
    payload: bytes
    headers: dict[str, str]
    size: int


class _StreamRefusal(NamedTuple):
    """The answer to a message that a stream does not take.

    Attributes:
        number: of the error, as JetStream counts them; `_NOBODY` where nobody answered.
        status: its class, as in HTTP.
        why: for people.
    """

    number: int
    status: int
    why: str


class _Publishing:
    """The messages of one call that are not answered yet.

    Attributes:
        open: how many.
        refused: what the server said of others, by place.
        moved: set by each answer, and when the connection has ended.
    """

    def __init__(self) -> None:
        self.open = 0
        self.refused: dict[int, _StreamRefusal] = {}
        self.moved = asyncio.Event()

    def answered(self, place: int, message: Any) -> None:
        self.open -= 1
        self.moved.set()
        if (message.headers or {}).get("Status") == _NOT_THERE:
            self.refused[place] = _StreamRefusal(_NOBODY, 503, "no stream takes it")
        elif error := json.loads(message.data).get("error"):
            number, status = int(error.get("err_code", 0)), int(error.get("code", 0))
            self.refused[place] = _StreamRefusal(number, status, str(error.get("description", "")))


class NatsSink:
    """Publishes each batch and waits for the acknowledgements of all its messages.

    The payload of a message is the record as it came.
    """

    EXTRA = Extra("nats", ("nats",))
    BATCH = BatchHints(records_max=5000, bytes_max=4 * 1024**2)

    def __init__(self, options: NatsSinkOptions, context: Context = _HERE) -> None:
        self._options = options
        self._subject = Template(options.subject, context.pipeline)
        self._id = Template(options.message_id, context.pipeline)
        self._headers = [
            (name, Template(text, context.pipeline)) for name, text in options.headers.items()
        ]
        self._decodes = any(
            one.has_fields for one in (self._subject, self._id, *(t for _, t in self._headers))
        )
        if self._decodes and context.record_format != "json":
            raise ValueError(f"records of format {context.record_format} have no values by name")
        self._client: Any = None
        self._lock = asyncio.Lock()
        self._inbox = ""
        self._tokens = itertools.count()
        self._waiting: dict[str, tuple[_Publishing, int]] = {}
        self._violation = ""

    async def __call__(self, batch: Batch[bytes]) -> None:
        """Publishes the batch.

        Raises:
            Unavailable: not all is acknowledged.
            Blocked: there is no stream for the subject, or a right is missing.
            RuntimeError: the server refuses messages for another reason.
        """
        from nats.errors import Error  # noqa: PLC0415  an extra

        messages = list(self._messages(batch))
        if not messages:
            return
        try:
            client = await self._connected()
            fitting = []
            for one in messages:
                if one.size > client.max_payload:
                    why = f"it has {one.size} bytes with its headers, more than max_payload"
                    batch.reject(one.place, f"{why} = {client.max_payload} of the server")
                else:
                    fitting.append(one)
            refused = await self._publish(client, fitting)
            if refused:
                await self._judge(client, batch, fitting, refused)
        except (OSError, TimeoutError, Error) as error:
            raise self._class_of(error) from None

    async def close(self) -> None:
        """Ends the connection."""
        client, self._client = self._client, None
        if client is not None:
            await close_nats(client)

    # -- messages ------------------------------------------------------------------------------

    def _messages(self, batch: Batch[bytes]) -> Iterator[_NatsMessage]:
        """A message a record; rejects what can be none."""
        batch_id, values = batch.id, None
        for place, (name, item) in enumerate(zip(batch.ids, batch, strict=True)):
            if self._decodes:
                try:
                    values = _decode(item)
                except (ValueError, RecursionError):
                    batch.reject(place, "it is no JSON that can be decoded")
                    continue
            subject = self._subject.fixed or self._subject.render(name, batch_id, values)
            if subject is None or not is_subject(subject):
                why = (
                    "has no value for" if subject is None else "gives no subject to publish to for"
                )
                batch.reject(place, f"it {why} {self._options.subject}")
                continue
            headers = {}
            if self._options.message_id:
                own = self._id.render(name, batch_id, values)
                if own is not None:
                    # Two ids must not become one: the second message would count as stored.
                    headers[MESSAGE_ID] = own if _plain(own) == own else json.dumps(own)
            if self._options.stream:
                headers["Nats-Expected-Stream"] = self._options.stream
            for header, template in self._headers:
                if (text := template.render(name, batch_id, values)) is not None:
                    headers[header] = _plain(text)
            size = len(item) + _HEAD_BYTES
            size += sum(len(key) + 4 + len(value.encode()) for key, value in headers.items())
            yield _NatsMessage(place, subject, item, headers, size)

    # -- publishing ----------------------------------------------------------------------------

    async def _publish(
        self, client: Any, messages: Sequence[_NatsMessage]
    ) -> dict[int, _StreamRefusal]:
        """Publishes messages and waits for all answers; returns what was refused, by place.

        Raises:
            Unavailable: not all came in time, or the connection has ended.
            Blocked: a right is missing.
        """
        call, mine = _Publishing(), set[str]()
        end = asyncio.get_running_loop().time() + self._options.timeout
        self._violation = ""
        try:
            for one in messages:
                while call.open >= WINDOW:
                    await self._moved(client, call, end)
                token = str(next(self._tokens))
                mine.add(token)
                self._waiting[token] = (call, one.place)
                call.open += 1
                reply = f"{self._inbox}.{token}"
                await client.publish(one.subject, one.payload, reply=reply, headers=one.headers)
            while call.open:
                await self._moved(client, call, end)
        finally:
            for token in mine:
                self._waiting.pop(token, None)
        return call.refused

    async def _moved(self, client: Any, call: _Publishing, end: float) -> None:
        if self._violation:
            raise Blocked(self._violation)
        if client.is_closed:
            raise Unavailable(f"the connection was lost, {call.open} messages not acknowledged")
        left = end - asyncio.get_running_loop().time()
        if left <= 0:
            raise Unavailable(f"{call.open} messages are not acknowledged in time")
        with suppress(TimeoutError):
            async with asyncio.timeout(left):
                await call.moved.wait()
        call.moved.clear()

    async def _answered(self, message: Any) -> None:
        waiting = self._waiting.pop(message.subject.rpartition(".")[2], None)
        if waiting is not None:
            call, place = waiting
            call.answered(place, message)

    async def _judge(
        self,
        client: Any,
        batch: Batch[bytes],
        messages: Sequence[_NatsMessage],
        refused: dict[int, _StreamRefusal],
    ) -> None:
        """Rejects the records that are at fault; raises for the rest.

        Raises:
            Unavailable: the stream is full, or has no leader.
            Blocked: no stream takes a subject that all records have.
            RuntimeError: any other reason.
        """
        subjects = {one.place: one.subject for one in messages}
        for place, refusal in refused.items():
            text = one_line(f"{refusal.why} ({refusal.number})", 300)
            if refusal.number == _NOBODY:
                await self._demand_stream(client, subjects[place])
                batch.reject(place, f"no stream takes the subject {subjects[place]}")
            elif refusal.number in _OF_RECORD:
                batch.reject(place, text)
            elif refusal.number in _LASTING:
                raise Blocked(text)
            elif refusal.number in _BUSY or refusal.status >= 500:
                raise Unavailable(text)
            else:
                raise RuntimeError(text)

    async def _demand_stream(self, client: Any, subject: str) -> None:
        """Returns if there is none for a subject of this record alone.

        Raises:
            Blocked: there is none for the subject of all.
            Unavailable: there is one after all, or nobody knows.
        """
        from nats.js.errors import NotFoundError  # noqa: PLC0415  an extra

        try:
            await client.jetstream(timeout=REQUEST_SECONDS).find_stream_name_by_subject(subject)
        except NotFoundError:
            if self._subject.fixed is not None:
                raise Blocked(f"no stream takes the subject {subject}: make one") from None
        else:
            raise Unavailable(f"the stream of {subject} has no leader")

    # -- connection ----------------------------------------------------------------------------

    async def _connected(self) -> Any:
        async with self._lock:
            if self._client is not None and not self._client.is_closed:
                return self._client
            options = self._options
            try:
                demand_nats(options.credentials or "")
            except ConfigError as error:
                raise Blocked(str(error)) from None
            client = await connect_nats(
                self._access(), "ingestd sink", on_closed=self._wake, on_error=self._note
            )
            self._inbox = client.new_inbox()
            await client.subscribe(
                f"{self._inbox}.*", cb=self._answered, pending_msgs_limit=0, pending_bytes_limit=0
            )
            self._client = client
            return client

    def _access(self) -> NatsAccess:
        options = self._options
        return NatsAccess(
            options.addresses,
            options.username or "",
            str(options.password or ""),
            str(options.token or ""),
            str(options.credentials or ""),
            str(options.tls_ca or ""),
            str(options.tls_certificate or ""),
            str(options.tls_key or ""),
        )

    async def _wake(self) -> None:
        for call, _ in list(self._waiting.values()):
            call.moved.set()

    async def _note(self, error: Exception) -> None:
        if "permissions violation" in str(error).lower():
            self._violation = one_line(str(error), 300)
            await self._wake()

    @staticmethod
    def _class_of(error: BaseException) -> Exception:
        """The class of a sink's errors that an error of the client's belongs to."""
        text = one_line(str(error) or type(error).__name__, 300)
        is_lasting = "authorization" in text.lower() or isinstance(error, PermissionError)
        return Blocked(text) if is_lasting else Unavailable(text)

    # -- check ---------------------------------------------------------------------------------

    async def check(self) -> list[SinkFinding]:
        """Asks for the server, and for the stream that takes the subject.

        Raises:
            Unavailable: they do not answer.
            Blocked: they refuse the credentials.
        """
        from nats.errors import Error  # noqa: PLC0415  an extra
        from nats.js.errors import NotFoundError  # noqa: PLC0415

        try:
            client = await self._connected()
            text = f"server {client.connected_url.netloc}: {client.connected_server_version}"
            found = [SinkFinding("info", f"{text}, max_payload {client.max_payload}")]
            jetstream = client.jetstream(timeout=REQUEST_SECONDS)
            name = self._options.stream
            if not name and self._subject.fixed is None:
                return found
            if not name:
                name = await jetstream.find_stream_name_by_subject(self._subject.fixed)
            found += _of_stream(name, (await jetstream.stream_info(name)).config)
        except NotFoundError:
            what = self._options.stream or f"for {self._subject.fixed}"
            return [*found, SinkFinding("error", f"there is no stream {what}")]
        except (OSError, TimeoutError, Error) as error:
            raise self._class_of(error) from None
        return found


def _of_stream(name: str, config: Any) -> Iterator[SinkFinding]:
    window = config.duplicate_window or 0
    text = f"stream {name}: {config.num_replicas} replicas, duplicate_window {window:g} s"
    yield SinkFinding("info", f"{text}: a message that comes again after it is there twice")
    if config.num_replicas < 2:
        text = f"stream {name} has one replica: what is acknowledged goes with its server"
        yield SinkFinding("warning", text)
    if str(getattr(config.storage, "value", config.storage)) == "memory":
        yield SinkFinding("warning", f"stream {name} is in memory: a restart loses it")


def _plain(text: str) -> str:
    """A value of a header: one line."""
    return " ".join(text.split()) if not text.isprintable() else text.strip()
