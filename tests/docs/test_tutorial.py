"""The tutorial, block by block, in an empty folder and an environment of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from tests.daemon.harness import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "TUTORIAL.md").read_text()
STEPS = re.findall(
    r"^<!-- (interrupt) -->$|(?:^<!-- (\w+) -->\n)?^```sh\n(.*?)\n```$", PAGE,
    re.MULTILINE | re.DOTALL,
)  # fmt: skip
INSTALL = "pip install --require-hashes -r ~/ingestd/requirements/run.txt"


class Shell:
    """Runs blocks as somebody types them, in one folder; one may run beside the others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = ("LANG", "HTTP_PROXY", "HTTPS_PROXY", "PIP_INDEX_URL", "PIP_FIND_LINKS", "PIP_CERT")
        scripts = folder / ".venv" / "bin"
        self.environ = {
            **{name: os.environ[name] for name in kept if name in os.environ},
            "PATH": f"{scripts}:{folder}/path:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder), "TMPDIR": str(folder),
        }  # fmt: skip
        (folder / "path").mkdir()
        (folder / "path" / "python3").symlink_to(sys.executable)
        self.background: subprocess.Popen[str] | None = None

    def run(self, block: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=self.folder, env=self.environ,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=300,
        )  # fmt: skip
        return done.returncode, done.stdout

    def start(self, block: str) -> None:
        self.log = (self.folder / "log").open("w+")
        self.background = subprocess.Popen(
            ["bash", "-c", f"exec {block}"], cwd=self.folder, env=self.environ, text=True,
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, start_new_session=True,
        )  # fmt: skip

    def status(self) -> dict[str, int]:
        with urllib.request.urlopen("http://127.0.0.1:8081/v1/status", timeout=30) as answer:
            found: dict[str, int] = json.load(answer)["pipelines"]["default"]
            return found

    def until(self, accepted: int) -> None:
        deadline = time.monotonic() + 120
        while True:
            try:
                now = self.status()
                if now["accepted"] >= accepted and now["pending"] == 0:
                    return
            except (OSError, KeyError):
                pass
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.1)

    def interrupt(self) -> str:
        assert self.background is not None
        os.killpg(self.background.pid, signal.SIGINT)
        code = self.background.wait(60)
        self.background = None
        self.log.close()
        text = (self.folder / "log").read_text()
        assert code == 0, text
        return text

    def close(self) -> None:
        if self.background is not None:
            os.killpg(self.background.pid, signal.SIGKILL)
            self.background.wait()
            self.log.close()


def copy_checkout(target: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a checkout")
    for name in listed.stdout.split("\0"):
        if name and not name.startswith(("tests/", "benchmarks/")) and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def follow(shell: Shell) -> tuple[list[str], list[str]]:
    """Runs all steps; what the blocks printed, and what ran beside them."""
    said: list[str] = []
    logs: list[str] = []
    for interrupts, mark, block in STEPS:
        if interrupts:
            logs.append(shell.interrupt())
            continue
        if mark == "background":
            shell.start(block)
            continue
        if mark in {"ready", "settled"}:
            shell.until(0 if mark == "ready" else 4)
        code, text = shell.run(block)
        if INSTALL in block and "No matching distribution" in text:
            pytest.skip("the packages can't be had here")
        assert code == (1 if mark == "fails" else 0), f"{block}\n{text}"
        said.append(text)
        if mark == "ready":
            shell.until(4)
    return said, logs


def test_from_an_empty_folder_to_a_service(tmp_path: Path) -> None:
    if not all(map(_is_free, (8080, 8081))):
        pytest.skip("its ports are in use")
    copy_checkout(tmp_path / "ingestd")
    shell = Shell(tmp_path)
    try:
        said, logs = follow(shell)
    finally:
        shell.close()
    made, tried, tests, answered, checked, served, dead = (*said[1:2], *said[3:])
    assert "app.py" in made
    (shown,) = re.findall(r"^```\n(batch 1: .*?)\n```$", PAGE, re.MULTILINE | re.DOTALL)
    numbers = re.compile(r"[\d.,]+( ms| records/s)")
    assert numbers.sub("", tried).strip() == numbers.sub("", shown)
    assert "4 passed" in tests
    for text in (answered, served):  # the status comes behind the answer
        assert json.JSONDecoder().raw_decode(text)[0]["accepted"] == 4
    assert "syncs of 4 KiB" in checked
    assert "a negative amount" in dead
    assert re.search(r"batch \w+-1: 2 done, 2 rejected in ", logs[0])
    assert re.search(r'"processed": ?2', logs[1])
    with closing(sqlite3.connect(tmp_path / "events.db")) as db:
        assert db.execute("SELECT count(*) FROM events").fetchone() == (4,)  # dev, then run
    assert not list(tmp_path.glob("ingestd-dev-*"))


def _is_free(port: int) -> bool:
    import socket

    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
