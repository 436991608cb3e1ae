"""`handler.validate = "accept"` with whole daemons: HTTP, standard input, `check`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.daemon.harness import ROOT, daemon

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

HANDLER = """\
import os, pathlib
import msgspec

with open("importers", "a") as file: file.write(f"{os.getpid()}\\n")

class Click(msgspec.Struct):
    page: str

def store(batch: list[Click]):
    with open("out", "a") as file:
        file.writelines(f"{one.page}\\n" for one in batch)

def untyped(batch): ...
"""
SETTINGS = """\
batch.age_max = "10ms"
[handler]
target = "clicks:store"
validate = "accept"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clicks.py").write_text(HANDLER)
    (tmp_path / "ingestd.toml").write_text(SETTINGS)
    return tmp_path


def command(folder: Path, *args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "ingestd", *args], cwd=folder, capture_output=True, timeout=60,
        input=stdin, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["auto", "thread"])
def test_a_client_is_told_and_the_daemon_imports_no_more_than_before(
    folder: Path, kind: str
) -> None:
    with daemon("--executor.kind", kind, cwd=folder) as one:
        status, answer = one.post(b'{"page":"a"}\n{"page":1}\n{"page":"b"}\n')
        assert (status, answer["accepted"], answer["invalid"]) == (202, 2, 1)
        (error,) = answer["errors"]
        assert (error["index"], error["reason"]) == (1, "schema")
        assert error["detail"] == "Expected `str`, got `int` - at `$.page`"
        status, answer = one.post(b'{"page":null}', Idempotency_Key="k")
        assert (status, answer["type"]) == (400, "urn:ingestd:problem:malformed")
        for _ in range(2):
            status, answer = one.post(b'{"page":"c"}\n{}\n', Idempotency_Key="k2")
            assert (status, answer["accepted"], answer["errors"][0]["index"]) == (202, 1, 1)
        status, answer = one.post(b'{"page":3}\n{"page":"d"}\n', Prefer="wait=50")
        assert (status, answer["processed"], answer["errors"][0]["index"]) == (200, 1, 0)
        document = one.request("GET", "/openapi.json")[2]
        assert document["components"]["schemas"]["default.Click"]["required"] == ["page"]
        importers = set((folder / "importers").read_text().split())
        assert (str(one.pid) in importers) is (kind == "thread")
        one.terminate()
        assert one.wait() == 0
    assert sorted((folder / "out").read_text().split()) == ["a", "b", "c", "d"]
    report = one.event("drained")
    assert (report["accepted"], report["processed"], report["invalid"]) == (4, 4, 3)
    letters = command(folder, "dead", "list", "--reason", "schema")
    assert letters.returncode == 0, letters.stderr
    assert letters.stdout.count(b"schema") >= 2


def test_standard_input_keeps_what_does_not_fit_as_dead_letters(folder: Path) -> None:
    lines = b"".join(
        json.dumps({"page": "x" if n % 10 else n}).encode() + b"\n" for n in range(1000)
    )
    done = command(folder, "run", "--source", "stdin", "--admin.listen", "", stdin=lines)
    assert done.returncode == 0, done.stderr
    assert (folder / "out").read_text().split() == ["x"] * 900
    listed = command(folder, "dead", "list", "--reason", "schema", "--json")
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.count(b'"schema"') == 100


def test_check_refuses_what_has_nothing_to_validate(folder: Path) -> None:
    assert command(folder, "check").returncode == 0
    done = command(folder, "check", "clicks:untyped")
    assert done.returncode == 78
    assert b"has nothing to validate" in done.stderr
    done = command(folder, "run", "clicks:untyped", "--admin.listen", "")
    assert done.returncode == 78
    assert b"has nothing to validate" in done.stderr
