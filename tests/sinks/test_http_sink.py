"""The sink `http` against another ingestd, and against services that answer as they like."""

from __future__ import annotations

import base64
import gzip
import json
import signal
import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from multidict import CIMultiDict

from ingestd.base.record import Records, Span
from ingestd.handlers.options import OptionError
from ingestd.handlers.outcome import Job
from ingestd.handlers.runner import HandlerConfig
from ingestd.http.problem import ERRORS_MAX
from ingestd.sinks.http import HttpSinkOptions
from ingestd.sources.http.endpoints import webhooks
from tests.daemon.harness import daemon
from tests.sinks.contract.adapter import Worker, job
from tests.sinks.contract.adapter_http import RECORD_BYTES, TOKEN, Receiver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ingestd.handlers.outcome import Result

BAD = b'{"n":-1,"text":"%b"}' % (b"x" * RECORD_BYTES)
SIGN = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class Service:
    """A service that answers with what a function says, and keeps what it got."""

    def __init__(self, answer: Callable[[Request], tuple[Any, ...]], context: Any = None) -> None:
        self.got: list[Request] = []
        self.connections = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                outer.connections += 1
                super().setup()

            def work(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                one = Request(self.command, self.path, dict(self.headers), self.rfile.read(length))
                outer.got.append(one)
                status, headers, body = (*answer(one), {}, b"")[:3]
                if status == 0:  # no answer at all
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_PUT = do_GET = do_OPTIONS = work  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        if context is not None:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Request:
    def __init__(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        self.method, self.path, self.headers, self.body = method, path, headers, body

    @property
    def key(self) -> str:
        return self.headers.get("Idempotency-Key", "")


@pytest.fixture
def serve() -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def serve(answer: Callable[[Request], tuple[Any, ...]], context: Any = None) -> Service:
        made.append(Service(answer, context))
        return made[-1]

    yield serve
    for one in made:
        one.close()


def worker(service: Service | str, record_format: str = "json", **options: Any) -> Worker:
    url = service if isinstance(service, str) else f"http://127.0.0.1:{service.port}/in?a=1"
    given = {"url": url, "allow_private": True, **options}
    return Worker(HandlerConfig("http", given, record_format, "thread", "default", b"/x"))


def run(service: Service, one: Job | None = None, **options: Any) -> Result:
    with worker(service, **options) as sink:
        return sink.run(one or job(range(10)))


JSON_PROBLEM = "application/problem+json"


def ok(_: Request) -> tuple[Any, ...]:
    return (204,)


# -- requests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["ndjson", "array", "record"])
def test_the_forms_of_a_body(serve: Callable[..., Service], body: str) -> None:
    service = serve(ok)
    result = run(service, body=body, headers={"X-From": "me"}, token="t0ken", method="PUT")
    assert result.failure is None
    assert {one.method for one in service.got} == {"PUT"}
    assert {one.path for one in service.got} == {"/in?a=1"}
    head = service.got[0].headers
    assert (head["X-From"], head["Authorization"]) == ("me", "Bearer t0ken")
    if body == "record":
        found = [json.loads(one.body) for one in service.got]
        assert [one.key for one in service.got] == [f'"j.1.{n}"' for n in range(10)]
    elif body == "array":
        (one,) = service.got
        found, key = json.loads(one.body), one.key
        assert key == '"j-1"'
    else:
        found = [json.loads(line) for line in service.got[0].body.splitlines()]
        assert head["Content-Type"] == "application/x-ndjson"
    assert [one["n"] for one in found] == list(range(10))
    assert service.connections == 1


@pytest.mark.parametrize("body", ["ndjson", "array"])
def test_records_with_line_breaks_are_one_line(serve: Callable[..., Service], body: str) -> None:
    service = serve(ok)
    records = Records.sized([b'{\n"n": 1\r\n}', b"2"])
    assert run(service, Job("j-1", 1, records, [Span(1, 0, 2)], "j"), body=body).failure is None
    text = service.got[0].body
    found = json.loads(text) if body == "array" else [json.loads(x) for x in text.splitlines()]
    assert found == [{"n": 1}, 2]


@pytest.mark.parametrize(
    ("record_format", "body", "kind"),
    [("text", "auto", "text/plain"), ("bytes", "auto", "application/octet-stream"),
     ("text", "array", "application/json")],
)  # fmt: skip
def test_text_and_bytes(
    serve: Callable[..., Service], record_format: str, body: str, kind: str
) -> None:
    service = serve(ok)
    one = Job("j-1", 1, Records.lines([b"a", b"b"]), [Span(1, 0, 2)], "j")
    with worker(service, record_format, body=body) as sink:
        assert sink.run(one).failure is None
    assert {got.headers["Content-Type"] for got in service.got} == {kind}
    sent = b"|".join(got.body for got in service.got)
    assert sent == {"auto": b"a\nb\n", "array": b'["a","b"]'}[body] or sent == b"a|b"


def test_bytes_have_no_lines(serve: Callable[..., Service]) -> None:
    with worker(serve(ok), "bytes", body="array") as sink:
        assert "body" in sink.not_ready


@pytest.mark.parametrize("compress", ["gzip", "zstd"])
def test_what_is_compressed_is_the_same_every_time(
    serve: Callable[..., Service], compress: str
) -> None:
    service = serve(ok)
    for _ in range(2):
        assert run(service, compress=compress).failure is None
    first, second = service.got
    assert first.body == second.body
    assert first.headers["Content-Encoding"] == compress
    if compress == "gzip":
        assert gzip.decompress(first.body).count(b"\n") == 10
        assert first.body[4:8] == bytes(4)  # no time in it: it would be another request


def test_a_signature_is_that_of_standard_webhooks(serve: Callable[..., Service]) -> None:
    service = serve(ok)
    assert run(service, sign=SIGN, compress="gzip").failure is None
    (one,) = service.got

    class Settings:
        kind, tolerance = "standard", 300

    key = base64.b64decode(SIGN.removeprefix("whsec_"))
    hook = webhooks.Webhook("x", Settings(), [key])  # type: ignore[arg-type]
    lower = CIMultiDict((name, value) for name, value in one.headers.items())
    assert lower["webhook-id"] == "j-1"
    assert hook.check(lower, one.body, time.time())
    with pytest.raises(Exception, match="another"):
        hook.check(lower, one.body + b" ", time.time())


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "headers", "reason", "after"),
    [
        (503, {}, "unavailable", None),
        (502, {}, "unavailable", None),
        (503, {"Retry-After": "2"}, "unavailable", None),
        (429, {"Retry-After": "2"}, "unavailable", 2),
        (503, {"Retry-After": "30"}, "unavailable", 30),
        (503, {"Retry-After": "99999999999"}, "unavailable", 3600),
        (503, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, "unavailable", None),
        (429, {"Retry-After": "soon"}, "unavailable", None),
        (409, {}, "unavailable", None),
        (500, {}, "raised", None),
        (301, {"Location": "https://example.com/"}, "blocked", None),
        (401, {}, "blocked", None),
        (403, {}, "blocked", None),
        (404, {}, "blocked", None),
        (405, {}, "blocked", None),
        (501, {}, "blocked", None),
        (0, {}, "unavailable", None),
    ],
)
def test_statuses(
    serve: Callable[..., Service], status: int, headers: dict[str, str], reason: str, after: Any
) -> None:
    service = serve(lambda _: (status, headers, b"no"))
    result = run(service)
    assert result.failure is not None
    assert (result.failure.reason, result.failure.after) == (reason, after)
    assert result.rejections == []
    if status:
        assert str(status) in result.failure.error


def test_a_conflict_may_mean_done(serve: Callable[..., Service]) -> None:
    service = serve(lambda _: (409,))
    assert run(service, on_conflict="done").failure is None
    assert run(serve(lambda _: (409, {"Retry-After": "1"})), on_conflict="done").failure is not None


@pytest.mark.parametrize(
    "body",
    [
        b'{"accepted": "9", "invalid": 1}',
        b'{"accepted": 9, "invalid": 1, "errors": [{"index": 99}]}',
        b"[" * 5000,
    ],
)
def test_what_an_api_tells_behind_a_200_fails_no_batch(
    serve: Callable[..., Service], body: bytes
) -> None:
    result = run(serve(lambda _: (200, {"Content-Type": "application/json"}, body)))
    assert (result.failure, result.rejections) == (None, [])


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_record_that_is_refused_costs_one(serve: Callable[..., Service], status: int) -> None:
    service = serve(lambda one: (status, {}, b"no -1 here") if b'"n":77,' in one.body else (204,))
    result = run(service, job(range(1000)))
    assert result.failure is None
    (refused,) = result.rejections
    assert (refused.index, refused.error) == (77, f"{status} no -1 here")
    taken = [one for one in service.got if b'"n":77,' not in one.body]
    numbers = [json.loads(x)["n"] for one in taken for x in one.body.splitlines()]
    assert sorted(numbers) == [n for n in range(1000) if n != 77]
    assert len(service.got) <= 2 * 10 + 1
    # The parts have the same keys whenever they come.
    before = [one.key for one in service.got]
    service.got.clear()
    assert run(service, job(range(1000))).rejections == result.rejections
    assert [one.key for one in service.got] == before
    assert len(set(before)) == len(before)


def test_a_batch_is_cut_before_it_is_too_long(serve: Callable[..., Service]) -> None:
    service = serve(ok)
    assert run(service, job(range(1000)), request_bytes_max="4KiB").failure is None
    assert max(len(one.body) for one in service.got) <= 4096
    lines = [line for one in service.got for line in one.body.splitlines()]
    assert [json.loads(line)["n"] for line in lines] == list(range(1000))


def test_single_records_that_fail_do_not_hold_the_others_up(serve: Callable[..., Service]) -> None:
    failing = {3: (503,), 5: (429, {"Retry-After": "7"}), 8: (500,)}
    service = serve(lambda one: failing.get(json.loads(one.body)["n"], (200,)))
    result = run(service, body="record")
    assert result.failure is None
    assert {one.index: (one.after, one.is_unavailable) for one in result.retries} == {
        3: (None, True), 5: (7, True), 8: (None, False),
    }  # fmt: skip


def test_a_service_that_goes_down_between_single_records(serve: Callable[..., Service]) -> None:
    service = serve(lambda one: (200,) if json.loads(one.body)["n"] < 4 else (503,))
    result = run(service, job(range(100)), body="record")
    assert [one.index for one in result.retries] == list(range(4, 100))
    assert len(service.got) == 4 + 3
    all_fail = run(serve(lambda _: (503,)), job(range(100)), body="record")
    assert all_fail.failure is not None
    assert all_fail.failure.reason == "unavailable"


def test_single_records_before_one_that_blocks_are_not_sent_again(
    serve: Callable[..., Service],
) -> None:
    """As a firewall does it, which forbids what is in one record."""
    service = serve(lambda one: (403,) if json.loads(one.body)["n"] == 4 else (200,))
    result = run(service, body="record")
    assert result.failure is None
    assert {one.index for one in result.retries if one.is_unavailable} == set(range(4, 10))
    assert len(service.got) == 5
    later = run(service, job(range(4, 10), 2), body="record")
    assert later.failure is not None
    assert later.failure.reason == "blocked"


@pytest.mark.parametrize("status", [429, 503, 403])
def test_parts_behind_a_limit_come_again_alone(serve: Callable[..., Service], status: int) -> None:
    """Else a limit that has no room for all parts would get the first ones again for ever."""
    stored: list[bytes] = []

    def answer(one: Request) -> tuple[Any, ...]:
        if len(stored) == 2:
            return (status, {"Retry-After": "7"} if status == 429 else {}, b"")
        stored.append(one.body)
        return (200,)

    result = run(serve(answer), job(range(8)), request_bytes_max=60)
    assert result.failure is None
    lines = [line for body in stored for line in body.splitlines()]
    assert {one.index for one in result.retries} == set(range(len(lines), 8))
    assert all(one.is_unavailable for one in result.retries)
    assert {one.after for one in result.retries} == {7 if status == 429 else None}


@pytest.mark.parametrize("is_ingestd", [True, False])
def test_parts_keep_their_keys_where_these_tell_what_is_there(
    serve: Callable[..., Service], *, is_ingestd: bool
) -> None:
    taken = {} if not is_ingestd else {"Content-Type": "application/json"}

    def answer(one: Request) -> tuple[Any, ...]:
        count = one.body.count(b"\n")
        if len(service.got) == 3:
            return (429 if is_ingestd else 504,)
        return (202, taken, b'{"accepted":%d,"invalid":0}' % count)

    service = serve(answer)
    result = run(service, job(range(8)), request_bytes_max=60)
    assert result.failure is not None
    assert result.failure.reason == "unavailable"


def test_the_connection_is_kept_and_made_again(serve: Callable[..., Service]) -> None:
    service = serve(lambda one: (200, {"Connection": "close"}) if b'"n":1,' in one.body else (200,))
    with worker(service, body="record") as sink:
        for batch in range(3):
            assert sink.run(job(range(5), batch)).failure is None
    assert service.connections == 4
    assert len(service.got) == 15


def test_a_kept_connection_that_broke_costs_nothing(serve: Callable[..., Service]) -> None:
    seen: set[str] = set()

    def answer(one: Request) -> tuple[Any, ...]:
        first = one.key not in seen
        seen.add(one.key)
        return (0,) if first and one.key == '"j-2"' else (200,)

    service = serve(answer)
    with worker(service) as sink:
        assert sink.run(job(range(5), 1)).failure is None
        assert sink.run(job(range(5), 2)).failure is None
    assert [one.key for one in service.got] == ['"j-1"', '"j-2"', '"j-2"']


def test_an_answer_that_comes_byte_by_byte_ends_at_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            one, _ = server.accept()
            with one:
                try:
                    while True:
                        one.sendall(b"H")
                        time.sleep(0.05)
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        started = time.monotonic()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        with worker(url, timeout="500ms") as sink:
            result = sink.run(job(range(3)))
        thread.join(60)
    assert result.failure is not None
    assert result.failure.reason == "unavailable"
    assert time.monotonic() - started < 60


def test_an_endless_answer_is_bounded(serve: Callable[..., Service]) -> None:
    service = serve(lambda _: (400, {}, b"x" * (3 * 1024 * 1024)))
    result = run(service, job([1]))
    assert len(result.rejections[0].error) < 500


# -- addresses and TLS -----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "169.254.169.254", "[::1]"])
def test_private_addresses_have_to_be_allowed(host: str) -> None:
    with worker(f"http://{host}:9/", allow_private=False) as sink:
        result = sink.run(job([1]))
        assert result.failure is not None
        assert result.failure.reason == "blocked"
        assert "allow_private" in result.failure.error


def test_tls(serve: Callable[..., Service], tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    service = serve(ok, context)
    url = f"https://localhost:{service.port}/"
    ca, mine = tmp_path / "ca.pem", tmp_path / "mine.pem"
    authority.cert_pem.write_to_path(str(ca))
    client = authority.issue_cert("sender")
    client.private_key_and_cert_chain_pem.write_to_path(str(mine))
    with worker(url, tls_ca=str(ca), tls_certificate=str(mine)) as sink:
        assert sink.run(job(range(3))).failure is None
    with worker(url) as sink:
        result = sink.run(job(range(3)))
        assert result.failure is not None
        assert result.failure.reason == "blocked"
        assert "self-signed" in result.failure.error or "issuer" in result.failure.error
    with worker(url, tls_ca=str(tmp_path / "none.pem")) as sink:
        result = sink.run(job(range(3)))
        assert result.failure is not None
        assert result.failure.reason == "blocked"


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({}, "url"),
        ({"url": "ftp://x/"}, "url"),
        ({"url": "https://user:hidden@x/"}, "url"),
        ({"url": "https://x/", "headers": {"Host": "y"}}, "headers"),
        ({"url": "https://x/", "headers": {"X": "a\r\nB: c"}}, "headers"),
        ({"url": "https://x/", "headers": {"X": "a", "x": "b"}}, "headers"),
        ({"url": "https://x/", "headers": {"authorization": "a"}, "token": "hid"}, "headers"),
        (
            {"url": "https://x/", "headers": {"content-encoding": "a"}, "compress": "gzip"},
            "headers",
        ),
        ({"url": "https://collector..example/"}, "url"),
        ({"url": f"https://{'a' * 64}.example/"}, "url"),
        ({"url": "https://.example/"}, "url"),
        ({"url": "https://x:0/"}, "url"),
        ({"url": "https://x/\x01"}, "url"),
        ({"url": "https://x/", "token": "hid\nden"}, "token"),
        ({"url": "https://x/", "sign": "whsec_hidden"}, "sign"),
        ({"url": "https://x/", "sign": "whsec_aGlkZGVu"}, "sign"),
        ({"url": "https://x/", "timeout": "0s"}, "timeout"),
        ({"url": "https://x/", "tls_key": "k"}, "tls_key"),
        ({"url": "https://x/", "body": "xml"}, "body"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], part: str) -> None:
    with pytest.raises(OptionError, match=part) as caught:
        HttpSinkOptions.of(**options)
    assert "hid" not in str(caught.value)


def test_what_finds_invalid_records_can_never_be_accepted(serve: Callable[..., Service]) -> None:
    """The bound that made the first one invalid may be another one meanwhile."""
    listed = [{"index": n, "reason": "too_large"} for n in range(100)]

    def answer(one: Request) -> tuple[Any, ...]:
        lines = one.body.splitlines()
        if lines[-1] == b"{":
            last = [{"index": len(lines) - 1, "reason": "malformed"}]
            document = {"type": "urn:ingestd:problem:malformed", "errors": last}
            return (400, {"Content-Type": JSON_PROBLEM}, json.dumps(document).encode())
        document = {"accepted": 19, "invalid": 101, "errors": listed}
        return (202, {"Content-Type": "application/json"}, json.dumps(document).encode())

    service = serve(answer)
    result = run(service, job(range(120)))
    assert len(result.rejections) == 100
    assert [one.body.splitlines()[-1] == b"{" for one in service.got] == [False, True]


@pytest.mark.parametrize(("status", "sent"), [(503, 0), (404, 1)])
def test_a_proxy_without_its_ingestd_says_nothing_about_ancestors(
    serve: Callable[..., Service], status: int, sent: int
) -> None:
    """The batch that the parts were split from is stored; the receiver restarts behind a proxy."""
    away = [True]

    def answer(one: Request) -> tuple[Any, ...]:
        if away and away.pop():
            return (status, {}, b"no server is available")
        name = "idempotency-key-reused" if one.method == "POST" else "method-not-allowed"
        body = json.dumps({"type": f"urn:ingestd:problem:{name}"}).encode()
        asked = (422 if one.method == "POST" else 405, {"Content-Type": JSON_PROBLEM}, body)
        stored = (202, {"Content-Type": "application/json"}, b'{"accepted":5,"invalid":0}')
        return stored if one.body else asked

    service = serve(answer)
    with worker(service, "text") as sink:
        results = [sink.run(job(range(5), 2 + n, [1])) for n in range(3)]
    assert [one.failure is None for one in results] == [status == 404, True, True]
    assert len([one for one in service.got if one.body]) == sent


def test_a_header_of_the_option_is_sent_once(serve: Callable[..., Service]) -> None:
    kinds: list[list[str]] = []

    def answer(one: Request) -> tuple[Any, ...]:
        kinds.append([text for name, text in one.headers.items() if name.lower() == "content-type"])
        return (204,)

    service = serve(answer)
    assert run(service, headers={"content-type": "application/vnd.own+json"}).failure is None
    assert kinds == [["application/vnd.own+json"]]


# -- another ingestd -------------------------------------------------------------------------------


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    one = Receiver(tmp_path / "receiver")
    one.start()
    yield one
    one.stop()


def toward(receiver: Receiver, record_format: str = "json", **options: Any) -> Worker:
    return worker(receiver.url, record_format, token=TOKEN, **options)


@pytest.mark.parametrize("body", ["ndjson", "array"])
def test_invalid_records_of_another_ingestd_are_dead_letters(receiver: Receiver, body: str) -> None:
    """More of them than an answer lists, and again when the batch comes again."""
    items = [BAD if n % 3 == 0 else b'{"n":%d}' % n for n in range(600)]
    one = Job("j-1", 1, Records.lines(items), [Span(1, 0, 600)], "j")
    bad = list(range(0, 600, 3))
    assert len(bad) > ERRORS_MAX
    for _ in range(2):
        with toward(receiver, body=body) as sink:
            result = sink.run(one)
        assert result.failure is None
        assert [rejected.index for rejected in result.rejections] == bad
        assert all("too_large" in rejected.error for rejected in result.rejections)
    # A part of it, under another id.
    part = Job("j-2", 1, Records.lines(items[:300]), [Span(1, 0, 300)], "j", 0.0, ["j-1"])
    with toward(receiver, body=body) as sink:
        result = sink.run(part)
    assert [rejected.index for rejected in result.rejections] == bad[:100]
    assert sorted(receiver.stored()) == [n for n in range(600) if n % 3]


def test_records_of_which_none_can_be_accepted(receiver: Receiver) -> None:
    items = [BAD] * 250
    one = Job("j-1", 1, Records.lines(items), [Span(1, 0, 250)], "j")
    with toward(receiver) as sink:
        result = sink.run(one)
    assert result.failure is None
    assert [rejected.index for rejected in result.rejections] == list(range(250))


def test_mostly_invalid_records(receiver: Receiver) -> None:
    items = [b'{"n":%d}' % n if n % 4 == 0 else BAD for n in range(400)]
    one = Job("j-1", 1, Records.lines(items), [Span(1, 0, 400)], "j")
    for _ in range(2):
        with toward(receiver) as sink:
            result = sink.run(one)
        assert result.failure is None
        assert [rejected.index for rejected in result.rejections] == [
            n for n in range(400) if n % 4
        ]
    assert sorted(receiver.stored()) == list(range(0, 400, 4))


def test_a_batch_that_was_sent_with_other_options_is_there_already(receiver: Receiver) -> None:
    for compress in ("none", "gzip", "zstd"):
        with toward(receiver, compress=compress) as sink:
            assert sink.run(job(range(50), bad=BAD)).rejections[0].index == 25
    assert sorted(receiver.stored()) == list(range(50))


def test_check_says_what_it_found(receiver: Receiver, serve: Callable[..., Service]) -> None:
    with toward(receiver) as sink:
        (found,) = sink.check()
        assert (found.level, "ingestd" in found.text) == ("info", True)
    with worker(receiver.url, token="x" * 32) as sink:
        assert [one.level for one in sink.check()] == ["error"]
    with worker(receiver.url + "/nosuch", token=TOKEN) as sink:
        assert [one.level for one in sink.check()] == ["error"]
    service = serve(ok)
    with worker(service) as sink:
        assert [one.level for one in sink.check()] == ["info"]
    assert {one.method for one in service.got} == {"GET", "OPTIONS"}
    with worker(serve(lambda _: (403,))) as sink:
        assert [one.level for one in sink.check()] == ["error"]
    assert receiver.daemon is not None
    assert receiver.daemon.status()["pipelines"]["default"]["accepted"] == 0


@pytest.mark.slow
def test_a_receiver_that_stops_in_the_middle(tmp_path: Path) -> None:
    """A try that overran its timeout is one whose request may still be accepted."""
    receiver = Receiver(tmp_path / "receiver")
    receiver.start()
    options = {"url": receiver.url, "token": TOKEN, "allow_private": True, "timeout": "1s"}
    try:
        with daemon("http", "--handler.options", json.dumps(options), "--batch.age_max", "10ms",
                    "--retry.backoff", "20ms", cwd=tmp_path) as one:  # fmt: skip
            assert receiver.daemon is not None
            receiver.daemon.process.send_signal(signal.SIGSTOP)
            assert one.post(b"".join(b'{"n":%d}\n' % n for n in range(100)))[0] == 202
            assert "in time" in one.event("batch_failed")["error"]
            receiver.daemon.process.send_signal(signal.SIGCONT)
            assert one.until_settled()["processed"] == 100
        assert sorted(receiver.stored()) == list(range(100))
    finally:
        receiver.stop()
