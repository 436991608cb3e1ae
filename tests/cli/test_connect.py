"""`ingestd check --connect` and `--json`: real disks, journals and certificates."""

from __future__ import annotations

import json
import os
import sqlite3
import tarfile
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from tests.cli.test_cli import ROOT, ingestd

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

HANDLER = """
class Store:
    def __init__(self, token: str = "") -> None: ...
    def __call__(self, batch: list[dict]) -> None: ...
    def check(self):
        from ingestd.handlers.outcome import SinkFinding
        yield SinkFinding("warning", "the table has no index")
"""


def found(*arguments: str, cwd: Path, code: int = 0) -> list[tuple[str, str, str]]:
    run = ingestd("check", *arguments, "--connect", "--json", cwd=cwd)
    assert run.returncode == code, run.stderr
    told: dict[str, Any] = json.loads(run.stdout)
    assert told["exit_code"] == code
    return [(one["about"], one["level"], one["text"]) for one in told["findings"]]


def test_a_new_data_directory(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(HANDLER)
    sink, *others = found("app:Store", cwd=tmp_path)
    assert sink == ("pipeline default", "warning", "the table has no index")
    missing, space, syncs = others
    assert missing[:2] == ("data_dir", "info")
    assert missing[2].endswith("ingestd-data does not exist; run makes it")
    assert space[:2] == ("pipeline default", "info")
    assert "MiB of its disk are free, journal.free_min is" in space[2]
    assert syncs[0] == "data_dir"
    assert "20 syncs of 4 KiB: " in syncs[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["__pycache__", "app.py"]
    text = ingestd("check", "app:Store", "--connect", cwd=tmp_path).stdout
    assert "# default: warning: the table has no index\n" in text
    assert "\n# sources, disk and certificates\n# data_dir: info: " in text


def test_settings_as_json(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(HANDLER)
    secret = ("--handler.options.token", "hidden-from-all")
    run = ingestd("check", "app:Store", "--batch.age_max", "250ms", *secret, "--json", cwd=tmp_path)
    assert run.returncode == 0
    assert "hidden-from-all" not in run.stdout
    told = json.loads(run.stdout)
    settings = {one["key"]: (one["value"], one["origin"]) for one in told["settings"]}
    assert settings["batch.age_max"] == ("250ms", "flag --batch.age_max")
    assert settings["batch.records_max"] == (1000, "default")
    assert told["handlers"] == [
        {"pipeline": "default", "targets": "app:Store", "is": "app:Store (executor: process)"}
    ]
    assert told["findings"] == []


@pytest.mark.skipif(os.getuid() != 0, reason="a file system is mounted by root alone")
def test_a_disk_that_syncs_for_nothing_is_a_warning() -> None:
    from pathlib import Path
    from tempfile import TemporaryDirectory

    if not Path("/dev/shm").is_mount():
        pytest.skip("/dev/shm is no file system in memory")
    with TemporaryDirectory(dir="/dev/shm") as folder:
        told = found("jsonl", "--data-dir", folder, cwd=Path(folder))
        assert [level for about, level, text in told if "syncs" in text] == ["warning"]


def test_what_keeps_a_daemon_from_starting_is_an_error(tmp_path: Path) -> None:
    full = found("jsonl", "--journal.free_min", "1024TiB", cwd=tmp_path, code=78)
    (problem,) = [text for _, level, text in full if level == "error"]
    assert problem.endswith("no record is accepted")
    (tmp_path / "file").write_text("")
    told = found("jsonl", "--data-dir", "file", cwd=tmp_path, code=78)
    assert [(about, level) for about, level, _ in told] == [("data_dir", "error")]
    memory = found("jsonl", "--journal.kind", "memory", cwd=tmp_path)
    assert [about for about, *_ in memory] == ["data_dir"]


def test_the_version_of_a_journal(tmp_path: Path) -> None:
    with tarfile.open(ROOT / "tests" / "journal" / "upgrade" / "data-version-2.tar.gz") as packed:
        packed.extraction_filter = getattr(tarfile, "data_filter", None)  # from 3.11.4 on
        packed.extractall(tmp_path)
    (path,) = (one for one in tmp_path.rglob("journal.db") if "pipelines" not in one.parts)
    before = path.read_bytes()
    told = found("jsonl", "--data-dir", str(path.parent), cwd=tmp_path)
    (text,) = (text for about, level, text in told if "version" in text and level == "warning")
    assert text == (
        "the next start makes version 3 of its journal of version 2;"
        " an earlier ingestd cannot read it then"
    )
    assert path.read_bytes() == before
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    told = found("jsonl", "--data-dir", str(path.parent), cwd=tmp_path, code=78)
    assert [text for _, level, text in told if level == "error"] == [
        "its journal has version 99, this ingestd reads up to 3"
    ]
    path.write_bytes(b"no journal" * 1000)
    assert found("jsonl", "--data-dir", str(path.parent), cwd=tmp_path, code=78)


@pytest.mark.parametrize(("days", "is_soon"), [(400, False), (3, True)])
def test_the_last_day_of_a_certificate(tmp_path: Path, days: int, is_soon: bool) -> None:
    until = datetime.now(UTC) + timedelta(days=days)
    made = trustme.CA().issue_cert("ingest.example", not_after=until)
    made.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    flags = ("--http.tls.certificate", "server.pem")
    told = found("jsonl", *flags, cwd=tmp_path)
    day = f"{until:%Y-%m-%d}"
    path = tmp_path / "server.pem"
    assert ("http", "info", f"the certificate {path} is valid until {day}") in told
    doubts = [text for about, level, text in told if level == "warning" and about == "http"]
    assert doubts == ([f"http.tls.certificate: {path}: it expires on {day}"] if is_soon else [])
