"""`ingestd dev` as a person uses it: files that change, a terminal, Ctrl-C; real processes."""

from __future__ import annotations

import http.client
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ingestd.cli.dev import Watch
from ingestd.prove.servers import free_port
from tests.cli.test_cli import ROOT, ingestd

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

APP = """
VERSION = 1

def store(batch: list[dict]) -> None:
    with open("seen", "a") as file:
        file.writelines(f"{VERSION} {record['n']}\\n" for record in batch)

def fail(batch: list[dict]) -> None:
    print("printed", len(batch), flush=True)
    raise ValueError("not this one")  # here

def stop(batch: list[dict]) -> None:
    breakpoint()
    print("went on", flush=True)
"""


class Terminal:
    """The command in a pseudo-terminal; without `listens` a file says where it listens."""

    def __init__(self, *arguments: str, cwd: Path, listens: bool = True) -> None:
        self.port = free_port()
        listen = ["--listen", f"127.0.0.1:{self.port}"] if listens else []
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ingestd", "dev", *arguments,
             *listen, "--admin.listen", "127.0.0.1:0",
             "--batch.age_max", "50ms"],
            cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(cwd)},
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._ours, 4096)
            except OSError:
                return
            if not data:
                return
            self.seen += data.decode(errors="replace").replace("\r\n", "\n")

    def until(self, text: str, times: int = 1) -> None:
        deadline = time.monotonic() + 60
        while self.seen.count(text) < times:
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.seen[-3000:]}"
            time.sleep(0.02)

    def write(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C: a terminal sends it to all processes in front of it."""
        os.killpg(self.process.pid, signal.SIGINT)

    def post(self, body: bytes) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", "/v1/records", body)
            return connection.getresponse().status
        finally:
            connection.close()

    def is_listening(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


@pytest.fixture
def started(here: Path, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    one = Terminal(*request.param, cwd=here)
    try:
        one.until("-- ready at ")
        yield one
    finally:
        one.close()


def stored_by(here: Path, version: int, beyond: int = -1) -> None:
    """Waits until a version of the handler has stored a record with a greater number."""
    deadline = time.monotonic() + 60
    while True:
        text = (here / "seen").read_text() if (here / "seen").exists() else ""
        lines = [line.split() for line in text.split("\n")[:-1]]  # the rest is being written
        if any(int(who) == version and int(number) > beyond for who, number in lines):
            return
        assert time.monotonic() < deadline, (version, beyond, lines[-3:])
        time.sleep(0.02)


@pytest.mark.parametrize("started", [("app:store",)], indirect=True)
def test_the_handler_is_loaded_again_and_no_record_is_lost(started: Terminal, here: Path) -> None:
    stopped, posted = threading.Event(), 0

    def post() -> None:
        nonlocal posted
        while not stopped.is_set():
            assert started.post(b'{"n": %d}' % posted) == 202
            posted += 1
            time.sleep(0.005)

    poster = threading.Thread(target=post)
    poster.start()
    stored_by(here, 1)
    for version in (2, 3):
        (here / "app.py").write_text(APP.replace("VERSION = 1", f"VERSION = {version}"))
        started.until("-- ready at ", version)
        stored_by(here, version)
    (here / "app.py").write_text("def store(batch: list[dict]) -> None: oops oops")
    started.until("cannot be used; the handler before it works on")
    stored_by(here, 3, beyond=posted)
    stopped.set()
    poster.join(60)
    assert not poster.is_alive()
    deadline = time.monotonic() + 60
    while len(lines := (here / "seen").read_text().splitlines()) < posted:
        assert time.monotonic() < deadline, (len(lines), posted)
        time.sleep(0.05)
    assert sorted(int(line.split()[1]) for line in lines) == list(range(posted))
    assert {line.split()[0] for line in lines} == {"1", "2", "3"}
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(60) == 0
    assert not list(here.glob("ingestd-dev-*"))


def test_a_changed_address_of_the_file_needs_a_restart(here: Path) -> None:
    def write(address: str) -> None:
        (here / "new").write_text(f'[http]\nlisten = "{address}"\n')
        (here / "new").rename(here / "ingestd.toml")  # whole at each moment

    first = f"127.0.0.1:{free_port()}"
    write(first)
    one = Terminal("app:store", cwd=here, listens=False)
    try:
        one.until(f"-- ready at http://{first}: ")
        write(f"127.0.0.1:{free_port()}")
        one.until(f"-- ready at http://{first}: ", 2)
        assert f"-- http.listen needs a restart of dev: it stays at {first}\n" in one.seen
        write(first)
        one.until(f"-- ready at http://{first}: ", 3)
        assert one.seen.count("needs a restart") == 1
    finally:
        one.close()


@pytest.mark.parametrize(
    "started", [("app:fail", "--retry.backoff", "10ms", "--drain.timeout", "10m")], indirect=True
)
def test_what_it_prints_and_ctrl_c(started: Terminal) -> None:
    assert started.post(b'{"n": 1}\n{"n": 2}') == 202
    started.until("ValueError: not this one")
    assert re.search(r"batch \w+-1: 2 failed in \d", started.seen)
    assert 'raise ValueError("not this one")  # here' in started.seen
    assert re.search(r'File ".*/app.py", line 10, in fail', started.seen)
    started.until("printed 2\n", 2)
    started.until("-- every batch fails, and records wait until one succeeds: ValueError: not this")
    started.interrupt()
    assert started.process.wait(60) == 0
    assert "Traceback (most recent call last):\n  File" in started.seen
    assert "KeyboardInterrupt" not in started.seen


@pytest.mark.parametrize("started", [("app:stop", "--send", "two.ndjson")], indirect=True)
@pytest.mark.usefixtures("two")
def test_the_debugger_and_a_sample(started: Terminal) -> None:
    started.until('-- sent: 202 {"accepted":2,')
    started.until("(Pdb)")
    started.write("p sum(record['n'] for record in batch)\n")
    started.until("\n7\n")
    started.write("c\n")
    started.until("went on")
    started.until(": 2 done in ")
    assert started.post(b'{"n": 1}') == 202
    started.until("(Pdb)", 2)
    started.interrupt()
    assert started.process.wait(60) == 0


@pytest.mark.parametrize("started", [("app:store",)], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_no_daemon_is_left_behind(started: Terminal, here: Path, number: signal.Signals) -> None:
    """A terminal that is closed sends SIGHUP; the daemon would keep the port, and take records."""
    started.process.send_signal(number)
    assert started.process.wait(20) == (0 if number == signal.SIGHUP else -number)
    deadline = time.monotonic() + 5
    while started.is_listening():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if number == signal.SIGHUP:
        assert not list(here.glob("ingestd-dev-*"))


def test_a_daemon_that_cannot_start_ends_the_command(here: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        flags = ("--listen", "127.0.0.1:0", "--admin.listen", taken)
        run = ingestd("dev", "app:store", *flags, cwd=here)
    assert run.returncode == 78
    assert run.stderr.startswith(f"ingestd: cannot listen on {taken} (admin.listen): address")


def test_a_watch_looks_at_the_nearest_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a home or at the root there are too many to look at three times a second."""
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    monkeypatch.setattr("ingestd.cli.dev.FOLDERS_MAX", 3)
    for name in ("a/deep/er", "b", ".hidden", "venv"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "one.py").touch()
    watch = Watch(tmp_path)
    assert not watch.sees_all
    assert watch.changed() == ""
    (tmp_path / "b" / "new.py").touch()
    assert watch.changed() == "b/new.py"
    (tmp_path / "a" / "deep" / "er" / "two.py").touch()
    (tmp_path / ".hidden" / "two.py").touch()
    assert watch.changed() == ""
    monkeypatch.setattr("ingestd.cli.dev.FOLDERS_MAX", 5)
    assert watch.changed() == "a/deep/er/one.py"
    assert watch.sees_all


PRINTS = """
import atexit
print("no line end", end="")
atexit.register(print, "the end")
"""


def test_a_module_may_print_when_it_is_imported_and_at_the_exit(here: Path) -> None:
    (here / "app.py").write_text(PRINTS + APP)
    one = Terminal("app:store", cwd=here)
    try:
        one.until("-- ready at ")
    finally:
        one.close()


def test_a_stdout_that_is_full_ends_the_command(here: Path) -> None:
    words = ["-P", "-m", "ingestd", "dev", "app:store", "--listen", "127.0.0.1:0"]
    with Path("/dev/full").open("wb") as full:
        run = subprocess.run(
            [sys.executable, *words, "--admin.listen", "127.0.0.1:0"],
            cwd=here, stdout=full, stderr=subprocess.PIPE, timeout=60,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(here)},
        )  # fmt: skip
    assert run.stderr == b"ingestd: standard output: No space left on device\n"
    assert run.returncode == 1
    assert not list(here.glob("ingestd-dev-*"))


@pytest.fixture
def two(tmp_path: Path) -> None:
    (tmp_path / "two.ndjson").write_text('{"n": 3}\n{"n": 4}\n')


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("app:store", "--source", "stdin"), 2, "dev is for the source http alone"),
        (("app:stor",), 78, "did you mean 'store'?"),
        (("app:store", "--send", "gone"), 2, "gone: No such file or directory"),
        (("app:store", "--listen", "192.0.2.1:80"), 78, "http.listen"),
        (("app:store", "--sned", "x"), 2, "did you mean --send?"),
    ],
)
def test_mistakes(here: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    run = ingestd("dev", *arguments, cwd=here)
    assert (run.returncode, says in run.stderr) == (code, True), run.stderr
