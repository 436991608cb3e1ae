"""The table in docs/RELIABILITY.md and the tests are about the same faults."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = (ROOT / "docs" / "RELIABILITY.md").read_text()


def defined(folder: Path) -> set[str]:
    files = [path for path in folder.rglob("test_*.py") if path != Path(__file__)]
    return {name for path in files for name in re.findall(r"def (test_\w+)\(", path.read_text())}


def test_every_test_in_the_table_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", TABLE))
    assert len(named) > 40
    assert named <= defined(ROOT / "tests")


def test_every_fault_test_has_its_row() -> None:
    controls = {"test_the_whole_journal_reads_back"}
    assert defined(ROOT / "tests" / "faults") - controls <= set(re.findall(r"test_\w+", TABLE))
