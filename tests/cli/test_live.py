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
import time
from typing import TYPE_CHECKING

import pytest

from ingestd.cli.top import Look, rows
from tests.daemon.harness import ROOT, daemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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


@pytest.mark.slow
def test_tap_on_a_terminal_ends_with_ctrl_c(running: Daemon, tmp_path: Path) -> None:
    pid, number = pty.fork()
    if not pid:
        os.chdir(tmp_path)
        os.execve(sys.executable, command(running, "tap"), ENV)
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
    pid, number = pty.fork()
    if not pid:
        os.chdir(tmp_path)
        os.execve(sys.executable, args, {**ENV, "COLUMNS": "120", "LINES": "20"})
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
