"""The pages of clients show what the programs of `tests/clients` run, line by line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = [path.read_text() for path in (ROOT / "tests/clients/programs").glob("*.*")]
BLOCK = re.compile(r"^```(?:python|js|)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["elasticsearch", "splunk", "datadog", "loki"])
def test_configurations_are_those_of_the_programs(page: str) -> None:
    text = (ROOT / f"docs/clients/{page}.md").read_text().partition("\n## Clients\n")[2]
    blocks = BLOCK.findall(text)
    assert blocks
    for block in blocks:
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        assert any(all(line in program for line in lines) for program in PROGRAMS), block
