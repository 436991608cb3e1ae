"""`batch.key` as a user of it sees it: order and exclusion of keys, through all that goes wrong."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from ingestd import Batch, Retry
from ingestd.base.append import Append
from ingestd.base.record import Records
from tests.daemon.harness import daemon
from tests.pipeline import recording

KEYED = {"batch.key": "/user/id", "batch.records_max": 4, "executor.workers": 3}
KEYS = "abcdefg"


def clicks(count: int, keys: str = KEYS) -> list[dict[str, Any]]:
    return [{"n": n, "user": {"id": keys[n * n % len(keys)]}} for n in range(count)]


def is_ordered(records: list[dict[str, Any]]) -> bool:
    by_key = defaultdict(list)
    for record in records:
        by_key[record["user"]["id"]].append(record["n"])
    return all(numbers == sorted(numbers) for numbers in by_key.values())


def test_failures_splits_and_crashes_change_no_order(ingestd_harness) -> None:
    tried: dict[int, int] = defaultdict(int)

    def store(batch: Batch[dict[str, Any]]) -> None:
        for i, record in enumerate(batch):
            tried[record["n"]] += 1
            if record["n"] % 10 == 3 and tried[record["n"]] < 2:
                raise OSError("not yet")
            if record["n"] == 40:
                raise ValueError("never")
            if record["n"] % 10 == 7 and tried[record["n"]] < 2:
                for later in range(i, len(batch)):  # and all of its key behind it
                    if batch[later]["user"] == record["user"]:
                        batch.retry(later, after=30)
                return

    harness = ingestd_harness(store, **{**KEYED, "retry.give_up_after": "1h"})
    for record in clicks(60):
        harness.send([record])
    harness.crash_after(9)
    harness.run(40)
    harness.restart()
    harness.run()
    assert is_ordered(harness.processed)
    dead = {one.record["n"] for one in harness.dead}
    assert 40 in dead  # and what was tried as often, because it was in one batch with it
    assert {one["n"] for one in harness.processed} == set(range(60)) - dead
    assert len(harness.processed) + len(harness.dead) == 60
    assert harness.lives == 3


def test_a_key_that_waits_for_an_hour_delays_no_other(ingestd_harness) -> None:
    waits = True

    def store(batch: list[dict[str, Any]]) -> None:
        if waits and any(record["user"]["id"] == "a" for record in batch):
            raise Retry("later", after=3600)

    harness = ingestd_harness(store, **{**KEYED, "batch.records_max": 1})
    for _ in range(3):
        harness.send(clicks(40))
    harness.run(60)
    done = [record["user"]["id"] for record in harness.processed]
    assert "a" not in done
    assert len(done) + harness.pending == 120
    assert harness.pending == sum(one["user"]["id"] == "a" for one in clicks(40)) * 3
    harness.restart()
    harness.run(60)
    assert len(harness.processed) == len(done)
    waits = False
    harness.run()
    late = [record["n"] for record in harness.processed[len(done) :]]
    assert late == [one["n"] for one in clicks(40) if one["user"]["id"] == "a"] * 3


def test_records_without_the_key_have_no_order(ingestd_harness) -> None:
    def store(batch: list[Any]) -> None:
        if 0 in batch:
            raise Retry("later", after=3600)

    harness = ingestd_harness(store, **{**KEYED, "batch.records_max": 1})
    records: list[Any] = [0, {"user": None}, {"user": {"id": None}}, [], "user"]
    harness.send(records)
    harness.run(60)
    assert harness.processed == records[1:]


async def test_records_that_come_again_while_a_pipeline_ends_break_nothing(start, tmp_path) -> None:
    pipeline = await start(
        "tests.pipeline.recording:AsyncPostponesWhenCancelled",
        batch={"key": "/user/id"},
        executor={"kind": "async"},
        options={"folder": str(tmp_path)},
    )
    lines = [json.dumps({**one, "text": "x" * 1000}).encode() for one in clicks(500)]
    await pipeline.accept(Append(Records.lines(lines)))
    async with asyncio.timeout(60):
        while not recording.calls(tmp_path):
            await asyncio.sleep(0.01)
    report = await pipeline.close()
    assert not pipeline.broken.done()
    assert report.balanced
    assert report.ledger.pending == 500


# -- real processes ------------------------------------------------------------------------------

HANDLER = """
import json, os, random, signal, time
import ingestd

def note(what, batch):
    line = json.dumps([what, os.getpid(), [[r["user"]["id"], r["n"]] for r in batch]]) + "\\n"
    os.write(LOG, line.encode())

LOG = os.open("calls", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

def store(batch: ingestd.Batch[dict]) -> None:
    note("begin", batch)
    time.sleep(random.random() / 200)
    # None is given up: those behind it would go on.
    chance = random.random() if len(batch) > 1 or batch.attempt < 3 else 1
    if chance < 0.05:
        note("end", batch)  # of its call
        os.kill(os.getpid(), signal.SIGKILL)
    if chance < 0.2:
        note("end", batch)
        raise OSError("not now")
    note("done", batch)
"""


def check_calls(path: Path) -> int:
    """Reads what workers wrote down, in the order of their writes; returns the records done."""
    done: dict[str, set[int]] = defaultdict(set)
    running: dict[str, int] = {}
    for line in path.read_text().splitlines():
        what, pid, records = json.loads(line)
        if what == "killed":
            running.clear()  # and its workers with it
            continue
        for key, n in records:
            if what == "begin":
                earlier = {m for m in range(n) if KEYS[m * m % len(KEYS)] == key}
                mine = {m for one, m in records if one == key}
                assert earlier - mine <= done[key]
                assert running.setdefault(key, pid) == pid
        for key, n in records if what != "begin" else ():
            running.pop(key, None)
            if what == "done":
                done[key].add(n)
    return sum(map(len, done.values()))


@pytest.mark.slow
def test_no_kill_changes_the_order(tmp_path: Path) -> None:
    """Workers of three processes that fail and are killed, under a daemon that is killed."""
    (tmp_path / "app.py").write_text(HANDLER)
    sent = clicks(900)
    settings = [
        "app:store", "--batch.key", "/user/id", "--batch.records_max", "5", "--executor.workers",
        "3", "--retry.backoff", "10ms", "--retry.backoff_max", "50ms", "--batch.age_max", "20ms",
        "--retry.attempts_max", "3", "--executor.kind", "process",
    ]  # fmt: skip
    for life in range(4):
        with daemon(*settings, cwd=tmp_path) as one:
            if life < 3:
                for start in range(300 * life, 300 * life + 300, 10):
                    body = "\n".join(map(json.dumps, sent[start : start + 10])).encode()
                    assert one.post(body)[0] == 202
                time.sleep(0.3)  # where it is killed decides nothing
                os.kill(one.pid, signal.SIGKILL)
                one.wait()
                ends_of_children(tmp_path)
            else:
                while one.request("GET", "/v1/status", admin=True)[2]["pipelines"]["default"][
                    "pending"
                ]:
                    time.sleep(0.05)
                one.terminate()
                assert one.wait() == 0
    assert check_calls(tmp_path / "calls") == 900


def ends_of_children(folder: Path) -> None:
    """Waits until no worker is there any more, and notes it where they write."""
    while any(is_in(folder, process) for process in Path("/proc").glob("[0-9]*")):
        time.sleep(0.02)
    with (folder / "calls").open("a") as file:
        file.write('["killed", 0, []]\n')


def is_in(folder: Path, process: Path) -> bool:
    try:
        return (process / "cwd").readlink() == folder.resolve()
    except OSError:
        return False  # it has ended, or is another user's


def test_what_stands_behind_the_second_half_of_a_split_delays_no_other(ingestd_harness) -> None:
    def store(batch: list[dict[str, Any]]) -> None:
        bad = any("bad" in record for record in batch)
        if bad and len(batch) > 2:
            raise ValueError("too many")
        if bad:
            raise Retry("not yet", after=3600)

    harness = ingestd_harness(
        store, **{"batch.key": "/k", "executor.workers": 4, "batch.age_max": "0.2s"}
    )
    first = [{"k": "K", "bad": 1}, {"k": "K"}, {"k": "K"}, {"k": "M"}]
    for seconds, records in (
        (1, first),
        (1, [{"k": "M"}]),
        (30, [{"k": "z"}]),
        (4800, [{"k": "y"}]),
    ):
        harness.send(records)
        harness.run(seconds)
    assert {"k": "z"} in harness.processed
    assert {"k": "y"} in harness.processed


def test_a_call_that_takes_long_keeps_no_other_key_from_idle_workers(ingestd_harness) -> None:
    done: list[dict[str, Any]] = []
    harness = ingestd_harness(
        done.extend,
        **{
            "batch.key": "/k",
            "executor.workers": 4,
            "batch.age_max": "0.2s",
            "executor.timeout": "300s",
        },
    )
    harness.hang(1)
    for key in "aab":
        harness.send([{"k": key}])
        harness.run(1)
    assert done == [{"k": "b"}]
