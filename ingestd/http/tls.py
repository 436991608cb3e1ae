"""TLS: half-closed connections under TLS, and the server's context from files.

asyncio and uvloop end both directions as soon as the peer has sent `close_notify`, and as soon as
its packets end (FIN). TLS 1.3 does not ask for that (RFC 8446, 6.1), so here `close_notify`, and
the FIN that comes with it or later, are kept from the TLS of the loop, and told to the connection.
An end without `close_notify` may be a truncation by a third party: it ends everything.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import ssl
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ingestd.base.errors import ConfigError
from ingestd.base.files import read_file

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from ingestd.http.settings import TlsSettings


class Secured(ssl.SSLObject):
    """The TLS of one connection.

    Attributes:
        incoming: bytes that were not looked at yet.
        ended: `close_notify` was read.
        at_cut: called once, in a turn of the loop of its own, if there is no `close_notify` in
            `incoming`.
    """

    incoming: ssl.MemoryBIO
    ended = False
    at_cut: Callable[[], None] | None = None
    _at_end: Callable[[], None] | None = None

    def tell(self, at_end: Callable[[], None]) -> None:
        """Calls this once, in a turn of the loop of its own, when nothing more will come."""
        self._at_end = at_end
        if self.ended:
            asyncio.get_running_loop().call_soon(at_end)

    def read(self, len: int = 1024, buffer: Any = None) -> Any:  # noqa: A002 - the base's name
        """Reads, and says that more may come where it was the end."""
        try:
            data = super().read(len, buffer)
        except ssl.SSLWantReadError:
            if self.at_cut is not None and not self.ended:
                asyncio.get_running_loop().call_soon(self.at_cut)
                self.at_cut = None
            raise
        if data:
            return data
        if not self.ended:
            self.ended = True
            if self._at_end is not None:
                # What came before it in the same packets goes to the protocol first.
                asyncio.get_running_loop().call_soon(self._at_end)
        raise ssl.SSLWantReadError


class SecuredContext(ssl.SSLContext):
    """A context whose connections are `Secured`.

    Attributes:
        valid_until: last second of its certificate, since the epoch; 0 if that is not known.
    """

    sslobject_class = Secured
    valid_until = 0.0

    def wrap_bio(self, incoming: ssl.MemoryBIO, *args: Any, **more: Any) -> Secured:
        """See `ssl.SSLContext`."""
        secured = cast("Secured", super().wrap_bio(incoming, *args, **more))
        secured.incoming = incoming
        return secured


class _Early(asyncio.Protocol):
    """Buffers bytes that arrive before their protocol is connected."""

    def __init__(self) -> None:
        self.came = b""
        self.ended = False

    def data_received(self, data: bytes) -> None:
        self.came += data

    def eof_received(self) -> bool:
        self.ended = True
        return True


class _Packets(asyncio.BufferedProtocol):
    """Stands before the TLS of a loop, and keeps a FIN from it that comes with `close_notify`."""

    def __init__(self, inner: Any, transport: asyncio.Transport) -> None:
        # Nothing is called in between where nothing is to be done.
        self.get_buffer = inner.get_buffer  # type: ignore[method-assign]
        self.buffer_updated = inner.buffer_updated  # type: ignore[method-assign]
        self.pause_writing = inner.pause_writing  # type: ignore[method-assign]
        self.resume_writing = inner.resume_writing  # type: ignore[method-assign]
        self.connection_lost = inner.connection_lost  # type: ignore[method-assign]
        self._inner = inner
        self._transport = transport
        self.secured: Secured | None = None

    def eof_received(self) -> bool:
        # A handshake that is through is known in the next turn.
        asyncio.get_running_loop().call_soon(self._decide)
        return True

    def _decide(self) -> None:
        secured = self.secured
        if secured is not None and (secured.ended or secured.at_cut is not None):
            return
        if secured is not None and (secured.incoming.pending or secured.pending()):
            secured.at_cut = self._cut  # close_notify may be in bytes not read yet
        else:
            self._cut()

    def _cut(self) -> None:
        if not self._inner.eof_received():
            self._transport.close()


async def secure(
    sock: socket.socket,
    protocol: asyncio.BaseProtocol,
    context: ssl.SSLContext,
    *,
    handshake: float,
    shutdown: float,
) -> None:
    """Makes a connection out of an accepted socket.

    Args:
        sock: not blocking.
        protocol: gets the connection once the handshake is through.
        context: a `SecuredContext`.
        handshake: seconds that the handshake may take.
        shutdown: seconds that the peer may take to send `close_notify`.

    Raises:
        OSError: the handshake failed.
    """
    loop = asyncio.get_running_loop()
    hello, early = _Early(), _Early()
    raw, _ = await loop.connect_accepted_socket(lambda: hello, sock)
    packets: list[_Packets] = []

    def stand_before() -> None:
        inner = cast("asyncio.BufferedProtocol", raw.get_protocol())
        packets.append(_Packets(inner, raw))
        raw.set_protocol(packets[0])
        if hello.came:
            memoryview(inner.get_buffer(len(hello.came)))[: len(hello.came)] = hello.came
            inner.buffer_updated(len(hello.came))
        if hello.ended:
            packets[0].eof_received()

    # After `start_tls` has put its protocol there, and before the handshake begins.
    standing = loop.call_soon(stand_before)
    try:
        transport = await loop.start_tls(
            raw, early, context, server_side=True,
            ssl_handshake_timeout=handshake, ssl_shutdown_timeout=shutdown,
        )  # fmt: skip
    except BaseException:
        standing.cancel()
        raw.abort()
        raise
    if transport is None or transport.is_closing():
        raw.abort()
        return
    packets[0].secured = transport.get_extra_info("ssl_object")
    transport.set_protocol(protocol)
    cast("asyncio.Protocol", protocol).connection_made(transport)
    if early.came:
        cast("asyncio.Protocol", transport.get_protocol()).data_received(early.came)


# -- the context -----------------------------------------------------------------------------------

_STEPS_MAX = 10
SOON_SECONDS = 14 * 86400.0
"""A certificate that expires within this time is a doubt."""
_CERTIFICATE = re.compile(rb"-----BEGIN [A-Z0-9 ]*CERTIFICATE-----([^-]*)-----END ")


def make_context(
    settings: TlsSettings,
    problems: list[str],
    doubts: list[str],
    *,
    table: str = "http.tls",
    protocols: Sequence[str] = ("http/1.1",),
) -> SecuredContext | None:
    """Makes the TLS context; `None` without TLS, or with problems.

    Args:
        settings: of TLS.
        problems: gets a line for everything that is wrong.
        doubts: gets a line for what keeps nobody from starting.
        table: of the settings, for these lines.
        protocols: that ALPN offers.
    """
    if not settings.certificate:
        return None
    named = ("certificate", "key", "client_ca")
    bad = [_unreadable(getattr(settings, key), f"{table}.{key}") for key in named]
    if any(bad):
        problems += [line for line in bad if line]
        return None
    context = SecuredContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if protocols:
        context.set_alpn_protocols(protocols)
    wrong = _load_chain(context, settings, table) or _load_client_ca(context, settings, table)
    if wrong:
        problems.append(wrong)
        return None
    doubt = _rehearse(context, settings.certificate) or _expires_soon(context.valid_until)
    if doubt:
        doubts.append(f"{table}.certificate: {settings.certificate}: {doubt}")
    return context


def read_authorities(settings: TlsSettings) -> frozenset[bytes]:
    """Digests of the certificates in the file of `client_ca`; none without one."""
    try:
        content = read_file(Path(settings.client_ca))
    except OSError:
        return frozenset()  # no file; or `make_context` has said so
    blocks = _CERTIFICATE.findall(content)
    return frozenset(hashlib.sha256(b"".join(block.split())).digest() for block in blocks)


class TlsAccess(NamedTuple):
    """TLS of a server whose protocol is not HTTP, as the files say; a reload replaces it.

    Attributes:
        context: `None` without TLS.
        authorities: digests of the CAs of client certificates.
        doubts: what should be seen to and is no reason to refuse.
    """

    context: SecuredContext | None
    authorities: frozenset[bytes]
    doubts: Sequence[str]


def read_tls(settings: TlsSettings, table: str) -> TlsAccess:
    """Reads certificates and keys; for a thread, if something else is going on.

    Args:
        settings: that name the files.
        table: of the settings, for errors.

    Raises:
        ConfigError: with one line for everything that is wrong.
    """
    problems: list[str] = []
    doubts: list[str] = []
    context = make_context(settings, problems, doubts, table=table, protocols=())
    if problems:
        raise ConfigError(problem="\n".join(problems))
    if context is not None:
        # A client that only sends reads no tickets, and one that closes with something unread ends
        # with a reset, which takes what it sent last.
        context.num_tickets = 0
    return TlsAccess(context, read_authorities(settings), doubts)


def _unreadable(path: str, key: str) -> str | None:
    if not path:
        return None
    try:
        content = read_file(Path(path))
    except OSError as error:
        return f"{key}: cannot read {path}: {error.strerror}"
    if b"-----BEGIN " not in content:
        return f"{key}: {path} is not a PEM file"
    return None


def _load_chain(context: ssl.SSLContext, settings: TlsSettings, table: str) -> str | None:
    """Certificate and key; what is wrong with them."""
    key = settings.key or settings.certificate
    setting = f"{table}.key" if settings.key else f"{table}.certificate"
    asked = False

    def password() -> str:
        # Without this OpenSSL would ask on the terminal.
        nonlocal asked
        asked = True
        return settings.key_password.get_secret_value()

    try:
        context.load_cert_chain(settings.certificate, settings.key or None, password)
    except (ssl.SSLError, ValueError, OSError) as error:
        reason = getattr(error, "reason", None) or ""
        if asked and not settings.key_password.get_secret_value():
            return f"{setting}: {key} is encrypted; set {table}.key_password"
        if asked:
            return f"{table}.key_password: does not open {key}"
        if reason == "KEY_VALUES_MISMATCH":
            return f"{setting}: {key} is not the key of {settings.certificate}"
        if b"PRIVATE KEY-----" not in read_file(Path(key)):
            return f"{setting}: there is no private key in {key}"
        return f"{table}.certificate: {settings.certificate} can't be used ({_words(reason)})"
    return None


def _load_client_ca(context: ssl.SSLContext, settings: TlsSettings, table: str) -> str | None:
    """Loads the CA of client certificates; returns its problem, if any."""
    if not settings.client_ca:
        return None
    try:
        context.load_verify_locations(settings.client_ca)
    except (ssl.SSLError, OSError) as error:
        words = _words(getattr(error, "reason", None) or "")
        return f"{table}.client_ca: {settings.client_ca} can't be used ({words})"
    required = settings.client_required
    context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    return None


def _words(reason: str) -> str:
    return reason.replace("_", " ").lower() or "no reason given"


def _expires_soon(valid_until: float) -> str | None:
    left = valid_until - time.time()
    return f"it expires on {_day(valid_until)}" if valid_until and left < SOON_SECONDS else None


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(at))


def _rehearse(server: SecuredContext, certificate: str) -> str | None:
    """Tests the certificate by a handshake with ourselves, and notes how long it is valid.

    Faults do not prevent the start: a certificate that has expired is better than no service.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server)
    answering = server.wrap_bio(to_server, to_client, server_side=True)
    try:
        for _ in range(_STEPS_MAX):
            for side in (asking, answering):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
                if side is asking:
                    shown = asking.getpeercert() or {}
                    server.valid_until = ssl.cert_time_to_seconds(str(shown["notAfter"]))
                    return None
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    except ssl.SSLError as error:
        return _words(error.reason or "")
    return None
