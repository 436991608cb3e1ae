"""Handlers that change the process they live in, in good faith, while that is the daemon's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.harness import ROOT, Daemon, daemon

pytestmark = pytest.mark.slow  # each starts processes of its own

TOKEN = "a-token-that-is-long-enough-0123456789"
THREAD = ("--executor.kind", "thread")


def app(folder: Path, body: str, imports: str = "") -> str:
    """A handler of the user's that notes what it got and then does something."""
    (folder / "app.py").write_text(
        f"import os\n{imports}\n"
        f"NOTES = {str(folder / 'notes')!r}\n"
        "def store(batch: list[str]) -> None:\n"
        "    with open(NOTES, 'a') as notes:\n"
        "        notes.writelines(line + '\\n' for line in batch)\n"
        + "".join(f"    {line}\n" for line in body.splitlines())
    )
    return "app:store"


def notes(folder: Path) -> list[str]:
    path = folder / "notes"
    return path.read_text().splitlines() if path.exists() else []


def post(one: Daemon, text: str, token: str = "") -> int:
    headers = {"Content-Type": "text/plain"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    return one.request("POST", "/v1/records", text.encode(), headers)[0]


def until(condition: Any, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("handler", ["app:store", "jsonl"])
def test_a_changed_folder_costs_nothing(tmp_path: Path, handler: str) -> None:
    """Neither the journal nor a path of ours is looked for where the handler went."""
    app(tmp_path, "os.chdir('/')")
    (tmp_path / "ingestd.toml").write_text(
        'format = "text"\n[executor]\nkind = "thread"\n[log]\nlevel = "info"\n'
        f'[handler]\ntarget = "{handler}"\n[http.tokens.me]\nfile = "tokens"\n'
        '[pipelines.other.handler]\ntarget = "app:store"\n'
    )
    (tmp_path / "tokens").write_text(TOKEN + "\n")
    with daemon(cwd=tmp_path) as one:
        answers = [
            one.request(
                "POST", f"/v1/records{path}", b"x\n",
                {"Content-Type": "text/plain", "Authorization": f"Bearer {TOKEN}"},
            )[0]
            for path in ("/other", "")
        ]  # fmt: skip
        assert answers == [202, 202]
        one.until_settled("other")
        one.until_settled()
        assert Path(f"/proc/{one.process.pid}/cwd").readlink() == Path("/")
        one.terminate(signal.SIGHUP)
        assert one.event("reloaded")["changed"] == []
        assert post(one, "y\n") == 401
        assert post(one, "y\n", TOKEN) == 202
        one.until_settled()
        one.terminate()
        assert one.wait() == 0
    assert (tmp_path / "ingestd-data" / "journal.db").exists()


def test_a_configuration_file_that_is_gone_is_no_empty_one(tmp_path: Path) -> None:
    (tmp_path / "ingestd.toml").write_text('[http.tokens.me]\nfile = "tokens"\n')
    (tmp_path / "tokens").write_text(TOKEN + "\n")
    with daemon(cwd=tmp_path) as one:
        (tmp_path / "ingestd.toml").rename(tmp_path / "aside.toml")
        one.terminate(signal.SIGHUP)
        assert str(tmp_path / "ingestd.toml") in one.event("reload_refused")["error"]
        assert post(one, "1") == 401
        (tmp_path / "aside.toml").rename(tmp_path / "ingestd.toml")
        one.terminate(signal.SIGHUP)
        one.event("reloaded")


def test_secrets_that_are_gone_are_not_taken_out(tmp_path: Path) -> None:
    secrets = tmp_path / "credentials"
    secrets.mkdir()
    (secrets / "ingestd_http__tokens__me__token").write_text(TOKEN)
    with daemon(cwd=tmp_path, environ={"CREDENTIALS_DIRECTORY": str(secrets)}) as one:
        secrets.rename(tmp_path / "aside")
        one.terminate(signal.SIGHUP)
        assert str(secrets) in one.event("reload_refused")["error"]
        assert post(one, "1") == 401


def test_the_environment_of_the_start_is_the_environment(tmp_path: Path) -> None:
    target = app(tmp_path, "os.environ.clear(); os.umask(0)")
    environ = {"INGESTD_HTTP__TOKENS__ME__TOKEN": TOKEN}
    with daemon(target, *THREAD, "--format", "text", cwd=tmp_path, environ=environ) as one:
        assert post(one, "x\n", TOKEN) == 202
        one.until_settled()
        one.terminate(signal.SIGHUP)
        assert one.event("reloaded")["changed"] == []
        assert post(one, "x\n") == 401


def feed(folder: Path, lines: int, *args: str, timeout: float = 60) -> tuple[int, list[Any]]:
    """`cat lines | ingestd run --source stdin`: exit code and events."""
    done = subprocess.run(
        [sys.executable, "-m", "ingestd", "run", *args, "--source", "stdin", "--format", "text",
         "--log.format", "json", "--admin.listen", ""],
        cwd=folder, input="".join(f"line {i}\n" for i in range(lines)), text=True,
        capture_output=True, timeout=timeout, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    return done.returncode, events


@pytest.mark.parametrize("kind", ["thread", "process", "async"])
def test_a_handler_that_reads_standard_input_gets_none_of_ours(tmp_path: Path, kind: str) -> None:
    """While more of it is still to come."""
    called = tmp_path / "called"
    (tmp_path / "app.py").write_text(
        "import subprocess, sys\n"
        f"NOTES = {str(tmp_path / 'notes')!r}\n"
        f"{'async ' if kind == 'async' else ''}def store(batch: list[str]) -> None:\n"
        f"    open({str(called)!r}, 'w').close()\n"
        "    assert subprocess.run(['cat'], capture_output=True).stdout == b''\n"
        "    assert sys.stdin.read() == ''\n"
        "    with open(NOTES, 'a') as notes:\n"
        "        notes.writelines(line + '\\n' for line in batch)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "ingestd", "run", "app:store", "--executor.kind", kind,
         "--source", "stdin", "--format", "text", "--admin.listen", ""],
        cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        assert process.stdin is not None
        process.stdin.write("line 0\n")
        process.stdin.flush()
        until(called.exists)
        process.stdin.write("".join(f"line {i}\n" for i in range(1, 20_000)))
        process.stdin.close()
        assert process.wait(60) == 0
    assert sorted(notes(tmp_path)) == sorted(f"line {i}" for i in range(20_000))


LEFT_BEHIND = {
    "thread": "threading.Thread(target=time.sleep, args=(1000,)).start()",
    "timer": "threading.Timer(1000, print).start()",
    "pool": "ThreadPoolExecutor(1).submit(time.sleep, 1000)",
    "atexit": "atexit.register(time.sleep, 1000)",
}
IMPORTS = "import atexit, threading, time\nfrom concurrent.futures import ThreadPoolExecutor\n"


@pytest.mark.parametrize(
    ("left", "kind"), [*((left, "thread") for left in LEFT_BEHIND), ("pool", "async")]
)
def test_the_process_ends_whatever_is_left_behind(tmp_path: Path, left: str, kind: str) -> None:
    target = app(tmp_path, "", IMPORTS + LEFT_BEHIND[left])
    if kind == "async":
        text = (tmp_path / "app.py").read_text().replace("def store", "async def store")
        (tmp_path / "app.py").write_text(text)
    code, events = feed(tmp_path, 3, target, "--executor.kind", kind)
    assert code == 0
    assert [event["event"] for event in events][-1] == "daemon_left"
    assert len(notes(tmp_path)) == 3


def test_check_ends_too(tmp_path: Path) -> None:
    app(tmp_path, "", IMPORTS + LEFT_BEHIND["thread"])
    done = subprocess.run(
        [sys.executable, "-m", "ingestd", "check", "app:store"], cwd=tmp_path,
        capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "app:store" in done.stdout


def test_a_start_that_fails_ends_too(tmp_path: Path) -> None:
    app(tmp_path, "", IMPORTS + LEFT_BEHIND["thread"] + "\nraise OSError('no')")
    code, _ = feed(tmp_path, 1, "app:store", *THREAD)
    assert code == 78


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_hooks_at_exit_run(tmp_path: Path, kind: str) -> None:
    said = tmp_path / "said"
    app(tmp_path, "", f"import atexit\natexit.register(open, {str(said)!r}, 'w')")
    code, _ = feed(tmp_path, 1, "app:store", "--executor.kind", kind)
    assert code == 0
    assert said.exists()


MEDDLING = {
    "structlog": """\
import structlog
structlog.configure(processors=[structlog.processors.JSONRenderer()])""",
    "structlog that raises": """\
import structlog
structlog.configure(processors=[lambda *_: 1 / 0])""",
    "logging": """\
import logging.config
logging.basicConfig(force=True, level=50)
logging.config.dictConfig({"version": 1})
logging.shutdown()
logging.disable(100)""",
    "streams": """\
import sys
if sys.stderr is not None:
    sys.stdout.close(); sys.stderr.close()
    sys.stdout = sys.stderr = None
    os.close(1); os.close(2)""",
    "interpreter": """\
import faulthandler, gc, locale, socket, sys, threading, warnings
gc.disable()
gc.freeze()
locale.setlocale(locale.LC_ALL, "C")
warnings.simplefilter("error")
faulthandler.enable()
threading.excepthook = sys.excepthook = lambda *_: None
threading.settrace(lambda *_: None)
socket.setdefaulttimeout(0.01)""",
}


@pytest.mark.parametrize("what", MEDDLING)
@pytest.mark.slow
def test_the_daemons_log_and_life_are_out_of_reach(tmp_path: Path, what: str) -> None:
    target = app(tmp_path, f"if batch == ['bad']: raise OSError('this is it')\n{MEDDLING[what]}")
    arguments = ("--format", "text", "--retry.backoff", "1ms", "--retry.attempts_max", "1")
    with daemon(target, *THREAD, *arguments, cwd=tmp_path) as one:
        assert post(one, "one\n") == 202
        one.until_settled()
        assert post(one, "bad\n") == 202
        until(lambda: "bad" in notes(tmp_path))
        assert post(one, "two\n") == 202
        until(lambda: "two" in notes(tmp_path))
        one.terminate(signal.SIGHUP)
        one.event("reloaded")
        one.terminate()
        assert one.wait() == 0
        one.event("drain_started")
        assert one.event("daemon_left")["code"] == 0
