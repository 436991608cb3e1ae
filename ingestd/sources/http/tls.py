"""TLS: files into a context, and what is wrong with them."""

from __future__ import annotations

import hashlib
import re
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from ingestd.base.read_file import read_file
from ingestd.sources.http.secured import SecuredContext

if TYPE_CHECKING:
    from ingestd.http.settings import TlsSettings

_STEPS_MAX = 10
_CERTIFICATE = re.compile(rb"-----BEGIN [A-Z0-9 ]*CERTIFICATE-----([^-]*)-----END ")


def make_context(
    settings: TlsSettings, problems: list[str], doubts: list[str]
) -> ssl.SSLContext | None:
    """What connections are encrypted with; `None` without TLS, or if something is wrong.

    Args:
        settings: of TLS.
        problems: gets a line for everything that is wrong.
        doubts: gets a line for what keeps nobody from starting.
    """
    if not settings.certificate:
        return None
    named = ("certificate", "key", "client_ca")
    bad = [_unreadable(getattr(settings, key), f"http.tls.{key}") for key in named]
    if any(bad):
        problems += [line for line in bad if line]
        return None
    context = SecuredContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    wrong = _load_chain(context, settings) or _load_client_ca(context, settings)
    if wrong:
        problems.append(wrong)
        return None
    doubt = _rehearse(context, settings.certificate)
    if doubt:
        doubts.append(f"http.tls.certificate: {settings.certificate}: {doubt}")
    return context


def read_authorities(settings: TlsSettings) -> frozenset[bytes]:
    """Digests of the certificates in the file of `http.tls.client_ca`; none without one."""
    try:
        content = read_file(Path(settings.client_ca))
    except OSError:
        return frozenset()  # no file; or `make_context` has said so
    blocks = _CERTIFICATE.findall(content)
    return frozenset(hashlib.sha256(b"".join(block.split())).digest() for block in blocks)


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


def _load_chain(context: ssl.SSLContext, settings: TlsSettings) -> str | None:
    """Certificate and key; what is wrong with them."""
    key = settings.key or settings.certificate
    setting = "http.tls.key" if settings.key else "http.tls.certificate"
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
            return f"{setting}: {key} is encrypted; set http.tls.key_password"
        if asked:
            return f"http.tls.key_password: does not open {key}"
        if reason == "KEY_VALUES_MISMATCH":
            return f"{setting}: {key} is not the key of {settings.certificate}"
        if b"PRIVATE KEY-----" not in read_file(Path(key)):
            return f"{setting}: there is no private key in {key}"
        return f"http.tls.certificate: {settings.certificate} can't be used ({_words(reason)})"
    return None


def _load_client_ca(context: ssl.SSLContext, settings: TlsSettings) -> str | None:
    """Whose signature makes a client's certificate good; what is wrong with it."""
    if not settings.client_ca:
        return None
    try:
        context.load_verify_locations(settings.client_ca)
    except (ssl.SSLError, OSError) as error:
        words = _words(getattr(error, "reason", None) or "")
        return f"http.tls.client_ca: {settings.client_ca} can't be used ({words})"
    required = settings.client_required
    context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    return None


def _words(reason: str) -> str:
    return reason.replace("_", " ").lower() or "no reason given"


def _rehearse(server: ssl.SSLContext, certificate: str) -> str | None:
    """A handshake with ourselves: who trusts this very certificate says what is wrong with it.

    Nobody is kept from starting: a certificate that has expired is better than no service.
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
                    return None
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    except ssl.SSLError as error:
        return _words(error.reason or "")
    return None
