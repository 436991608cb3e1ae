"""`dedupe.key` as a user of it sees it."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

import pytest

from ingestd import Batch
from tests.daemon.harness import daemon

if TYPE_CHECKING:
    from pathlib import Path


def events(*ids: int) -> list[dict[str, int]]:
    return [{"id": one} for one in ids]


def test_a_record_that_comes_again_within_the_window_is_left_out(ingestd_harness) -> None:
    def store(batch: Batch[dict[str, int]]) -> None:
        for index, record in enumerate(batch):
            if record["id"] == 9:
                batch.reject(index, "no")

    harness = ingestd_harness(store, **{"dedupe.key": "/id", "dedupe.window": "10m"})
    harness.send(events(1, 2, 1))
    harness.send(events(9))
    harness.run(300)
    harness.send(events(2, 3, 9))  # what became a dead letter came before as well
    pipeline = harness._pipeline
    assert (pipeline.ledger.accepted, pipeline.deduplicator.left_out) == (4, 3)
    harness.crash_after(1)
    harness.run()
    harness.send(events(3, 1))
    harness.run(600)
    assert harness.processed == events(1, 2, 3)
    harness.send(events(3, 1))
    harness.run()
    assert harness.processed == events(1, 2, 3, 3, 1)
    assert [one.record for one in harness.dead] == events(9)


@pytest.mark.slow
def test_a_daemon_that_is_killed_knows_what_it_accepted(tmp_path: Path) -> None:
    settings = ["--dedupe.key", "/event/id", "--batch.age_max", "0s"]
    sent = [json.dumps({"event": {"id": f"e{n}"}}) for n in range(60_000)]
    body = "\n".join(sent).encode()
    with daemon(*settings, cwd=tmp_path) as one:
        assert one.post(body)[1]["accepted"] == 60_000
        os.kill(one.pid, signal.SIGKILL)
        one.wait()
    with daemon(*settings, cwd=tmp_path) as one:
        assert one.post(body + b'\n{"event":{"id":"new"}}\n{}')[1]["accepted"] == 60_002
        again = one.request("POST", "/v1/records", sent[3], {"Prefer": "wait=50"})
        assert (again[0], again[2]["processed"]) == (200, 1)
        one.until_settled()
        status = one.request("GET", "/v1/status", admin=True)[2]["pipelines"]["default"]
        assert (status["accepted"], status["processed"]) == (60_002, 60_002)
        metrics = one.request("GET", "/metrics", admin=True)[2].decode()
        left_out = status["deduplicated"]
        assert left_out == 60_001
        assert f'ingestd_records_deduplicated_total{{pipeline="default"}} {left_out}.0' in metrics
        one.terminate()
        assert one.wait() == 0
