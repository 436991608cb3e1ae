"""Connections to NATS: how to reach its servers, with which credentials.

A connection never connects again by itself: what uses it has to ask or to send again what was lost
with it, and makes the next one.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections import UserString
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ingestd.base.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

CONNECT_SECONDS = 5.0
"""Bound of a connection to one server, its handshakes included."""
CONNECT_SECONDS_MAX = 20.0
"""Bound of one to any of several servers."""
CLOSE_SECONDS = 1.0
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
        scheme, mark, rest = server.partition("://")
        if not mark or scheme not in {"nats", "tls"} or not rest:
            return f"{server[:80]!r} should be nats://HOST:PORT or tls://HOST:PORT"
        if "@" in rest:
            return f"{scheme}://… has credentials, which would be shown"
    return ""


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
    """

    def __init__(self, path: str) -> None:
        self._path = path

    @property
    def data(self) -> str:  # type: ignore[override]
        """The JWT and the seed, as they are in the file now.

        Raises:
            OSError: the file cannot be read, or lacks one of the two.
        """
        with Path(self._path).open(encoding="ascii", errors="replace") as file:
            text = file.read(CREDENTIALS_BYTES_MAX)
        blocks = []
        for name, pattern in _CREDENTIALS:
            found = pattern.search(text)
            if found is None:
                raise OSError(f"{self._path} is no file of credentials: it has no {name}")
            blocks.append(f"-----BEGIN {name}-----\n{found[1]}\n------END {name}------\n")
        return "\n".join(blocks)


async def connect_nats(
    access: NatsAccess,
    name: str,
    *,
    on_closed: Callable[[], Awaitable[None]] | None = None,
    on_error: Callable[[Exception], Awaitable[None]] | None = None,
) -> Any:
    """Connects to one of the servers, and never again by itself.

    Args:
        access: servers and credentials.
        name: of the connection, for the servers' monitoring.
        on_closed: called when the connection has ended.
        on_error: called with errors that belong to no call, such as a missing right.

    Returns:
        A client of nats-py.

    Raises:
        OSError: a file cannot be read, or no server can be reached.
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
    if access.tls_ca or access.tls_certificate or any(s.startswith("tls") for s in access.servers):
        context = ssl.create_default_context(cafile=access.tls_ca or None)
        if access.tls_certificate:
            context.load_cert_chain(access.tls_certificate, access.tls_key or None)
        more["tls"] = context
    secrets = {
        "user": access.username,
        "password": access.password,
        "token": access.token,
    }
    more |= {key: value for key, value in secrets.items() if value}
    if access.credentials:
        more["user_credentials"] = CredentialsFile(access.credentials)
    client = Client()
    try:
        await client.connect(
            list(access.servers), name=name, allow_reconnect=False, max_reconnect_attempts=1,
            reconnect_time_wait=0, connect_timeout=CONNECT_SECONDS, error_cb=note,
            closed_cb=on_closed, ping_interval=20, max_outstanding_pings=2, **more,
        )  # fmt: skip
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
