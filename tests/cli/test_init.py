"""`ingestd init`: the project passes its own tests and `check`, and does what it says."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import yaml

from ingestd import __version__
from ingestd.cli.init import FILES, PROJECT
from ingestd.config.units import parse_seconds
from ingestd.settings import Settings
from tests.cli.test_cli import ROOT, ingestd
from tests.daemon.harness import daemon
from tests.deploy.test_units import analyze, needs_analyze

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

EVENTS = b'{"user": "ann", "action": "buy", "amount": 5}\n{"user": "bob", "action": "x"}\n'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    run = ingestd("init", "shop", cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert all(f"shop/{name} " in run.stdout for name in FILES)
    assert run.stdout.splitlines()[-1] == "next: cd shop && ingestd dev"
    return tmp_path / "shop"


def test_its_files_are_those_of_the_package(project: Path) -> None:
    found = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    ours = {str(path.relative_to(PROJECT))[:-4] for path in PROJECT.rglob("*.txt")}
    assert found == ours == FILES.keys()
    assert f"FROM ingestd:{__version__}\n" in (project / "Dockerfile").read_text()
    texts = [(project / name).read_text() for name in FILES]
    assert not [text for text in texts if "VERSION" in text.replace("ingestd:VERSION in", "")]


def test_it_passes_its_own_tests_and_the_check(project: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=project, env=environ, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    assert "4 passed" in run.stdout
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "."]
    assert subprocess.run(command, cwd=project, capture_output=True).returncode == 0
    run = ingestd("check", cwd=project)
    assert (run.returncode, run.stderr) == (0, "")
    assert "# default: app:Store is app:Store (executor: process)" in run.stdout


def test_its_records_are_in_its_table(project: Path) -> None:
    with daemon(cwd=project) as one:
        assert one.post(EVENTS + b'{"user": 1}\n')[1]["accepted"] == 3
        now = one.until_settled()
        assert (now["processed"], now["dead"]) == (2, 1)
        one.terminate()
        assert one.wait() == 0
    with sqlite3.connect(project / "events.db") as db:
        rows = db.execute("SELECT user, action, amount FROM events ORDER BY user").fetchall()
    db.close()
    assert rows == [("ann", "buy", 5.0), ("bob", "x", 0.0)]


def test_nothing_is_overwritten(project: Path) -> None:
    (project / "app.py").write_text("mine")
    for name in ("Dockerfile", "test_app.py"):
        (project / name).unlink()
    run = ingestd("init", cwd=project)
    assert run.returncode == 2
    assert "there is app.py, ingestd.toml, compose.yaml, ingestd.service.d/app.conf;" in run.stderr
    assert (project / "app.py").read_text() == "mine"
    assert not (project / "Dockerfile").exists()


def test_where_nothing_can_be_written_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = ingestd("init", "file", cwd=tmp_path)
    assert (run.returncode, "file: File exists; nothing was written" in run.stderr) == (2, True)
    (tmp_path / "ingestd.service.d").write_text("")
    run = ingestd("init", cwd=tmp_path)
    assert run.returncode == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "ingestd.service.d"]


def test_its_compose_file(project: Path) -> None:
    service = yaml.safe_load((project / "compose.yaml").read_text())["services"]["ingestd"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    drain = Settings().drain
    assert parse_seconds(service["stop_grace_period"]) >= drain.delay + drain.timeout + 10
    assert (project / service["build"] / "Dockerfile").is_file()


@needs_analyze
def test_its_drop_in_fits_the_unit(project: Path, tmp_path: Path) -> None:
    units = tmp_path / "units"
    units.mkdir()
    unit = (ROOT / "deploy" / "systemd" / "ingestd.service").read_text()
    (units / "ingestd.service").write_text(unit.replace("/opt/ingestd/bin/ingestd", "/bin/true"))
    shutil.copytree(project / "ingestd.service.d", units / "ingestd.service.d")
    done = analyze("verify", "--man=no", "--generators=no", str(units / "ingestd.service"))
    said = (done.stdout + done.stderr).splitlines()
    assert not [line for line in said if "ingestd" in line or str(units) in line]
