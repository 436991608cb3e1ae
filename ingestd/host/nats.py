"""Connections to NATS: how to reach its servers, with which credentials.

A client never connects again by itself: what uses it has to ask or to send again what was lost with
its connection. Sources and sinks make the next one themselves, `NatsConnection` makes it for the
journal. The client's own way back stays unused: where the end of a connection meets it, each waits
for what the other has cancelled, and the client stays without a connection for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import random
import re
import ssl
from collections import UserString
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from ingestd.base.errors import ConfigError
from ingestd.base.tasks import end_tasks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

CONNECT_SECONDS = 5.0
"""Bound of a connection to one server, its handshakes included."""
CONNECT_SECONDS_MAX = 20.0
"""Bound of one to any of several servers."""
CLOSE_SECONDS = 1.0
RECONNECT_SECONDS = 0.25
"""Between two tries to connect, and between two looks whether the connection has ended."""
SERVERS_TOLD_MAX = 30
"""Servers that are known beyond the given ones: the newest that the last one told of."""
REQUEST_SECONDS = 5.0
"""Bound of a question to JetStream."""
CREDENTIALS_BYTES_MAX = 1 << 20
_CREDENTIALS = (
    ("NATS USER JWT", re.compile(r"BEGIN NATS USER JWT[^\n]*\n\s*([\w-]+\.[\w-]+\.[\w-]+)\s")),
    ("USER NKEY SEED", re.compile(r"BEGIN USER NKEY SEED[^\n]*\n\s*(SU[A-Z2-7]{56})\s")),
)


class NatsAccess(NamedTuple):
    """Servers and credentials; a text is empty where there is none.

    Attributes:
        servers: addresses, `nats://HOST:PORT` or `tls://HOST:PORT`, of one cluster.
        username: with a password.
        password: of the name.
        token: instead of both.
        credentials: path of a file of credentials (a JWT and the seed of an NKey).
        tls_ca: path of authorities (PEM) instead of the system's.
        tls_certificate: path of a client certificate (PEM), with its chain.
        tls_key: path of its key, if that is in another file.
    """

    servers: Sequence[str]
    username: str = ""
    password: str = ""
    token: str = ""
    credentials: str = ""
    tls_ca: str = ""
    tls_certificate: str = ""
    tls_key: str = ""


def fault_of_servers(servers: Sequence[str]) -> str:
    """Explains what is wrong with addresses; empty if they can be connected to."""
    for server in servers:
        scheme, _, rest = server.partition("://")
        if "@" in rest:
            return f"{scheme[:8]}://… has credentials, which would be shown"
        if scheme not in {"nats", "tls"} or not _is_place(server):
            return f"{server[:80]!r} should be nats://HOST:PORT or tls://HOST:PORT"
    return ""


def _is_place(server: str) -> bool:
    try:
        parts = urlsplit(server)
        port = parts.port
    except ValueError:  # brackets that are open, a port that is none
        return False
    more = parts.path.strip("/") or parts.query or parts.fragment
    return bool(parts.hostname) and port != 0 and not more and not re.search(r"\s", server)


def demand_nats(credentials: str = "") -> None:
    """Refuses to go on without the packages.

    Args:
        credentials: a file of credentials, whose signatures need one more.

    Raises:
        ConfigError: one is not installed.
    """
    if find_spec("nats") is None:
        raise ConfigError(problem="needs nats-py: pip install 'ingestd[nats]'")
    if credentials and find_spec("nkeys") is None:
        raise ConfigError(problem="files of credentials need nkeys: pip install nkeys")


class CredentialsFile(UserString):
    """A file of credentials that nats-py takes in place of its path, and reads at each connection.

    By itself it would never return from a file without a JWT, such as one that is just written.

    Args:
        path: of the file.
        demand: called before it is read; raises OSError if the server must not have it.
    """

    def __init__(self, path: str, demand: Callable[[], None] | None = None) -> None:
        self._path = path
        self._demand = demand

    @property
    def data(self) -> str:  # type: ignore[override]
        """The JWT and the seed, as they are in the file now.

        Raises:
            OSError: the file cannot be read, or lacks one of the two.
        """
        if self._demand is not None:
            self._demand()
        with Path(self._path).open(encoding="ascii", errors="replace") as file:
            text = file.read(CREDENTIALS_BYTES_MAX)
        blocks = []
        for name, pattern in _CREDENTIALS:
            found = pattern.search(text)
            if found is None:
                raise OSError(f"{self._path} is no file of credentials: it has no {name}")
            blocks.append(f"-----BEGIN {name}-----\n{found[1]}\n------END {name}------\n")
        return "\n".join(blocks)


def tls_context(access: NatsAccess) -> ssl.SSLContext | None:
    """Reads the files of TLS; None if no server is reached with it.

    Raises:
        OSError: one cannot be read, or is none.
    """
    if not (
        access.tls_ca
        or access.tls_certificate
        or any(server.startswith("tls") for server in access.servers)
    ):
        return None
    context = ssl.create_default_context(cafile=access.tls_ca or None)

    def password() -> bytes:
        # Without this OpenSSL would ask the terminal, or read standard input.
        raise OSError(f"{access.tls_key or access.tls_certificate} is encrypted")

    if access.tls_certificate:
        context.load_cert_chain(access.tls_certificate, access.tls_key or None, password)
    return context


class _Handshakes:
    """Notes whether a context of TLS was used, and demands it.

    nats-py goes on without TLS where a server does not ask for it, and so does what stands between
    the two and leaves that out: it would get the password, and all that is sent.

    Args:
        context: of one connection; none: TLS is not demanded.
    """

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self._done = context is None
        if context is not None:
            noted = self

            class Noting(ssl.SSLObject):
                def do_handshake(self) -> None:
                    super().do_handshake()
                    noted._done = True

            context.sslobject_class = Noting

    def demand(self) -> None:
        """Goes on with a server whose certificate is valid.

        Raises:
            OSError: it did not ask for TLS.
        """
        if not self._done:
            raise OSError("the server does not ask for TLS, without which nothing is sent to it")

    def guarded(self, secret: str) -> Callable[[], str]:
        """A secret as nats-py takes it: it asks for it once the handshake is over."""

        def given() -> str:
            self.demand()
            return secret

        return given


async def connect_nats(
    access: NatsAccess,
    name: str,
    *,
    server: str = "",
    on_closed: Callable[[], Awaitable[None]] | None = None,
    on_error: Callable[[Exception], Awaitable[None]] | None = None,
    connect_seconds: float = CONNECT_SECONDS,
    ping_seconds: float = 20,
    tls_hostname: str | None = None,
) -> Any:
    """Connects to one of the servers, and never again by itself.

    Args:
        access: servers and credentials.
        name: of the connection, for the servers' monitoring.
        server: the only one that is tried; none: those of `access`.
        on_closed: called when the connection has ended; it may end without.
        on_error: called with errors that belong to no call, such as a missing right.
        connect_seconds: bound of each step to connect to one server.
        ping_seconds: between two pings; a server that leaves two without an answer is left.
        tls_hostname: the name that certificates of servers should have; none: that of the address.

    Returns:
        A client of nats-py.

    Raises:
        OSError: a file cannot be read, no server can be reached, or one does not ask for TLS.
        nats.errors.Error: they refuse the connection.
    """
    from nats.aio.client import Client  # noqa: PLC0415  an extra

    told: list[Exception] = []

    async def note(error: Exception) -> None:
        told.append(error)
        del told[:-8]
        if on_error is not None:
            await on_error(error)

    more: dict[str, Any] = {}
    context = tls_context(access)
    handshakes = _Handshakes(context)
    if context is not None:
        more = {"tls": context, "tls_hostname": tls_hostname}
    secrets = {
        "user": access.username,
        "password": access.password,
        "token": access.token,
    }
    more |= {key: handshakes.guarded(value) for key, value in secrets.items() if value}
    if access.credentials:
        more["user_credentials"] = CredentialsFile(access.credentials, handshakes.demand)
    client = Client()
    try:
        await client.connect(
            [server] if server else list(access.servers), name=name, allow_reconnect=False,
            max_reconnect_attempts=1, reconnect_time_wait=0, connect_timeout=connect_seconds,
            error_cb=note, closed_cb=on_closed, ping_interval=ping_seconds,
            max_outstanding_pings=2, **more,
        )  # fmt: skip
        handshakes.demand()
    except BaseException as error:
        await close_nats(client)
        if told and (isinstance(error, TimeoutError) or type(error).__name__ == "NoServersError"):
            raise told[-1] from None
        raise
    return client


async def close_nats(client: Any) -> None:
    """Ends a connection, or leaves it: nats-py waits for ever where a handshake has failed."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await client.close()
    except asyncio.CancelledError:
        # A stream's end that an earlier close was cancelled at is cancelled for every later one.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
    except Exception:  # noqa: BLE001, S110  it is left as it is
        pass


class _Server(NamedTuple):
    """A server that can be tried.

    Attributes:
        url: its address.
        tls_name: the name that its certificate should have; none: that of the address.
    """

    url: str
    tls_name: str | None = None


class NatsConnection:
    """A connection to NATS that is made again, with a new client, as often as it ends.

    The servers are tried one after the other, in rounds: the given ones at random, then those that
    servers told of. So one that takes connections and says nothing costs its own time alone.

    Args:
        access: servers and credentials; files are read anew for each client.
        name: of the connection, for the servers' monitoring.
        seconds: bound of each of the four steps to connect to a server.
        patience: seconds without an answer after which another server is connected to.
        ping_seconds: see `connect_nats`.
        on_error: see `connect_nats`; also called with each try that fails.

    Attributes:
        client: the newest one, of nats-py; None until the first has connected.
    """

    def __init__(
        self,
        access: NatsAccess,
        name: str,
        *,
        seconds: float,
        patience: float,
        ping_seconds: float,
        on_error: Callable[[Exception], Awaitable[None]],
    ) -> None:
        self.client: Any = None
        self._access = access
        self._name = name
        self._seconds, self._ping_seconds = seconds, ping_seconds
        self._on_error = on_error
        self._patience = patience
        self._unanswered_since = math.inf
        self._is_leaving = False
        self._ended = asyncio.Event()
        self._round: list[_Server] = []  # those of this round that are yet to be tried
        self._told: list[_Server] = []
        self._server: _Server | None = None  # of the newest client
        self._keeping: asyncio.Task[None] | None = None

    @property
    def is_connected(self) -> bool:
        """True after a server has answered, until the connection ends."""
        return self.client is not None and bool(self.client.is_connected)

    async def open(self, seconds: float) -> None:
        """Connects for the first time, to a server that answers.

        Args:
            seconds: after which no other round begins.

        Raises:
            TimeoutError: none has answered, and each was tried.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while not await self._try():
            if not self._round and loop.time() >= until:
                raise TimeoutError
            await asyncio.sleep(RECONNECT_SECONDS)
        self._keeping = asyncio.create_task(self._keep(), name="nats connection")

    def asked(self) -> None:
        """Notes a question to the servers; if those before have no answer for long, it goes on.

        A server that the others do not reach answers pings, and nothing else.
        """
        now = asyncio.get_running_loop().time()
        self._unanswered_since = min(self._unanswered_since, now)
        if now > self._unanswered_since + self._patience:
            self._unanswered_since = now
            self._is_leaving = True
            self._ended.set()

    def answered(self) -> None:
        """Notes an answer that takes a majority of the servers."""
        self._unanswered_since = math.inf

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # The client tells of most ends, and not of all.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECONNECT_SECONDS):
                    await self._ended.wait()
            self._ended.clear()
            if self._is_leaving or not self.is_connected:
                next_try = loop.time() + RECONNECT_SECONDS
                await self._try()
                await asyncio.sleep(next_try - loop.time())

    async def _try(self) -> bool:
        """Connects to the next server with a new client, in a bounded time."""

        async def end() -> None:
            self._ended.set()

        if not self._round:
            self._round = self._next_round()
        server = self._round.pop(0)
        try:
            async with asyncio.timeout(4 * self._seconds):
                client = await connect_nats(
                    self._access,
                    self._name,
                    server=server.url,
                    on_closed=end,
                    on_error=self._on_error,
                    connect_seconds=self._seconds,
                    ping_seconds=self._ping_seconds,
                    tls_hostname=server.tls_name,
                )
        except asyncio.CancelledError:
            # Of this task, or of one in the client, whose end came amid its handshake.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return False
        except Exception as error:  # noqa: BLE001  any: the next try may go well
            silent = isinstance(error, TimeoutError)
            why = "it does not answer" if silent else str(error) or type(error).__name__
            await self._on_error(OSError(f"{server.url}: {why}"))
            return False
        self._round.clear()
        self._server = server
        self._is_leaving, self._unanswered_since = False, math.inf
        ended, self.client = self.client, client
        if ended is not None:
            await close_nats(ended)
        return True

    def _next_round(self) -> list[_Server]:
        """All servers that are known, with those that the last client heard of until its end."""
        last = self._server
        if last is not None:
            # Certificates need not have the addresses that servers tell, but their names.
            name = last.tls_name or _name_in(last.url)
            found = [
                _Server(url, None if _name_in(url) else name)
                for url in (uri.geturl() for uri in reversed(self.client.discovered_servers))
                if url not in self._access.servers
            ]
            self._told = found[:SERVERS_TOLD_MAX] or self._told
        given = [_Server(url) for url in self._access.servers]
        random.shuffle(given)
        # One that is left comes last.
        return sorted([*given, *self._told], key=lambda one: self._is_leaving and one == last)

    async def close(self) -> None:
        """Ends it for good."""
        if self._keeping is not None:
            await end_tasks(self._keeping)
        if self.client is not None:
            await close_nats(self.client)


def _name_in(server: str) -> str | None:
    """The name of a host in an address; none if that is an IP address."""
    host = urlsplit(server).hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host or None
    return None
