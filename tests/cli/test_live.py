"""`ingestd tap` and `ingestd top` beside a real daemon, on a terminal and without one."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from ingestd.__main__ import main
from ingestd.cli.top import Look, rows
from tests.daemon.harness import ROOT, daemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

    from tests.daemon.harness import Daemon

APP = """
import ingestd

def store(batch: ingestd.Batch[dict]) -> None:
    for i, record in enumerate(batch):
        if record.get("bad"):
            batch.reject(i, "bad")
"""
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("live")
    (folder / "app.py").write_text(APP)
    with daemon("app:store", "--pipelines.clicks.batch.age_max", "5ms", cwd=folder) as started:
        yield started


def command(running: Daemon, *args: str) -> list[str]:
    address = f"127.0.0.1:{running.admin_port}"
    return [sys.executable, "-m", "ingestd", *args, "--admin.listen", address]


def read_until(number: int, wanted: str, seen: str = "") -> str:
    """What a terminal shows, up to some text."""
    deadline = time.monotonic() + 60
    while wanted not in seen:
        ready, _, _ = select.select([number], [], [], max(0, deadline - time.monotonic()))
        assert ready, seen
        seen += os.read(number, 65536).decode()
    return seen


def table(sort: str = "name", only: str = "") -> list[tuple[str, float, float]]:
    def look(clock: float, accepted: int) -> Look:
        one = {
            "accepted": accepted, "processed": 5, "dead": 0, "pending": accepted - 5,
            "oldest_pending_seconds": 1.0, "dispatch_stopped": "", "paused": False,
            "handler": {"state": "up"}, "dead_letters": {"kept": 0}, "batches": {"running": 0},
            "journal": {"bytes": 0}, "bounds_near": [],
        }  # fmt: skip
        why = "the pipeline is paused (ingestd pause): ingestd resume has it go on"
        other = {**one, "accepted": 2 * accepted, "paused": True, "dispatch_stopped": why}
        return Look(clock, clock, {"pipelines": {"b": one, "a": other}})

    found = rows(look(12.0, 30), look(10.0, 10), sort=sort, only=only)
    assert {row.name: row.state for row in found}.items() <= {"a": "paused", "b": "up"}.items()
    return [(row.name, row.into, row.out) for row in found]


def test_rates_order_and_filter() -> None:
    assert table() == [("a", 20.0, 0.0), ("b", 10.0, 0.0)]
    assert table(sort="in")[0][0] == "a"
    assert table(only="B") == [("b", 10.0, 0.0)]


@pytest.mark.slow
def test_tap_prints_what_passes(running: Daemon, tmp_path: Path) -> None:
    where = ["--where", "n=2", "--limit", "2"]
    with subprocess.Popen(
        command(running, "tap", "clicks", "--json", "--stage", "dead", *where),
        stdout=subprocess.PIPE, cwd=tmp_path, env=ENV,
    ) as tapped:  # fmt: skip
        posts = 0
        while tapped.poll() is None and posts < 2000:  # until it is there, and has had enough
            assert (
                running.post(b'{"n":1,"bad":1}\n{"n":2,"bad":1}\n', "/v1/records/clicks")[0] == 202
            )
            posts += 1
            time.sleep(0.02)
        assert tapped.stdout is not None
        lines = [json.loads(line) for line in tapped.stdout]
    assert tapped.returncode == 0
    assert [json.loads(line["payload"])["n"] for line in lines] == [2, 2]
    assert {(line["pipeline"], line["stage"], line["reason"]) for line in lines} == {
        ("clicks", "dead", "rejected")
    }
    refused = subprocess.run(
        command(running, "tap", "none"), cwd=tmp_path, env=ENV, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "/v1/tap is 404" in refused.stderr


def on_terminal(args: list[str], cwd: Path, environ: dict[str, str]) -> tuple[int, int]:
    """Starts a program of Python's on a terminal of its own: its process, and the other end."""
    pid, number = pty.fork()
    if not pid:
        os.chdir(cwd)
        os.execve(sys.executable, args, environ)
    return pid, number


@pytest.mark.slow
def test_tap_on_a_terminal_ends_with_ctrl_c(running: Daemon, tmp_path: Path) -> None:
    pid, number = on_terminal(command(running, "tap"), tmp_path, ENV)
    seen = ""
    deadline = time.monotonic() + 60
    while not ('"n":7' in seen.replace("\\", "") and "\n" in seen) and time.monotonic() < deadline:
        running.post(b'{"n":7}\n')
        if select.select([number], [], [], 0.05)[0]:
            seen += os.read(number, 65536).decode()
    assert json.loads(seen.splitlines()[0])["stage"] == "accepted"
    os.write(number, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(number)


@pytest.mark.slow
def test_top_without_a_terminal(running: Daemon, tmp_path: Path) -> None:
    def run(*args: str) -> str:
        done = subprocess.run(
            command(running, "top", "--interval", "100ms", *args),
            cwd=tmp_path, env=ENV, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    deadline = time.monotonic() + 60
    while running.status()["pipelines"]["clicks"]["pending"]:  # of the test before this one
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.post(b'{"n":1}\n')
    title, head, clicks, default = run("--once").splitlines()
    assert "running" in title
    assert head.split()[:3] == ["PIPELINE", "STATE", "IN/s"]
    assert (clicks.split()[0], default.split()[0]) == ("clicks", "default")
    out = run("--once", "--json", "--filter", "def")
    told = json.loads(out)
    assert [(one["name"], one["state"]) for one in told["pipelines"]] == [("default", "up")]
    with subprocess.Popen(
        command(running, "top", "--interval", "100ms", "--filter", "clicks"),
        cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, text=True,
    ) as going:  # fmt: skip
        assert going.stdout is not None
        two = [going.stdout.readline() for _ in range(2)]
        going.send_signal(signal.SIGINT)
        assert going.wait() == 0
    assert all(re.match(r"\S+Z clicks up in=0/s out=0/s .* pending=0 ", line) for line in two)
    cut = f"{shlex.join(command(running, 'top', '--interval', '100ms'))} | head -1"
    assert (
        " up in="
        in subprocess.run(
            ["sh", "-c", cut], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=60
        ).stdout
    )
    gone = subprocess.run(
        [*command(running, "top", "--once")[:-1], "127.0.0.1:1"],
        cwd=tmp_path, env=ENV, capture_output=True, text=True,
    )  # fmt: skip
    assert (gone.returncode, "no answer from" in gone.stderr) == (1, True)


@pytest.mark.slow
def test_top_on_a_terminal(running: Daemon, tmp_path: Path) -> None:
    args = command(running, "top", "--interval", "200ms")
    pid, number = on_terminal(args, tmp_path, {**ENV, "COLUMNS": "120", "LINES": "20"})
    seen = read_until(number, "sort name")
    assert "\x1b[?1049h" in seen
    assert seen.index("clicks") < seen.index("default")
    os.write(number, b"p")
    read_until(number, "sort pending")
    os.write(number, b"/cli")
    read_until(number, "filter: cli_")
    os.write(number, b"\r")
    seen = read_until(number, "filter cli")
    seen = read_until(number, "filter cli")
    assert "default" not in seen.rpartition("\x1b[H")[2]
    os.write(number, b"q")
    read_until(number, "\x1b[?1049l")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(number)


@pytest.mark.slow
def test_top_puts_the_terminal_back_when_it_is_ended(running: Daemon, tmp_path: Path) -> None:
    pid, number = on_terminal(command(running, "top"), tmp_path, {**ENV, "TERM": "xterm"})
    read_until(number, "sort name")
    os.kill(pid, signal.SIGTERM)
    read_until(number, "\x1b[?25h\x1b[?1049l")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(number)


@pytest.mark.slow
def test_top_draws_no_page_on_a_terminal_that_has_none(running: Daemon, tmp_path: Path) -> None:
    pid, number = on_terminal(command(running, "top"), tmp_path, {**ENV, "TERM": "dumb"})
    seen = read_until(number, " up in=")
    os.kill(pid, signal.SIGINT)
    os.waitpid(pid, 0)
    os.close(number)
    assert "\x1b" not in seen


class Stranger:
    """A server that is no daemon, at some address.

    Args:
        body: of each of its answers; `None` for none.
    """

    def __init__(self, body: bytes | None) -> None:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if body is None:
                    time.sleep(5)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"pipelines": null}', b'{"pipelines": {"a": 1}}'])
def test_an_answer_of_another_program_is_one_line(
    body: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with Stranger(body) as other:
        assert main(["top", "--once", "--admin.listen", other.address]) == 1
    said = f"ingestd: the answer from {other.address} is no status of a daemon\n"
    assert capsys.readouterr() == ("", said)


def test_a_tap_of_a_program_that_says_nothing_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingestd.cli.healthcheck.STREAM_SECONDS", 0.2)
    with Stranger(None) as other:
        assert main(["tap", "--admin.listen", other.address]) == 1
    assert capsys.readouterr().err == f"ingestd: no answer from {other.address}: timed out\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["tap", "--sample", "some"], 2, "argument --sample: 'some' is not a number"),
        (["tap", "--where", "a=\udcff"], 2, "no text in the encoding of this locale"),
        (["peek", "--where", "\udcff=1"], 2, "no text in the encoding of this locale"),
        (["tap", "\udcff"], 1, "/v1/tap is 404"),
        (["tap", "--token-file", "token"], 1, "Invalid header value"),
        (["tap", "--token-file", "/dev/zero"], 78, "/dev/zero: it is no regular file"),
        (["peek", "--limit", "9" * 30], 2, "argument --limit: should be at most"),
    ],
)
def test_arguments_that_no_request_can_have(
    running: Daemon, arguments: list[str], code: int, said: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "token").write_text("a\nb")
    where = [] if arguments[0] == "peek" else ["--admin.listen", f"127.0.0.1:{running.admin_port}"]
    assert main([*arguments, *where]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
