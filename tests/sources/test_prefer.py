"""`Prefer`: wait for what becomes of the records; all of them or none."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ingestd
from ingestd.base.append import DeliveryWaiter
from ingestd.base.clock import SystemClock
from ingestd.base.metrics import Metrics
from ingestd.http.settings import HttpSettings
from ingestd.journal.dead_letters import DeadLetter
from ingestd.journal.interface import Place
from ingestd.pipeline import Pipeline
from ingestd.settings import Settings
from ingestd.sources.http.headers import NOTHING, Preferences, parse_prefer
from ingestd.sources.http.source import HttpSource
from ingestd.waiters import DeliveryWaiters
from tests.sources.source_tools import ask, connected, until

HERE = "tests.sources.test_prefer:"
GO = "go"
"""A file in the folder of a test, without which the handler holds on."""


# -- the header ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (["wait=10"], Preferences(10)),
        (["wait = 10"], Preferences(10)),
        (["Wait=10, Handling=STRICT"], Preferences(10, True)),
        (["wait=10", "handling=strict"], Preferences(10, True)),
        (['handling="strict"; why="a, b"; x, wait="7"'], Preferences(7, True)),
        (["wait=10, wait=20"], Preferences(10)),
        (["wait=100000"], Preferences(60)),
        (["wait=0"], Preferences(0)),
        (["respond-async, wait=5"], Preferences(5)),
        (["return=minimal"], NOTHING),
        (["handling=lenient"], NOTHING),
        (["wait=-1"], NOTHING),
        (["wait=1.5"], NOTHING),
        (["wait=²"], NOTHING),
        (["wait"], NOTHING),
        (["wait="], NOTHING),
        ([""], NOTHING),
        (['wait="10'], NOTHING),
        ([";;;,,,"], NOTHING),
    ],
)
def test_what_is_preferred(values, found):
    assert parse_prefer(values, 60.0) == found


def test_waiting_can_be_switched_off():
    assert parse_prefer(["wait=10, handling=strict"], 0.0) == Preferences(None, True)


@given(st.lists(st.text(alphabet='wait=handling strict;,"\\0 9\t', max_size=60), max_size=3))
def test_no_header_is_an_error(values):
    found = parse_prefer(values, 60.0)
    assert found.wait is None or 0 <= found.wait <= 60


@pytest.mark.parametrize("evil", ["a=" * 40000, "a;" * 40000, 'a="' + "\\" * 60001, "," * 80000])
def test_a_long_header_costs_little(evil):
    began = time.process_time()
    parse_prefer([evil], 60.0)
    assert time.process_time() - began < 10  # it would be minutes if it were not linear


# -- through a pipeline --------------------------------------------------------------------------


class Fussy:
    """Rejects what is negative, and fails for zero."""

    def __call__(self, batch: ingestd.Batch[int]) -> None:
        for i, number in enumerate(batch):
            if number < 0:
                batch.reject(i, f"{number} is negative")
        if 0 in batch:
            raise RuntimeError("the password is hunter2")


class Holding:
    """Holds on until there is a file."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def __call__(self, batch: list[Any]) -> None:
        while not self.file.exists():
            time.sleep(0.01)


@contextlib.asynccontextmanager
async def door(folder: Path, target: str = "Fussy", http: Any = None, **more: Any) -> Any:
    """A pipeline and the http source in front of it."""
    options = {"file": str(folder / GO)} if target == "Holding" else {}
    settings = Settings(
        handler={"target": HERE + target, "options": options},
        retry={"attempts_max": 2, "backoff": "1ms", "backoff_max": "2ms"},
        batch={"age_max": "5ms", **more},
        executor={"workers": 2},
    )
    pipeline = Pipeline(
        "default", settings.pipeline_settings()["default"], folder=folder, data_dir=folder,
        metrics=Metrics("test").pipeline("default"), clock=SystemClock(),
    )  # fmt: skip
    await pipeline.open()
    source = HttpSource(
        HttpSettings(listen="127.0.0.1:0", **(http or {})),
        {"default": pipeline},
        default="default",
    )
    await source.start()
    try:
        yield source, pipeline
    finally:
        await source.close()
        (folder / GO).touch()
        await pipeline.close(asyncio.get_running_loop().time() + 60)
        assert not len(pipeline.waiters)


async def test_a_client_that_waits_hears_that_all_is_done(tmp_path):
    async with door(tmp_path) as (source, pipeline):
        reply = await ask(source, b"1\n2\n3", Prefer="wait=50")
        assert reply.status == 200
        assert reply.json == {
            "accepted": 3, "invalid": 0, "processed": 3, "dead": 0, "errors": [],
        }  # fmt: skip
        assert reply.headers["preference-applied"] == "wait=50"
        assert pipeline.journal.ledger.processed == 3


async def test_each_failed_record_is_named_by_its_place_in_the_body(tmp_path):
    """Malformed lines, rejected records and failing ones, counted as they were sent."""
    body = b"bad\n-1\n2\n{oops\n0\n-5\n7\nbad"
    async with door(tmp_path) as (source, _):
        reply = await ask(source, body, Prefer="wait=50")
        assert reply.status == 200
        assert {k: v for k, v in reply.json.items() if k != "errors"} == {
            "accepted": 5, "invalid": 3, "processed": 2, "dead": 3,
        }  # fmt: skip
        found = [(error["index"], error["reason"]) for error in reply.json["errors"]]
        assert found == [
            (0, "malformed"), (1, "rejected"), (3, "malformed"), (4, "failed"), (5, "rejected"),
            (7, "malformed"),
        ]  # fmt: skip
        assert reply.json["errors"][1]["detail"] == "-1 is negative"
        # What a handler raises may hold what clients should not see.
        assert b"hunter2" not in reply.body


async def test_when_the_time_is_up_it_is_a_202(tmp_path):
    body = b"".join(b"%d\n" % n for n in range(40))
    async with door(tmp_path, "Holding", records_max=1) as (source, _):
        reply = await ask(source, body, Prefer="wait=1")
        assert (reply.status, reply.json["accepted"]) == (202, 40)
        assert reply.headers["preference-applied"] == "wait=1"


async def test_a_drain_ends_the_waiting(tmp_path):
    async with (
        door(tmp_path, "Holding", records_max=1) as (source, pipeline),
        connected(source) as client,
    ):
        client.post(b"".join(b"%d\n" % n for n in range(40)), Prefer="wait=50")
        await until(lambda: len(pipeline.waiters))
        await source.stop_taking(asyncio.get_running_loop().time() + 60)
        reply = await client.reply()
        assert (reply.status, reply.json["accepted"]) == (202, 40)


async def test_those_who_share_a_chunk_hear_of_their_own_records(tmp_path):
    """Small requests are joined in one commit, batches are cut elsewhere: nobody is mixed up."""
    dice = random.Random(3)
    bodies = [[dice.choice((n, n, n, -n)) for n in range(1, dice.randint(2, 9))] for _ in range(80)]
    async with door(tmp_path, records_max=7) as (source, pipeline):
        replies = await asyncio.gather(
            *(ask(source, b"".join(b"%d\n" % n for n in body), Prefer="wait=50") for body in bodies)
        )
        for body, reply in zip(bodies, replies, strict=True):
            assert reply.status == 200
            assert reply.json["accepted"] == len(body)
            negative = [i for i, number in enumerate(body) if number < 0]
            assert [error["index"] for error in reply.json["errors"]] == negative
            assert reply.json["dead"] == len(negative)
        assert pipeline.journal.ledger.accepted == sum(map(len, bodies))


async def test_a_request_that_waits_holds_no_bytes(tmp_path):
    async with door(tmp_path, "Holding") as (source, pipeline), connected(source) as client:
        client.post(b"1\n2", Prefer="wait=50")
        await until(lambda: len(pipeline.waiters))
        await until(lambda: source._handler.ingestion.admission.bytes == 0)
        assert source._handler.ingestion.admission.requests == 1
        (tmp_path / GO).touch()
        assert (await client.reply()).status == 200


async def test_a_key_and_a_wait_go_together(tmp_path):
    async with door(tmp_path) as (source, pipeline):
        first = await ask(source, b"1", Prefer="wait=50", Idempotency_Key="k")
        again = await ask(source, b"1", Prefer="wait=50", Idempotency_Key="k")
        assert (first.status, again.status) == (200, 202)
        assert again.headers["idempotent-replayed"] == "true"
        assert pipeline.journal.ledger.accepted == 1


# -- strict --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", ["", ", wait=20"])
async def test_strict_stores_nothing_if_one_record_is_bad(tmp_path, wait):
    async with door(tmp_path) as (source, pipeline):
        reply = await ask(source, b"1\nbad\n2", Prefer=f"handling=strict{wait}")
        assert (reply.status, reply.slug) == (400, "not-strict")
        assert [error["index"] for error in reply.json["errors"]] == [1]
        assert pipeline.journal.ledger == (0, 0, 0, 0)
        assert not pipeline.journal.dead_totals.letters
        reply = await ask(source, b"1\n2", Prefer=f"handling=strict{wait}")
        assert reply.status in {200, 202}
        assert "handling=strict" in reply.headers["preference-applied"]
        assert (await ask(source, b"1\nbad\n2")).status == 202


# -- who is told what ----------------------------------------------------------------------------


@given(st.data())
async def test_watches_are_told_of_exactly_their_own(data):
    """Any layout of appends in chunks, settled in any order and any runs."""
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    watches, told = DeliveryWaiters(), []
    first = 0
    for size in sizes:
        watch = DeliveryWaiter(size)
        if data.draw(st.booleans()):
            watches.add(Place(7, first), watch)
            told.append((first, watch, []))
        first += size
    order = data.draw(st.permutations(range(first)))
    dead = data.draw(st.sets(st.integers(0, first - 1)))
    for place in order:
        letters = []
        if place in dead:
            letter = DeadLetter(f"j.7.{place}", "failed", str(place), "", b"", 1, 0.0, 0.0)
            letters = [letter._replace(place=Place(7, place))]
        watches.settled([ingestd.base.record.Span(7, place, 1)], letters)
    for start, watch, _ in told:
        mine = sorted(d - start for d in dead if start <= d < start + watch.count)
        assert sorted(failed.index for failed in watch.failed) == mine
        assert watch.dead == len(mine)
        assert watch.left == 0
        assert watch.done.is_set()
        watches.remove(watch)
    assert not len(watches)
    assert not watches._chunks
