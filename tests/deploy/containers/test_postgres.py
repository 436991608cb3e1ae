"""The handler that writes to PostgreSQL, as compose.yaml ships it, with a real PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.deploy.base import ROOT
from tests.deploy.containers.container import Container
from tests.deploy.containers.engine import volume, wait
from tests.real_input import nginx_log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.deploy.containers.engine import Engine

pytestmark = pytest.mark.slow

FOLDER = ROOT / "deploy" / "docker" / "postgres"
IMAGE = "localhost/ingestd-postgres"
PATIENT = {
    "INGESTD_HANDLER__OPTIONS__DSN": "host=/pg user=ingestd dbname=ingestd",
    # An outage of seconds, not of minutes.
    "INGESTD_RETRY__BACKOFF": "100ms",
    "INGESTD_RETRY__BACKOFF_MAX": "300ms",
    "INGESTD_RETRY__ATTEMPTS_MAX": "1000",
    "INGESTD_BATCH__RECORDS_MAX": "50",
}


class Postgres:
    """A cluster of its own that listens on a socket in its folder, and nowhere else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bin = _binaries()
        # It refuses to be root.
        self._user = pwd.getpwnam("postgres")
        os.chown(folder, self._user.pw_uid, self._user.pw_gid)
        folder.chmod(0o755)  # who is in the container is neither
        self._process: subprocess.Popen[bytes] | None = None
        self._run("initdb", "-D", str(folder / "data"), "-U", "ingestd", "-A", "trust", "-N")

    def _run(self, tool: str, *args: str) -> str:
        done = subprocess.run(
            [self._bin / tool, *args], cwd=self.folder, user=self._user.pw_uid,
            group=self._user.pw_gid, extra_groups=[], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [self._bin / "postgres", "-D", self.folder / "data", "-h", "", "-F",
             "-k", self.folder],
            cwd=self.folder, user=self._user.pw_uid, group=self._user.pw_gid, extra_groups=[],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        ready = [self._bin / "pg_isready", "-q", "-h", self.folder]
        wait(lambda: subprocess.run(ready).returncode == 0, what="PostgreSQL")

    def stop(self) -> None:
        """Connections are broken off, as in a restart of the server."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
            self._process = None

    def sql(self, statement: str, database: str = "ingestd") -> str:
        return self._run(
            "psql", "-h", str(self.folder), "-U", "ingestd", "-d", database,
            "-v", "ON_ERROR_STOP=1", "-Atc", statement,
        )  # fmt: skip

    def hold_commits(self) -> None:
        """From now on a commit is on disk and nobody is told: it waits for a standby."""
        self.sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        self.sql("SELECT pg_reload_conf()")

    def held(self) -> int:
        """How many commits wait like that."""
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        return int(self.sql(waiting))

    def release_commits(self) -> None:
        """They go on, and those to come do not wait."""
        self.sql("ALTER SYSTEM RESET synchronous_standby_names")
        self.sql("SELECT pg_reload_conf()")


def _binaries() -> Path:
    on_path = shutil.which("postgres")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not on_path and not found:
        pytest.skip("needs postgresql")
    return Path(on_path or found[-1]).resolve().parent


@pytest.fixture
def postgres(engine: Engine) -> Iterator[Postgres]:
    # Not in pytest's own folder: others than root have to come in.
    with tempfile.TemporaryDirectory(prefix="ingestd-postgres-") as folder:
        server = Postgres(Path(folder))
        try:
            server.start()
            server.sql("CREATE DATABASE ingestd", "postgres")
            server.sql((FOLDER / "schema.sql").read_text())
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def writing(
    engine: Engine, postgres: Postgres, name: str, state: Path, **environ: str
) -> Iterator[Container]:
    volumes = ("--volume", f"{state.parent.name}:/var/lib/ingestd",
               "--volume", f"{postgres.folder}:/pg")  # fmt: skip
    with Container(engine, name, *volumes, image=IMAGE, environ=PATIENT | environ) as one:
        one.until_ready()
        yield one


def test_rows_are_there_exactly_once_over_kills_and_an_outage(
    engine: Engine, postgres: Postgres
) -> None:
    body = nginx_log().read_bytes()
    engine.build(FOLDER, IMAGE)
    with volume(engine, "postgres") as state:
        postgres.stop()
        with writing(engine, postgres, "postgres", state) as one:
            # The database is down: it takes records, and nobody thinks that it should start anew.
            assert one.post(body) == 500
            wait(lambda: one.events("batch_postponed"), what="a try that failed")
            assert one.request("GET", "/livez", admin=True)[0] == 200
            assert one.ready()
            assert one.numbers()["pending"] == 500
            postgres.start()
            one.until_settled()
            # SIGKILL behind the commit and before its answer: the batches come again.
            postgres.hold_commits()
            for _ in range(4):
                assert one.post(body) == 500
            wait(postgres.held, what="commits that nobody heard of")
            one.kill()
            postgres.release_commits()
            # SIGKILL anywhere.
            for _ in range(4):
                assert one.post(body) == 500
            one.kill()
            # Its connections break under it.
            assert one.post(body) == 500
            postgres.stop()
            postgres.start()
            numbers = one.until_settled()
            assert (numbers["accepted"], numbers["processed"], numbers["dead"]) == (5000, 5000, 0)
            assert one.stop() == 0
        assert postgres.sql("SELECT count(*) FROM records") == "5000"
        # Each line of the input ten times: no row instead of another.
        counts = "SELECT DISTINCT count(*) FROM records GROUP BY record"
        assert len(set(body.splitlines())) == 500
        assert postgres.sql(counts) == "10"

        # What PostgreSQL can't store costs itself and no neighbour.
        with writing(
            engine, postgres, "postgres-bad", state, INGESTD_RETRY__ATTEMPTS_MAX="2"
        ) as one:
            assert one.post(b'{"n":1}\n{"n":"\\u0000"}\n{"n":3}\n') == 3
            numbers = one.until_settled()
            assert (numbers["processed"], numbers["dead"]) == (5002, 1)
            assert one.stop() == 0
        found = "SELECT record->>'n' FROM records WHERE record ? 'n' ORDER BY 1"
        assert postgres.sql(found).split() == ["1", "3"]
