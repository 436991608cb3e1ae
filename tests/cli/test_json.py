"""Every command that prints facts prints them as JSON if it is asked to."""

from __future__ import annotations

import io
import json
import shutil
import signal
import sqlite3
import sys
from argparse import _SubParsersAction
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from ingestd import Batch
from ingestd.__main__ import COMMANDS, TOOLS, _parser, main
from ingestd.testing import Harness
from tests.cli.test_cli import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ingestd.cli.output import Parser

NO_FACTS = {
    "run": "its stdout is the handler's, and its log has log.format = json",
    "dev": "a session at a terminal",
    "dead export": "prints JSON lines without being asked",
}
SLOW = {
    "journal list": "tests/journal/test_group.py",
    "prove": "tests/prove/test_prove.py",
    "tap": "tests/cli/test_live.py",
    "top": "tests/cli/test_live.py",
}
"""Commands that take seconds, and the tests that parse their `--json`."""
LINES = {
    "check": ["check", "sqlite", "--handler.options.path", "x.db"],
    "try": ["try", "app:store", "records.ndjson"],
    "init": ["init", "project"],
    "token": ["token"],
    "healthcheck": ["healthcheck", "--admin.listen", "127.0.0.1:1"],
    "peek": ["peek"],
    "replay": ["replay", "--all", "--yes"],
    "pause": ["pause"],
    "resume": ["resume", "default"],
    "dead list": ["dead", "list"],
    "dead summary": ["dead", "summary"],
    "dead show": ["dead", "show", "1"],
    "dead retry": ["dead", "retry", "--all"],
    "dead edit": ["dead", "edit", "1", "--set", "user=cy"],
    "dead purge": ["dead", "purge", "--all", "--yes"],
    "journal stat": ["journal", "stat"],
    "journal verify": ["journal", "verify"],
}
"""A command line without `--json` for each of the others."""


def leaves() -> Iterator[tuple[str, Parser]]:
    """The name and the parser of each command and action."""
    for name in (*COMMANDS, *TOOLS):
        parser = _parser([name])[1][name]
        actions = [one for one in parser._actions if isinstance(one, _SubParsersAction)]
        if not actions:
            yield name, parser
        for action in actions:
            yield from ((f"{name} {word}", one) for word, one in action.choices.items())


def test_every_command_that_prints_facts_has_the_flag() -> None:
    found = dict(leaves())
    without = [name for name, one in found.items() if "--json" not in one._option_string_actions]
    assert set(without) == NO_FACTS.keys()
    assert found.keys() == NO_FACTS.keys() | SLOW.keys() | LINES.keys()
    for name, path in SLOW.items():
        text = (ROOT / path).read_text()
        assert f'"{name}"' in text
        assert '"--json"' in text
        assert "json.loads(out)" in text


def reject(batch: Batch[dict[str, object]]) -> None:
    batch.reject(0, "no")


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with one record that is dead and one that is pending."""
    folder = tmp_path_factory.mktemp("journal") / "data"
    with Harness(reject) as harness:
        harness.send([{"user": "ann"}])
        harness.run()
        harness.send([{"user": "bob"}])  # it stays pending
        shutil.copytree(harness._journal, folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, journal: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a handler, records and a data directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "app.py").write_text("def store(batch: list[dict]): ...\n")
    (tmp_path / "records.ndjson").write_text('{"user": "ann"}\n')
    shutil.copytree(journal, tmp_path / "ingestd-data")
    before, path = signal.getsignal(signal.SIGINT), list(sys.path)
    yield tmp_path
    signal.signal(signal.SIGINT, before)
    sys.path[:] = path
    sys.modules.pop("app", None)


def parsed(capfdbinary: pytest.CaptureFixture[bytes], *words: str) -> list[dict[str, object]]:
    capfdbinary.readouterr()
    main([*words, "--json"])
    return [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", LINES)
def test_what_it_prints_is_json(
    name: str, here: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    found = parsed(capfdbinary, *LINES[name])
    assert found, name
    assert all(isinstance(one, dict) for one in found)
    told = found[0]
    match name:
        case "token":
            assert str(told["token"]).startswith("ingestd_")
            assert str(told["hash"]).startswith("sha256:")
        case "healthcheck":
            assert (told["asked"], told["ok"]) == ("ready", False)
            assert "127.0.0.1:1" in str(told["problem"])
        case "init":
            assert '"project/app.py"' in json.dumps(told["files"])
        case "dead retry":
            assert told == {"marked": 1, "before": 0, "incomplete": 0, "invalid": 0}
            assert parsed(capfdbinary, *LINES[name])[0]["before"] == 1
            purged = parsed(capfdbinary, *LINES["dead purge"])
            assert purged == [{"deleted": 0, "requeued": 1}]
        case "replay":
            assert told == {"pipeline": "default", "kept": 0, "replay": None}
        case "pause" | "resume":
            paused = name == "pause"
            assert told == {"pipeline": "default", "paused": paused, "was_paused_since": None}
        case "dead edit":
            assert told == {"id": 1, "pipeline": "default", "edited": True}
        case "dead purge":
            assert told == {"deleted": 1, "requeued": 0}
        case "journal verify":
            assert (told["pipeline"], told["ok"], told["findings"]) == ("default", True, [])


def test_the_hash_of_a_token_is_json(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (made,) = parsed(capfdbinary, "token")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{made['token']}\n"))
    assert parsed(capfdbinary, "token", "--hash") == [{"hash": made["hash"]}]


def test_a_damaged_journal_and_its_repair_are_json(
    here: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    with closing(sqlite3.connect(here / "ingestd-data/journal.db")) as db:
        db.execute("UPDATE meta SET accepted = accepted + 1")
        db.commit()
    (told,) = parsed(capfdbinary, "journal", "verify")
    assert told["ok"] is False
    assert told["findings"] == told["left"]
    (told,) = parsed(capfdbinary, "journal", "verify", "--repair")
    assert (told["ok"], told["left"]) == (True, [])
    assert told["findings"]
    assert told["repairs"]
