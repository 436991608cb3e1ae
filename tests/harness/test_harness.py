"""A harness runs the real pipeline: the invariants of `ingestd/testing/core.py`, its methods."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from ingestd import Batch, Blocked, Envelope, Reject, Retry, Unavailable
from ingestd.base.errors import ConfigError, HandlerLoadError, Overloaded
from ingestd.testing import AsyncHarness, Harness, HarnessError
from ingestd.testing import core as core_module

if TYPE_CHECKING:
    from pathlib import Path

BEGIN = core_module.FIRST_DAY
SMALL = {"batch.records_max": 2}


class Click:
    """Not a handler: it is here to show that a module's own class is found by its name."""


@dataclass
class Order:
    total: int


def nothing(batch: list[Any]) -> None:
    pass


def numbers(count: int) -> list[dict[str, int]]:
    return [{"n": n} for n in range(count)]


def adds_up(harness: Harness, sent: int) -> bool:
    return sent == len(harness.processed) + len(harness.dead) + harness.pending


# -- calls, outcomes -------------------------------------------------------------------------------


def test_records_are_processed_in_batches_of_the_settings(ingestd_harness) -> None:
    harness = ingestd_harness(nothing, **SMALL)
    harness.send(numbers(5))
    harness.run()
    assert harness.processed == numbers(5)
    assert [call.records for call in harness.batches] == [
        [{"n": 0}, {"n": 1}], [{"n": 2}, {"n": 3}], [{"n": 4}],
    ]  # fmt: skip
    assert [call.attempt for call in harness.batches] == [1, 1, 1]
    assert len({call.id for call in harness.batches}) == 3
    assert [len(call.ids) for call in harness.batches] == [2, 2, 1]
    assert (harness.dead, harness.pending) == ([], 0)


def test_the_handler_is_called_and_time_passes_in_run_alone(ingestd_harness) -> None:
    calls: list[int] = []

    def count(batch: list[Any]) -> None:
        calls.append(len(batch))

    harness = ingestd_harness(count, **SMALL)
    for n in range(6):
        harness.send([n])
    assert (calls, harness.now, harness.pending) == ([], BEGIN, 6)
    harness.run()
    assert calls == [2, 2, 2]


def test_an_open_batch_goes_when_it_is_old(ingestd_harness) -> None:
    harness = ingestd_harness(nothing, **{"batch.age_max": "10m"})
    harness.send([1])
    harness.run(599)
    assert (harness.batches, harness.pending) == ([], 1)
    assert harness.now == BEGIN + timedelta(seconds=599)
    harness.run(1)
    assert harness.processed == [1]
    assert harness.batches[0].at == harness.now == BEGIN + timedelta(minutes=10)


def test_a_batch_is_accepted_at_the_time_of_the_fake_clock(ingestd_harness) -> None:
    seen: list[datetime] = []

    def look(batch: Batch[int]) -> None:
        seen.append(batch.accepted_at)

    begin = datetime(2031, 2, 3, tzinfo=UTC)
    harness = ingestd_harness(look, begin=begin)
    harness.run(30)
    harness.send([1])
    harness.run()
    assert seen == [begin + timedelta(seconds=30)]


def test_a_record_that_fails_alone_becomes_a_dead_letter(ingestd_harness) -> None:
    def store(batch: list[dict[str, int]]) -> None:
        if {"n": 7} in batch:
            raise ValueError("seven")

    harness = ingestd_harness(store)
    harness.send(numbers(20))
    harness.run()
    (dead,) = harness.dead
    assert (dead.record, dead.reason, dead.error) == ({"n": 7}, "failed", "ValueError: seven")
    assert "in store" in dead.traceback
    assert sorted(record["n"] for record in harness.processed) == [*range(7), *range(8, 20)]
    assert harness.batches[0].reason == "raised"
    assert any(call.lineage == [harness.batches[0].id] for call in harness.batches)
    assert harness.now > BEGIN + timedelta(seconds=1)
    assert adds_up(harness, 20)


def test_what_a_handler_says_of_single_records(ingestd_harness) -> None:
    def store(batch: Batch[Any]) -> None:
        for i, record in enumerate(batch):
            if record == "bad":
                batch.reject(i, "it is bad")
            elif record == "early" and batch.attempt == 1 and len(batch) > 1:
                batch.retry(i, after=3600, why="not yet")

    harness = ingestd_harness(store)
    harness.send(["good", "bad", "early"])
    harness.run()
    assert harness.processed == ["good", "early"]
    assert [(one.record, one.reason, one.error) for one in harness.dead] == [
        ("bad", "rejected", "it is bad")
    ]
    first, second = harness.batches
    assert (first.rejected, first.retried) == ({1: "it is bad"}, {2: "not yet"})
    assert second.records == ["early"]
    assert second.at - first.at >= timedelta(hours=1)


def test_records_are_decoded_as_the_annotation_says(ingestd_harness) -> None:
    totals: list[int] = []

    def store(batch: list[Order]) -> None:
        totals.extend(order.total for order in batch)

    harness = ingestd_harness(store)
    harness.send([Order(1), {"total": "x"}, b'{"total": 3}'])
    harness.run()
    assert totals == [1, 3]
    assert harness.processed == [{"total": 1}, {"total": 3}]
    assert [(one.record, one.reason) for one in harness.dead] == [({"total": "x"}, "undecodable")]


def test_text_and_bytes(ingestd_harness) -> None:
    harness = ingestd_harness(nothing, format="text")
    harness.send(["one", b"two"])
    harness.run()
    assert harness.processed == ["one", "two"]
    harness = ingestd_harness(nothing, format="bytes")
    harness.send([b"a\nb", b"\xff"])
    harness.run()
    assert harness.processed == [b"a\nb", b"\xff"]


def test_an_envelope_comes_with_the_records(ingestd_harness) -> None:
    clients: list[str] = []

    def look(batch: Batch[int]) -> None:
        clients.extend(batch.envelope(i).client for i in range(len(batch)))

    harness = ingestd_harness(look)
    harness.send([1], envelope=Envelope("http", client="shop"))
    harness.send([2])
    harness.run()
    assert clients == ["shop", ""]


# -- classes, coroutines, sinks --------------------------------------------------------------------


class Store:
    """Counts its instances and calls; keeps what it stored beside them."""

    made = closed = 0
    threads: set[int] = set()  # noqa: RUF012
    stored: dict[str, list[Any]] = {}  # noqa: RUF012

    def __init__(self, *, prefix: str = "") -> None:
        Store.made += 1
        self.prefix = prefix
        self.threads.add(threading.get_ident())

    def __call__(self, batch: Batch[Any]) -> None:
        self.threads.add(threading.get_ident())
        self.stored.setdefault(self.prefix + batch.id, []).append(list(batch))

    def close(self) -> None:
        Store.closed += 1


@pytest.fixture
def store():
    Store.made = Store.closed = 0
    Store.threads.clear()
    Store.stored.clear()
    return Store


def test_a_class_gets_its_options_and_is_closed(ingestd_harness, store) -> None:
    harness = ingestd_harness(store, options={"prefix": "x-"})
    harness.send([1])
    harness.run()
    harness.close()
    assert (store.made, store.closed) == (1, 1)
    assert len(store.threads) == 1
    (key,) = store.stored
    assert key.startswith("x-")


def test_an_instance_whose_call_failed_is_made_anew(ingestd_harness, store) -> None:
    harness = ingestd_harness(store)
    harness.fail_batch(1, ConnectionError)
    harness.send([1])
    harness.run()
    assert (store.made, store.closed) == (1, 0)  # the planned failure was not the instance's

    class Broken(store):
        def __call__(self, batch: list[Any]) -> None:
            if Store.made < 4:
                raise ConnectionError("lost")

    harness = ingestd_harness(Broken)
    harness.send([1])
    harness.run()
    assert (store.made, store.closed) == (4, 2)


def test_an_async_handler(ingestd_harness) -> None:
    loops: set[int] = set()

    async def store(batch: list[int]) -> None:
        await asyncio.sleep(0)
        loops.add(id(asyncio.get_running_loop()))
        if 3 in batch:
            raise Reject("no threes")

    harness = ingestd_harness(store, **{"executor.workers": 3}, **SMALL)
    harness.send(range(5))
    harness.run()
    assert sorted(harness.processed) == [0, 1, 4]
    assert [one.record for one in harness.dead] == [2, 3]
    assert len(loops) == 1


def test_workers_run_at_once(ingestd_harness) -> None:
    both = threading.Barrier(2, timeout=60)

    def meet(batch: list[int]) -> None:
        both.wait()

    harness = ingestd_harness(meet, **{"executor.workers": 2, "batch.records_max": 1})
    harness.send(range(4))
    harness.run()
    assert sorted(harness.processed) == [0, 1, 2, 3]


def test_a_sink_by_name_behind_a_transform(ingestd_harness, tmp_path: Path) -> None:
    def clean(record: dict[str, int]) -> dict[str, int] | None:
        return None if record["n"] == 1 else {"m": record["n"]}

    harness = ingestd_harness("jsonl", transform=clean, data_dir=tmp_path)
    harness.send(numbers(3))
    harness.run()
    harness.close()
    written = [file.read_text() for file in tmp_path.rglob("*.jsonl*") if file.is_file()]
    assert "".join(written) == '{"m":0}\n{"m":2}\n'
    assert harness.processed == numbers(3)


def test_settings_of_a_file(ingestd_harness, tmp_path: Path) -> None:
    file = tmp_path / "ingestd.toml"
    file.write_text("[batch]\nrecords_max = 3\n[pipelines.small]\nbatch.records_max = 1\n")
    harness = ingestd_harness(nothing, config=file)
    assert harness.settings.batch.records_max == 3
    harness = ingestd_harness(nothing, config=file, pipeline="small")
    assert harness.settings.batch.records_max == 1
    with pytest.raises(HarnessError, match="no pipeline 'large', only default, small"):
        Harness(nothing, config=file, pipeline="large")


# -- planned outcomes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("x"), "raised"),
        (KeyError, "raised"),
        (Retry("x", after=60), "postponed"),
        (Unavailable("x"), "unavailable"),
        (Blocked("x"), "blocked"),
    ],
)
def test_a_planned_failure_is_as_one_of_the_handler(ingestd_harness, error, reason) -> None:
    harness = ingestd_harness(nothing, **SMALL)
    harness.fail_batch(2, error, times=2)
    harness.send(numbers(4))
    harness.run()
    failed = [call for call in harness.batches if call.reason]
    assert [call.reason for call in failed] == [reason] * 2
    assert {tuple(call.ids) for call in failed} == {tuple(harness.batches[-1].ids)}
    assert harness.processed == numbers(4)
    if reason == "postponed":
        assert harness.now >= BEGIN + timedelta(seconds=120)


def test_a_planned_rejection(ingestd_harness) -> None:
    harness = ingestd_harness(nothing)
    harness.fail_batch(1, Reject("not these"))
    harness.send([1, 2])
    harness.run()
    assert [(one.record, one.error) for one in harness.dead] == [(1, "not these"), (2, "not these")]


def test_a_failure_after_the_work_is_done(ingestd_harness, store) -> None:
    harness = ingestd_harness(store)
    harness.fail_batch(1, ConnectionError("reset"), after=True)
    harness.send([1])
    harness.run()
    (calls,) = store.stored.values()
    assert calls == [[1], [1]]  # under one id
    assert harness.processed == [1]


def test_a_call_that_hangs_ends_by_the_timeout(ingestd_harness) -> None:
    harness = ingestd_harness(nothing, **{"executor.timeout": "2h"})
    harness.hang(1)
    harness.send([1])
    harness.run()
    first, second = harness.batches
    assert (first.reason, second.reason) == ("timeout", "")
    assert second.at - first.at >= timedelta(hours=2)


def test_a_crash_loses_the_result_and_not_the_batch(ingestd_harness, store) -> None:
    harness = ingestd_harness(store, **SMALL)
    harness.send(range(4))
    harness.crash_after(2)
    harness.run()
    first, lost, again = harness.batches
    assert (lost.id, lost.ids, lost.records) == (again.id, again.ids, again.records)
    assert first.id != lost.id
    assert lost.attempt == again.attempt == 1
    assert harness.processed == [0, 1, 2, 3]
    assert (store.made, store.closed) == (2, 0)  # nothing is closed in a crash
    assert harness.lives == 2
    # The second life has the files as they were, not as a journal that is closed leaves them.
    in_use = harness.data_dir.parent.glob("journal*/journal.db-wal")
    assert [file.parent.name for file in in_use] == ["journal-2"]
    harness.close()
    assert store.closed == 1


def test_crashes_one_after_the_other(ingestd_harness, store) -> None:
    harness = ingestd_harness(store, **{"batch.records_max": 1, "executor.workers": 3})
    sent = 0
    for crash in range(1, 5):
        harness.send(range(sent, sent + 4))
        sent += 4
        harness.crash_after(crash)
        harness.run()
        assert adds_up(harness, sent)
    assert sorted(harness.processed) == list(range(16))
    assert harness.lives == 5
    assert len(store.stored) == 16  # each batch under its one id, however often


def test_a_restart_goes_on_with_the_same_journal(ingestd_harness, store) -> None:
    harness = ingestd_harness(store)
    harness.fail_batch(1, ConnectionError("down"))
    harness.send([1])
    harness.run(1)  # the backoff is longer than nothing
    assert (harness.pending, len(harness.batches)) == (1, 1)
    harness.restart()
    assert (harness.pending, harness.lives) == (1, 2)
    assert (store.made, store.closed) == (2, 1)
    harness.run()
    assert harness.processed == [1]
    assert [call.attempt for call in harness.batches] == [1, 2]
    assert harness.batches[0].id == harness.batches[1].id
    harness.restart()
    harness.send([2])
    harness.run()
    assert harness.processed == [1, 2]


def test_what_waits_for_run_outlives_a_restart(ingestd_harness, store) -> None:
    harness = ingestd_harness(store, **SMALL)
    harness.send(range(5))  # batches are sealed, and one lies before a worker
    harness.restart()
    assert (harness.batches, harness.pending, store.closed) == ([], 5, 1)
    harness.run()
    assert harness.processed == list(range(5))
    assert {call.attempt for call in harness.batches} == {1}


def test_an_async_instance_is_closed_whatever_waits(ingestd_harness) -> None:
    closed: list[int] = []

    class Slow:
        async def __call__(self, batch: list[int]) -> None: ...

        async def close(self) -> None:
            await asyncio.sleep(0.01)
            closed.append(1)

    harness = ingestd_harness(Slow, **SMALL)
    harness.send(range(5))
    harness.run()
    harness.send(range(5))
    harness.restart()
    assert closed == [1]
    harness.close()
    assert closed == [1, 1]
    assert len(harness.processed) == 5


# -- runs that do not end by themselves ------------------------------------------------------------


def test_a_handler_that_never_succeeds_is_an_error(ingestd_harness, monkeypatch) -> None:
    monkeypatch.setattr(core_module, "FRUITLESS_MAX", 20)

    def store(batch: list[Any]) -> None:
        raise ValueError("a mistake")

    harness = ingestd_harness(store, **{"journal.kind": "memory"})
    harness.send(numbers(3))
    with pytest.raises(HarnessError, match=r"3 records are still pending after 20 calls .*mistake"):
        harness.run()
    harness.run(10)
    assert adds_up(harness, 3)


def test_with_a_time_it_goes_on_until_records_are_given_up(ingestd_harness) -> None:
    def store(batch: list[Any]) -> None:
        raise ValueError("a mistake")

    settings = {"journal.kind": "memory", "retry.give_up_after": "1h"}
    harness = ingestd_harness(store, **settings)
    harness.send([1])
    harness.run(2 * 3600)
    assert [(one.record, one.reason) for one in harness.dead] == [(1, "failed")]
    assert harness.now == BEGIN + timedelta(hours=2)


def test_letters_at_their_bound_are_an_error(ingestd_harness) -> None:
    def store(batch: Batch[Any]) -> None:
        raise Reject("x" * 2000)

    harness = ingestd_harness(store, **{"dead.bytes_max": "1KiB", "batch.records_max": 1})
    harness.send(range(1))
    harness.run()
    harness.send(range(3))
    with pytest.raises(HarnessError, match=r"dead\.bytes_max"):
        harness.run()
    assert adds_up(harness, 4)


def test_a_handler_that_does_not_come_back_is_an_error(ingestd_harness) -> None:
    may_end = threading.Event()

    def store(batch: list[Any]) -> None:
        may_end.wait(300)

    harness = ingestd_harness(store, **{"executor.timeout": "50ms"})
    harness.send([1])
    with pytest.raises(HarnessError, match=r"has not come back from batch \w+-1 for 0\.05 real"):
        harness.run()
    harness.close()
    may_end.set()


def test_an_interrupt_ends_a_run_that_hangs(ingestd_harness) -> None:
    may_end = threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    def store(batch: list[Any]) -> None:
        signal.pthread_kill(main, signal.SIGINT)
        may_end.wait(300)

    harness = ingestd_harness(store)
    harness.send([1])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            harness.run()
    finally:
        signal.signal(signal.SIGINT, before)
    harness.close()
    assert not may_end.is_set()
    may_end.set()


# -- a beginner's errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "text"),
    [
        ([1, object()], "record 1 is no json: "),
        ([b"{"], "record 0 would not be accepted: "),
        ([1, b"1 2"], "record 1 would not be accepted: "),
        (["x" * 2**21], "record 0 would not be accepted: "),
        ({"n": 1}, "send takes a list of records"),
        ("abc", "send takes a list of records"),
    ],
)
def test_what_is_no_record_is_not_accepted(ingestd_harness, records, text) -> None:
    harness = ingestd_harness(nothing)
    with pytest.raises(HarnessError) as raised:
        harness.send(records)
    assert text in str(raised.value)
    assert [one.name for one in raised.traceback][1:] == ["send", "_do"]  # what pytest shows
    assert harness.pending == 0


def test_text_that_is_none(ingestd_harness) -> None:
    harness = ingestd_harness(nothing, format="text")
    with pytest.raises(HarnessError, match="record 0 is no text: it is dict"):
        harness.send([{"n": 1}])


@pytest.mark.parametrize(
    ("handler", "text"),
    [
        ("no_such_module:store", "no module named 'no_such_module'"),
        (Click, "class Click has no __call__"),
        (lambda: None, "a handler is called with one argument"),
        (lambda batch: (yield), "contains yield"),
    ],
)
def test_what_is_no_handler_is_not_loaded(handler, text) -> None:
    with pytest.raises(HandlerLoadError) as raised:
        Harness(handler)
    assert text in str(raised.value)


def test_what_can_be_none_is_refused() -> None:
    with pytest.raises(HarnessError, match=r"a handler is a function, a class, .* not int: 3"):
        Harness(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"batch.record_max": 1}, "batch.record_max, did you mean batch.records_max?"),
        ({"batch.records_max": 0}, "should be at least 1"),
        ({"executor.kind": "async"}, "is not async"),
        ({"options": {"path": 1}}, "is no class and takes no options"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Harness(nothing, **settings)
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (lambda harness: harness.fail_batch(0, ValueError("no")), "number of a batch"),
        (lambda harness: harness.fail_batch("1", ValueError("no")), "number of a batch"),
        (lambda harness: harness.fail_batch(1, ValueError("no"), times=0), "times is a whole"),
        (lambda harness: harness.fail_batch(1, "no"), "raises an exception, not 'no'"),
        (lambda harness: harness.hang(-1), "number of a batch"),
        (lambda harness: harness.crash_after(0), "the calls before a crash"),
        (lambda harness: harness.run("5s"), "run takes seconds, 0 or more, not '5s'"),
        (lambda harness: harness.run(-5), "run takes seconds, 0 or more, not -5"),
    ],
)
def test_a_plan_that_nothing_would_come_of_is_refused(ingestd_harness, plan, text) -> None:
    """A test would go on and see nothing of it."""
    harness = ingestd_harness(nothing)
    with pytest.raises(HarnessError, match=text):
        plan(harness)


def test_a_closed_harness_says_so() -> None:
    with Harness(nothing) as harness:
        pass
    harness.close()
    for use in (lambda: harness.send([1]), harness.run, harness.restart):
        with pytest.raises(HarnessError, match="this harness is closed"):
            use()


def test_a_memory_journal_outlives_nothing(ingestd_harness) -> None:
    harness = ingestd_harness(nothing, **{"journal.kind": "memory"})
    for use in (lambda: harness.crash_after(1), harness.restart):
        with pytest.raises(HarnessError, match=r'needs journal\.kind = "sqlite"'):
            use()


def test_a_full_journal_refuses_records(ingestd_harness) -> None:
    settings = {"journal.bytes_max": "3MiB", "record_bytes_max": "1MiB"}
    harness = ingestd_harness(nothing, **settings)
    harness.send(["x" * 900_000] * 3)
    with pytest.raises(Overloaded):
        harness.send(["x" * 900_000])
    harness.run()
    assert harness.pending == 0


def test_what_the_pipeline_logs_is_in_the_log_of_the_test(ingestd_harness, caplog, capsys) -> None:
    caplog.set_level(logging.WARNING, "ingestd")
    harness = ingestd_harness(nothing)
    harness.fail_batch(1, ValueError("told"))
    harness.send([1])
    harness.run()
    assert [one.name for one in caplog.records] == ["ingestd"]
    assert "batch_failed reason='raised' error='ValueError: told'" in caplog.text
    assert capsys.readouterr() == ("", "")


def test_nothing_is_left_behind() -> None:
    before = set(threading.enumerate())
    with Harness(nothing) as harness:
        harness.send([1])
        harness.run()
        folder = harness.data_dir.parent
        assert folder.exists()
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(60)
    assert not any(thread.is_alive() for thread in left)
    assert not folder.exists()


# -- coroutines as tests ---------------------------------------------------------------------------


async def test_an_async_test_serves_its_handler_meanwhile(ingestd_async_harness) -> None:
    got: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.readline())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()

    async def push(batch: list[int]) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"%d records\n" % len(batch))
        await reader.read()
        writer.close()
        await writer.wait_closed()

    harness: AsyncHarness = ingestd_async_harness(push, **SMALL)
    async with server:
        await harness.send(range(3))
        await harness.run()
        await harness.restart()
        await harness.send([3])
        await harness.run()
    assert got == [b"2 records\n", b"1 records\n", b"1 records\n"]
    assert (harness.processed, harness.lives) == ([0, 1, 2, 3], 2)
    await harness.close()


async def test_a_handler_of_an_async_test_is_loaded_when_it_is_needed() -> None:
    harness = AsyncHarness("no_such_module:store")
    with pytest.raises(HandlerLoadError):
        await harness.send([1])
    async with harness:
        pass
    with pytest.raises(HarnessError, match="closed"):
        await harness.run()
