"""Files beside the handler that are called like modules of Python's own, or of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.daemon.harness import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow  # each starts processes of its own

NAMES = ("queue", "json", "token", "types", "typing", "enum", "select", "aiohttp", "msgspec",
         "structlog", "email", "random", "string", "statistics")  # fmt: skip


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('this is not the module')\n")
    (tmp_path / "app.py").write_text(
        "import json, queue, token\n"
        "import beside\n"
        "def store(batch: list[int]) -> None:\n"
        "    with open(beside.NOTES, 'a') as notes:\n"
        "        notes.write(json.dumps(batch))\n"
    )
    (tmp_path / "beside.py").write_text(f"NOTES = {str(tmp_path / 'notes')!r}\n")
    return tmp_path


def ingestd(*args: str, cwd: Path, feed: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    # The program as it is installed: `python -m` itself fails with a file types.py beside it.
    return subprocess.run(
        [sys.executable, "-c", "from ingestd.__main__ import main; main()", *args],
        cwd=cwd, input=feed, capture_output=True, text=True, timeout=60,
        env={**os.environ, **env},
    )  # fmt: skip


@pytest.mark.parametrize("path", ["{root}", "{root}:{here}"])
@pytest.mark.parametrize("kind", ["process", "thread"])
def test_they_are_not_taken_for_the_modules(crowded: Path, kind: str, path: str) -> None:
    where = {
        "PYTHONPATH": path.format(root=ROOT, here=crowded),
        "PYTHONSAFEPATH": "1",
    }
    if ":" in path:  # what Python itself needs before we come
        for name in ("types", "enum", "typing"):
            (crowded / f"{name}.py").unlink()
    arguments = ("app:store", "--executor.kind", kind, "--admin.listen", "")
    checked = ingestd("check", *arguments, cwd=crowded, **where)
    assert checked.returncode == 0, checked.stderr
    ran = ingestd("run", *arguments, "--source", "stdin", cwd=crowded, feed="1\n2\n", **where)
    assert ran.returncode == 0, ran.stderr
    assert (crowded / "notes").read_text() == "[1, 2]"


def test_with_python_m_too(tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("raise RuntimeError('this is not the module')\n")
    (tmp_path / "token.py").write_text("raise RuntimeError('this is not the module')\n")
    (tmp_path / "app.py").write_text("def store(batch: list[int]) -> None: print(batch)\n")
    for command in (("check",), ("run", "--source", "stdin", "--admin.listen", "")):
        done = subprocess.run(
            [sys.executable, "-m", "ingestd", command[0], "app:store", *command[1:]],
            cwd=tmp_path, input="1\n", capture_output=True, text=True, timeout=60,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_a_handler_of_such_a_name_is_refused_by_its_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / "queue.py").write_text("def store(batch): pass\n")
    for command in ("check", "run"):
        done = ingestd(
            command, "queue:store", "--executor.kind", kind, "--source", "stdin", cwd=tmp_path,
            PYTHONPATH=str(ROOT),
        )  # fmt: skip
        assert done.returncode == 78
        assert f"{tmp_path}/queue.py has the name of a module of Python's own" in done.stderr


def test_a_helper_of_such_a_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "token.py").write_text("def make(): pass\n")
    (tmp_path / "app.py").write_text("from token import make\ndef store(batch): pass\n")
    done = ingestd("check", "app:store", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 78
    assert "hide token.py: rename it" in done.stderr


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_python_m_with_a_safe_path(crowded: Path, kind: str) -> None:
    """Without `-P` Python itself takes `types.py` for its own, before any line of ours runs."""
    for command in (("check",), ("run", "--source", "stdin")):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "ingestd", command[0], "app:store", *command[1:],
             "--executor.kind", kind, "--admin.listen", ""],
            cwd=crowded, input="1\n", capture_output=True, text=True, timeout=60,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert (crowded / "notes").read_text() == "[1]"
