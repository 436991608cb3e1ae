"""The image with the sink `postgres`, as compose.yaml ships it, with a real PostgreSQL."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.deploy.base import ROOT
from tests.deploy.containers.container import Container
from tests.deploy.containers.engine import volume, wait
from tests.postgres import Postgres
from tests.real_input import nginx_log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.deploy.containers.engine import Engine

pytestmark = pytest.mark.slow

FOLDER = ROOT / "deploy" / "docker" / "postgres"
IMAGE = "localhost/ingestd-postgres"
PATIENT = {
    "INGESTD_HANDLER__OPTIONS__DSN": "host=/pg user=ingestd dbname=ingestd",
    "INGESTD_HANDLER__OPTIONS__COLUMNS": "json",
    # An outage of seconds, not of minutes.
    "INGESTD_RETRY__BACKOFF": "100ms",
    "INGESTD_RETRY__BACKOFF_MAX": "300ms",
    "INGESTD_RETRY__ATTEMPTS_MAX": "1000",
    "INGESTD_BATCH__RECORDS_MAX": "50",
}


@pytest.fixture
def postgres(engine: Engine) -> Iterator[Postgres]:
    # Not in pytest's own folder: others than root have to come in.
    with tempfile.TemporaryDirectory(prefix="ingestd-postgres-") as folder:
        server = Postgres(Path(folder))
        try:
            server.start()
            server.sql("CREATE DATABASE ingestd", "postgres")
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
            wait(lambda: one.events("batch_failed"), what="a try that failed")
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
