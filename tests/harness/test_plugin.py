"""pytest finds the fixtures by the entry point, and pays nothing for those that it does not use."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import ingestd.testing

ROOT = Path(__file__).parents[2]
TEST = """
class Store:
    closed = 0
    def __call__(self, batch: list[int]) -> None: ...
    def close(self) -> None: Store.closed += 1

def test_one(ingestd_harness):
    for handler in (Store, Store):
        harness = ingestd_harness(handler)
        harness.send([1, 2])
        harness.run()
        assert harness.processed == [1, 2]

def test_fails(ingestd_harness):
    assert Store.closed == 2
    harness = ingestd_harness(lambda batch: None)
    harness.fail_batch(1, ValueError("planned"))
    harness.send([1])
    harness.run()
    assert harness.processed == []
"""


def run(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *argv], cwd=folder, env=environ, capture_output=True, text=True, timeout=60
    )


def test_the_entry_point_names_the_plug_in() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    plugin = importlib.import_module(project["entry-points"]["pytest11"]["ingestd"])
    assert plugin.ingestd_harness
    assert plugin.ingestd_async_harness


def test_a_test_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "test_store.py").write_text(TEST)
    flags = ("-W", "error", "-p", "ingestd.testing.plugin", "-p", "no:cacheprovider")
    ran = run(tmp_path, "-m", "pytest", "-q", *flags)
    assert "1 failed, 1 passed" in ran.stdout, ran.stdout + ran.stderr
    # A test that fails shows what the pipeline logged.
    assert "batch_failed reason='raised' error='ValueError: planned'" in ran.stdout


def test_the_plug_in_is_light(tmp_path: Path) -> None:
    script = (
        "import sys, pytest; before = set(sys.modules); import ingestd.testing.plugin\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    ran = run(tmp_path, "-c", script)
    assert ran.stdout.split() == ["ingestd", "ingestd.testing", "ingestd.testing.plugin"], (
        ran.stderr
    )


def test_the_package_has_what_it_names() -> None:
    for name in ingestd.testing.__all__:
        assert getattr(ingestd.testing, name).__name__ == name
    assert not hasattr(ingestd.testing, "nothing")
