"""Handlers that misbehave by the dice: the daemon goes on, and each record ends exactly once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.attacks.misbehaving import ASYNC, FATAL, POISON, WEIRD
from tests.daemon.harness import ROOT, Daemon, daemon

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("FAULTS_SEED", "1"))
EXECUTORS = [
    ("Misbehaves", "thread", ""),
    ("Misbehaves", "process", "all"),
    ("Misbehaves", "auto", "all"),
    ("MisbehavesAsync", "async", ""),
]
LOOPS = [list(ASYNC)[first : first + 5] for first in range(0, len(ASYNC), 5)]
GROUPS = [list(WEIRD)[first : first + 6] for first in range(0, len(WEIRD), 6)]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(folder: Path, handler: str, kind: str, fatal: str, *, seed: int, records: int) -> None:
    """One daemon, `records` good records and three that never succeed; all of them end."""
    poison = [POISON + number for number in range(3)]
    wanted = list(range(records)) + poison
    arguments = (
        f"tests.attacks.misbehaving:{handler}",
        "--executor.kind", kind, "--executor.workers", "3", "--executor.timeout", "1s",
        "--batch.records_max", "4", "--batch.age_max", "5ms",
        "--retry.attempts_max", "3", "--retry.backoff", "5ms", "--retry.backoff_max", "20ms",
        "--handler.options.folder", str(folder), "--handler.options.seed", str(seed),
    )  # fmt: skip
    if fatal:
        arguments += ("--handler.options.fatal", fatal)
    environ = {"PYTHONPATH": str(ROOT)}
    with daemon(*arguments, cwd=folder, environ=environ) as one:
        for first in range(0, len(wanted), 8):
            body = b"".join(b"%d\n" % number for number in wanted[first : first + 8])
            assert one.post(body)[0] == 202, (one.events[-5:], one.other[-20:])
        until_settled(one, wanted)
        one.terminate()
        assert one.wait() == 0, (one.events[-5:], one.other[-20:])
        report = one.event("drained")
    assert report["balanced"]
    assert report["accepted"] == report["processed"] + report["dead"] == len(wanted)
    dead = exported(folder, environ)
    stored = {record for batch in lines(folder / "stored") for record in batch}
    assert len(dead) == len(set(dead)) == report["dead"]
    assert set(poison) <= set(dead)
    assert not stored & set(poison)
    # Each record that is no dead letter was processed, once, and its handler said so.
    processed = set(wanted) - set(dead)
    assert len(processed) == report["processed"]
    assert processed <= stored


def until_settled(one: Daemon, wanted: list[int]) -> None:
    """Waits; good records go on coming, because nothing is given up while nothing succeeds."""
    deadline = time.monotonic() + 240
    while True:
        wanted.append(len(wanted) + POISON // 2)
        assert one.post(b"%d\n" % wanted[-1])[0] == 202, (one.events[-5:], one.other[-20:])
        settled = time.monotonic() + 1
        while time.monotonic() < settled:
            now = one.status()["pipelines"]["default"]
            if now["pending"] == 0:
                assert now["accepted"] == len(wanted)
                return
            time.sleep(0.02)
        assert time.monotonic() < deadline, now


def exported(folder: Path, environ: dict[str, str]) -> list[int]:
    """The records of the dead letters."""
    done = subprocess.run(
        [sys.executable, "-m", "ingestd", "dead", "export"],
        cwd=folder, env={**os.environ, **environ}, capture_output=True, check=True,
    )  # fmt: skip
    letters = [json.loads(line) for line in done.stdout.splitlines()]
    return [json.loads(line) for letter in letters for line in letter["payload"].splitlines()]


@pytest.mark.parametrize(("handler", "kind", "fatal"), EXECUTORS)
@pytest.mark.slow
def test_long(tmp_path: Path, handler: str, kind: str, fatal: str) -> None:
    """Other dice with other seeds: `FAULTS_SEED=7 pytest -m slow tests/attacks`."""
    run(tmp_path, handler, kind, fatal, seed=SEED, records=300)


@pytest.mark.parametrize(
    ("handler", "kind", "fatal"), [one for one in EXECUTORS if one[1] != "auto"]
)
def test_short(tmp_path: Path, handler: str, kind: str, fatal: str) -> None:
    run(tmp_path, handler, kind, fatal, seed=SEED, records=24)


def each(folder: Path, handler: str, kind: str, names: list[str]) -> None:
    """One daemon whose handler does each of these at least once."""
    run(folder, handler, kind, ",".join(names), seed=SEED, records=24)
    assert {name for line in lines(folder / "turns") for name in line} == set(names)


@pytest.mark.slow
@pytest.mark.parametrize("name", FATAL)
def test_each_in_a_process(tmp_path: Path, name: str) -> None:
    each(tmp_path, "Misbehaves", "process", [name])


@pytest.mark.slow
@pytest.mark.parametrize("names", LOOPS, ids=lambda names: names[0])
def test_each_on_a_loop(tmp_path: Path, names: list[str]) -> None:
    each(tmp_path, "MisbehavesAsync", "async", names)


@pytest.mark.slow
@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
@pytest.mark.parametrize(
    ("handler", "kind"),
    [("Misbehaves", "process"), ("Misbehaves", "thread"), ("MisbehavesAsync", "async")],
)
def test_each_in_any_executor(tmp_path: Path, handler: str, kind: str, names: list[str]) -> None:
    each(tmp_path, handler, kind, names)
