"""Connections to NATS: servers that are silent, gone, told of by others, or speak without TLS."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import trustme

from ingestd.host.nats import (
    NatsAccess,
    NatsConnection,
    close_nats,
    connect_nats,
    fault_of_servers,
)
from ingestd.prove.servers import local_cluster
from tests.journal.on_nats import accept
from tests.nats import needs_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from ingestd.prove.servers import NatsCluster, NatsServer
    from tests.nats import Cluster

pytest.importorskip("nats", reason="needs nats-py: pip install 'ingestd[jetstream]'")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "server",
    [
        "nats://[::1", "nats://:4222", "nats://h:port", "nats://h:99999", "nats://h:0", "tls://",
        "nats://h/x:1", "nats://a b:1", "h:4222", "TLS://h:1", "http://h:1",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_a_fault(server: str) -> None:
    assert "should be nats://HOST:PORT" in fault_of_servers(["nats://h:1", server])


def test_addresses_are_without_fault() -> None:
    fine = ["nats://h", "nats://h:4222/", "tls://10.0.0.1:4222", "nats://[::1]:4222"]
    assert not fault_of_servers(fine)
    assert "credentials" in fault_of_servers(["nats://a:b@h:1"])


def test_no_password_of_a_key_is_asked_for(tmp_path: Path) -> None:
    """OpenSSL would ask the terminal, or standard input, whose lines may be records."""
    own = trustme.CA().issue_cert("client@example.org")
    own.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "plain.pem"))
    key = tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "pkey", "-in", tmp_path / "plain.pem", "-aes256", "-passout", "pass:opens",
         "-out", key], check=True,
    )  # fmt: skip
    code = (
        "import sys; from ingestd.host.nats import *\n"
        f"access = NatsAccess(['tls://h:1'], tls_certificate='{tmp_path}/plain.pem',"
        f" tls_key='{key}')\n"
        "try: tls_context(access)\n"
        "except OSError as error: print(error, sys.stdin.read())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=b"opens\n", capture_output=True,
        start_new_session=True, check=True,
    )  # fmt: skip
    assert done.stdout.decode() == f"{key} is encrypted opens\n\n"
    assert not done.stderr


@contextlib.contextmanager
def silent():
    """A server that takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        yield f"nats://127.0.0.1:{one.getsockname()[1]}"


async def test_servers_that_say_nothing_do_not_keep_a_journal_from_the_one_that_does(
    one_node: Cluster, open_
) -> None:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(silent()) for _ in range(4)]
        for number in range(3):
            own = {"servers": [*servers, *one_node.urls], "timeout": "1s"}
            await accept(await open_(one_node, f"silent{number}", **own), b"1")


@contextlib.asynccontextmanager
async def in_clear() -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server without TLS, and what it gets."""
    got = list[bytes]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = {"version": "2.15.1", "max_payload": 1 << 20, "auth_required": True, "nonce": "x"}
        writer.write(b"INFO " + json.dumps(info).encode() + b"\r\n")
        while line := await reader.readline():
            got.append(line)
            if line == b"PING\r\n":
                writer.write(b"PONG\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", got
    finally:
        server.close()


@pytest.mark.parametrize(
    "secret", [{"username": "shop", "password": "p"}, {"token": "t"}, {"credentials": "file"}, {}]
)
@pytest.mark.parametrize("scheme", ["tls", "nats"])
async def test_nothing_is_sent_in_clear_where_tls_is_asked_for(
    tmp_path: Path, secret: dict[str, str], scheme: str
) -> None:
    ca = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(ca))
    if "credentials" in secret:
        pytest.importorskip("nkeys", reason="needs nkeys: pip install nkeys")
        secret = {"credentials": str(tmp_path / "none.creds")}
    more = {"tls_ca": str(ca)} if scheme == "nats" else {}
    async with in_clear() as (place, got):
        with pytest.raises(OSError, match="does not ask for TLS"):
            await connect_nats(NatsAccess([f"{scheme}://{place}"], **secret, **more), "test")
        # Without secrets it is known once the server has answered.
        assert len(got) == (0 if secret else 2)
        plain = await connect_nats(NatsAccess([f"nats://{place}"]), "test")
        await close_nats(plain)


def telling(folder: Path, places: tuple[str, str], tls: str = "") -> NatsCluster:
    """Two nodes that tell clients of each other, under some names; they are not started yet."""
    needs_server()
    folder.mkdir()
    cluster = local_cluster(folder, 2, sync="2m")
    for number, (node, place) in enumerate(zip(cluster.servers, places, strict=True)):
        text = node.file.read_text().replace("no_advertise: true", "no_advertise: false")
        port = node.url.rpartition(":")[2]
        node.file.write_text(f'{text}\nclient_advertise: "{place}:{port}"\n{tls.format(number)}\n')
        node.url = f"{'tls' if tls else 'nats'}://{place}:{port}"
    return cluster


@contextlib.asynccontextmanager
async def connected(node: NatsServer, **more: str) -> AsyncIterator[NatsConnection]:
    async def on_error(_: Exception) -> None:
        """The state tells."""

    connection = NatsConnection(
        NatsAccess([node.url], **more),
        "test",
        seconds=5,
        patience=60,
        ping_seconds=5,
        on_error=on_error,
    )
    async with asyncio.timeout(60):
        await connection.open(30)
    try:
        yield connection
    finally:
        await connection.close()


async def moved(connection: NatsConnection, first: NatsServer, second: NatsServer) -> None:
    """Ends the node that it is connected to, for good, once it has heard of the other one."""
    async with asyncio.timeout(60):
        while not connection.client.discovered_servers:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(first.kill)
        port = int(second.url.rpartition(":")[2])
        while not connection.is_connected or connection.client.connected_url.port != port:
            await asyncio.sleep(0.05)


async def test_a_server_that_came_later_is_known_when_the_given_one_is_gone(tmp_path: Path) -> None:
    cluster = telling(tmp_path / "nats", ("127.0.0.1", "127.0.0.1"))
    first, second = cluster.servers
    try:
        first.launch()
        await asyncio.to_thread(first.wait_ready, "/healthz?js-enabled-only=true")
        async with connected(first) as connection:
            assert not connection.client.discovered_servers
            second.launch()
            await moved(connection, first, second)
    finally:
        cluster.stop()


@pytest.mark.parametrize(
    ("told", "name"),
    [
        pytest.param("127.0.1", "127.0.1", id="a name of its own"),  # which is 127.0.0.1
        pytest.param("127.0.0.1", "localhost", id="an address"),
    ],
)
async def test_a_server_that_others_tell_of_has_a_certificate_of_its_name(
    tmp_path: Path, told: str, name: str
) -> None:
    authority, ca = trustme.CA(), tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    for number, host in enumerate(("localhost", name)):
        own = authority.issue_cert(host)
        own.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / f"{number}.pem"))
    files = f'cert_file: "{tmp_path}/{{0}}.pem", key_file: "{tmp_path}/{{0}}.pem"'
    tls = f"tls {{{{ {files} }}}}"
    cluster = telling(tmp_path / "nats", ("localhost", told), tls)
    first, second = cluster.servers
    try:
        for node in (first, second):
            node.launch()
        async with connected(first, tls_ca=str(ca)) as connection:
            await moved(connection, first, second)
    finally:
        cluster.stop()
