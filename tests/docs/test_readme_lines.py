"""The lines of the README, as they are printed there, one after the other in one folder."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.harness import ROOT
from tests.sinks.postgres_server import Database

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(?:^<!-- (\S+) -->\n)?^```sh\n(.*?)\n```$", README, re.MULTILINE | re.DOTALL)
LINES = [line for mark, block in BLOCKS for line in block.splitlines() if not mark]
SAMPLES = b"".join(b'{"user": "ada", "page": "/%d"}\n' % n for n in range(100))
ACTIVATE, RUN = ". .venv/bin/activate", "ingestd run app:store"
DSN = "postgresql://localhost/shop"
EXAMPLE = "https://example.com/2026-01.ndjson.gz"


def line_with(part: str) -> str:
    (line,) = [line for line in LINES if part in line]
    return line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What somebody has who ran the first line and wrote the file."""
    (code,) = re.findall(r"^```python\n# app\.py\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "app.py").write_text(code)
    (tmp_path / "visits.ndjson.gz").write_bytes(gzip.compress(SAMPLES))
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "activate").write_text(f'PATH="{scripts}:$PATH"\n')
    program = scripts / "ingestd"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ingestd "$@"\n')
    program.chmod(0o755)
    return tmp_path


def shell(line: str, folder: Path, **env: str) -> subprocess.Popen[str]:
    """The line in a shell that ran the README's lines before it."""
    environ = {
        "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(ROOT),
        "INGESTD_ADMIN__LISTEN": "127.0.0.1:0", "INGESTD_HTTP__LISTEN": "127.0.0.1:0", **env,
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", f"{line_with('activate')}\n{line}"], cwd=folder,
        env=environ, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def visits(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "pages.db")) as db:
        return int(db.execute("SELECT count(*) FROM visits").fetchone()[0])


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    events = [json.loads(line) for line in said.splitlines()]
    assert not [one for one in events if one["level"] in ("warning", "error")], said
    return {one["event"]: one for one in events}


@pytest.mark.slow
def test_the_pipe(folder: Path) -> None:
    summary = ended(shell(line_with("--source stdin"), folder))["input_summed_up"]
    assert (summary["accepted"], summary["processed"], summary["dead"]) == (100, 100, 0)
    assert visits(folder) == 100


@pytest.mark.slow
def test_the_sink(folder: Path) -> None:
    pytest.importorskip("psycopg", reason="needs the extra postgres")
    database = Database()
    try:
        line = line_with("run postgres")
        assert DSN in line
        line = f"zcat visits.ndjson.gz | {line.replace(DSN, database.dsn())} --source stdin"
        assert ended(shell(line, folder))["input_summed_up"]["processed"] == 100
        assert database.sql("SELECT count(DISTINCT page) FROM records") == "100"
    finally:
        database.drop()


class _Files(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = gzip.compress(SAMPLES)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def files() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Files) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_download(folder: Path, files: str) -> None:
    line = line_with("--source fetch")
    assert EXAMPLE in line
    line = line.replace(EXAMPLE, f"{files}/2026-01.ndjson.gz")
    events = ended(shell(line, folder, INGESTD_FETCH__ALLOW_PRIVATE="true"))
    assert events["input_summed_up"]["processed"] == 100
    assert visits(folder) == 100


def test_the_server(folder: Path) -> None:
    assert RUN in LINES
    process = shell(f"exec {RUN}", folder)
    assert process.stderr is not None
    for text in process.stderr:
        event = json.loads(text)
        if event["event"] == "daemon_started":
            break
    host, _, port = event["listening"][0].removeprefix("http://").rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    (sent,) = re.findall(r"--data-binary '(.*?)'", line_with("curl -i"))
    connection.request("POST", "/v1/records", sent)
    answer = connection.getresponse()
    assert answer.status == 202
    (shown,) = re.findall(r"^HTTP/1.1 202 Accepted\n…\n(.*)$", README, re.MULTILINE)
    assert answer.read().decode().strip() == shown
    connection.close()
    process.send_signal(signal.SIGINT)
    assert ended(process)["drained"]["processed"] == 1
    assert visits(folder) == 1


def test_every_line_is_one_of_these() -> None:
    parts = ("curl -i", "stdin", "fetch", "run postgres")
    known = (ACTIVATE, RUN, *map(line_with, parts))
    assert sorted(LINES) == sorted(known)
    assert [mark for mark, _ in BLOCKS if mark] == ["run-line", "test-line"]


@pytest.mark.slow
def test_the_first_line(tmp_path: Path) -> None:
    """It makes an environment out of what is checked out, and what it starts takes records."""
    (line,) = [block for mark, block in BLOCKS if mark == "run-line"]
    line = line.replace("&& .venv/bin/ingestd", "&& exec .venv/bin/ingestd")  # it gets the signal
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a checkout")
    for name in listed.stdout.split("\0"):
        if name and not name.startswith(("tests/", "docs/")) and (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    scripts = tmp_path / "path"
    scripts.mkdir()
    (scripts / "python3").symlink_to(sys.executable)
    kept = ("HOME", "LANG", "HTTP_PROXY", "HTTPS_PROXY", "PIP_INDEX_URL", "SSL_CERT_FILE")
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", line],
        cwd=tmp_path, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={
            **{name: os.environ[name] for name in kept if name in os.environ},
            "PATH": f"{scripts}:/usr/local/bin:/usr/bin:/bin",
            "INGESTD_ADMIN__LISTEN": "127.0.0.1:0", "INGESTD_HTTP__LISTEN": "127.0.0.1:0",
        },
    )  # fmt: skip
    assert process.stderr is not None
    said = []
    for text in process.stderr:
        said.append(text)
        if "daemon_started" in text:
            break
    if process.poll() is not None and "No matching distribution" in "".join(said):
        pytest.skip("the packages can't be had here")
    assert "daemon_started" in said[-1], said
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0
