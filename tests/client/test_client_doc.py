"""The examples of docs/clients/python.md, each as a program of its own beside a real daemon."""

from __future__ import annotations

import inspect
import json
import re
from typing import TYPE_CHECKING

import pytest

from ingestd.client import Client
from ingestd.client.exchange import RETRIED
from tests.client.test_client import THREAD, ended, script
from tests.daemon.harness import ROOT, daemon, written

if TYPE_CHECKING:
    from pathlib import Path

PAGE = (ROOT / "docs" / "clients" / "python.md").read_text()
EXAMPLES = re.findall(r"^<!-- example -->\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
ARRIVES = [1000, 1, 1, 1, 1]
"""Records of each example."""


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example(number: int, tmp_path: Path) -> None:
    with daemon(*THREAD, "--pipelines.clicks.batch.age_max", "50ms", cwd=tmp_path) as one:
        text = EXAMPLES[number].replace("http://127.0.0.1:8080", f"http://127.0.0.1:{one.port}")
        said = ended(script(text, cwd=tmp_path))
        one.until_settled("clicks" if "clicks" in text else "default")
        lines = written(tmp_path)
    assert len(lines) == ARRIVES[number]
    if "LogHandler(" in text:
        (shown,) = re.findall(r"^```json\n(.*?)\n```$", PAGE, re.MULTILINE)
        got, wanted = json.loads(lines[0]), json.loads(shown)
        assert len(got.pop("time")) == len(wanted.pop("time"))
        assert got == wanted
    if "print(" in text:
        assert "accepted=1" in said
    assert ("invalid: 400" in said or "invalid: malformed" in said) == ("on_invalid" in text)


def test_every_example_is_run_and_every_option_told() -> None:
    assert len(EXAMPLES) == PAGE.count("```python") == len(ARRIVES)
    rows = re.findall(r"^\| (`.*?`) \|", PAGE[PAGE.index("## Options") :], re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"\w+", row)}
    assert told == set(inspect.signature(Client).parameters) - {"url"}


def test_the_table_of_answers_is_that_of_the_code() -> None:
    table = PAGE[PAGE.index("| answer | the client |") :]
    again = "".join(table.splitlines()[2:4])
    assert {int(code) for code in re.findall(r"\b4\d\d\b", again)} == RETRIED
