"""A real PostgreSQL is stopped under the handler that docs/EXACTLY_ONCE.md prints."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.daemon.harness import ROOT, Daemon, daemon
from tests.faults.tools import until
from tests.postgres import Postgres

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "EXACTLY_ONCE.md").read_text()
HANDLER = re.search(r"```python\n# clicks_postgres\.py\n(.*?)```", PAGE, re.DOTALL)
TABLES = re.search(r"With `(CREATE TABLE [^`]*)` and `(CREATE TABLE [^`]*)`", PAGE)
PINNED = ROOT / "deploy" / "docker" / "postgres" / "requirements.txt"
WAITING = 300_000


@pytest.fixture(scope="module")
def psycopg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with psycopg, as the example of the image pins it."""
    folder = tmp_path_factory.mktemp("psycopg")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-warn-script-location",
         "--require-hashes", "--target", folder, "-r", PINNED],
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"psycopg can't be installed: {done.stderr[-300:]}")
    return folder


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    # Not in pytest's own folder: its user has to come in.
    with tempfile.TemporaryDirectory(prefix="ingestd-postgres-") as folder:
        server = Postgres(Path(folder))
        try:
            server.start()
            server.sql("CREATE DATABASE ingestd", "postgres")
            assert TABLES is not None
            for statement in TABLES.groups():
                server.sql(statement)
            yield server
        finally:
            server.stop()


@pytest.fixture
def writing(postgres: Postgres, psycopg: Path, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with the page's handler and default settings."""
    assert HANDLER is not None
    (tmp_path / "clicks_postgres.py").write_text(HANDLER[1])
    dsn = f"host={postgres.folder} user=ingestd dbname=ingestd"
    with daemon(
        "clicks_postgres:Store", "--handler.options.dsn", dsn, cwd=tmp_path,
        environ={"PYTHONPATH": f"{ROOT}:{psycopg}"},
    ) as one:  # fmt: skip
        yield one


def clicks(first: int, count: int) -> bytes:
    return b"".join(b'{"user":"u%d"}\n' % n for n in range(first, first + count))


def rows(postgres: Postgres) -> tuple[int, int]:
    """All, and different users."""
    found = postgres.sql("SELECT count(*), count(DISTINCT usr) FROM clicks").split("|")
    return int(found[0]), int(found[1])


def test_the_handler_of_the_page_survives_a_restart_of_the_database(
    writing: Daemon, postgres: Postgres
) -> None:
    """Its connections break; the first batch after that is stored, and nothing is dead."""
    assert writing.post(clicks(0, 100))[0] == 202
    writing.until_settled()
    for life in range(1, 4):
        postgres.stop()
        postgres.start()
        assert writing.post(clicks(life * 100, 100))[0] == 202
        numbers = writing.until_settled(timeout=120)
        assert (numbers["processed"], numbers["dead"]) == (100 * (life + 1), 0)
    assert rows(postgres) == (400, 400)
    writing.terminate()
    assert writing.wait() == 0


def test_a_database_that_was_down_costs_no_record_and_few_lines(
    writing: Daemon, postgres: Postgres
) -> None:
    """Stopped for a while under load: no dead letter, a few lines, and all is done soon after."""
    assert writing.post(clicks(0, 1000))[0] == 202
    writing.until_settled()
    postgres.stop()
    began = time.monotonic()
    sent = 1000
    while sent < 1000 + WAITING:
        assert writing.post(clicks(sent, 1000))[0] == 202
        sent += 1000
    writing.event("handler_went_down")
    until(lambda: time.monotonic() - began > 30)
    state = writing.status()["pipelines"]["default"]
    assert state["handler"]["state"] == "down"
    assert "OperationalError" in state["handler"]["error"]
    assert (state["pending"], state["dead"]) == (WAITING, 0)
    postgres.start()
    back = time.monotonic()
    down = back - began
    numbers = writing.until_settled(timeout=240)
    seconds = time.monotonic() - back
    assert (numbers["processed"], numbers["dead"]) == (sent, 0)
    up = {"state": "up", "down_since": None, "down_since_seconds": 0.0, "error": ""}
    assert numbers["handler"] == up
    assert rows(postgres) == (sent, sent)
    # Noticed within an eighth of the outage; then the backlog at the speed of the database.
    came_back = writing.event("handler_came_back")
    assert came_back["down_seconds"] < down * 1.125 + 15
    loud = [one for one in writing.events if one["level"] in {"warning", "error"}]
    assert len(loud) < 40, loud
    print(f"down {down:.1f} s; all {WAITING} done {seconds:.1f} s after it was back")
