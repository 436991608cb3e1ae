"""What a beginner does wrong: one line on stderr, the right exit code, no traceback, no loss."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.daemon.harness import ROOT, daemon

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def run(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ingestd", "run", *args],
        cwd=cwd, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )  # fmt: skip


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("ingestd: ")
    return line


LISTEN = ("--listen", "127.0.0.1:0", "--admin.listen", "127.0.0.1:0")


@pytest.mark.parametrize("kind", ["thread", "process"])
@pytest.mark.parametrize(
    ("handler", "says"),
    [
        ("nowhere:store", "nowhere"),
        ("app:stor", "stor"),
        ("app", "app"),
        ("broken:store", "ZeroDivisionError"),
    ],
)
def test_a_handler_that_cannot_be_loaded(tmp_path, handler, says, kind) -> None:
    (tmp_path / "app.py").write_text("def store(batch: list[dict]) -> None: ...\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    done = run(handler, "--executor.kind", kind, *LISTEN, cwd=tmp_path)
    assert done.returncode == 78
    assert says in one_line(done)


@pytest.mark.parametrize("setting", ["http.listen", "admin.listen"])
def test_a_port_that_is_taken(tmp_path: Path, setting: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ports = {"http.listen": "127.0.0.1:0", "admin.listen": "127.0.0.1:0", setting: address}
        flags = [part for key, value in ports.items() for part in (f"--{key}", value)]
        done = run(*flags, cwd=tmp_path)
    assert done.returncode == 78
    line = one_line(done)
    assert address in line
    assert setting in line


def test_a_data_directory_that_is_locked(tmp_path: Path) -> None:
    with daemon(cwd=tmp_path) as first:
        assert first.post(b"1")[0] == 202
        done = run(*LISTEN, cwd=tmp_path)
        assert done.returncode == 78
        assert f"process {first.process.pid}" in one_line(done)
        assert first.post(b"2")[0] == 202
        assert first.until_settled()["processed"] == 2


def test_a_data_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run(*LISTEN, "--data-dir", "file", cwd=tmp_path)
    assert done.returncode == 78
    assert "file" in one_line(done)


def test_a_data_directory_that_cannot_be_created(tmp_path: Path) -> None:
    done = run(*LISTEN, "--data-dir", "/proc/ingestd-data", cwd=tmp_path)  # nobody can, nor root
    assert done.returncode == 78
    assert "/proc/ingestd-data" in one_line(done)


@pytest.mark.parametrize(
    ("toml", "flags", "code"),
    [
        ("[batch]\nrecord_max = 5\n", (), 78),
        ("[batch\n", (), 78),
        ("", ("--batch.records_max", "many"), 78),
        ("", ("--batch.record_max", "5"), 2),
        ("", ("--config", "missing.toml"), 78),
    ],
)
def test_settings_that_are_wrong(tmp_path: Path, toml: str, flags, code: int) -> None:
    (tmp_path / "ingestd.toml").write_text(toml)
    done = run(*flags, *LISTEN, cwd=tmp_path)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "ingestd" in done.stderr


def test_a_journal_of_another_program(tmp_path: Path) -> None:
    (tmp_path / "ingestd-data").mkdir(mode=0o700)
    import sqlite3

    with sqlite3.connect(tmp_path / "ingestd-data" / "journal.db") as db:
        db.execute("CREATE TABLE theirs(x)")
    db.close()
    done = run(*LISTEN, cwd=tmp_path)
    assert done.returncode == 78
    assert "not a journal of ingestd" in one_line(done)


def test_an_admin_port_in_use_names_a_way_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("--listen", "127.0.0.1:0", "--admin.listen", address, cwd=tmp_path)
    assert done.returncode == 78
    assert "(admin.listen): address already in use; another program has it" in one_line(done)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["process", "thread"])
def test_a_data_directory_may_have_any_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "app.py").write_text(
        "from ingestd.handlers.context import Context\n"
        "class Store:\n"
        "    def __init__(self, context: Context) -> None:\n"
        "        open(context.data_dir + '/made', 'w').close()\n"
        "    def __call__(self, batch: list[int]) -> None: pass\n"
    )
    name = os.fsdecode(b"d\xff")
    arguments = ("app:Store", "--executor.kind", kind, "--data-dir", name)
    with daemon(*arguments, cwd=tmp_path) as one:
        assert one.post(b"1")[0] == 202
        one.until_settled()
        one.terminate()
        assert one.wait() == 0
    assert (tmp_path / name / "made").exists()
    for tool in (("dead", "list"), ("journal", "stat")):
        done = subprocess.run(
            [sys.executable, "-m", "ingestd", *tool, "--data-dir", name], cwd=tmp_path,
            capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_without_docstrings_the_daemon_does_its_work(tmp_path: Path) -> None:
    with daemon(cwd=tmp_path, environ={"PYTHONOPTIMIZE": "2"}) as one:
        status, answer = one.post(b"{]")
        assert status == 400
        assert answer["detail"]
        assert one.post(b"{}")[0] == 202
        one.until_settled()
        one.terminate()
        assert one.wait() == 0
