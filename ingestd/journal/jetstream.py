"""The journal kind `jetstream`: a log in NATS JetStream, a subject of a stream that daemons share.

`STREAM.log.NAME.PIPELINE` has the messages of a log; their compare-and-set is the header
`Nats-Expected-Last-Subject-Sequence`. Beside it lie `STREAM.snapshot.…` and `STREAM.part.…`, and
`STREAM.retired.PIPELINE` has the numbers of logs that have ended. `STREAM.key.PIPELINE.…` are the
idempotency keys of all logs of a pipeline, each with a time to live (`Nats-TTL`); they come in one
atomic batch with the message that has their records. Leases are keys of a bucket whose
values the servers let lapse, so no clock of a daemon counts.

An answer is believed where it is certain: a sequence, a wrong last sequence, a bound of the stream,
no stream at all. Everything else, a time-out above all, is ambiguous. The last message is read from
the leader of the stream; replicas may answer other reads, and what they lack is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import re
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import msgspec
from pydantic import Field, SecretStr

from ingestd.base.errors import ConfigError, Overloaded
from ingestd.config.sections import FilePath, Secret, Section
from ingestd.config.units import Count, Seconds, Size, Words  # noqa: TC001  pydantic reads them
from ingestd.journal.settings import JournalKind

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Sequence

    from ingestd.host.nats import NatsConnection
    from ingestd.journal.interface import Journal, JournalContext
    from ingestd.journal.log.interface import (
        LogKey,
        LogLease,
        LogMessage,
        LogUnreachable,
        RetiredLogs,
        Snapshot,
    )
    from ingestd.journal.log.messages import LogEnd
    from ingestd.journal.settings import JournalSettings, Level

T = TypeVar("T")
VERSION_MIN = (2, 15)
"""Of the servers: before it a compare-and-set could be undone, and syncing each write was slow."""
HEADERS_BYTES = 512
EXPECTED, BATCH = "Nats-Expected-Last-Subject-Sequence", "Nats-Batch-Id"
READ_MESSAGES = 1000
KEYS_ASKED = 100
"""So many keys are read at once, with their answers."""
OWNER_LOOKS = 10
"""A lease changes hands seldom, and is read at each of so many looks."""
RETIRED_KEPT = 1000
"""Ids of retired logs that their sum names: far more than can be half retired at a time."""
OPEN_SECONDS, READY_SECONDS, RETRY_SECONDS = 5.0, 20.0, 0.25
"""Bounds of an answer to what is made, of the wait until servers can make it, and between tries."""
PING_SECONDS_MIN = 1.0
PATIENCE_SECONDS = 10.0
"""So long, or for two answers, a server is asked in vain before another one is."""
_WRONG_LAST, _ON_ITS_WAY = 10071, 10164
"""The second one: something is on its way that would change the last sequence."""
_NO_PEERS = 10005
_BATCH_REFUSED = {10174, 10176, 10199, 10210}
"""Batches are disabled, one lacks a message or has too many, there are too many at a time."""
_FULL = {10047, 10023}
_STORE_FAILED = 10077
_TOO_LARGE = 10054
_ENDS = {"204", "404"}
"""The end of messages that were asked for, and that there are none."""
_NOT_CONNECTED = "no NATS server is connected"
_TOKEN = re.compile(r"[A-Za-z0-9_-]+")
_PLACE = re.compile(rf"{_TOKEN.pattern}\.{_TOKEN.pattern}")


class JetStreamTlsSettings(Section):
    """`[journal.jetstream.tls]`: encryption of the connection to the servers."""

    ca: FilePath = Field("", description="PEM file: CA of the servers; enables TLS")
    certificate: FilePath = Field("", description="PEM file: certificate of the daemon")
    key: FilePath = Field("", description="PEM file: its private key")


class JetStreamSettings(Section):
    """`[journal.jetstream]`: a journal in NATS JetStream."""

    servers: Words = Field(
        ("nats://127.0.0.1:4222",), min_length=1, max_length=100, description="URLs of the servers"
    )
    name: str = Field(
        "", description="name of the log; empty: the host's; no two daemons share one"
    )
    stream: str = Field("ingestd", description="stream of all logs; made if it is not there")
    bucket: str = Field("ingestd-leases", description="bucket of the leases; made like it")
    replicas: Count = Field(3, ge=1, le=5, description="replicas of both, at least")
    stream_bytes_max: Size = Field(
        0, ge=0, le=1024**5, description="bound of the stream as it is made; 0: the servers'"
    )
    username: str = Field("", description="name of the user")
    password: Secret = Field(SecretStr(""), description="password of the user")
    credentials: FilePath = Field("", description="file of credentials (.creds), in place of both")
    tls: JetStreamTlsSettings = JetStreamTlsSettings()
    timeout: Seconds = Field(
        5.0, ge=0.1, le=300, description="time limit of an answer; then it is asked again"
    )
    lease: Seconds = Field(
        10.0, ge=1, le=3600, description="time after which the log of a silent daemon is free"
    )
    adopt: bool = Field(
        False, description="also processes what daemons of the stream that are gone left pending"
    )
    retire_after: Seconds = Field(
        86_400.0, ge=0, le=36500 * 86_400,
        description="time after which the log of a daemon that is gone ends, if adopt is on",
    )  # fmt: skip
    monitoring: Words = Field(
        (), max_length=100, description="URLs of the servers' monitoring, for check --connect alone"
    )


class JetStreamKind(JournalKind):
    """The kind `jetstream`."""

    settings: ClassVar[type[Section]] = JetStreamSettings

    def problems(self, own: Any) -> Iterable[tuple[str, str]]:
        """See `JournalKind.problems`."""
        from ingestd.host.nats import fault_of_servers  # noqa: PLC0415  loads ssl

        for key in ("name", "stream", "bucket"):
            value = getattr(own, key)
            if value and not _TOKEN.fullmatch(value):
                yield key, "should be letters, digits, _ and -"
        if fault := fault_of_servers(own.servers):
            yield "servers", fault
        if own.tls.key and not own.tls.certificate:
            yield "tls.key", "needs journal.jetstream.tls.certificate"

    def build(self, settings: JournalSettings, context: JournalContext, own: Any) -> Journal:
        """See `JournalKind.build`."""
        from ingestd.journal.log import LogJournal  # noqa: PLC0415  if it is used
        from ingestd.journal.sqlite.journal import options_of  # noqa: PLC0415
        from ingestd.journal.sqlite.offline import ADOPTED, CACHE, FILE  # noqa: PLC0415

        folder = context.folder
        own_folder = folder.parent.parent if folder.parent.name == ADOPTED else folder
        pipeline = own_folder.name if own_folder.parent.name == "pipelines" else "default"
        path = Path(os.path.realpath(folder / CACHE))  # a loop of links shows as it is opened
        if (folder / FILE).exists():
            problem = f"{folder / FILE} is a journal of the kind sqlite: drain it, and move it away"
            raise ConfigError(problem=problem)
        _nats()
        log, group = JetStreamLog(own, pipeline), None
        if own.adopt:
            from ingestd.journal.log.group import LogGroup  # noqa: PLC0415

            group = LogGroup(
                log,
                clock=context.clock,
                ttl=own.lease,
                retire_after=own.retire_after,
                named=lambda name: own.model_copy(update={"name": name, "adopt": False}),
            )
        return LogJournal(
            log,
            path,
            ttl=own.lease,
            owner=log.place.partition(".")[0],
            group=group,
            **options_of(settings, context, path),
        )

    async def check(self, own: Any) -> list[tuple[Level, str]]:
        """See `JournalKind.check`."""
        from ingestd.journal.log.interface import LogUnreachable  # noqa: PLC0415

        log = JetStreamLog(own, "check", create=False)
        found: list[tuple[Level, str]]
        try:
            await log.open()
            found = [*(("info", text) for text in log.facts), *log.doubts]
        except (ConfigError, LogUnreachable) as error:
            found = [("error", str(error))]
        finally:
            await log.close()
        return [*found, *_syncs(own.monitoring)]

    async def logs(self, own: Any) -> list[dict[str, Any]]:
        """See `JournalKind.logs`."""
        from ingestd.journal.log.group import retired_logs, states_of  # noqa: PLC0415

        log = JetStreamLog(own, "list", create=False)
        try:
            await log.open()
            if log.missing:
                raise ConfigError(problem=f"the stream {log.missing} is not there; run makes it")
            return [*await states_of(log), *await retired_logs(log)]
        finally:
            await log.close()


def doubts(stream: str, cluster: Any) -> list[tuple[Level, str]]:
    """Faults of the servers of a stream, as the one that answers sees them."""
    if cluster is None:
        return []
    if not cluster.leader:
        text = f"the stream {stream} has no leader"
        return [("error", f"{text}: it takes nothing until most of its servers are there")]
    away = [one.name for one in cluster.replicas or () if one.offline]
    text = f"servers of the stream {stream} that are away: {', '.join(away)}"
    return [("warning", text)] if away else []


def _syncs(monitoring: Iterable[str]) -> Iterator[tuple[Level, str]]:
    """Asks servers for their `sync_interval`, which no client sees."""
    if not monitoring:
        text = "not verified: that sync_interval is always on each server; name their monitoring"
        yield "warning", f"{text} (journal.jetstream.monitoring)"
    import urllib.request  # noqa: PLC0415  for this alone

    for base in monitoring:
        try:
            url = f"{base.rstrip('/')}/jsz?config=1"
            with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310  the operator's
                config = json.load(answer).get("config", {})
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", error)
            yield "warning", f"the monitoring of {base} does not answer: {why}"
            continue
        if config.get("sync_always"):
            yield "info", f"{base} syncs each write before it acknowledges it"
        else:
            seconds = config.get("sync_interval", 0) / 1e9
            text = f"{base} syncs every {seconds:g} s: what a majority acknowledged in that time"
            yield "error", f"{text} is lost when they lose power; set sync_interval: always"


class JetStreamLog:
    """See `ingestd.journal.log.interface.ReplicatedLog`.

    Args:
        settings: `[journal.jetstream]`.
        pipeline: whose log it is.
        create: makes stream and bucket where they are not there; else it is opened for `facts`.

    Attributes:
        message_bytes_max: see `ReplicatedLog`; known once it is open.
        facts: what was verified as it was opened, a line each.
        doubts: what is wrong then with servers of the stream, and how much.
        missing: a stream that was not there, and was not to be made.
    """

    message_bytes_max = 0
    keys_max = 900
    """A batch has a thousand messages at most."""

    def __init__(self, settings: JetStreamSettings, pipeline: str, *, create: bool = True) -> None:
        host = "-".join(_TOKEN.findall(socket.gethostname())) or "ingestd"
        self.facts: list[str] = []
        self.doubts: list[tuple[Level, str]] = []
        self.missing = ""
        self._owners: dict[str, str] = {}
        self._looks = 0
        self._settings = settings
        self._create = create
        self.place = f"{settings.name or host}.{pipeline}"
        self._connection: NatsConnection | None = None
        self._seconds = max(OPEN_SECONDS, settings.timeout)  # of an answer
        self._late = self._full = self._unreached = ""
        self._denied: list[str] = []  # the last thing that the servers do not allow
        self._late_after = 0
        self._revisions: dict[str, int] = {}  # of leases, by the places of logs
        self._first_part = 0

    @property
    def name(self) -> str:
        """See `ReplicatedLog.name`."""
        return f"{self._settings.stream}.log.{self.place}"

    @property
    def _snapshots(self) -> str:
        return f"{self._settings.stream}.snapshot.{self.place}"

    @property
    def _no_majority(self) -> str:
        return f"a majority of the stream {self._settings.stream} does not answer"

    @property
    def _parts(self) -> str:
        return f"{self._settings.stream}.part.{self.place}"

    def sibling(self, place: str) -> JetStreamLog:
        """See `GroupedLog.sibling`."""
        other = copy.copy(self)
        other.place = place
        return other

    @property
    def silence(self) -> str:
        """See `ReplicatedLog.silence`."""
        return self._late if self._is_connected else _NOT_CONNECTED

    @property
    def refusal(self) -> str:
        """See `ReplicatedLog.refusal`."""
        return self.silence or self._full

    @property
    def _is_connected(self) -> bool:
        return self._connection is not None and self._connection.is_connected

    @property
    def _client(self) -> Any:
        return None if self._connection is None else self._connection.client

    @property
    def _js(self) -> Any:
        return self._client.jetstream(timeout=self._seconds)

    # -- opening -------------------------------------------------------------------------------

    async def open(self) -> None:
        """See `ReplicatedLog.open`."""
        self._nats = _nats()
        own = self._settings
        await self._connect()
        version = self._client.connected_server_version
        shown = f"{version.major}.{version.minor}.{version.patch}"
        if (version.major, version.minor) < VERSION_MIN:
            least = ".".join(map(str, VERSION_MIN))
            raise ConfigError(problem=f"NATS is {shown}, and should be {least} or newer")
        self.message_bytes_max = self._client.max_payload - HEADERS_BYTES
        loop = asyncio.get_running_loop()
        until = loop.time() + READY_SECONDS
        while True:
            self.facts = [f"NATS {shown} answers"]
            try:
                await self._open_stream()
                await self._open_bucket()
                break
            except Overloaded:  # some errors come at once, as that of a node that just starts
                if loop.time() > until:
                    raise
                await asyncio.sleep(RETRY_SECONDS)
        # A stream that is made, and its leader's election, may take longer than an answer does.
        self._seconds = own.timeout

    async def _connect(self) -> None:
        from ingestd.host.nats import (  # noqa: PLC0415  loads ssl
            NatsAccess,
            NatsConnection,
            demand_nats,
            tls_context,
        )

        async def quiet(error: Exception) -> None:
            """The client tells of each server that it does not reach; `refusal` is enough."""
            self._unreached = str(error) or type(error).__name__
            if "permissions violation" in self._unreached:
                self._denied[:] = [self._unreached]

        own = self._settings
        access = NatsAccess(
            own.servers,
            own.username,
            own.password.get_secret_value(),
            credentials=own.credentials,
            tls_ca=own.tls.ca,
            tls_certificate=own.tls.certificate,
            tls_key=own.tls.key,
        )
        demand_nats(own.credentials)
        try:
            tls_context(access)
        except OSError as error:
            raise ConfigError(problem=f"journal.jetstream.tls: {error}") from error
        self._connection = NatsConnection(
            access,
            "ingestd",
            seconds=own.timeout,
            patience=max(PATIENCE_SECONDS, 2 * own.timeout),
            ping_seconds=max(PING_SECONDS_MIN, own.timeout),
            on_error=quiet,
        )
        try:
            await self._connection.open(2 * own.timeout)
        except TimeoutError as error:
            problem = f"no server of journal.jetstream.servers answers: {self._unreached}"
            raise _unreachable(problem) from error

    async def _open_stream(self) -> None:
        own, api = self._settings, self._nats.js.api
        wanted = api.StreamConfig(
            name=own.stream, subjects=[f"{own.stream}.>"], retention=api.RetentionPolicy.LIMITS,
            storage=api.StorageType.FILE, num_replicas=own.replicas, discard=api.DiscardPolicy.NEW,
            max_bytes=own.stream_bytes_max or -1, allow_direct=True, allow_atomic=True,
            allow_msg_ttl=True, compression=api.StoreCompression.S2,
        )  # fmt: skip
        info = await self._made(own.stream, lambda: self._js.add_stream(wanted))
        if info is None:
            return
        config, max_payload = info.config, self._client.max_payload
        few = f"{config.num_replicas} replicas (journal.jetstream.replicas is {own.replicas})"
        problems = [
            text
            for fine, text in (
                (wanted.subjects[0] in (config.subjects or ()), f"no subject {wanted.subjects[0]}"),
                (config.storage == api.StorageType.FILE, "memory as its storage"),
                (config.retention == api.RetentionPolicy.LIMITS, "another retention than limits"),
                (config.discard == api.DiscardPolicy.NEW, "a policy that discards old messages"),
                (not config.max_age, "a maximum age"),
                ((config.max_msgs or -1) < 0, "a maximum of messages"),
                (config.max_msgs_per_subject < 1, "a maximum of messages of a subject"),
                (not 0 < (config.max_msg_size or 0) < max_payload, "a low maximum message size"),
                (not config.subject_delete_marker_ttl, "markers of what is deleted"),
                (not config.subject_transform, "a transform of subjects"),
                (config.allow_direct, "no direct access"),
                (not (config.sealed or config.deny_purge or config.no_ack), "a restriction"),
                (config.num_replicas >= own.replicas, few),
            )
            if not fine
        ]  # fmt: skip
        if problems:
            text = f"the stream {own.stream} has {' and '.join(problems)}"
            raise ConfigError(problem=f"{text}: it would lose what is accepted, or refuse it")
        wants = [key for key in ("allow_atomic", "allow_msg_ttl") if not getattr(config, key)]
        if wants:
            text = f"the stream {own.stream} needs {' and '.join(wants)}"
            raise ConfigError(problem=f"{text}, for idempotency keys: edit its configuration")
        self.facts.append(f"the stream {own.stream} has {config.num_replicas} replicas on disk")
        self.doubts = doubts(own.stream, info.cluster)

    async def _open_bucket(self) -> None:
        own, api = self._settings, self._nats.js.api
        stream = f"KV_{own.bucket}"
        config = api.KeyValueConfig(
            bucket=own.bucket, ttl=own.lease, history=1, replicas=own.replicas
        )
        info = await self._made(stream, lambda: self._js.create_key_value(config))
        if info is None:
            return
        if abs((info.config.max_age or 0) - own.lease) > 0.001:
            text = f"the bucket {own.bucket} lets leases lapse after {info.config.max_age:g} s"
            raise ConfigError(problem=f"{text}, journal.jetstream.lease is {own.lease:g} s")
        if info.config.num_replicas < own.replicas:
            text = f"the bucket {own.bucket} has {info.config.num_replicas} replicas"
            raise ConfigError(problem=f"{text}, journal.jetstream.replicas is {own.replicas}")

    async def _made(self, stream: str, make: Callable[[], Coroutine[Any, Any, object]]) -> Any:
        """Returns what is known of a stream, which is made if it is not there and may be."""
        errors = self._nats.js.errors
        try:
            return await self._ask(self._js.stream_info(stream))
        except errors.NotFoundError:
            if not self._create:
                self.missing = stream
                self.facts.append(f"the stream {stream} is not there; run makes it")
                return None
        try:
            await self._ask(make(), raw=True)
        except errors.APIError as error:
            if error.err_code != 10058:  # another daemon made it meanwhile
                raise ConfigError(problem=f"the stream {stream}: {error.description}") from error
        return await self._ask(self._js.stream_info(stream))

    async def _ask(
        self, call: Coroutine[Any, Any, T], *, raw: bool = False, of_replica: bool = False
    ) -> T:
        """Waits for an answer; passes on that something is not there, or is another's.

        Args:
            call: the question.
            raw: passes on all errors of the servers but that they are not ready.
            of_replica: a server that is cut off from the others may answer it as well.

        Raises:
            LogUnreachable: there was none, or an error.
        """
        errors = self._nats.js.errors
        if not self._is_connected:
            call.close()  # between two connections it would be lost, and answers to later ones too
            raise _unreachable(_NOT_CONNECTED)
        try:
            return await (call if of_replica else self._counted(call))
        except (errors.NotFoundError, errors.KeyWrongLastSequenceError, errors.KeyNotFoundError):
            raise
        except errors.APIError as error:
            # Nodes that are down are no fault of the settings, as too few nodes are.
            down = error.err_code == _NO_PEERS and "offline" in (error.description or "")
            if raw and not (down or isinstance(error, errors.ServiceUnavailableError)):
                raise
            # Without a description it is nobody's answer: to such a question none is listening.
            problem = str(error) if error.description else "no server with JetStream is ready"
            raise _unreachable(problem) from error
        except (self._nats.errors.Error, TimeoutError, OSError) as error:
            problem = str(error) or type(error).__name__
            raise _unreachable(problem) from error

    async def _counted(self, call: Coroutine[Any, Any, T]) -> T:
        """Waits for an answer, and has the connection know whether one comes."""
        connection = cast("NatsConnection", self._connection)
        connection.asked()
        try:
            answer = await call
        except self._nats.js.errors.APIError as error:
            if not isinstance(error, self._nats.js.errors.ServiceUnavailableError):
                connection.answered()
            raise
        connection.answered()
        return answer

    # -- the lease -----------------------------------------------------------------------------

    async def acquire(self, owner: str, ttl: float) -> str:  # noqa: ARG002  the bucket's
        """See `ReplicatedLog.acquire`."""
        from ingestd.journal.log.interface import LogUnreachable  # noqa: PLC0415

        held = await self._acquire(owner)
        with contextlib.suppress(LogUnreachable):  # a stream without a leader costs no lease
            await self._look()
        return held

    async def _acquire(self, owner: str) -> str:
        stream, subject = self._leases()
        for _ in range(3):
            last = self._revisions.get(self.place, 0)
            if number := await self._write_lease(subject, owner.encode(), last):
                self._revisions[self.place] = number
                return owner
            held = await self._last_of(subject, stream)
            if held is None:  # it lapsed meanwhile
                self._revisions.pop(self.place, None)
                continue
            if held.data not in {b"", owner.encode()}:
                self._revisions.pop(self.place, None)
                return held.data.decode("utf-8", "replace")
            # Ours, by a renewal without an answer, say: it is as old as that. Or a marker, where an
            # operator has deleted the lease.
            self._revisions[self.place] = held.number
        return ""

    async def _write_lease(self, subject: str, owner: bytes, after: int) -> int:
        """Takes or renews a lease; 0 if its last message is another than that number.

        Raises:
            LogUnreachable: no answer, or an error.
        """
        call = self._js.publish(subject, owner, headers={EXPECTED: str(after)})
        try:
            return int((await self._ask(call, raw=True)).seq)
        except self._nats.js.errors.APIError as error:
            if error.err_code in {_WRONG_LAST, _ON_ITS_WAY}:
                return 0
            raise _unreachable(str(error)) from error

    async def _look(self) -> None:
        """Asks how full the stream is: snapshots need room as well, and make room."""
        info = await self._info(self._settings.stream)
        bytes_max = info.config.max_bytes or 0  # an operator may change it; -1 is none
        full = 0 < 0.9 * bytes_max < info.state.bytes
        self._full = f"the stream {self._settings.stream} is nine tenths full" if full else ""

    async def _info(self, stream: str, subjects: str = "") -> Any:
        """Asks for the state of a stream, which an operator may have deleted, and may make again.

        Raises:
            LogUnreachable: no answer, or it is not there.
        """
        return await self._of(stream, self._js.stream_info(stream, subjects or None))

    async def _of(self, stream: str, call: Coroutine[Any, Any, T]) -> T:
        """Asks something of a stream; see `_info`."""
        try:
            return await self._ask(call)
        except self._nats.js.errors.NotFoundError as error:
            problem = f"the stream {stream} is not there"
            raise _unreachable(problem) from error

    async def release(self, owner: str) -> None:
        """See `ReplicatedLog.release`."""
        self._revisions.pop(self.place, None)
        stream, subject = self._leases()
        # As it is there: a renewal may have come without its answer.
        held = await self._last_of(subject, stream)
        if held is not None and held.data == owner.encode():
            # Without a marker, which would look like a lease, and no later one of another daemon.
            purge = self._js.purge_stream(stream, seq=held.number + 1, subject=subject)
            with contextlib.suppress(self._nats.js.errors.NotFoundError):
                await self._ask(purge)

    def _leases(self) -> tuple[str, str]:
        """The stream of the bucket, and the subject of the lease in it."""
        bucket = self._settings.bucket
        return f"KV_{bucket}", f"$KV.{bucket}.{self.place}"

    async def want(self) -> None:
        """See `ReplicatedLog.want`."""
        await self._publish(f"{self._leases()[1]}.wanted", b"1")

    # -- the other logs ------------------------------------------------------------------------

    async def logs(self) -> dict[str, LogLease]:
        """See `GroupedLog.logs`."""
        from ingestd.journal.log.interface import LogLease  # noqa: PLC0415

        own = self._settings
        logs, leases = f"{own.stream}.log.", f"$KV.{own.bucket}."
        found = await self._subjects(own.stream, logs)
        held = await self._subjects(f"KV_{own.bucket}", leases)
        self._looks += 1
        known = self._owners if self._looks % OWNER_LOOKS else {}
        owners = self._owners = {place: known[place] for place in found & held & known.keys()}
        for place in (found & held) - known.keys():
            value = await self._last_of(f"{leases}{place}", f"KV_{own.bucket}")
            owners[place] = "" if value is None else value.data.decode("utf-8", "replace")
        return {
            place: LogLease(owners.get(place, ""), f"{place}.wanted" in held)
            for place in sorted(found)
            if _PLACE.fullmatch(place)  # the names become those of folders here
        }

    async def _subjects(self, stream: str, start: str) -> set[str]:
        """The subjects of a stream that have messages, without their start."""
        info = await self._info(stream, f"{start}>")
        return {subject.removeprefix(start) for subject in info.state.subjects or ()}

    async def retire(self, number: int, end: LogEnd) -> None:
        """See `ReplicatedLog.retire`."""
        from ingestd.journal.log import interface as log  # noqa: PLC0415

        pipeline = self.place.partition(".")[2]
        retired = f"{self._settings.stream}.retired.{pipeline}"
        while True:
            sum_, after = await self._sum(pipeline)
            if end.journal in sum_.journals:
                break
            more = log.RetiredLogs(
                sum_.logs + 1, sum_.accepted + end.accepted, sum_.processed + end.processed,
                sum_.dead + end.dead, sum_.invalid + end.invalid,
                (*sum_.journals[-RETIRED_KEPT:], end.journal),
            )  # fmt: skip
            with contextlib.suppress(log.LogFenced):  # another one is retired meanwhile
                after = await self._publish(retired, msgspec.msgpack.encode(more), after)
                await self._purge(retired, after)
        # The log last: as long as it is there its end is seen, and all of this is done again.
        await self._purge(self._snapshots, number + 1)
        await self._purge(f"{self._parts}.>", number + 1)
        await self._purge(self.name, number + 1)

    async def retired(self) -> dict[str, RetiredLogs]:
        """See `GroupedLog.retired`."""
        found = await self._subjects(self._settings.stream, f"{self._settings.stream}.retired.")
        return {name: (await self._sum(name))[0] for name in sorted(found)}

    async def _sum(self, pipeline: str) -> tuple[RetiredLogs, int]:
        from ingestd.journal.log.interface import RetiredLogs  # noqa: PLC0415

        subject = f"{self._settings.stream}.retired.{pipeline}"
        found = await self._last_of(subject)
        if found is None:
            return RetiredLogs(), 0
        try:
            return msgspec.msgpack.decode(found.data, type=RetiredLogs), found.number
        except msgspec.MsgspecError as error:
            raise ConfigError(problem=f"{subject} can't be read: {error}") from error

    # -- messages ------------------------------------------------------------------------------

    async def append(self, data: bytes, *, after: int, keys: Sequence[LogKey] = ()) -> int:
        """See `ReplicatedLog.append`."""
        from ingestd.journal.log.interface import LogAmbiguous  # noqa: PLC0415

        try:
            number = await self._publish(self.name, data, after, keys)
        except LogAmbiguous as error:
            # Until the caller knows what became of it.
            self._late, self._late_after = str(error.facts["problem"]), after
            raise
        self._late = ""
        return number

    async def _publish(
        self, subject: str, data: bytes, after: int | None = None, keys: Sequence[LogKey] = ()
    ) -> int:
        from ingestd.journal.log import interface as log  # noqa: PLC0415

        headers = None if after is None else {EXPECTED: str(after)}
        errors = self._nats.js.errors
        if not self._is_connected:
            raise _unreachable(_NOT_CONNECTED)
        try:
            if keys and headers is not None:
                headers |= await self._send_keys(keys)
            answer = await self._counted(
                self._js.publish(subject, data, timeout=self._settings.timeout, headers=headers)
            )
        except errors.NoStreamResponseError as error:
            problem = f"the stream {self._settings.stream} has no leader"
            raise _unreachable(problem) from error
        except errors.APIError as error:
            if error.err_code == _WRONG_LAST or (keys and error.err_code == _ON_ITS_WAY):
                raise log.LogFenced from error
            if error.err_code == _TOO_LARGE:
                raise log.LogRefused(problem=str(error.description)) from error
            full = error.err_code == _STORE_FAILED and "maximum" in (error.description or "")
            problem = str(error.description)
            if full or error.err_code in _FULL:
                raise log.LogFull(problem=problem, retry_after=log.retry_after()) from error
            if error.err_code in _BATCH_REFUSED:
                raise _unreachable(problem) from error
            if error.err_code == _ON_ITS_WAY:  # a majority has not answered to an earlier one
                problem = self._no_majority
            raise log.LogAmbiguous(problem=problem) from error
        except self._nats.errors.MaxPayloadError as error:
            problem = f"max_payload of the servers is {self._client.max_payload} by now"
            raise log.LogRefused(problem=problem) from error
        except (self._nats.errors.Error, TimeoutError, OSError) as error:
            # The servers tell of it beside, and leave the message without an answer.
            denied = [text for text in self._denied if f'"{subject.lower()}"' in text]
            raise log.LogAmbiguous(problem=(*denied, self._no_majority)[0]) from error
        return int(answer.seq)

    async def _send_keys(self, keys: Sequence[LogKey]) -> dict[str, str]:
        """Sends keys, of which nothing is stored before the message with these headers comes."""
        batch, number = {BATCH: secrets.token_hex(16)}, "Nats-Batch-Sequence"
        for place, key in enumerate(keys, 1):
            headers = {**batch, number: str(place), EXPECTED: str(key.replaces)}
            headers["Nats-TTL"] = str(key.ttl)
            await self._client.publish(self._key(key.name), key.data, headers=headers)
        return {**batch, number: str(len(keys) + 1), "Nats-Batch-Commit": "1"}

    def _key(self, name: str) -> str:
        return f"{self._settings.stream}.key.{self.place.partition('.')[2]}.{name}"

    async def find_keys(
        self, names: Collection[str], *, from_leader: bool = False
    ) -> dict[str, LogMessage]:
        """See `ReplicatedLog.find_keys`."""
        found: dict[str, LogMessage] = {}
        subjects = [self._key(name) for name in names]
        for first in range(0, len(subjects), KEYS_ASKED):
            some = subjects[first : first + KEYS_ASKED]
            if from_leader:
                last = await asyncio.gather(*map(self._last_of, some))
                found.update({s: one for s, one in zip(some, last, strict=True) if one is not None})
            else:
                found.update(await self._ask(self._get({"multi_last": some}), of_replica=True))
        return {subject.rpartition(".")[2]: message for subject, message in found.items()}

    async def last(self) -> LogMessage | None:
        """See `ReplicatedLog.last`."""
        found = await self._last_of(self.name)
        if (0 if found is None else found.number) != self._late_after:
            self._late = ""
        return found

    async def _last_of(self, subject: str, stream: str = "") -> LogMessage | None:
        from ingestd.journal.log.interface import LogMessage  # noqa: PLC0415

        try:
            asked = self._js.get_last_msg(stream or self._settings.stream, subject)
            found = await self._ask(asked)
        except self._nats.js.errors.NotFoundError:
            return None
        return LogMessage(int(found.seq), found.data or b"")

    async def read(self, first: int, bytes_max: int) -> list[LogMessage]:
        """See `ReplicatedLog.read`."""
        return await self._ask(self._read(first, bytes_max), of_replica=True)

    async def _read(self, first: int, bytes_max: int) -> list[LogMessage]:
        asked = {"seq": max(1, first), "batch": READ_MESSAGES, "max_bytes": bytes_max,
                 "next_by_subj": self.name}  # fmt: skip
        return [message for _, message in await self._get(asked)]

    async def _get(self, asked: dict[str, Any]) -> list[tuple[str, LogMessage]]:
        """Asks a replica for messages; the subject of each, and itself."""
        from ingestd.journal.log.interface import LogMessage  # noqa: PLC0415

        client, found = self._client, list[tuple[str, LogMessage]]()
        inbox = client.new_inbox()
        answers = await client.subscribe(inbox)
        try:
            subject = f"$JS.API.DIRECT.GET.{self._settings.stream}"
            await client.publish(subject, json.dumps(asked).encode(), reply=inbox)
            while True:
                answer = await answers.next_msg(self._settings.timeout)
                headers = answer.headers or {}
                if status := headers.get("Status"):
                    if status not in _ENDS:
                        raise self._nats.errors.Error(f"no replica answers: {status}")
                    return found
                message = LogMessage(int(headers["Nats-Sequence"]), answer.data)
                found.append((headers["Nats-Subject"], message))
        finally:
            await answers.unsubscribe()

    async def trim(self, before: int) -> None:
        """See `ReplicatedLog.trim`."""
        await self._purge(self.name, before)

    async def _purge(self, subject: str, before: int | None) -> None:
        stream = self._settings.stream
        await self._of(stream, self._js.purge_stream(stream, seq=before, subject=subject))

    # -- snapshots -----------------------------------------------------------------------------

    async def save_part(self, at: int, part: int, data: bytes) -> None:
        """See `ReplicatedLog.save_part`."""
        number = await self._publish(f"{self._parts}.{at}.{part}", data)
        if not part:
            self._first_part = number

    async def drop_parts(self, at: int) -> None:
        """See `ReplicatedLog.drop_parts`."""
        await self._purge(f"{self._parts}.{at}.>", None)

    async def save(self, snapshot: Snapshot, *, after: int) -> int:
        """See `ReplicatedLog.save`."""
        number = await self._publish(self._snapshots, msgspec.msgpack.encode(snapshot), after)
        await self._purge(self._snapshots, number)
        await self._purge(f"{self._parts}.>", self._first_part)
        return number

    async def snapshot(self) -> Snapshot | None:
        """See `ReplicatedLog.snapshot`."""
        from ingestd.journal.log.interface import Snapshot  # noqa: PLC0415

        found = await self._last_of(self._snapshots)
        if found is None:
            return None
        snapshot = msgspec.msgpack.decode(found.data, type=Snapshot)
        return msgspec.structs.replace(snapshot, number=found.number)

    async def load_part(self, at: int, part: int) -> bytes | None:
        """See `ReplicatedLog.load_part`."""
        found = await self._last_of(f"{self._parts}.{at}.{part}")
        return None if found is None else found.data

    async def close(self) -> None:
        """See `ReplicatedLog.close`."""
        if self._connection is not None:
            await self._connection.close()


def _unreachable(problem: str) -> LogUnreachable:
    from ingestd.journal.log.interface import LogUnreachable, retry_after  # noqa: PLC0415

    return LogUnreachable(problem=problem, retry_after=retry_after())


def _nats() -> Any:
    """Imports the client.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import nats  # noqa: PLC0415  in an extra
        import nats.js.errors  # noqa: PLC0415
    except ImportError as error:
        problem = "journal.kind = 'jetstream' needs NATS' client: pip install 'ingestd[jetstream]'"
        raise ConfigError(problem=problem) from error
    return nats
