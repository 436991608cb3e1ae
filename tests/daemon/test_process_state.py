"""State that belongs to the whole process, changed by a handler in a thread of the daemon."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.harness import ROOT, daemon
from tests.daemon.test_shared_process import THREAD, app, notes, post, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow  # each starts processes of its own

TEXT = ("--format", "text", *THREAD)


def test_a_worker_gets_the_surroundings_of_the_start(tmp_path: Path) -> None:
    """Also one that is started after a handler in a thread has changed all of them."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "apart.py").write_text("raise RuntimeError('this is not the module')\n")
    (tmp_path / "apart.py").write_text(
        "import os, sys\n"
        f"NOTES = {str(tmp_path / 'apart')!r}\n"
        "def store(batch: list[str]) -> None:\n"
        "    mask = os.umask(0); os.umask(mask)\n"
        "    with open(NOTES, 'a') as notes:\n"
        "        print(os.getcwd(), os.environ.get('OF_THE_START'), oct(mask), file=notes)\n"
        "    if batch == ['die']: os._exit(1)\n"
    )
    app(
        tmp_path,
        f"os.chdir({str(elsewhere)!r}); os.environ.clear(); os.umask(0)\n"
        "sys.path[:] = ['relative']",
        "import sys",
    )
    (tmp_path / "ingestd.toml").write_text(
        'format = "text"\n[handler]\ntarget = "app:store"\n[executor]\nkind = "thread"\n'
        "workers = 1\n[retry]\nattempts_max = 1\nbackoff = '1ms'\n"
        '[pipelines.apart.handler]\ntarget = "apart:store"\n'
        '[pipelines.apart.executor]\nkind = "process"\n'
    )
    with daemon(cwd=tmp_path, environ={"OF_THE_START": "here"}) as one:
        status = Path(f"/proc/{one.process.pid}/status").read_text().splitlines()
        mask = next(line.split()[1] for line in status if line.startswith("Umask"))
        assert post(one, "x\n") == 202
        one.until_settled()
        kind = {"Content-Type": "text/plain"}
        assert one.request("POST", "/v1/records/apart", b"die\n", kind)[0] == 202
        one.event("worker_died")
        assert one.request("POST", "/v1/records/apart", b"again\n", kind)[0] == 202
        said = tmp_path / "apart"
        until(lambda: len(said.read_text().splitlines()) >= 2)
        assert set(said.read_text().splitlines()) == {f"{tmp_path} here {oct(int(mask, 8))}"}


def test_a_small_recursion_limit_is_not_the_daemons(tmp_path: Path) -> None:
    target = app(
        tmp_path,
        "if batch == ['low']:\n"
        "    for limit in (50, 40, 30, 20, 12): sys.setrecursionlimit(limit)\n"
        "    while not os.path.exists(NOTES + '-go'): time.sleep(0.01)",
        "import sys, time",
    )
    with daemon(target, *TEXT, cwd=tmp_path) as one:
        assert post(one, "low\n") == 202
        until(lambda: notes(tmp_path) == ["low"])
        for number in range(20):
            assert post(one, f"{number}\n") == 202
        assert one.request("GET", "/metrics", admin=True)[0] == 200
        (tmp_path / "notes-go").touch()
        one.until_settled()
        assert len(notes(tmp_path)) == 21
        one.terminate()
        assert one.wait() == 0


def test_the_interpreter_is_settled_again(tmp_path: Path) -> None:
    target = app(
        tmp_path,
        "if batch == ['change']:\n"
        "    gc.disable(); gc.set_threshold(0); sys.setswitchinterval(100)\n"
        "with open(NOTES + '-now', 'w') as now:\n"
        "    now.write(repr((gc.isenabled(), gc.get_threshold()[0] > 0, sys.getswitchinterval())))",
        "import gc, sys",
    )
    now = tmp_path / "notes-now"

    def settled() -> bool:
        assert post(one, "look\n") == 202
        one.until_settled()
        return now.read_text() == "(True, True, 0.001)"

    with daemon(target, *TEXT, cwd=tmp_path) as one:
        assert settled()
        assert post(one, "change\n") == 202
        one.until_settled()
        until(settled)


DISPOSITIONS = """\
faulthandler.register(signal.SIGTERM)
signal.siginterrupt(signal.SIGTERM, True)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())"""


@pytest.mark.parametrize("kind", ["thread", "async"])
def test_sigterm_is_ours(tmp_path: Path, kind: str) -> None:
    """A second after a handler has put something else in its place, at the latest."""
    target = app(tmp_path, DISPOSITIONS, "import faulthandler, signal")
    if kind == "async":
        text = (tmp_path / "app.py").read_text().replace("def store", "async def store")
        (tmp_path / "app.py").write_text(text)
    arguments = ("--format", "text", "--executor.kind", kind)
    with daemon(target, *arguments, cwd=tmp_path) as one:
        for number in range(3):
            assert post(one, f"{number}\n") == 202
            one.until_settled()
        until(lambda: _asked(one))
        assert one.wait() == 0
        assert one.event("daemon_left")["code"] == 0


def _asked(one: Any) -> bool:
    """Whether the drain has begun; asks for it once a call."""
    if one.process.poll() is None and not any(e["event"] == "drain_started" for e in one.events):
        one.terminate()
        one.process.poll()
        try:
            one.event("drain_started", timeout=2)
        except AssertionError:
            return False
    return True


SIGNALS = """\
signal.setitimer(signal.ITIMER_REAL, 0.01); time.sleep(0.05)
signal.setitimer(signal.ITIMER_VIRTUAL, 0.01); sum(range(10**6))
signal.setitimer(signal.ITIMER_PROF, 0.01); sum(range(10**6))
os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGUSR2)"""


def test_a_signal_without_a_meaning_ends_nothing(tmp_path: Path) -> None:
    target = app(tmp_path, SIGNALS, "import signal, time")
    with daemon(target, *TEXT, cwd=tmp_path) as one:
        for number in range(3):
            assert post(one, f"{number}\n") == 202
            one.until_settled()
        one.terminate()
        assert one.wait() == 0
    assert len(notes(tmp_path)) == 3


def test_what_is_started_dies_of_such_a_signal(tmp_path: Path) -> None:
    """A program, or a process that multiprocessing forks, finds signals as they usually are."""
    target = app(
        tmp_path,
        "program = subprocess.run(['sh', '-c', 'kill -USR1 $$'])\n"
        "child = multiprocessing.get_context('fork').Process(target=kill)\n"
        "child.start(); child.join()\n"
        "assert (program.returncode, child.exitcode) == (-10, -14), (program, child.exitcode)",
        "import multiprocessing, signal, subprocess\n"
        "def kill(): os.kill(os.getpid(), signal.SIGALRM)\n",
    )
    with daemon(target, *TEXT, cwd=tmp_path) as one:
        assert post(one, "x\n") == 202
        assert one.until_settled()["processed"] == 1


@pytest.mark.parametrize("handler", ["jsonl", "sqlite"])
def test_files_stay_private_whatever_the_umask(tmp_path: Path, handler: str) -> None:
    app(tmp_path, "os.umask(0)\nif batch == ['bad']: raise OSError")
    (tmp_path / "ingestd.toml").write_text(
        'format = "text"\n[handler]\ntarget = "app:store"\n[executor]\nkind = "thread"\n'
        '[retry]\nattempts_max = 1\nbackoff = "1ms"\n'
        f'[pipelines.sink.handler]\ntarget = "{handler}"\n'
    )
    kind = {"Content-Type": "text/plain"}
    with daemon(cwd=tmp_path) as one:
        for body in (b"x\n", b"bad\n", b"y\n"):
            assert one.request("POST", "/v1/records", body, kind)[0] == 202
            assert one.request("POST", "/v1/records/sink", body, kind)[0] == 202
        until(lambda: len(notes(tmp_path)) >= 3)
        one.until_settled("sink")
        open_now = modes(tmp_path / "ingestd-data")
        one.terminate()
        assert one.wait() == 0
    assert {mode for _, mode in open_now} == {0o600, 0o700}
    assert {mode for _, mode in modes(tmp_path / "ingestd-data")} == {0o600, 0o700}
    assert {"journal.db", "journal.db-wal"} <= {name for name, _ in open_now}


def modes(folder: Path) -> list[tuple[str, int]]:
    found = []
    for path in folder.rglob("*"):
        try:
            found.append((path.name, stat.S_IMODE(path.lstat().st_mode)))
        except FileNotFoundError:  # it was written under a name for the moment
            continue
    return found


class _Lines(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = f"{self.path}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def lines() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Lines)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_a_handler_that_reads_standard_input_takes_no_url_away(
    tmp_path: Path, lines: str, kind: str
) -> None:
    """At its import, before the list is read, and in each call."""
    target = app(
        tmp_path,
        "assert subprocess.run(['cat'], capture_output=True).stdout == b''",
        "import subprocess, sys\nassert sys.stdin.read() == ''\n"
        "assert subprocess.run(['cat'], capture_output=True).stdout == b''",
    )
    done = subprocess.run(
        [sys.executable, "-m", "ingestd", "run", target, "--source", "fetch", "--fetch.file", "-",
         "--fetch.allow_private", "true", "--format", "text", "--executor.kind", kind,
         "--admin.listen", ""],
        cwd=tmp_path, input="".join(f"{lines}/{i}\n" for i in range(200)), text=True,
        capture_output=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(notes(tmp_path)) == sorted(f"/{i}" for i in range(200))


RAISES = """\
import logging, structlog, sys
class Raises(logging.Handler):
    def emit(self, record): raise SystemExit("no log")
    def handle(self, record): raise SystemExit("no log")
def raises(*_): raise SystemExit("no log")
for name in ("", "aiohttp", "asyncio"):
    logging.getLogger(name).handlers[:] = [Raises()]
structlog.configure(processors=[raises])
logging.Logger.handle = logging.Logger._log = raises
sys.stderr = sys.stdout = None"""


@pytest.mark.parametrize("leaves_by", ["itself", "SIGTERM"])
def test_a_pipeline_breaks_whatever_becomes_of_its_log_lines(
    tmp_path: Path, leaves_by: str
) -> None:
    """The journal's file goes while no log line of anybody's gets through `logging`."""
    lost = "for path in glob.glob('ingestd-data/journal.db*'): os.unlink(path)"
    target = app(tmp_path, f"{RAISES}\nif batch == ['break']:\n    {lost}", "import glob")
    with daemon(target, *TEXT, cwd=tmp_path) as one:
        assert post(one, "one\n") == 202
        one.until_settled()
        assert post(one, "break\n") == 202
        until(lambda: notes(tmp_path) == ["one", "break"])
        if leaves_by == "SIGTERM":
            one.terminate(signal.SIGTERM)
        assert one.wait() == 75
        assert one.event("journal_failed")
