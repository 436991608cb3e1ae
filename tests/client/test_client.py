"""The Python client against the real daemon: each record once, in order, or accounted for."""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.client import AsyncClient, BufferFull, Client, ClientClosed, Counts
from tests.access.tools import Files
from tests.client.tools import Proxy, arrived, arrives, closed_port, restarting, until
from tests.daemon.harness import ROOT, Daemon, daemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

THREAD = ("--executor.kind", "thread", "--executor.workers", "1", "--batch.age_max", "50ms")
RECORDS = 1000


def spoilt(number: int) -> str:
    """One request of 20 is refused, one of 17 loses its answer."""
    return "503" if number % 20 == 0 else "lose" if number % 17 == 0 else ""


def script(text: str, *args: str, cwd: Path) -> subprocess.Popen[str]:
    """A program of its own that uses the client."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", text, *args], cwd=cwd, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> str:
    try:
        out, err = process.communicate(timeout=90)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("shared")
    with daemon(*THREAD, "--record_bytes_max", "4KiB", cwd=folder) as one:
        one.folder = folder  # type: ignore[attr-defined]
        yield one


def url_of(one: Daemon) -> str:
    return f"http://127.0.0.1:{one.port}"


@pytest.mark.slow
def test_each_record_once_through_refusals_lost_answers_and_a_restart(tmp_path: Path) -> None:
    with Proxy(spoilt) as proxy, restarting(proxy, tmp_path, *THREAD, after=30) as daemons:
        with Client(proxy.url, batch_records=10, close_timeout=60) as client:
            for number in range(RECORDS):
                client.send({"n": number})
            assert client.flush(120)
        assert client.counts == Counts(RECORDS, RECORDS)
        until(lambda: len(daemons) == 2)
        arrives(tmp_path, daemons[-1], range(RECORDS))
        assert arrived(tmp_path) == list(range(RECORDS))
    assert proxy.faults["503"] >= 5
    assert proxy.faults["lose"] >= 5


@pytest.mark.slow
async def test_each_record_once_from_coroutines(tmp_path: Path) -> None:
    with Proxy(spoilt) as proxy, restarting(proxy, tmp_path, *THREAD, after=30) as daemons:
        # So small that the coroutines wait for room again and again.
        async with AsyncClient(
            proxy.url, batch_records=10, buffer_bytes=5000, close_timeout=60
        ) as client:

            async def work(first: int) -> None:
                for number in range(first, RECORDS, 4):
                    await client.send({"n": number})

            await asyncio.gather(*map(work, range(4)))
            assert await client.flush(120)
        assert client.counts == Counts(RECORDS, RECORDS)
        await asyncio.to_thread(until, lambda: len(daemons) == 2)
        await asyncio.to_thread(arrives, tmp_path, daemons[-1], range(RECORDS))
        for first in range(4):  # the order of each coroutine
            assert [n for n in arrived(tmp_path) if n % 4 == first] == [*range(first, RECORDS, 4)]


def test_threads_share_a_client(shared: Daemon) -> None:
    before = shared.status()["pipelines"]["default"]["accepted"]
    with Client(url_of(shared), batch_records=50, buffer_bytes=20_000, close_timeout=60) as client:
        threads = [
            threading.Thread(target=lambda: [client.send({"n": n}) for n in range(500)])
            for _ in range(4)
        ]
        for one in threads:
            one.start()
        for one in threads:
            one.join(60)
    assert client.counts == Counts(2000, 2000)
    assert shared.status()["pipelines"]["default"]["accepted"] == before + 2000


def test_batches_by_count_bytes_and_age_on_one_connection(shared: Daemon) -> None:
    with Proxy() as proxy:
        proxy.port = shared.port
        with Client(proxy.url, batch_records=100, batch_age=600, close_timeout=60) as client:
            for number in range(100):
                client.send({"number": number})
            proxy.until(1)  # by count
            until(lambda: client.counts.accepted == 100)
        with Client(
            proxy.url, batch_bytes=2000, batch_age=600, compress=False, close_timeout=60
        ) as client:
            for _ in range(4):
                client.send("x" * 598)  # 600 with its quotes: three make a batch
            proxy.until(2)
            until(lambda: client.counts.accepted == 3)
            assert client.counts.pending == 1
        proxy.until(3)
        with Client(proxy.url, batch_age=0.01, close_timeout=60) as client:
            client.send(1)
            until(lambda: client.counts.accepted == 1)  # by age
            client.send(2)
            assert client.flush(60)
    keys, encodings, sizes = zip(*proxy.seen, strict=True)
    assert len(set(keys)) == 5
    assert proxy.connections == 3
    assert encodings == ("gzip", "", "", "", "")
    assert sizes[1:] == (1802, 600, 1, 1)


def test_a_retry_after_is_waited_for(shared: Daemon) -> None:
    statuses = iter(["429", "503"])
    with Proxy(lambda _: next(statuses, "")) as proxy:
        proxy.port, proxy.retry_after = shared.port, 1
        with Client(proxy.url) as client:
            client.send(1)
            assert client.flush(60)
    assert client.counts == Counts(1, 1)
    first, second, third = proxy.times
    assert second - first >= 1 <= third - second  # the first backoffs are 0.2 and 0.4 s at most
    assert len({key for key, *_ in proxy.seen}) == 1


def test_a_request_too_large_is_split(tmp_path: Path) -> None:
    flags = ("--http.request_bytes_max", "4KiB", "--record_bytes_max", "2KiB")
    with daemon(*THREAD, *flags, cwd=tmp_path) as one:
        refused: list[tuple[bytes, str]] = []
        with Client(
            url_of(one),
            compress=False,
            close_timeout=60,
            on_invalid=lambda *told: refused.append(told),
        ) as client:
            for number in range(100):
                client.send({"n": number, "pad": "x" * 200})
            client.send({"n": 100, "pad": "x" * 8000})  # too large also alone
            client.send({"n": 101})
        assert client.counts == Counts(102, 101, 1)
        one.until_settled()
        assert arrived(tmp_path) == [*range(100), 101]
    ((record, reason),) = refused
    assert json.loads(record)["n"] == 100
    assert "413" in reason


def test_invalid_records_and_a_bound_of_records_leave_the_bytes_of_requests_alone(
    tmp_path: Path,
) -> None:
    """Requests are halved around the invalid records, and those that follow are as full as ever."""
    with daemon(*THREAD, "--http.records_max", "700", cwd=tmp_path) as one, Proxy() as proxy:
        proxy.port = one.port
        with Client(proxy.url, batch_age=600) as client:
            for number in range(1000):
                client.send(b"x" if number % 3 else b'{"n": 0}')
            assert client.flush(60)
            assert client.counts == Counts(1000, 334, 666)
            before = len(proxy.seen)
            for number in range(1000):
                client.send({"n": number, "pad": "x" * 200})
            assert client.flush(60)
        assert client.counts == Counts(2000, 1334, 666)
    assert len(proxy.seen) - before == 2


def test_a_byte_order_mark_is_no_record(shared: Daemon) -> None:
    """A daemon skips one at the beginning of a body: with it the request had a record too few."""
    mark = b"\xef\xbb\xbf"
    with Client(url_of(shared), batch_age=600, close_timeout=60) as client:
        for nothing in (mark, b" " + mark + b"\n", mark * 2):
            with pytest.raises(ValueError, match="at least one"):
                client.send(nothing)
        client.send(mark + b"1")
        client.send(mark + b"2")
        assert client.flush(60)
        assert client.counts == Counts(2, 2)


def test_a_body_that_shrinks_too_much_is_sent_as_it_is(shared: Daemon) -> None:
    with Proxy() as proxy:
        proxy.port = shared.port
        with Client(
            proxy.url, batch_records=600, batch_bytes=2**22, batch_age=600, close_timeout=60
        ) as client:
            for _ in range(600):
                client.send("x" * 4000)
        assert client.counts == Counts(600, 600)
    assert proxy.seen[0][1:] == ("", 600 * 4003 - 1)


def test_invalid_records_are_told_apart(shared: Daemon) -> None:
    refused: dict[bytes, str] = {}
    with Client(
        url_of(shared), on_invalid=refused.__setitem__, batch_age=600, close_timeout=60
    ) as client:
        for number in range(10):
            client.send({"n": number})
        client.send(b"{nonsense}")
        client.send("x" * 5000)
        client.send(b'{\n"n": 10\n}')
    assert client.counts == Counts(13, 11, 2)
    assert refused[b"{nonsense}"].startswith("malformed")
    assert refused[b'"' + b"x" * 5000 + b'"'].startswith("too_large")
    refused.clear()
    with Client(
        url_of(shared), on_invalid=refused.__setitem__, batch_age=600, close_timeout=60
    ) as client:
        client.send(b"{nonsense}")  # nothing good beside it: 400
        client.flush()
        for number in range(300):  # mostly invalid: the daemon stores nothing of such a request
            client.send(b"{bad %d}" % number)
            if number % 3 == 0:
                client.send({"n": number})
    assert client.counts == Counts(401, 100, 301)
    assert len(refused) == 201  # of each half the first 100, and the one alone


@pytest.mark.parametrize("record", [{1}, float("nan"), "\ud800", b" \n", object()])
def test_what_is_no_json_is_refused_at_once(record: Any) -> None:
    with Client("http://127.0.0.1:1") as client:
        with pytest.raises((TypeError, ValueError)):
            client.send(record)
        assert client.counts == Counts()


def test_a_callback_that_fails_is_logged_and_one_may_use_the_client(
    shared: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        client.send({"about": "it"})
        assert not client.flush()  # its own thread waits for nothing
        raise RuntimeError("mine")

    with Client(url_of(shared), on_invalid=fail, close_timeout=60) as client:
        client.send(b"{")
        client.flush(60)
    assert client.counts == Counts(2, 1, 1)
    assert "a callback of the client failed" in caplog.text


@pytest.mark.parametrize("full", ["block", "raise", "drop"])
def test_a_full_buffer(full: Any, shared: Daemon) -> None:
    """While nothing is accepted the buffer holds what it may hold and no more."""
    with Proxy(lambda _: "" if opened.is_set() else "503") as proxy:
        opened = threading.Event()
        proxy.port = shared.port
        with Client(
            proxy.url, full=full, buffer_bytes=10_000, batch_records=10, close_timeout=60
        ) as client:
            room = 10_000 // (len('{"n":10}') + 160)
            for number in range(10, 10 + room):
                assert client.send({"n": number})
            if full == "drop":
                assert not client.send({"n": 0})
                assert client.counts == Counts(room + 1, 0, 0, 1)
            else:
                with pytest.raises(BufferFull):
                    client.send({"n": 99}, timeout=0.01)
                assert client.counts.sent == room
            with pytest.raises(BufferFull) if full != "drop" else pytest.MonkeyPatch.context():
                client.send("x" * 20_000)  # would never fit: no wait
            if full == "block":
                thread = threading.Thread(target=client.send, args=({"n": 0},))
                thread.start()
                opened.set()
                thread.join(60)
                assert not thread.is_alive()
            opened.set()
        assert client.counts.accepted == room + (full == "block")


def test_close_wakes_a_blocked_send() -> None:
    client = Client(f"http://127.0.0.1:{closed_port()}", buffer_bytes=1000)
    raised = []

    def fill() -> None:
        try:
            while True:
                client.send("x" * 100)
        except ClientClosed as error:
            raised.append(error)

    thread = threading.Thread(target=fill)
    thread.start()
    until(lambda: client.counts.sent == 3)
    counts = client.close(0.0)
    thread.join(60)
    assert raised
    assert counts == Counts(3, 0, 0, 3)


@pytest.mark.parametrize("kind", ["down", "hangs"])
def test_a_daemon_that_is_away_for_longer_than_the_deadline(kind: str) -> None:
    dropped: list[tuple[list[bytes], str]] = []
    with Proxy(lambda _: "hang") as proxy:
        url = proxy.url if kind == "hangs" else f"http://127.0.0.1:{closed_port()}"
        client = Client(
            url,
            batch_records=2,
            request_timeout=600,
            on_dropped=lambda *told: dropped.append(told),
        )
        for number in range(5):
            client.send(number)
        if kind == "hangs":
            proxy.until(1)
        began = time.monotonic()
        counts = client.close(0.3)
        assert time.monotonic() - began < 60  # and not request_timeout
    assert counts == client.close() == Counts(5, 0, 0, 5)
    assert sorted(b"".join(one for records, _ in dropped for one in records)) == [*b"01234"]
    with pytest.raises(ClientClosed):
        client.send(1)
    client._thread.join(60)
    assert not client._thread.is_alive()


async def test_coroutines_and_a_daemon_that_is_away() -> None:
    async with AsyncClient(
        f"http://127.0.0.1:{closed_port()}", buffer_bytes=600, close_timeout=0.2
    ) as client:
        for number in range(3):
            await client.send(number)
        with pytest.raises(BufferFull):
            await client.send(3, timeout=0.05)
        assert not await client.flush(0.05)
        waits = asyncio.create_task(client.send(4))
        await asyncio.sleep(0)
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        blocked = asyncio.create_task(client.send(5))
        await asyncio.sleep(0)
    with pytest.raises(ClientClosed):
        await blocked
    assert client.counts == Counts(3, 0, 0, 3)
    assert not client._wakers


def test_a_request_is_given_up_after_retry_timeout() -> None:
    dropped: list[object] = []
    with Client(
        f"http://127.0.0.1:{closed_port()}",
        retry_timeout=0.05,
        on_dropped=lambda records, reason: dropped.extend([*records, reason]),
    ) as client:
        client.send(1)
        assert client.flush(60)
        assert client.counts == Counts(1, 0, 0, 1)
    assert dropped[0] == b"1"
    assert "refused" in str(dropped[1])


@pytest.mark.slow
def test_a_token_that_is_put_right_later_loses_nothing(tmp_path: Path, caplog: Any) -> None:
    secret = "an-example-of-a-token-0123456789"
    (tmp_path / "tokens").write_text("another-example-of-a-token-01234\n")
    with daemon(*THREAD, "--http.tokens.shop.file", str(tmp_path / "tokens"), cwd=tmp_path) as one:
        with Client(url_of(one), token=secret, close_timeout=60) as client:
            client.send({"n": 1})
            until(lambda: "401" in caplog.text)
            (tmp_path / "tokens").write_text(f"{secret}\n")
            one.terminate(signal.SIGHUP)
        assert client.counts == Counts(1, 1)
    assert secret not in caplog.text + repr(client)


def test_tls_with_an_authority_and_a_client_certificate(tmp_path: Path) -> None:
    files = Files(tmp_path / "pem")
    mine = files.issue("client", "shop.example")
    flags = (
        "--http.tls.certificate", files.server(), "--http.tls.client_ca", files.ca,
        "--http.tokens.shop.client_certificate", "shop.example",
    )  # fmt: skip
    with daemon(*THREAD, *flags, cwd=tmp_path) as one:
        url = f"https://127.0.0.1:{one.port}"
        with Client(url, ca=files.ca, certificate=mine, close_timeout=60) as client:
            client.send({"n": 1})
            assert client.flush(60)
            client.send({"n": 2})
        assert client.counts == Counts(2, 2)
        for wrong in ({"ca": files.ca}, {"certificate": mine}):
            with Client(url, retry_timeout=0, **wrong) as client:
                client.send({"n": 3})
            assert client.counts == Counts(1, 0, 0, 1)
        arrives(tmp_path, one, [1, 2])


@pytest.mark.slow
def test_a_client_killed_in_the_middle_doubles_nothing(tmp_path: Path) -> None:
    text = """
import sys
from ingestd.client import Client
client = Client(sys.argv[1], batch_records=7, batch_age=0.001)
for n in range(100_000):
    client.send({"n": n})
    if n % 100 == 99:
        client.flush()
        print(client.counts.accepted, flush=True)
"""
    with daemon(*THREAD, cwd=tmp_path) as one, Proxy(spoilt) as proxy:
        proxy.port = one.port
        process = script(text, proxy.url, cwd=tmp_path)
        assert process.stdout is not None
        out = process.stdout.readline()
        proxy.until(100)
        process.kill()  # a request is under way, or an answer, or a backoff
        out += process.stdout.read()
        process.communicate(timeout=60)
        told = int(out.rpartition("\n")[0].split()[-1])
        one.until_settled()
        numbers = arrived(tmp_path)
    assert told > 0
    assert numbers == list(range(len(numbers)))  # once, in order, without a gap
    assert len(numbers) >= told  # all that was said to be accepted


@pytest.mark.parametrize("how", ["end", "exception", "exit hook"])
def test_the_end_of_the_interpreter_sends_what_is_there(how: str, tmp_path: Path) -> None:
    text = """
import atexit, sys
from ingestd.client import Client
if sys.argv[2] == "exit hook":  # runs before the client's own: its thread cannot start any more
    atexit.register(lambda: client.send({"n": 2}))
client = Client(sys.argv[1], batch_age=3600, close_timeout=60)
if sys.argv[2] != "exit hook":
    client.send({"n": 2})
if sys.argv[2] == "exception":
    raise SystemExit(0)
"""
    with daemon(*THREAD, cwd=tmp_path) as one:
        ended(script(text, url_of(one), how, cwd=tmp_path))
        arrives(tmp_path, one, [2])


def test_close_posts_itself_where_no_thread_can_start(
    shared: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Python 3.12 on no thread starts once the end of the interpreter has begun."""

    def refuse(_: object) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        client = Client(url_of(shared), close_timeout=60)
        client.send(1)
        assert not client.flush()
        assert client.close() == Counts(1, 1)


def test_an_interrupted_end_drops_what_is_left_and_tells_it(tmp_path: Path) -> None:
    program = """
import sys
from ingestd.client import Client
client = Client(sys.argv[1], on_dropped=lambda records, _: print(records), close_timeout=60)
client.send({"n": 1})
print("ends", flush=True)
"""
    running = script(program, f"http://127.0.0.1:{closed_port()}", cwd=tmp_path)
    assert running.stdout is not None
    assert running.stdout.readline() == "ends\n"
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert (out, "Traceback" in err) == ("[b'{\"n\":1}']\n", False), err


def test_the_end_of_the_interpreter_has_a_deadline(tmp_path: Path) -> None:
    text = """
import sys
from ingestd.client import Client
tell = lambda records, reason: print(len(records), "dropped", flush=True)
for _ in range(3):
    Client(sys.argv[1], batch_age=3600, close_timeout=0.5, on_dropped=tell).send(1)
"""
    out = ended(script(text, f"http://127.0.0.1:{closed_port()}", cwd=tmp_path))
    assert out == "1 dropped\n" * 3


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_has_a_buffer_of_its_own(tmp_path: Path) -> None:
    with daemon(*THREAD, cwd=tmp_path) as one, Proxy() as proxy:
        proxy.port = one.port
        with Client(proxy.url, batch_age=3600, close_timeout=60) as client:
            client.send({"n": 0})
            client.flush()
            client.send({"n": 1})  # waits in the parent
            child = os.fork()
            if child == 0:  # the bare call: nothing runs at its end
                code = 1
                try:
                    client.send({"n": 2})
                    code = client.close(60) != Counts(1, 1)
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            worker = multiprocessing.get_context("fork").Process(
                target=client.send, args=({"n": 3},)
            )
            worker.start()
            worker.join(60)
            assert worker.exitcode == 0
            client.send({"n": 4})
        assert client.counts == Counts(3, 3)
        arrives(tmp_path, one, range(5))
    assert len({key for key, *_ in proxy.seen}) == 4
    assert proxy.connections == 3  # the parent kept its own


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_while_a_request_is_under_way(tmp_path: Path) -> None:
    """The child leaves the parent's request alone, and the parent goes on with it."""
    with (
        daemon(*THREAD, cwd=tmp_path) as one,
        Proxy(lambda number: "hang" if number == 1 else "") as proxy,
    ):
        proxy.port = one.port
        with Client(proxy.url, batch_records=1, close_timeout=60) as client:
            client.send({"n": 0})
            proxy.until(1)
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    client.send({"n": 1})
                    code = client.close(60) != Counts(1, 1)
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            proxy.released.set()
        assert client.counts == Counts(1, 1)
        arrives(tmp_path, one, [0, 1])


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("127.0.0.1:8080", {}),
        ("ftp://localhost", {}),
        ("http://user:secret@localhost", {}),
        ("http://localhost/?x=1", {}),
        ("http://localhost/a path", {}),
        ("http://localhost/\u00e9", {}),
        ("http://local host", {}),
        ("http://localhost/v1/records", {}),
        ("http://localhost/proxied/v1/records/clicks", {}),
        ("http://localhost", {"ca": "ca.pem"}),
        ("http://localhost", {"token": "two words"}),
        ("http://localhost", {"full": "wait"}),
        ("http://localhost", {"batch_records": 0}),
        ("http://localhost", {"batch_age": "1s"}),
        ("http://localhost", {"batch_age": float("inf")}),
        ("http://localhost", {"batch_bytes": "1MiB"}),
        ("http://localhost", {"request_timeout": float("nan")}),
        ("http://localhost", {"retry_timeout": "1h"}),
        ("http://localhost", {"close_timeout": None}),
        ("http://localhost", {"token": b"secret"}),
        ("http://localhost", {"pipeline": 3}),
        ("http://localhost", {"on_dropped": "print"}),
    ],
)
def test_wrong_options(url: str, options: dict[str, Any]) -> None:
    """They are told where the client is made: in its thread they would cost the records."""
    with pytest.raises((TypeError, ValueError)) as caught:
        Client(url, **options)
    assert "secret" not in str(caught.value)
    assert "two words" not in str(caught.value)


def test_the_client_logs_an_outage_once(shared: Daemon, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ingestd.client")
    with Proxy(lambda number: "503" if number < 4 else "") as proxy:
        proxy.port = shared.port
        with Client(proxy.url) as client:
            client.send(1)
            client.flush(60)
    began, over = [one.getMessage() for one in caplog.records if one.name == "ingestd.client"]
    assert "cannot be sent" in began
    assert "again" in over
