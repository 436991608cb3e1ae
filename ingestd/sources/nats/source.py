"""The source `nats`: pulls messages of a durable consumer, and acknowledges what is settled.

One task owns the connection. It asks for messages (`$JS.API.CONSUMER.MSG.NEXT`), one request at a
time and never more than there is room for, so that what comes can be held. Requests of our own
instead of nats-py's `fetch`, which has no bound in bytes and must not be cancelled.

1. A message is held from its delivery until its acknowledgement is sent. Held messages and their
   bytes are bounded; a message that is delivered again while it is held is only held once. None is
   held any more when its consumer is gone: one that is made anew, perhaps of another stream, would
   take an acknowledgement for that of its own message with that sequence.
2. What is held longer than a third of the consumer's `ack_wait` is told to be in progress (`+WPI`),
   so a slow handler makes no second delivery.
3. An acknowledgement is not waited for. One that is lost makes another delivery, whose id is known,
   and that is acknowledged at once.
4. A lost connection ends nothing: what is settled meanwhile is acknowledged on the next one, under
   the same reply subject. Servers that are down, and a stream that is not there yet, are asked
   again and again.
5. A drain asks for nothing more and keeps the connection: acknowledgements follow while the
   pipeline settles, until `close`. What is left is delivered again after `ack_wait`.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from ingestd.base.append import AppendCounts, sender_id
from ingestd.base.errors import ConfigError
from ingestd.base.logging import get_logger
from ingestd.base.tasks import end_tasks
from ingestd.handlers.outcome import SinkFinding
from ingestd.host.nats import (
    REQUEST_SECONDS,
    NatsAccess,
    close_nats,
    connect_nats,
    demand_nats,
)
from ingestd.sources.base import Source
from ingestd.sources.brokers import BrokerIntake, BrokerMessage, keep_headers, pack_envelope

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from ingestd.sources.base import SourceContext
    from ingestd.sources.nats import NatsSettings

log = get_logger()

PULL_MESSAGES = 1000
"""Most messages of one request."""
EXPIRES_SECONDS = 20.0
HEARTBEAT_SECONDS = 2.0
"""A request ends by itself after the first, and the server says so often that it is still there."""
BACKOFF_SECONDS, BACKOFF_SECONDS_MAX = 0.25, 5.0
CLOSE_SECONDS = 2.0
OVERHEAD_BYTES = 1024
"""What the server counts of a message beside its payload, about."""
_TOGETHER = 256
_NANO = 1_000_000_000
_PROGRESS = b"+WPI"
_COMPLETED = "Batch Completed"
_LIMIT = re.compile(r"Exceeded MaxRequest(Batch|MaxBytes|Expires) of (\d*)")
_NO_BOUND = 1 << 40
_EXPIRES_SECONDS_MIN = 0.01


class _Unusable(Exception):  # noqa: N818 - names the condition
    """The stream or the consumer is not what it should be, and why."""


class HeldMessage:
    """A message that is held.

    Attributes:
        sequence: in its stream.
        time: at which the stream got it, as the server writes it.
        reply: subject of its acknowledgement, of the last delivery.
        size: bytes.
        is_settled: it waits for its acknowledgement.
        touched: loop time at which the server last heard of it.
    """

    __slots__ = ("is_settled", "reply", "sequence", "size", "time", "touched")

    def __init__(self, sequence: int, time: str, reply: str, size: int, touched: float) -> None:
        self.sequence, self.time, self.reply = sequence, time, reply
        self.size, self.touched = size, touched
        self.is_settled = False


class NatsSource(Source):
    """See the module.

    Args:
        settings: servers, stream and bounds.
        context: the pipeline and the rest.

    Raises:
        ConfigError: a package is not installed.
    """

    def __init__(self, settings: NatsSettings, context: SourceContext) -> None:
        self._settings = settings
        self._name = context.name
        self._pipeline = context.pipelines[context.pipeline]
        self._access = access_of(settings)
        self._held: dict[int, HeldMessage] = {}
        self._done: list[HeldMessage] = []
        self._bytes = self._taken = self._acknowledged = self._backlog = 0
        self._client: Any = None
        self._is_leaving = self._is_closing = False
        self._ack_wait = settings.ack_wait
        self._made_at: datetime | None = None  # the consumer
        self._told = ""
        # -- of the request under way
        self._pull = self._requested = 0
        self._tight: int | None = None
        self._batch_max, self._request_bytes_max = PULL_MESSAGES, _NO_BOUND
        self._expires = EXPIRES_SECONDS
        self._heard = 0.0
        self._problem = ""
        self._counts = AppendCounts()

    @classmethod
    def findings(cls, settings: NatsSettings) -> Iterable[SinkFinding]:
        """See `Source`; asks for the stream and the consumer."""
        return asyncio.run(_ask(settings))

    async def start(self) -> None:
        """See `Source`; servers that are down are asked again and again."""
        self._loop = asyncio.get_running_loop()
        principal = f"nats {self._settings.stream}/{self._settings.durable}"
        self._intake: BrokerIntake[HeldMessage] = BrokerIntake(
            self._pipeline, principal, self._finish, is_held=self._is_held, counts=self._counts
        )
        self._wake, self._acks = asyncio.Event(), asyncio.Event()
        self._tasks = [
            self._loop.create_task(turn, name=f"{self._name}-{name}")
            for turn, name in (
                (self._serve(), "connection"),
                (self._acknowledge(), "acknowledge"),
                (self._keep(), "in-progress"),
            )
        ]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """An error here is a defect: the daemon leaves for it."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._intake.failed.done():
            self._intake.failed.set_exception(error)

    def facts(self) -> dict[str, object]:
        """See `Source`."""
        return {"stream": self._settings.stream, "durable": self._settings.durable}

    def numbers(self) -> Mapping[str, float]:
        """See `Source`."""
        return {
            "connected": int(self._client is not None),
            "messages": self._taken,
            "records": self._counts.records,
            "invalid": self._counts.invalid,
            "received_bytes": self._counts.bytes,
            "acknowledged": self._acknowledged,
            "unsettled": len(self._held),
            "backlog": self._backlog,
        }

    async def wait_finished(self) -> None:
        """See `Source`; it never ends."""
        await asyncio.shield(self._intake.failed)

    # -- the connection --------------------------------------------------------------------------

    async def _serve(self) -> None:
        """One connection after the other."""
        wait = BACKOFF_SECONDS
        while True:
            try:
                await self._connected()
                wait = BACKOFF_SECONDS if not self._problem else min(2 * wait, BACKOFF_SECONDS_MAX)
                problem = self._problem or "the connection was lost"
            except Exception as error:  # noqa: BLE001 - whatever a server or nats-py says, it may pass
                problem = str(error) or type(error).__name__
                wait = min(2 * wait, BACKOFF_SECONDS_MAX)
            if problem != self._told:
                self._told = problem
                log.warning("broker_error", source=self._name, error=problem[:500])
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))  # noqa: S311

    async def _connected(self) -> None:
        """One connection to its end."""
        closed = self._closed = asyncio.Event()
        self._problem = ""

        async def end() -> None:
            closed.set()
            self._wake.set()

        async def note(error: Exception) -> None:
            self._problem = str(error) or type(error).__name__

        client = await connect_nats(
            self._access, f"ingestd {self._name}", on_closed=end, on_error=note
        )
        try:
            found = await prepare(client, self._settings)
            self._ack_wait = found.ack_wait
            if self._made_at not in {None, found.made_at}:
                self._forget()
            self._made_at = found.made_at
            log.info("broker_connected", source=self._name, server=client.connected_url.netloc)
            self._client = client
            self._acks.set()
            inbox = client.new_inbox()
            subscription = await client.subscribe(
                f"{inbox}.*", cb=self._arrive, pending_msgs_limit=0, pending_bytes_limit=0
            )
            # The client tells of most ends of its connection, and not of all.
            while client.is_connected and not (self._is_leaving or closed.is_set()):
                await self._ask_for_more(client, inbox, closed)
            if client.is_connected and not closed.is_set():
                await subscription.unsubscribe()
            while client.is_connected and not closed.is_set():
                await self._wait(HEARTBEAT_SECONDS)
        finally:
            self._client = None
            await close_nats(client)

    async def _ask_for_more(self, client: Any, inbox: str, closed: asyncio.Event) -> None:
        """One request, as soon as there is room, to its end."""
        settings = self._settings
        least = min(PULL_MESSAGES, max(1, settings.inflight_messages_max // 4))
        room = settings.inflight_messages_max - len(self._held)
        bytes_room = settings.inflight_bytes_max - self._bytes
        is_tight = self._tight is not None and len(self._held) >= self._tight
        if self._held and (room < least or bytes_room <= 0 or is_tight):
            await self._wait(HEARTBEAT_SECONDS)
            return
        self._pull += 1
        # Where nothing is held any message has to fit; one that did not is of another time, or has
        # a long subject, and is asked for alone.
        is_alone = not self._held and self._tight is not None
        self._requested = 1 if is_alone else min(room, self._batch_max)
        request = {
            "batch": self._requested,
            "expires": int(self._expires * _NANO),
            "idle_heartbeat": int(min(HEARTBEAT_SECONDS, self._expires / 2) * _NANO),
        }
        if not is_alone:
            least_bytes = 0 if self._held else client.max_payload + OVERHEAD_BYTES
            request["max_bytes"] = min(max(bytes_room, least_bytes), self._request_bytes_max)
        self._tight = None
        self._heard = self._loop.time()
        await client.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{settings.stream}.{settings.durable}",
            json.dumps(request).encode(),
            reply=f"{inbox}.{self._pull}",
        )
        while self._requested and not (closed.is_set() or self._is_leaving):
            await self._wait(HEARTBEAT_SECONDS)
            if self._loop.time() - self._heard > 3 * HEARTBEAT_SECONDS:
                return  # the request, or its answer, was lost

    async def _wait(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()

    async def _arrive(self, message: Any) -> None:
        """Takes a message, or a word of the server's about the request."""
        self._heard = self._loop.time()
        reply = message.reply
        if not reply.startswith("$JS.ACK."):
            await self._hear(message)
            return
        self._requested = max(0, self._requested - 1)
        if not self._requested:
            self._wake.set()
        tokens = reply.split(".")
        # Later servers name a domain and an account in front.
        stream, _, _, sequence, _, time, pending = tokens[2:9] if len(tokens) == 9 else tokens[4:11]
        number = int(sequence)
        self._backlog = int(pending)
        held = self._held.get(number)
        if held is not None:
            if held.time == time:
                held.reply, held.touched = reply, self._heard
                return
            self._forget()
        payload, headers = message.data, message.headers or {}
        self._taken += 1
        self._told = ""
        # A stream that was made anew has the same sequences and other times.
        name = f"{stream} {sequence} {time}"
        if own := headers.get(self._settings.id_header) if self._settings.id_header else None:
            name = f"id {own}"
        attributes = (("stream", stream), ("subject", message.subject))
        packed = pack_envelope(self._name, keep_headers(headers.items()), attributes, "sequence")
        size = len(payload) + len(packed) + OVERHEAD_BYTES
        delivery = self._held[number] = HeldMessage(number, time, reply, size, self._heard)
        self._bytes += size
        identity = sender_id(name.encode("utf-8", "surrogateescape").replace(b"\0", b""))
        self._intake.put([BrokerMessage(payload, identity, packed, number, delivery)])

    async def _hear(self, message: Any) -> None:
        headers = message.headers or {}
        status, about = headers.get("Status", ""), headers.get("Description", "")
        if status == "100" or message.subject.rpartition(".")[2] != str(self._pull):
            return  # it is alive; or another request has ended
        if limit := _LIMIT.match(about):
            self._keep_within(limit[1], int(limit[2] or 0))
        elif "maxbytes" in about.replace(" ", "").lower():
            self._tight = len(self._held)
        elif status not in {"404", "408"} and about != _COMPLETED:
            # Another leader, no consumer, no JetStream: a new connection finds out.
            self._problem = f"the request for messages ended: {status} {about}"
            self._closed.set()
        self._requested = 0
        self._wake.set()

    def _keep_within(self, what: str, bound: int) -> None:
        """Asks for no more than a consumer allows that another one has made."""
        if what == "Batch":
            self._batch_max = max(1, bound)
        elif what == "MaxBytes":
            self._request_bytes_max = max(1, bound)
        else:  # a time as Go writes it
            self._expires = max(_EXPIRES_SECONDS_MIN, self._expires / 2)

    def _is_held(self, delivery: HeldMessage) -> bool:
        return self._held.get(delivery.sequence) is delivery

    def _forget(self) -> None:
        """Holds nothing of a consumer that is gone; another one delivers again what is there."""
        if self._held:
            log.warning("consumer_replaced", source=self._name, unsettled=len(self._held))
        self._held.clear()
        self._done.clear()
        self._bytes = 0

    # -- acknowledgements ------------------------------------------------------------------------

    def _finish(self, deliveries: Sequence[HeldMessage]) -> None:
        for one in deliveries:
            one.is_settled = True
        self._done += deliveries
        self._acks.set()

    async def _acknowledge(self) -> None:
        from nats.errors import Error  # noqa: PLC0415  an extra

        while True:
            await self._acks.wait()
            self._acks.clear()
            client = self._client
            if client is not None:  # the next connection sets it again
                with suppress(OSError, Error):
                    await self._send(client)

    async def _send(self, client: Any) -> None:
        """Acknowledges what is settled; what cannot be sent waits for the next connection."""
        done, self._done = [*filter(self._is_held, self._done)], []
        sent = 0
        try:
            for one in done:
                await client.publish(one.reply)
                sent += 1
        finally:
            self._done = done[sent:] + self._done
            for one in done[:sent]:
                if self._is_held(one):
                    del self._held[one.sequence]
                    self._bytes -= one.size
            self._acknowledged += sent
            if sent:
                self._wake.set()

    async def _keep(self) -> None:
        """Tells that what is held is in progress."""
        from nats.errors import Error  # noqa: PLC0415  an extra

        while True:
            await asyncio.sleep(min(self._ack_wait / 6, 10.0))
            before = self._loop.time() - self._ack_wait / 3
            late = [one for one in self._held.values() if one.touched < before]
            client = self._client
            if client is None:
                continue
            with suppress(OSError, Error):
                for number, one in enumerate(late):
                    if not one.is_settled:
                        await client.publish(one.reply, _PROGRESS)
                        one.touched = self._loop.time()
                    if not number % _TOGETHER:
                        await asyncio.sleep(0)

    # -- the end ---------------------------------------------------------------------------------

    async def stop_taking(self, deadline: float) -> None:
        """See `Source`; what is settled is acknowledged until `close`."""
        self._is_leaving = True
        self._wake.set()
        await self._intake.flush(deadline)

    async def close(self) -> None:
        """Sends the last acknowledgements, and ends the connection."""
        await self._intake.close()
        client = self._client
        if client is not None:
            with suppress(Exception):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._send(client)
                    await client.flush(CLOSE_SECONDS)
        await end_tasks(*self._tasks)
        if self._held:
            log.warning("messages_unsettled", source=self._name, messages=len(self._held))


def access_of(settings: NatsSettings) -> NatsAccess:
    """Servers and credentials of some settings.

    Raises:
        ConfigError: a package is not installed.
    """
    demand_nats(settings.credentials)
    return NatsAccess(
        settings.servers,
        settings.username,
        settings.password.get_secret_value(),
        settings.token.get_secret_value(),
        settings.credentials,
        settings.tls_ca,
        settings.tls_certificate,
        settings.tls_key,
    )


class _FoundConsumer(NamedTuple):
    """A consumer that can be used.

    Attributes:
        ack_wait: seconds that it waits for acknowledgements.
        made_at: when it was made.
    """

    ack_wait: float
    made_at: datetime


async def prepare(client: Any, settings: NatsSettings) -> _FoundConsumer:
    """Finds the consumer, or makes it.

    Raises:
        _Unusable: it cannot be used.
        nats.errors.Error: the stream is not there, or a right is missing.
    """
    from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy  # noqa: PLC0415
    from nats.js.errors import NotFoundError  # noqa: PLC0415

    stream = client.jetstream(timeout=REQUEST_SECONDS)
    try:
        info = await stream.consumer_info(settings.stream, settings.durable)
    except NotFoundError:
        try:
            await stream.stream_info(settings.stream)
        except NotFoundError:
            raise _Unusable(f"there is no stream {settings.stream}") from None
        if not settings.create:
            raise _Unusable(f"stream {settings.stream}: no consumer {settings.durable}") from None
        info = await stream.add_consumer(
            settings.stream,
            ConsumerConfig(
                durable_name=settings.durable,
                ack_policy=AckPolicy.EXPLICIT,
                deliver_policy=DeliverPolicy(settings.start),
                ack_wait=settings.ack_wait,
                max_ack_pending=settings.ack_pending_max,
                filter_subjects=list(settings.subjects) or None,
            ),
        )
    config = info.config
    if config.deliver_subject:
        raise _Unusable(f"consumer {settings.durable} pushes; one that is pulled is needed")
    if str(getattr(config.ack_policy, "value", config.ack_policy)) != "explicit":
        raise _Unusable(f"consumer {settings.durable}: its ack policy has to be explicit")
    ack_wait = float(min([config.ack_wait or settings.ack_wait, *(config.backoff or ())]))
    return _FoundConsumer(ack_wait, info.created)


async def _ask(settings: NatsSettings) -> list[SinkFinding]:
    from nats.errors import Error  # noqa: PLC0415  an extra

    found: list[SinkFinding] = []
    try:
        client = await connect_nats(access_of(settings), "ingestd check")
    except (OSError, TimeoutError, Error) as error:
        return [SinkFinding("error", f"servers: {error or type(error).__name__}")]
    try:
        jetstream = client.jetstream(timeout=REQUEST_SECONDS)
        version = str(client.connected_server_version)
        found.append(SinkFinding("info", f"server {client.connected_url.netloc}: {version}"))
        stream = await jetstream.stream_info(settings.stream)
        found += _of_stream(settings.stream, stream.config)
        try:
            info = await jetstream.consumer_info(settings.stream, settings.durable)
        except Error:
            text = f"there is no consumer {settings.durable}"
            if settings.create:
                found.append(SinkFinding("info", f"{text}; the source makes it"))
            else:
                found.append(SinkFinding("error", text))
        else:
            await prepare(client, settings)
            if (most := info.config.max_deliver or 0) > 0:
                text = f"consumer {settings.durable}: max_deliver is {most}; what is delivered so"
                found.append(SinkFinding("warning", f"{text} often and not settled is given up"))
    except (TimeoutError, Error, _Unusable, ConfigError) as error:
        found.append(SinkFinding("error", f"stream {settings.stream}: {error}"))
    finally:
        await close_nats(client)
    return found


def _of_stream(name: str, config: Any) -> list[SinkFinding]:
    storage = str(getattr(config.storage, "value", config.storage))
    found = [SinkFinding("info", f"stream {name}: {storage}, {config.num_replicas} replicas")]
    if storage == "memory":
        found.append(SinkFinding("warning", f"stream {name} is in memory: a restart loses it"))
    return found
