"""Each sink keeps the contract of `ingestd/sinks/base.py`; `adapter.py` says what a sink brings."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.registry import SINKS
from tests.daemon.harness import ROOT, Daemon, daemon
from tests.sinks.contract.adapter import SinkAdapter, Worker, adapters, job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ingestd.handlers.outcome import Job

KILLER = "tests.sinks.contract.killer:"
QUICK = ("--retry.backoff", "50ms", "--retry.backoff_max", "200ms", "--batch.age_max", "50ms")


@pytest.fixture(params=[
    pytest.param(kind, id=kind.target, marks=[pytest.mark.slow] if kind.is_slow else [])
    for kind in adapters()
])  # fmt: skip
def sink(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SinkAdapter]:
    one: SinkAdapter = request.param(tmp_path)
    yield one
    one.close()


def test_each_sink_has_an_adapter() -> None:
    assert {kind.target for kind in adapters()} == set(SINKS.own)


def settle(worker: Worker, records: list[int], bad: bytes) -> tuple[int, list[str]]:
    """Calls and splits as the daemon does until each record is stored or refused.

    Returns:
        The number of calls, and the reasons.
    """
    calls, errors, number = 0, [], 1
    left = [(records, 1, (), True)]
    while left:
        numbers, batch, lineage, has_bad = left.pop()
        result = worker.run(job(numbers, batch, lineage, bad if has_bad else None))
        calls += 1
        errors += [one.error for one in result.rejections]
        if result.failure is None:
            assert not result.retries
            continue
        assert result.failure.reason == "raised", result.failure
        if not numbers:
            errors.append(result.failure.error)
            continue
        middle = (len(numbers) + 1) // 2
        for half, with_bad in ((numbers[middle:], has_bad), (numbers[:middle], False)):
            number += 1
            left.append((half, number, (*lineage, batch), with_bad))
    return calls, errors


def flags(sink: SinkAdapter, **more: str) -> list[str]:
    own = [part for key, text in more.items() for part in (f"--{key.replace('__', '.')}", text)]
    return ["--handler.options", json.dumps(sink.options()), *QUICK, *own]


def body(first: int, count: int) -> bytes:
    return b"".join(b'{"n":%d,"text":"x"}\n' % n for n in range(first, first + count))


def until(condition: Callable[[], Any], *, what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


def metric(one: Daemon, name: str) -> float:
    page = one.request("GET", "/metrics", admin=True)[2].decode()
    return float(
        next(line for line in page.splitlines() if line.startswith(f"{name}{{")).split()[1]
    )


def test_a_batch_is_stored(sink: SinkAdapter) -> None:
    with sink.worker() as worker:
        assert worker.not_ready == ""
        for number in range(3):
            result = worker.run(job(range(number * 100, number * 100 + 100), number + 1))
            assert (result.failure, result.rejections, result.retries) == (None, [], [])
    assert sorted(sink.stored()) == list(range(300))


def test_a_batch_that_comes_again_is_stored_once(sink: SinkAdapter) -> None:
    for _ in range(2):  # the second time from a worker that knows nothing of the first
        with sink.worker() as worker:
            for _ in range(2):
                assert worker.run(job(range(100))).failure is None
                assert worker.run(job(range(100, 150), 2)).failure is None
    stored = sink.stored()
    assert set(stored) == set(range(150))
    assert len(stored) == 150 or not sink.exactly_once


def test_parts_of_a_batch_that_was_stored_change_nothing(sink: SinkAdapter) -> None:
    """Its answer was lost, it was split, and its parts come under names of their own."""
    with sink.worker() as worker:
        assert worker.run(job(range(100))).failure is None
        assert worker.run(job(range(50), 2, [1])).failure is None
        assert worker.run(job(range(50, 75), 4, [1, 3])).failure is None
        assert worker.run(job(range(75, 100), 5, [1, 3])).failure is None
    stored = sink.stored()
    assert set(stored) == set(range(100))
    assert len(stored) == 100 or not sink.exactly_once


def test_parts_of_a_batch_that_was_not_stored_are(sink: SinkAdapter) -> None:
    with sink.worker() as worker:
        assert worker.run(job(range(50), 2, [1])).failure is None
        assert worker.run(job(range(50, 75), 4, [1, 3])).failure is None
        assert worker.run(job(range(75, 100), 5, [1, 3])).failure is None
    assert sorted(sink.stored()) == list(range(100))


def test_one_bad_record_among_a_thousand_costs_one(sink: SinkAdapter) -> None:
    if sink.bad is None:
        pytest.skip("it takes every record")
    with sink.worker() as worker:
        calls, errors = settle(worker, list(range(999)), sink.bad)
        assert len(errors) == 1
        assert errors[0]
        assert calls <= 2 * math.ceil(math.log2(1000)) + 1
        # Its answer was lost: what was refused is refused again, and not taken for done.
        if calls == 1:
            again = worker.run(job(range(999), bad=sink.bad))
            assert [one.error for one in again.rejections] == errors
    assert sorted(sink.stored()) == list(range(999))


def stored_in_time(worker: Worker, one: Job) -> bool:
    """Tries until a batch is stored: its other side may be late, after its start above all."""

    def tried() -> bool:
        failure = worker.run(one).failure
        assert failure is None or failure.reason == "unavailable", failure
        return failure is None

    return bool(until(tried, what="stored"))


def test_a_sink_that_is_down_says_so_and_comes_back(sink: SinkAdapter) -> None:
    down = sink.down()
    if down is None:
        pytest.skip("it is never down")
    sink.timeout = "3s"
    with sink.worker() as worker:
        assert stored_in_time(worker, job(range(10)))
        with down:
            for number in range(2):
                result = worker.run(job(range(10, 20), 2))
                assert result.failure is not None, number
                assert result.failure.reason == "unavailable", result.failure
            assert any(one.level == "error" for one in worker.check())
        assert stored_in_time(worker, job(range(10, 20), 2))
        assert stored_in_time(worker, job(range(20, 30), 3))
    assert sorted(sink.stored()) == list(range(30))


def test_a_missing_table_or_right_is_the_sinks_and_no_records(sink: SinkAdapter) -> None:
    unusable = sink.unusable()
    if unusable is None:
        pytest.skip("there is nothing that it needs")
    with sink.worker() as worker:
        with unusable:
            result = worker.run(job(range(10)))
            assert result.failure is not None
            assert (result.failure.reason, result.rejections) == ("blocked", []), result.failure
            assert any(one.level == "error" for one in worker.check())
        assert worker.run(job(range(10))).failure is None
        assert [one for one in worker.check() if one.level == "error"] == []
    assert sorted(sink.stored()) == list(range(10))


@pytest.mark.slow
@pytest.mark.parametrize("disturb", ["down", "unusable"])
def test_the_pipeline_waits_says_so_once_and_gives_nothing_up(
    sink: SinkAdapter, tmp_path: Path, disturb: str
) -> None:
    disturbed = getattr(sink, disturb)()
    if disturbed is None:
        pytest.skip("there is no such thing")
    state, event = ("blocked", "handler_blocked") if disturb == "unusable" else (
        "down", "handler_went_down")  # fmt: skip
    sink.timeout = "3s"
    few = {"retry__attempts_max": "3", "retry__give_up_after": "1s", "batch__records_max": "20"}
    with disturbed, daemon(
        sink.target, *flags(sink, **few), cwd=tmp_path, environ=sink.environ
    ) as one:  # fmt: skip
        for number in range(20):
            assert one.post(body(number * 20, 20))[0] == 202
        one.event(event, timeout=60)
        told = until(
            lambda: (found := one.status()["pipelines"]["default"])["handler"]["state"] == state
            and found, what=state,
        )  # fmt: skip
        assert told["handler"]["error"]
        assert metric(one, "ingestd_handler_blocked") == (state == "blocked")
        assert metric(one, "ingestd_handler_down_since_seconds") > 0
        # Longer than `retry.give_up_after`, which is no reason to give anything up here.
        since = time.monotonic()
        until(lambda: time.monotonic() - since > 2, what="time")
        assert one.post(body(400, 20))[0] == 202  # it still accepts
        waiting = one.status()["pipelines"]["default"]
        assert (waiting["pending"], waiting["dead"], waiting["processed"]) == (420, 0, 0)
        disturbed.__exit__(None, None, None)
        numbers = one.until_settled(timeout=120)
        assert (numbers["processed"], numbers["dead"]) == (420, 0)
        assert numbers["handler"]["state"] == "up"
        one.terminate()
        assert one.wait() == 0
        assert len([line for line in one.events if line.get("event") == event]) == 1
        loud = [line for line in one.events if line["level"] in {"warning", "error"}]
        assert len(loud) < 20, loud
    assert sorted(sink.stored()) == list(range(420))


@pytest.mark.slow
def test_a_slow_answer_beyond_the_timeout(sink: SinkAdapter, tmp_path: Path) -> None:
    kind = "process" if sink.executor == "thread" else sink.executor
    sink.timeout = "3s"
    within = "3s" if sink.target == "kafka" else "1s"  # which needs most of a second itself
    more = {"executor__kind": kind, "executor__timeout": within, "retry__attempts_max": "1000"}
    with sink.slow() as slow, daemon(
        sink.target, *flags(sink, **more),
        cwd=tmp_path, environ=sink.environ,
    ) as one:  # fmt: skip
        assert one.post(body(0, 100))[0] == 202
        until(lambda: any(line.get("reason") == "timeout" for line in one.events), what="a timeout")
        slow.end()
        numbers = one.until_settled(timeout=120)
        assert (numbers["processed"], numbers["dead"]) == (100, 0)
    stored = sink.stored()
    assert set(stored) == set(range(100))
    assert len(stored) == 100 or not sink.exactly_once


@pytest.mark.slow
def test_a_kill_between_the_sinks_commit_and_the_settlement(
    sink: SinkAdapter, tmp_path: Path
) -> None:
    kills = 3
    killing = {
        "sink": sink.target, "options": sink.options(), "kills": kills,
        "marks": str(tmp_path / "marks"),
    }  # fmt: skip
    name = "AsyncKiller" if sink.executor == "async" else "Killer"
    arguments = [KILLER + name, "--handler.options", json.dumps(killing), *QUICK,
                 "--executor.kind", sink.executor, "--executor.workers", "1",
                 "--batch.records_max", "50"]  # fmt: skip
    posted = 0
    for life in range(kills + 1):
        with Daemon(*arguments, cwd=tmp_path, environ=sink.environ) as one:
            if not posted:
                one.event("daemon_started")
                assert one.post(body(0, 200))[0] == 202
                posted = 200
            if life < kills:
                assert one.wait() == -9
                continue
            one.event("daemon_started")
            numbers = one.until_settled(timeout=120)
            assert (numbers["processed"], numbers["dead"]) == (200, 0)
            one.terminate()
            assert one.wait() == 0
    stored = sink.stored()
    assert set(stored) == set(range(200))
    assert len(stored) == 200 or not sink.exactly_once


@pytest.mark.slow
def test_a_secret_is_shown_nowhere(sink: SinkAdapter, tmp_path: Path) -> None:
    if not sink.secret:
        pytest.skip("it has no secret")
    shown: list[str] = []
    for more in ([], ["--connect"], ["--handler.options.nosuch", "1"]):
        done = subprocess.run(
            [sys.executable, "-m", "ingestd", "check", sink.target, *flags(sink), *more],
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **sink.environ},
        )  # fmt: skip
        assert done.stdout or done.stderr
        shown += [done.stdout, done.stderr]
    sink.timeout = "3s"
    for disturbed in (sink.down(), sink.unusable(), nullcontext()):
        if disturbed is None:
            continue
        with disturbed, daemon(
            sink.target, *flags(sink, log__level="debug", drain__timeout="1s"), cwd=tmp_path,
            environ=sink.environ,
        ) as one:  # fmt: skip
            assert one.post(sink.bad + b"\n" if sink.bad else body(0, 1))[0] == 202
            until(lambda: any(line.get("event") in {"batch_failed", "records_given_up"}
                              for line in one.events) or not one.status()["pipelines"]["default"]["pending"], what="a try")  # noqa: E501  # fmt: skip
            shown.append(json.dumps(one.status()))
            one.terminate()
            one.wait()
            shown += [json.dumps(one.events), *one.other]
    assert not [text for text in shown if sink.secret in text]
