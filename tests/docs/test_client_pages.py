"""The pages of clients show what the programs of `tests/clients` run, line by line."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = [path.read_text() for path in (ROOT / "tests/clients/programs").glob("*.*")]
BLOCK = re.compile(r"^```(?:python|js|)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["elasticsearch", "splunk", "datadog", "loki"])
def test_configurations_are_those_of_the_programs(page: str) -> None:
    text = (ROOT / f"docs/clients/{page}.md").read_text().partition("\n## Clients\n")[2]
    blocks = BLOCK.findall(text)
    assert blocks
    for block in blocks:
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        assert any(all(line in program for line in lines) for program in PROGRAMS), block


def test_every_python_example_imports_what_it_uses() -> None:
    told = {"address", "node", "token", "chunk", "errors", "client"}  # by the text around them
    found = 0
    for page in sorted((ROOT / "docs/clients").glob("*.md")):
        for block in re.findall(
            r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL
        ):
            nodes = list(ast.walk(ast.parse(block)))
            names = [node for node in nodes if isinstance(node, ast.Name)]
            known = {one.id for one in names if isinstance(one.ctx, ast.Store)}
            known |= {one.arg for one in nodes if isinstance(one, ast.arg)}
            for node in nodes:
                if isinstance(node, ast.Import | ast.ImportFrom):
                    known |= {(one.asname or one.name).partition(".")[0] for one in node.names}
                elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    known.add(node.name)
            used = {one.id for one in names if isinstance(one.ctx, ast.Load)}
            if used & {"helpers"}:  # imported in the example before
                known.add("helpers")
            assert used - known - told <= set(dir(builtins)), (page.name, block)
            found += 1
    assert found > 10
