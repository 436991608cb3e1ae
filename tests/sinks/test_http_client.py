"""The HTTP client of sinks, against real servers on sockets of their own."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from contextlib import contextmanager, suppress
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from ingestd.handlers.batch import Blocked, Unavailable
from ingestd.handlers.options import OptionError
from ingestd.sinks import client
from ingestd.sinks.client import RETRY_AFTER_MAX, HttpOptions, HttpPeer, HttpReply, refuse
from ingestd.sinks.connection import HttpConnection, target_of
from tests.sinks.http_server import BREAK, Answer, Asked, FakeServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Echo(FakeServer):
    def answer(self, asked: Asked) -> Answer:
        return Answer(200, asked.path.encode() + b" " + asked.body)


@pytest.fixture
def server() -> Iterator[Echo]:
    one = Echo()
    yield one
    one.stop()


@pytest.fixture
def peer() -> Iterator[Callable[..., HttpPeer]]:
    made: list[HttpPeer] = []

    def peer(url: str, **options: Any) -> HttpPeer:
        made.append(HttpPeer(HttpOptions.of(url=url, **options), {"X-One": "1"}))
        return made[-1]

    yield peer
    for one in made:
        one.close()


def test_a_connection_is_kept(server: Echo, peer) -> None:
    one = peer(f"{server.url}/base/")
    for _ in range(3):
        assert one.request("POST", "/x?y", b"body").body == b"/base/x?y body"
    assert len(server._server.connections) == 1
    assert server.asked[0].headers["x-one"] == "1"


def test_one_that_was_closed_meanwhile_is_opened_again(server: Echo, peer) -> None:
    one = peer(server.url)
    assert one.request("GET", "/").status == 200
    with server.down():
        pass
    assert one.request("POST", "/x", b"again").body == b"/x again"


def test_a_broken_answer_on_a_new_connection_is_no_second_request(server: Echo, peer) -> None:
    one = peer(server.url)
    server.script.append(BREAK)
    with pytest.raises(Unavailable, match="Remote"):
        one.request("POST", "/x", b"1")
    assert len(server.asked) == 1
    assert one.request("POST", "/x", b"1").status == 200


def test_the_next_address_is_taken(server: Echo, peer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gone = listener.getsockname()[1]
    one = peer(f"http://127.0.0.1:{gone}, {server.url}")
    assert one.request("GET", "/1").body == b"/1 "
    assert one.request("GET", "/2").body == b"/2 "
    with server.down(), pytest.raises(Unavailable):
        one.request("GET", "/3")
    assert one.request("GET", "/4").body == b"/4 "


def test_nothing_is_waited_for_longer_than_the_timeout(server: Echo, peer) -> None:
    one = peer(server.url, timeout="200ms")
    with server.slow(), pytest.raises(Unavailable, match="no answer in time"):
        one.request("GET", "/")


def test_a_dripping_answer_ends_with_the_timeout(peer) -> None:
    import threading

    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                while not ended.wait(0.02):
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        one = peer(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout="300ms")
        with pytest.raises(Unavailable, match="no answer in time"):
            one.request("GET", "/")
        ended.set()
        thread.join(60)


def test_an_answer_in_the_middle_of_a_body_is_read(peer) -> None:
    """As a proxy does with 413: it answers, and takes no more."""
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse_early() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(
                    b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 20):
                    pass

        thread = threading.Thread(target=refuse_early)
        thread.start()
        one = peer(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert one.request("POST", "/", bytes(8 << 20)).status == 413
        thread.join(60)


def test_a_long_answer_is_not_read_to_its_end(server: Echo, peer, monkeypatch) -> None:
    monkeypatch.setattr(client, "REPLY_BYTES_MAX", 1000)
    with pytest.raises(Unavailable, match="too long"):
        peer(server.url).request("POST", "/", bytes(2000))


def test_gzip_and_basic_authentication(server: Echo, peer) -> None:
    one = peer(server.url, compress="gzip", username="me", password="sécret")
    assert one.request("POST", "/", b"body").body == b"/ body"
    asked = server.asked[0].headers
    assert (asked["content-encoding"], asked["authorization"]) == (
        "gzip", "Basic bWU6c8OpY3JldA==")  # fmt: skip


class Tls:
    """A server with a certificate of an authority of its own."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_OPTIONAL
        self.server = Echo(context)
        self.ca, self.client = folder / "ca.pem", folder / "client.pem"
        authority.cert_pem.write_to_path(self.ca)
        authority.issue_cert("client").private_key_and_cert_chain_pem.write_to_path(self.client)


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[Tls]:
    one = Tls(tmp_path)
    yield one
    one.server.stop()


def test_tls(tls: Tls, peer, tmp_path: Path) -> None:
    trusting = peer(tls.server.url, tls_ca=str(tls.ca), tls_certificate=str(tls.client))
    assert trusting.request("POST", "/", b"1").body == b"/ 1"
    assert peer(tls.server.url, tls_verify="false").request("GET", "/").status == 200
    with pytest.raises(Blocked, match="certificate"):
        peer(tls.server.url).request("GET", "/")
    for option in ("tls_ca", "tls_certificate"):
        with pytest.raises(Blocked, match="TLS"):
            peer(tls.server.url, **{option: str(tmp_path / "none")}).request("GET", "/")


@pytest.mark.parametrize(
    ("status", "kind"),
    [(429, Unavailable), (503, Unavailable), (302, Blocked), (401, Blocked), (404, Blocked),
     (400, RuntimeError), (500, RuntimeError)],
)  # fmt: skip
def test_classes_of_errors(status: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"^http://x: {status} why$"):
        refuse(HttpReply("http://x", status, {}, b"why"))


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("7", 7, 7), ("999999999999999", RETRY_AFTER_MAX, RETRY_AFTER_MAX), ("soon", 60, 100),
     ("without a zone", 60, 100),
     ("Thu, 01 Jan 1970 00:00:00 GMT", 0, 0)],
)  # fmt: skip
def test_retry_after(monkeypatch: pytest.MonkeyPatch, text: str, low: float, high: float) -> None:
    monkeypatch.setenv("TZ", "Etc/GMT+5")
    time.tzset()
    if text == "soon":
        text = formatdate(time.time() + 100, usegmt=True)
    if text == "without a zone":
        text = time.asctime(time.gmtime(time.time() + 100))
    try:
        with pytest.raises(Unavailable) as raised:
            refuse(HttpReply("http://x", 429, {"retry-after": text}, b""))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert raised.value.after is not None
    assert low <= raised.value.after <= high


@pytest.mark.parametrize(
    "options",
    [{"url": "ftp://x"}, {"url": "http://"}, {"url": "http://x:y"}, {"url": "http://x/?a=b"},
     {"url": "http://x", "username": "a"}, {"url": "http://x", "timeout": "0s"},
     {"url": "http://x", "tls_key": "/k"}, {"url": "http://x,"}, {"url": "http://x/a b"},
     {"url": "http://a..b"}, {"url": "http://x:0"}],
)  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        HttpOptions.of(**options)


def test_a_password_in_an_address_is_refused_and_not_shown() -> None:
    with pytest.raises(OptionError) as raised:
        HttpOptions.of(url="http://me:geheim@x")
    assert "geheim" not in str(raised.value)


@contextmanager
def raw_server(*pieces: tuple[bytes, ...], sent: threading.Event | None = None) -> Iterator[str]:
    """Answers the requests of each connection with bytes, some of them a moment later.

    Args:
        pieces: of each answer.
        sent: set when a whole answer has been sent.
    """
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            for answer in pieces:
                if not connection.recv(64 * 1024):
                    return
                for piece in answer:
                    connection.sendall(piece)
                    time.sleep(0.05)
                if sent is not None:
                    sent.set()
            connection.recv(1)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://sink.example/", "sink.example"),
        ("https://sink.example:443/", "sink.example"),
        ("https://sink.example:80/", "sink.example:80"),
        ("http://sink.example/", "sink.example"),
        ("http://sink.example:443/", "sink.example:443"),
    ],
)
def test_the_host_has_a_port_where_the_scheme_has_another_one(url: str, host: str) -> None:
    seen: list[socket.socket] = []

    class Local(HttpConnection):
        def _connect(self, end: float) -> socket.socket:
            here, there = socket.socketpair()
            there.sendall(b"HTTP/1.1 204 Done\r\n\r\n")
            seen.append(there)
            return here

    one = Local(target_of(url), connect_timeout=1, timeout=1, allow_private=True)
    # An answer that is there before its request is a leftover only of a kept connection.
    assert one.send("GET", b"", {}).status == 204
    with seen[0] as there:
        assert f"\r\nHost: {host}\r\n".encode() in there.recv(1000)
    one.close()


def test_an_interim_answer_is_not_the_answer(peer) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    busy = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
    done = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    with raw_server((hints, b"HTTP/1.1 102 Processing\r\n\r\n", done), (hints, busy)) as url:
        one = peer(url)
        assert [one.request("POST", "/", b"x").status for _ in range(2)] == [200, 503]


def test_what_came_without_a_request_is_no_answer(peer) -> None:
    done = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1"
    stale, sent = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstale", threading.Event()
    with raw_server((done, stale), sent=sent) as url:
        one = peer(url)
        assert one.request("POST", "/", b"x").body == b"1"
        assert sent.wait(60)
        assert one.request("POST", "/", b"x").body == b"1"


@contextmanager
def closing_server(answer: bytes, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Answers the beginning of a request, and closes the connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                one = listener.accept()[0]
                with suppress(OSError), tls.wrap_socket(one, True) if tls else one as connection:
                    connection.recv(1000)
                    connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.parametrize("length", [12, 17, 35])
def test_a_head_that_is_cut_off_is_no_answer(peer, length: int) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"[:length]
    with closing_server(head) as url, pytest.raises(Unavailable, match="cut off"):
        peer(url).request("GET", "/")


def test_an_answer_in_the_middle_of_a_body_is_read_from_tls(peer, tmp_path: Path) -> None:
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    seen = set()
    head = b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with closing_server(head, context) as url:
        one = peer(url, tls_ca=str(tmp_path / "ca.pem"))
        for _ in range(20):  # the end of the connection may overtake the answer
            with suppress(Unavailable):
                seen.add(one.request("POST", "/", bytes(8 << 20)).status)
    assert seen == {413}


def test_a_chunk_of_a_negative_length_is_no_answer(peer) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with (
        raw_server((head + b"-5\r\nabc\r\n0\r\n\r\n",)) as url,
        pytest.raises(Unavailable, match="broken answer"),
    ):
        peer(url).request("POST", "/", b"x")
