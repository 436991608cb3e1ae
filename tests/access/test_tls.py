"""TLS and the certificates of clients: real handshakes, on both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.errors import AddressError, ConfigError
from ingestd.http import listener
from ingestd.http.settings import TlsSettings
from ingestd.http.tls import make_context
from tests.access.tools import (
    NEXT,
    SHOP,
    Files,
    acurl,
    bearer,
    needs_curl,
    on_both_loops,
)
from tests.sources.source_tools import Client, MemoryIntake, serving, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
def intake() -> MemoryIntake:
    return MemoryIntake()


def trusting(files: Files, certificate: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=files.ca)
    if certificate:
        context.load_cert_chain(certificate)
    return context


@contextlib.asynccontextmanager
async def connected(source: Any, context: ssl.SSLContext) -> AsyncIterator[Client]:
    host, _, port = source.addresses[0].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


async def status(source: Any, context: ssl.SSLContext, **headers: str) -> int | str:
    """What one request gets; `refused` if TLS does not even come about."""
    try:
        async with connected(source, context) as client:
            client.post(b"1", **headers)
            return (await client.reply()).status
    except (ConnectionError, ssl.SSLError, asyncio.IncompleteReadError):
        return "refused"


@on_both_loops
async def test_records_come_encrypted(files: Files, intake: MemoryIntake) -> None:
    async with serving(intake, tls={"certificate": files.server()}) as source:
        ends = source.numbers()["certificate_until"]
        assert ends == source._access.context.valid_until > time.time()
        async with connected(source, trusting(files)) as client:
            for _ in range(3):
                client.post(b"1\n" * 100_000)
                assert (await client.reply()).json["accepted"] == 100_000
            client.post(b"", Content_Length="2", Expect="100-continue")
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.send(b"11")
            assert (await client.reply()).status == 202
        assert await status(source, ssl.create_default_context()) == "refused"
        await until(lambda: source._server.open == 0 and not source._server._greetings)


@pytest.mark.filterwarnings("ignore:.*TLSv1_1.*:DeprecationWarning")
@on_both_loops
async def test_old_versions_are_refused_and_http_1_1_is_agreed(
    files: Files, intake: MemoryIntake
) -> None:
    async with serving(intake, tls={"certificate": files.server()}) as source:
        for version, expected in (
            (ssl.TLSVersion.TLSv1_1, "refused"),
            (ssl.TLSVersion.TLSv1_2, "TLSv1.2"),
            (ssl.TLSVersion.TLSv1_3, "TLSv1.3"),
        ):
            context = trusting(files)
            context.set_alpn_protocols(["h2", "http/1.1"])
            # Otherwise it would be our own library that does not speak it.
            context.set_ciphers("DEFAULT:@SECLEVEL=0")
            context.minimum_version = context.maximum_version = version
            if expected == "refused":
                assert await status(source, context) == "refused"
                continue
            async with connected(source, context) as client:
                spoken = client.writer.get_extra_info("ssl_object")
                assert spoken.version() == expected
                assert spoken.selected_alpn_protocol() == "http/1.1"


@on_both_loops
async def test_a_client_certificate_is_needed_and_has_to_be_ours(
    files: Files, intake: MemoryIntake, tmp_path: Path
) -> None:
    tls = {"certificate": files.server(), "client_ca": files.ca, "client_required": True}
    good = files.issue("good", "client.example")
    expired = files.issue("expired", "client.example", days=-1)
    strange = Files(tmp_path / "strangers").issue("strange", "client.example")
    async with serving(intake, tls=tls) as source:
        assert await status(source, trusting(files, good)) == 202
        assert await status(source, trusting(files)) == "refused"
        assert await status(source, trusting(files, expired)) == "refused"
        assert await status(source, trusting(files, strange)) == "refused"
        await until(lambda: source._server.open == 0 and not source._server._greetings)
    assert len(intake.runs) == 1


@on_both_loops
async def test_a_certificate_may_be_who_a_token_is(files: Files, intake: MemoryIntake) -> None:
    tls = {"certificate": files.server(), "client_ca": files.ca}
    tokens = {
        "shop": {"client_certificate": "shop.example"},
        "common": {"client_certificate": "The Common Name", "pipelines": ["other"]},
        "next": {"token": NEXT},
    }
    shop = trusting(files, files.issue("shop", "www.example", "shop.example"))
    common = trusting(files, files.issue("common", "x.example", common_name="The Common Name"))
    nobody = trusting(files, files.issue("nobody", "nobody.example"))
    async with serving(intake, tls=tls, tokens=tokens) as source:
        assert await status(source, shop) == 202
        assert await status(source, common) == 403
        assert await status(source, nobody) == 401
        assert await status(source, trusting(files)) == 401
        assert await status(source, trusting(files), **bearer(NEXT)) == 202
        # What is said in the request counts more than what is said in the handshake.
        assert await status(source, common, **bearer(NEXT)) == 202
        assert await status(source, shop, **bearer("wrong-token-0123456789")) == 401


@on_both_loops
async def test_without_tokens_every_certificate_of_ours_is_good(
    files: Files, intake: MemoryIntake
) -> None:
    tls = {"certificate": files.server(), "client_ca": files.ca}
    async with serving(intake, tls=tls) as source:
        assert await status(source, trusting(files, files.issue("any", "any.example"))) == 202
        assert await status(source, trusting(files)) == 401


@on_both_loops
async def test_a_new_certificate_and_a_new_authority_without_a_refused_connection(
    files: Files, intake: MemoryIntake, tmp_path: Path
) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text(Path(files.ca).read_text())
    server = files.server()
    tls = {"certificate": server, "client_ca": str(ca), "client_required": True}
    theirs = Files(tmp_path / "theirs")
    ours = trusting(files, files.issue("ours", "ours.example"))
    new = trusting(files, theirs.issue("new", "new.example"))
    async with serving(intake, tls=tls) as source:
        first = ssl.DER_cert_to_PEM_cert(await _certificate(source, ours))
        async with connected(source, ours) as before:
            ca.write_text(Path(theirs.ca).read_text() + Path(files.ca).read_text())
            files.server()
            await source.reload()
            before.post(b"1")
            assert (await before.reply()).status == 202
            assert await status(source, new) == 202
            assert await status(source, ours) == 202
            ca.write_text(Path(theirs.ca).read_text())
            await source.reload()
            assert await before.closed()
        assert ssl.DER_cert_to_PEM_cert(await _certificate(source, new)) != first
        assert await status(source, new) == 202
        assert await status(source, ours) == "refused"
        Path(server).write_text("no more")
        with pytest.raises(ConfigError, match=r"http\.tls\.certificate: .* is not a PEM file"):
            await source.reload()
        assert await status(source, new) == 202


async def _certificate(source: Any, context: ssl.SSLContext) -> bytes:
    async with connected(source, context) as client:
        der = client.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    assert der
    return bytes(der)


# -- bounds --------------------------------------------------------------------------------------


@on_both_loops
async def test_connections_and_handshakes_are_bounded_together(
    files: Files, intake: MemoryIntake
) -> None:
    tls = {"certificate": files.server()}
    async with serving(intake, tls=tls, connections_max=2) as source:
        host, _, port = source.addresses[0].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"\x16\x03\x01")
        async with connected(source, trusting(files)):
            await until(lambda: source._server.open == 1 and source._server._greetings == 1)
            async with connected(source, trusting(files)) as third:
                reply = await third.reply()
                assert (reply.status, reply.slug) == (503, "too-many-connections")
                assert await third.closed()
            writer.close()
            await until(lambda: not source._server._greetings)
            async with connected(source, trusting(files)) as third:
                third.post(b"1")
                assert (await third.reply()).status == 202
        assert await reader.read() == b""


@on_both_loops
async def test_far_too_many_are_let_go_without_a_word(
    files: Files, intake: MemoryIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingestd.http.server._TURNED_AWAY_MAX", 1)
    async with serving(intake, tls={"certificate": files.server()}, connections_max=1) as source:
        host, _, port = source.addresses[0].rpartition(":")
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
        await until(lambda: source._server._greetings == 2)
        reader, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(60):
            assert await reader.read() == b""
        for _, other in [*silent, (reader, writer)]:
            other.close()
        await until(lambda: not source._server._greetings)
        assert await status(source, trusting(files)) == 202


@on_both_loops
async def test_a_handshake_that_does_not_end_is_ended(
    files: Files, intake: MemoryIntake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "HANDSHAKE_SECONDS", 0.2)
    async with serving(intake, tls={"certificate": files.server()}) as source:
        host, _, port = source.addresses[0].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(60):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()
        await until(lambda: not source._server._greetings)


@on_both_loops
async def test_leaving_refuses_new_ones_and_ends_handshakes(
    files: Files, intake: MemoryIntake
) -> None:
    loop = asyncio.get_running_loop()
    async with serving(intake, tls={"certificate": files.server()}) as source:
        host, _, port = source.addresses[0].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        await until(lambda: source._server._greetings == 1)
        async with connected(source, trusting(files)) as open_before:
            await source.stop_taking(loop.time() + 60)
            await until(lambda: source._listener.sockets[0].fileno() == -1)
            assert await status(source, trusting(files)) == "refused"
            open_before.post(b"1")
            assert (await open_before.reply()).slug == "draining"
        await source.close()
        assert not source._listener._handshakes
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()


@on_both_loops
async def test_a_port_that_is_taken(files: Files, intake: MemoryIntake) -> None:
    tls = {"certificate": files.server()}
    async with serving(intake, tls=tls) as source:
        with pytest.raises(AddressError, match=r"http\.listen.*in use"):
            async with serving(intake, tls=tls, listen=source.addresses[0]):
                pass


@pytest.mark.parametrize("listen", ["localhost:0", ":0"])
@on_both_loops
async def test_every_address_of_a_host(files: Files, intake: MemoryIntake, listen: str) -> None:
    async with serving(intake, tls={"certificate": files.server()}, listen=listen) as source:
        assert source.addresses
        for address in source.addresses:
            assert re.fullmatch(r".+:[1-9]\d*", address)


@needs_curl
@on_both_loops
async def test_curl(files: Files, intake: MemoryIntake) -> None:
    tls = {"certificate": files.server(), "client_ca": files.ca, "client_required": True}
    client = files.issue("client", "client.example")
    async with serving(intake, tls=tls, tokens={"shop": {"token": SHOP}}) as source:
        url = f"https://{source.addresses[0]}/v1/records"
        ours = ("-d", "1", "--cacert", files.ca, "--cert", client)
        assert (await acurl(url, *ours, "-H", f"Authorization: Bearer {SHOP}")).status == 202
        assert (await acurl(url, *ours)).status == 401
        assert (await acurl(url, "-d", "1", "--cacert", files.ca)).code != 0
        assert (await acurl(url.replace("https", "http"), "-d", "1")).code != 0


# -- files that are wrong ------------------------------------------------------------------------


def test_what_is_wrong_with_a_file_is_said_with_its_setting(files: Files, tmp_path: Path) -> None:
    server, other = files.server(), files.server("other")
    certificate = tmp_path / "only-certificate.pem"
    certificate.write_text(Path(server).read_text().partition("-----END RSA PRIVATE KEY-----\n")[2]
                           or _after_key(server))  # fmt: skip
    encrypted = tmp_path / "encrypted.pem"
    subprocess.run(
        ["openssl", "pkey", "-in", server, "-aes256", "-passout", "pass:opens", "-out", encrypted],
        check=True,
    )
    text = tmp_path / "text.pem"
    text.write_text("hello")
    empty = tmp_path / "empty.pem"
    empty.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    tables: list[tuple[dict[str, Any], str]] = [
        ({"certificate": "lost.pem"}, "http.tls.certificate: cannot read lost.pem: No such file"),
        ({"certificate": str(text)}, f"http.tls.certificate: {text} is not a PEM file"),
        ({"certificate": str(empty), "key": server}, "http.tls.certificate: "),
        ({"certificate": str(certificate)}, "http.tls.certificate: there is no private key in"),
        ({"certificate": server, "key": str(certificate)}, "http.tls.key: there is no private key"),
        ({"certificate": server, "key": "lost"}, "http.tls.key: cannot read lost"),
        ({"certificate": server, "key": other}, f"http.tls.key: {other} is not the key of"),
        ({"certificate": server, "key": str(encrypted)}, "is encrypted; set http.tls.key_password"),
        ({"certificate": server, "key": str(encrypted), "key_password": "hunter2"},
         "http.tls.key_password: does not open"),
        ({"certificate": server, "client_ca": str(text)}, "http.tls.client_ca: "),
        ({"certificate": server, "client_ca": str(empty)}, "http.tls.client_ca: "),
    ]  # fmt: skip
    for table, says in tables:
        problems: list[str] = []
        assert make_context(TlsSettings(**table), problems, []) is None
        (line,) = problems
        assert says in line
        assert "hunter2" not in line
    problems, doubts = [], []
    table = {"certificate": server, "key": str(encrypted), "key_password": "opens"}
    assert make_context(TlsSettings(**table), problems, doubts) is not None
    assert (problems, doubts) == ([], [])


def _after_key(path: str) -> str:
    text = Path(path).read_text()
    return text[text.index("-----BEGIN CERTIFICATE-----") :]


@pytest.mark.parametrize("client_required", [False, True])
def test_a_certificate_that_has_expired_is_a_doubt(files: Files, client_required: bool) -> None:
    doubts: list[str] = []
    settings = TlsSettings(
        certificate=files.server(days=-1), client_ca=files.ca, client_required=client_required
    )
    assert make_context(settings, [], doubts) is not None
    (line,) = doubts
    assert line.startswith("http.tls.certificate: ")
    assert "expired" in line
