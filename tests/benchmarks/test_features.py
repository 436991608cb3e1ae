"""The benchmark of features compares each with what ran in the same round, and really runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.features import OFF, VARIANTS, Measured, Variant, main, report

pytestmark = pytest.mark.slow


def test_the_table_compares_within_a_round() -> None:
    one = Variant("one")
    found: dict[tuple[int, str], list[Measured | None]] = {
        (100, OFF): [Measured(2.0, 1000.0), Measured(4.0, 500.0), None],
        (100, "one"): [Measured(3.0, 500.0), Measured(4.0, 500.0), Measured(9.0, 1.0)],
    }
    row = report(found, [Variant(OFF), one]).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "100", "one", "3.50", "1.250 (1.000 to 1.500)", "0.750 (0.500 to 1.000)",
    ]  # fmt: skip


def test_every_variant_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2]
    flags = ["--rounds", "1", "--seconds", "0.5", "--size", "100", "--before", str(root)]
    assert main([*flags, "--directory", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    names = [line.split("|")[2].strip() for line in lines]
    assert names == [OFF, "before", *(one.name for one in VARIANTS[1:])]
    assert all(float(line.split("|")[3]) > 0 for line in lines)
