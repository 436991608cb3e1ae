"""`ingestd journal` shows statistics of journals, verifies and repairs them, and lists logs."""

from __future__ import annotations

import asyncio
import base64
import os
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ingestd.base.clock import SystemClock, shown
from ingestd.base.errors import ConfigError, Exit
from ingestd.base.files import create_new, make_folder
from ingestd.cli.arguments import add_data_dir
from ingestd.cli.configured import configured
from ingestd.cli.lines import one_line
from ingestd.cli.output import add_json, say, say_json
from ingestd.host.data_dir import DataDir
from ingestd.journal.build import stored_journals
from ingestd.journal.settings import JournalKind
from ingestd.registry import JOURNALS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from ingestd.journal.sqlite.check import Finding, SqliteFile
    from ingestd.settings import Settings

DESCRIPTION = """\
Works on the journals of a data directory. stat and verify only read, with or without a running
daemon; --repair needs the daemon stopped. list reads the logs of all daemons of a stream
(journal.kind jetstream).

exit codes: 0 all is well; 1 verify found damage; 2 usage; 78 configuration, no journal, in use"""


def add_arguments(parser: argparse.ArgumentParser, _argv: Sequence[str]) -> None:
    """Adds the actions, each with its flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    for name, run, text in (
        ("stat", _stat, "show the ledger, chunks, batches, dead letters and sizes"),
        ("verify", _verify, "check the file, every checksum, every batch and the ledger"),
        (
            "list",
            None,
            "list the logs of all daemons on a stream, their owners and numbers",
        ),
    ):
        one = actions.add_parser(name, help=text, description=text.capitalize())
        one.set_defaults(run=run, leaf=one)
        add_data_dir(one)
        if name == "list":
            add_json(one, "a JSON line for each log")
            continue
        one.add_argument(
            "--pipeline", action="append", default=[], metavar="NAME", help="only this; repeatable"
        )
        add_json(one, "a JSON line for each journal")
        if name == "verify":
            one.add_argument(
                "--repair",
                action="store_true",
                help="set damaged chunks aside, build a damaged file anew; nothing is deleted",
            )
            one.add_argument(
                "-o",
                "--output",
                metavar="DIR",
                help="copy chunks that were set aside into this folder",
            )


def execute(arguments: argparse.Namespace) -> int:
    """Runs the action; returns the exit code.

    Raises:
        IngestdError: it failed; the message is one line.
    """
    settings = configured(arguments).settings
    if arguments.run is None:
        return _list(settings, as_json=arguments.json)
    data_dir = settings.data_dir
    found = stored_journals(data_dir, arguments.pipeline)
    return int(arguments.run(arguments, data_dir, found))


# -- list ------------------------------------------------------------------------------------------


def _list(settings: Settings, *, as_json: bool) -> int:
    stores = {repr(one.journal.own): one.journal for one in settings.pipeline_settings().values()}
    for journal in stores.values():
        kind = JOURNALS.load(journal.kind)
        has_logs = isinstance(kind, type) and issubclass(kind, JournalKind)
        logs = asyncio.run((kind() if has_logs else JournalKind()).logs(journal.own))
        if as_json:
            for one in logs:
                say_json(one)
        else:
            say(_columns(logs))
    return int(Exit.OK)


def _columns(logs: Sequence[dict[str, Any]]) -> str:
    """A table of logs, with the sum of those whose numbers are known."""
    numbers = ("accepted", "processed", "dead", "pending")
    known = [one for one in logs if one["pending"] is not None]
    total = {name: sum(one[name] for one in known) for name in numbers}
    rest = f"{len(logs) - len(known)} unknown" if len(known) < len(logs) else ""
    all_ = [*logs, {"log": "sum", "pipeline": "", "owner": "", "state": rest, **total}]
    rows = [tuple(all_[0]), *(tuple(map(_cell, one.values())) for one in all_)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return "-" if value in {None, ""} else one_line(str(value))  # others may write to the stream


# -- stat ------------------------------------------------------------------------------------------


def _stat(arguments: argparse.Namespace, _data_dir: Path, found: dict[str, SqliteFile]) -> int:
    for name, journal in found.items():
        facts = {"pipeline": name, **journal.stat()}
        oldest = facts["oldest_pending_at"]
        facts["oldest_pending_at"] = None if oldest is None else shown(oldest)
        if arguments.json:
            say_json(facts)
        else:
            say(_table(facts))
    return int(Exit.OK)


def _table(facts: dict[str, Any]) -> str:
    lines = []
    for name, value in facts.items():
        text = value
        if isinstance(value, dict):
            text = "  ".join(_pairs(value))
        elif value is None:
            text = "-"
        elif isinstance(value, bool):
            text = "yes" if value else "NO"
        lines.append(f"{name.replace('_', ' '):<18} {text}")
    return "\n".join(lines) + "\n"


def _pairs(facts: dict[str, Any], of: str = "") -> Iterator[str]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _pairs(value, f"{name}_")
        else:
            yield f"{of}{name} {value}"


# -- verify ----------------------------------------------------------------------------------------


class _Verdict:
    """Collects what is said of one journal, and prints it as it comes unless `quiet`."""

    def __init__(self, pipeline: str, *, quiet: bool) -> None:
        self.pipeline = pipeline
        self.findings: list[Finding] = []
        self.left: list[Finding] = []
        self.repairs: list[str] = []
        self.set_aside: list[str] = []
        self._quiet = quiet

    def say(self, text: str) -> None:
        """Prints a line about the journal."""
        if not self._quiet:
            say(f"{self.pipeline}: {text}")

    def facts(self) -> dict[str, object]:
        """All of it, for JSON."""
        return {
            "pipeline": self.pipeline,
            "ok": not self.left,
            "findings": [one._asdict() for one in self.findings],
            "repairs": self.repairs,
            "left": [one._asdict() for one in self.left],
            "set_aside": self.set_aside,
        }


def _verify(arguments: argparse.Namespace, data_dir: Path, found: dict[str, SqliteFile]) -> int:
    verdicts = [(_Verdict(name, quiet=arguments.json), one) for name, one in found.items()]
    with _held(data_dir, found) if arguments.repair else nullcontext():
        for verdict, journal in verdicts:
            verdict.findings = verdict.left = _find(verdict, journal)
            if arguments.repair and verdict.findings:
                _repair(verdict, journal)
        _export(arguments.output, verdicts)
    if arguments.json:
        for verdict, _ in verdicts:
            say_json(verdict.facts())
    return int(Exit.UNEXPECTED if any(one.left for one, _ in verdicts) else Exit.OK)


@contextmanager
def _held(data_dir: Path, found: dict[str, SqliteFile]) -> Iterator[None]:
    """Locks the journals: no daemon runs on them, and none can be started.

    Raises:
        DataDirError: one runs.
    """
    with ExitStack() as held:
        lock = DataDir(data_dir)
        held.callback(lock.close)
        for pipeline in {name.partition("@")[0] for name in found}:  # adopted logs are in theirs
            lock.folder(pipeline)
        for journal in found.values():
            held.callback(journal.lock().close)
        yield


def _find(verdict: _Verdict, journal: SqliteFile) -> list[Finding]:
    """Tells each fault of a journal as it is found; returns all of them."""
    found = []
    for finding in journal.findings():
        verdict.say(finding.text)
        found.append(finding)
    if not found:
        verdict.say("ok")
    return found


def _repair(verdict: _Verdict, journal: SqliteFile) -> None:
    """Mends all that can be mended, and looks for the faults that are left."""
    for done in journal.repair(verdict.findings, SystemClock.now()):
        verdict.say(done)
        verdict.repairs.append(done)
    verdict.left = _find(verdict, journal)


def _export(folder: str | None, verdicts: Sequence[tuple[_Verdict, SqliteFile]]) -> None:
    if folder is None:
        return
    try:
        target = Path(folder)
        make_folder(target)
        for verdict, journal in verdicts:
            for facts, payload in journal.set_aside():
                stem = f"{facts['journal']}-{facts['id']}"
                facts["sizes"] = base64.b64encode(facts["sizes"]).decode()
                _write(target / f"{stem}.payload", payload)
                about = {"pipeline": verdict.pipeline, **facts}
                _write(target / f"{stem}.json", msgspec.json.encode(about) + b"\n")
                verdict.say(f"chunk {facts['id']} is in {target / stem}.payload")
                verdict.set_aside.append(f"{target / stem}.payload")
    except OSError as error:
        raise ConfigError(problem=f"{folder}: {error.strerror or error}") from error


def _write(path: Path, data: bytes) -> None:
    with os.fdopen(create_new(path), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
