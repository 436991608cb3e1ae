"""The units themselves, read by the systemd of this machine. What they do is in test_systemd.py."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.daemon.harness import ROOT

if TYPE_CHECKING:
    from pathlib import Path

UNITS = ROOT / "deploy" / "systemd"
SERVICES = ["ingestd.service", "ingestd@.service"]

needs_analyze = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze is not here"
)


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """With a program that is there, and the examples in place."""
    for path in UNITS.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(UNITS)).removesuffix(".example")
            copy = tmp_path / name
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(path.read_text().replace("/opt/ingestd/bin/ingestd", "/bin/true"))
    return tmp_path


@needs_analyze
@pytest.mark.parametrize("unit", ["ingestd.service", "ingestd@one.service", "ingestd.socket"])
def test_nothing_in_a_unit_is_unknown(copies: Path, unit: str) -> None:
    """Unknown keys are lines on stderr, and the exit code is 0 all the same."""
    if "@" in unit:
        (copies / "ingestd@.service").rename(copies / unit)
    done = analyze("verify", "--man=no", "--generators=no", str(copies / unit))
    said = [
        line
        for line in (done.stdout + done.stderr).splitlines()
        # What the units of this machine's packages have wrong is not ours.
        if "ingestd" in line or str(copies) in line
    ]
    assert not said
    assert done.returncode == 0


@needs_analyze
def test_an_unknown_key_would_be_seen(copies: Path) -> None:
    service = copies / "ingestd.service"
    service.write_text(service.read_text().replace("UMask=", "Umask="))
    assert "Umask" in analyze("verify", "--man=no", "--generators=no", str(service)).stderr


@needs_analyze
@pytest.mark.parametrize("unit", SERVICES)
def test_the_sandbox_leaves_little(unit: str) -> None:
    done = analyze("security", "--offline=true", "--threshold=15", str(UNITS / unit))
    level = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert level is not None, done.stderr
    assert float(level[1]) <= 1.5
    assert done.returncode == 0


def settings(unit: str) -> list[str]:
    lines = (UNITS / unit).read_text().splitlines()
    return [line.replace("/%i", "") for line in lines if line and not line.startswith("#")]


def test_an_instance_is_like_the_one() -> None:
    one, many = settings("ingestd.service"), settings("ingestd@.service")
    different = ("Description=", "ExecStart=")
    assert [line for line in one if not line.startswith(different)] == [
        line for line in many if not line.startswith(different)
    ]
