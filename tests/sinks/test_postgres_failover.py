"""A standby is promoted under load: nothing that was committed on both is missing or doubled."""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from ingestd.prove.servers import free_port
from tests.daemon.harness import daemon
from tests.postgres import Postgres
from tests.sinks.contract.test_contract import QUICK, until
from tests.sinks.contract.test_kills import Client

pytestmark = pytest.mark.slow
pytest.importorskip("psycopg", reason="needs psycopg: pip install 'ingestd[postgres]'")


def test_a_standby_that_is_promoted_under_load(tmp_path: Path) -> None:
    with ExitStack() as ending:
        folders = [
            Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="ingestd-failover-")))
            for _ in range(2)
        ]
        ports = [free_port(), free_port()]
        primary = Postgres(folders[0], port=ports[0], durable=True)
        primary.start()
        ending.callback(primary.stop)
        primary.sql("CREATE DATABASE shop", "postgres")
        standby = Postgres(folders[1], port=ports[1], durable=True, primary=primary)
        standby.start()
        ending.callback(standby.stop)
        # From now on a commit that is answered is on both.
        primary.sql("ALTER SYSTEM SET synchronous_standby_names = '*'", "postgres")
        primary.sql("SELECT pg_reload_conf()", "postgres")
        synced = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
        until(lambda: primary.sql(synced, "postgres") == "1", what="a standby in step")

        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        dsn = f"postgresql://ingestd@{hosts}/shop?target_session_attrs=read-write"
        port = free_port()
        with daemon(
            "postgres", "--handler.options.dsn", dsn, *QUICK, "--batch.records_max", "100",
            "--listen", f"127.0.0.1:{port}", cwd=tmp_path,
        ) as one:  # fmt: skip
            clients = [Client(port, place) for place in range(3)]
            until(
                lambda: one.status()["pipelines"]["default"]["processed"] > 2000,
                what="load",
                seconds=180,
            )
            primary.kill()
            time.sleep(0.5)  # both are no good for a moment
            standby.promote()
            processed = one.status()["pipelines"]["default"]["processed"]
            until(
                lambda: one.status()["pipelines"]["default"]["processed"] > processed + 2000,
                what="work after the promotion",
                seconds=180,
            )
            for client in clients:
                client.stop()
            numbers = one.until_settled(timeout=120)
            assert numbers["dead"] == 0, json.dumps(numbers)
        stored = standby.sql("SELECT n FROM records ORDER BY n", "shop").split()
        wanted = sorted(n for client in clients for n in client.numbers())
        assert list(map(int, stored)) == wanted
