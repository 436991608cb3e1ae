"""A thread of its own, in which a handler may fork; the real interpreter at its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

FORKS = """
import multiprocessing, sys
from ingestd.base.tasks import OwnThread

def forks():
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=print, args=("child",), kwargs={"flush": True})
    child.start()
    child.join(60)
    return child.exitcode

thread = OwnThread("one")
print(thread.submit(forks).result())
try:
    thread.submit(int, "x").result()
except ValueError:
    print("raised")
waits = thread.submit(int, "7")
thread.shutdown()
print(waits.result())
try:
    thread.submit(int)
except RuntimeError:
    print("shut")
"""


def test_a_child_that_is_forked_in_it_ends_like_any_other() -> None:
    run = subprocess.run(
        [sys.executable, "-c", FORKS],
        env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert run.stdout.split() == ["child", "0", "raised", "7", "shut"]
    assert run.stderr == ""
