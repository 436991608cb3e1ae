"""The real daemon with `--source fetch`: kills, signals, exit codes, secrets, mistakes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import pty
import re
import signal
import sqlite3
import ssl
import subprocess
import sys
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from aiohttp import web

from tests.daemon.harness import ROOT, daemon
from tests.daemon.test_input import shown_by
from tests.faults.tools import until
from tests.fetch.nginx import needs_nginx, serving_files
from tests.fetch.tools import Server, lines, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

HERE = ("--source", "fetch", "--fetch.allow_private", "true", "--fetch.backoff", "1ms")


LINES = 100_000
"""So many that a server with a rate has sent only some of them when it is killed."""
NO_ADMIN = ("--admin.listen", "")


@contextlib.contextmanager
def server(handler: Any, **more: Any) -> Iterator[Server]:
    """The server of `tools`, in a thread with a loop of its own."""
    loop = asyncio.new_event_loop()
    ready: Any = threading.Event()
    ends = asyncio.Event()

    async def serve() -> None:
        async with serving(handler, **more) as started:
            ready.server = started
            ready.set()
            await ends.wait()

    def turn() -> None:
        loop.run_until_complete(serve())
        loop.close()

    thread = threading.Thread(target=turn)
    thread.start()
    assert ready.wait(60)
    try:
        yield ready.server
    finally:
        loop.call_soon_threadsafe(ends.set)
        thread.join(60)


async def good(request: web.Request) -> web.StreamResponse:
    """Ten lines, each path its own; `/bad` is not there."""
    if request.path == "/bad":
        return web.Response(status=404)
    first = int(request.path.strip("/") or 0)
    return web.Response(body=lines(first, first + 10), headers={"ETag": '"v1"'})


def numbers(path: Path) -> list[int]:
    with closing(sqlite3.connect(path)) as db:
        return [row[0] for row in db.execute("SELECT n FROM records ORDER BY n")]


def run(*args: str, cwd: Path, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ingestd", *args], cwd=cwd, capture_output=True, text=True,
        timeout=60, input=stdin, env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )  # fmt: skip


# -- the end ---------------------------------------------------------------------------------------


def test_everything_is_done_and_drained(tmp_path: Path) -> None:
    with server(good) as web_, daemon(
        "sqlite", *HERE, "--fetch.urls", f"{web_.url}/0,{web_.url}/10 {web_.url}/20", cwd=tmp_path
    ) as one:  # fmt: skip
        assert one.wait() == 0
        assert one.event("input_ended")["waits"] == "until all is settled, without deadline"
        assert not [event for event in one.events if event["event"] == "drain_started"]
        report = one.event("drained")
        assert (report["accepted"], report["processed"], report["balanced"]) == (30, 30, True)
        summary = one.event("input_summed_up")
        assert (summary["urls_done"], summary["urls_total"], summary["lines"]) == (3, 3, 30)
    assert numbers(tmp_path / "ingestd-data" / "out.db") == list(range(30))


@pytest.mark.parametrize("journal", ["sqlite", "memory"])
def test_what_is_given_up_is_listed_and_the_exit_code_is_1(tmp_path: Path, journal: str) -> None:
    with server(good) as web_, daemon(
        "sqlite", *HERE, "--fetch.urls", f"{web_.url}/bad {web_.url}/10",
        "--journal.kind", journal, cwd=tmp_path,
    ) as one:  # fmt: skip
        assert one.wait() == 1
        given_up = one.event("urls_given_up")
        assert given_up["urls"] == [f"{web_.url}/bad: the server answered 404 Not Found"]
        assert one.event("drained")["processed"] == 10
        assert one.event("daemon_left")["code"] == 1
    assert numbers(tmp_path / "ingestd-data" / "out.db") == list(range(10, 20))


def test_a_server_whose_authority_the_machine_trusts(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with server(good, ssl=context) as web_:
        assert web_.url.startswith("https://")
        arguments = ("run", "sqlite", *HERE, "--fetch.urls", f"{web_.url}/0", *NO_ADMIN)
        refused = run(*arguments, "--fetch.attempts_max", "1", cwd=tmp_path)
        assert refused.returncode == 1
        assert not web_.asked
        trusted = run(*arguments, cwd=tmp_path, SSL_CERT_FILE=str(tmp_path / "ca.pem"))
        assert trusted.returncode == 0, trusted.stderr
    assert numbers(tmp_path / "ingestd-data" / "out.db") == list(range(10))


def test_a_terminal_shows_how_far_it_is(tmp_path: Path) -> None:
    """URLs, lines, rate and bytes on one line that is drawn over, and the last one stays."""
    ours, theirs = pty.openpty()
    try:
        with server(good) as web_:
            command = [sys.executable, "-m", "ingestd", "run", "sqlite", *HERE, *NO_ADMIN,
                       "--fetch.urls", f"{web_.url}/0 {web_.url}/10"]  # fmt: skip
            with subprocess.Popen(
                command, cwd=tmp_path, stdin=subprocess.DEVNULL, stderr=theirs,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            ) as process:  # fmt: skip
                try:
                    shown = shown_by(ours, process)
                finally:
                    process.kill()
        assert process.returncode == 0
    finally:
        os.close(ours)
        os.close(theirs)
    assert "\r\x1b[K" in shown
    last = [part for part in shown.split("\r\x1b[K") if " URLs" in part][-1].splitlines()[0]
    done = r"2/2 URLs, 20 lines, 20 processed \([\d,]+/s\), 0 pending, [\d.]+ (B|KiB), [\d.]+ s"
    assert re.fullmatch(done, last), last


def test_a_list_from_a_file_and_from_standard_input(tmp_path: Path) -> None:
    with server(good) as web_:
        (tmp_path / "urls.txt").write_text(f"# two\n{web_.url}/0\n\n{web_.url}/10\n")
        quiet = ("--admin.listen", "", "--log.level", "error")
        done = run("run", "sqlite", *HERE, "--fetch.file", "urls.txt", *quiet, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        done = run("run", "sqlite", *HERE, "--fetch.file", "-", *quiet, cwd=tmp_path,
                   stdin=f"{web_.url}/0\n{web_.url}/20\n")  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert sorted((one.path, one.headers.get("if-none-match", "")) for one in web_.asked) == [
            ("/0", ""), ("/0", '"v1"'), ("/10", ""), ("/20", "")]  # fmt: skip
    assert numbers(tmp_path / "ingestd-data" / "out.db") == list(range(30))


# -- kills and signals -----------------------------------------------------------------------------


@needs_nginx
@pytest.mark.parametrize("name", ["x.ndjson", pytest.param("x.ndjson.gz", marks=pytest.mark.slow)])
def test_kill_9_and_it_goes_on_at_the_exact_line(tmp_path: Path, name: str) -> None:
    import gzip

    body = lines(0, LINES)
    rate = "400k" if name == "x.ndjson" else "60k"
    with serving_files(tmp_path / "nginx", rate=rate) as nginx:
        (nginx.www / name).write_bytes(gzip.compress(body) if name.endswith("gz") else body)
        arguments = ("sqlite", *HERE, "--fetch.urls", f"{nginx.url}/slow/{name}")
        for least in (1000, 3000):
            with daemon(*arguments, cwd=tmp_path) as one:
                until(lambda: one.status()["pipelines"]["default"]["accepted"] > least)  # noqa: B023
                os.kill(one.process.pid, signal.SIGKILL)
                one.wait()
        nginx.kill()
        nginx.rate = "0"
        nginx.start()
        with daemon(*arguments, cwd=tmp_path) as one:
            assert one.wait() == 0
            report = one.event("drained")
            assert report["accepted"] == report["processed"] == LINES
            assert report["balanced"]
    assert numbers(tmp_path / "ingestd-data" / "out.db") == list(range(LINES))
    done = run("journal", "verify", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "default: ok\n")


@pytest.mark.slow
@needs_nginx
def test_sigterm_keeps_the_position_of_the_last_accepted_line(tmp_path: Path) -> None:
    with serving_files(tmp_path / "nginx", rate="200k") as nginx:
        (nginx.www / "x.ndjson").write_bytes(lines(0, LINES))
        arguments = ("sqlite", *HERE, "--fetch.urls", f"{nginx.url}/slow/x.ndjson")
        with daemon(*arguments, cwd=tmp_path) as one:
            until(lambda: one.status()["pipelines"]["default"]["accepted"] > 1000)
            one.terminate()
            assert one.wait() == 0
            report = one.event("drained")
            assert report["pending"] == report["dead"] == report["invalid"] == 0
        nginx.kill()
        nginx.rate = "0"
        nginx.start()
        with daemon(*arguments, cwd=tmp_path) as one:
            assert one.wait() == 0
            assert one.event("drained")["accepted"] == LINES
    assert numbers(tmp_path / "ingestd-data" / "out.db") == list(range(LINES))


@pytest.mark.slow
def test_a_stream_goes_on_behind_its_last_event_after_kill_9(tmp_path: Path) -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        first = int(request.headers.get("Last-Event-ID", "-1")) + 1
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for n in range(first, 10**6):
            await response.write(b'id: %d\ndata: {"n": %d}\n\n' % (n, n))
            await asyncio.sleep(0.001)
        return response

    with server(handle) as web_:
        arguments = ("sqlite", *HERE, "--fetch.urls", web_.url)
        for least in (50, 100, 150):
            with daemon(*arguments, cwd=tmp_path) as one:
                until(lambda: one.status()["pipelines"]["default"]["processed"] > least)  # noqa: B023
                os.kill(one.process.pid, signal.SIGKILL if least < 150 else signal.SIGTERM)
                assert one.wait() == (-9 if least < 150 else 0)
    found = numbers(tmp_path / "ingestd-data" / "out.db")
    assert found == list(range(len(found)))
    assert len(found) > 150


# -- secrets ---------------------------------------------------------------------------------------

SECRETS = ("hunter2", "t0ken", "k3y", base64.b64encode(b"ada:hunter2").decode())


def test_no_secret_is_in_a_log_a_journal_or_what_check_prints(tmp_path: Path) -> None:
    with server(good) as web_:

        def secret(path: str) -> str:
            return web_.url.replace("://", "://ada:hunter2@") + path + "?token=t0ken"

        arguments = (*HERE, "--log.level", "debug", "--fetch.headers.X-Key", "k3y",
                     "--fetch.urls", f"{secret('/0')} {secret('/bad')}")  # fmt: skip
        with daemon("sqlite", *arguments, cwd=tmp_path) as one:
            assert one.wait() == 1
            said = json.dumps(one.events) + str(one.other)
        for asked in web_.asked:
            assert asked.headers["authorization"].removeprefix("Basic ") == SECRETS[3]
            assert asked.headers["x-key"] == "k3y"
            assert asked.path.endswith("?token=t0ken")
    assert "/bad?…: the server answered 404" in str(one.event("urls_given_up")["urls"])
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("journal.db*"))
    assert b"fetch:" in kept
    checked = run("check", "sqlite", *arguments, cwd=tmp_path)
    assert checked.returncode == 0
    assert 'fetch.headers.X-Key = "***"' in checked.stdout
    assert "/0?…" in checked.stdout
    for one_secret in SECRETS:
        assert one_secret not in said
        assert one_secret.encode() not in kept
        assert one_secret not in checked.stdout + checked.stderr


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "fetch.urls (default): no URL: list some here, or name a file of them in fetch.file"),
        (["--fetch.urls", "ftp://u:hunter2@a/x"], "'ftp://a/x' is not http or https"),
        (["--fetch.file", "nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["--fetch.file", "-"], "there is no URL in standard input"),
        (["--fetch.urls", "http://a/", "--fetch.follow", "maybe"], "'maybe' is not true or false"),
        (["--fetch.urls", "http://a/", "--fetch.follow", "true", "--fetch.every", "5m"],
         "fetch.every (flag --fetch.every): a stream that is followed"),
        (["--fetch.url", "http://a/"], "unknown flag --fetch.url, did you mean --fetch.urls?"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path: Path, arguments: list[str], says: str) -> None:
    listen = ("--admin.listen", "", "--log.level", "error")
    done = run("run", "sqlite", "--source", "fetch", *arguments, *listen, cwd=tmp_path)
    assert done.returncode == (2 if "unknown flag" in says else 78)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert says in line
    assert "nowhere.txt" not in says or f"cannot read {tmp_path}/nowhere.txt" in line
    assert "hunter2" not in line
    if "fetch.file" not in says and "--fetch.file" not in arguments:
        assert not (tmp_path / "ingestd-data").exists()


def test_lists_and_headers_in_a_file_and_the_environment(tmp_path: Path) -> None:
    (tmp_path / "ingestd.toml").write_text(
        '[source]\nkind = "fetch"\n[fetch]\nurls = ["http://a/x,y", "http://b/"]\n'
        'headers = { Authorization = "Bearer k3y" }\n'
    )
    done = run("check", cwd=tmp_path)
    assert done.returncode == 0
    assert 'fetch.urls = ["http://a/x,y", "http://b/"]' in done.stdout
    assert 'fetch.headers.Authorization = "***"' in done.stdout
    done = run("check", cwd=tmp_path, INGESTD_FETCH__URLS="http://c/ http://d/",
               INGESTD_FETCH__HEADERS='{"X-Key": "k3y"}')  # fmt: skip
    assert done.returncode == 0
    assert 'fetch.urls = ["http://c/", "http://d/"]' in done.stdout
    assert 'fetch.headers.X-Key = "***"' in done.stdout
    assert "k3y" not in done.stdout
