"""`handler.transform` and `handler.targets`: what handlers get, what becomes of records."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from ingestd import Batch, Envelope, Reject, Retry, Unavailable
from ingestd.base import envelope as envelopes
from ingestd.base.errors import HandlerLoadError
from ingestd.base.record import Records, Span
from ingestd.handlers.chain import Transform
from ingestd.handlers.outcome import Job, Result, RetryRequest, SinkFinding
from ingestd.handlers.runner import HandlerConfig, Runner
from tests.daemon.harness import daemon, written

if TYPE_CHECKING:
    from pathlib import Path

HERE = "tests.handlers.test_chain:"
SEEN: list[tuple[str, str, list[Any], list[str]]] = []


class Click(msgspec.Struct):
    n: int


def clean(record: dict[str, Any]) -> Any:
    n = record["n"]
    if n == 1:
        return None
    if n == 2:
        return [{"n": 2, "part": part} for part in range(3)]
    if n == 3:
        raise Reject("three")
    if n == 4:
        return 1 / 0
    if n == 5:
        return object()
    if n == 6:
        return []
    if n == 7:
        raise Retry("seven", after=5)
    if n == 8:
        raise Unavailable("a lookup is down")
    return record | {"clean": True}


def typed(record: Click) -> Click:
    return Click(record.n * 2)


def raw(record: bytes) -> bytes:
    return record.replace(b"1", b"\n2")


def shout(line: str) -> str:
    return line.upper()


async def late(record: Any) -> Any: ...


def lazily(record: Any) -> Any:
    yield record


class Note:
    """Notes what it gets, and does as the records say."""

    def __init__(self, *, name: str = "a") -> None:
        self.name = name

    def __call__(self, batch: Batch[dict[str, Any]]) -> None:
        SEEN.append((self.name, batch.id, list(batch), batch.ids))
        for i, record in enumerate(batch):
            if record.get("reject") == self.name:
                batch.reject(i, "no")
            if record.get("again") == self.name:
                batch.retry(i, after=7, why="later")
            if record.get("busy") == self.name:
                batch.adopt(RetryRequest(i, None, "429", is_unavailable=True))
            if record.get("raise") == self.name:
                raise RuntimeError("broken")

    def check(self) -> list[SinkFinding]:
        return [SinkFinding("info", f"{self.name} is well")]

    def close(self) -> None:
        SEEN.append((self.name, "closed", [], []))


class Other(Note):
    pass


class Later(Note):
    async def __call__(self, batch: Batch[dict[str, Any]]) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().__call__(batch)


def runner(*targets: str, transform: str = "", kind: str = "thread", form: str = "json") -> Runner:
    several = len(targets) > 1
    options = {HERE + name: {"name": name} for name in targets} if several else {"name": targets[0]}
    names = tuple(HERE + name for name in targets)
    one = Runner(
        HandlerConfig(
            names[0], options, form, kind, "default", b"/x", HERE + transform if transform else "",
            names if several else (),
        )
    )  # fmt: skip
    assert one.prepare() == ""
    return one


def run(one: Runner, *records: Any) -> Result:
    SEEN.clear()
    lines = [json.dumps(record).encode() for record in records]
    return one.run(Job("j-1", 1, Records.lines(lines), [Span(7, 0, len(lines))], "j"))


def test_one_none_and_several_records_are_made_of_one() -> None:
    result = run(runner("Note", transform="clean"), {"n": 0}, {"n": 1}, {"n": 2}, {"n": 6})
    assert (result.failure, result.rejections) == (None, [])
    ((_, name, records, ids),) = SEEN
    assert name == "j-1"
    assert records == [{"n": 0, "clean": True}, *({"n": 2, "part": part} for part in range(3))]
    assert ids == ["j.7.0", "j.7.2", "j.7.2-1", "j.7.2-2"]


def test_what_is_made_has_the_envelope_of_what_came() -> None:
    packed = envelopes.joined(
        [(1, envelopes.pack(Envelope(client=name))) for name in ("ann", "bob", "cy")]
    )
    records = Records.lines([b'{"n":1}', b'{"n":2}', b'{"n":0}'])._replace(envelopes=packed)
    job = Job("j-1", 1, records, [Span(1, 0, 3)], "j")
    made = Batch(None, Transform(HERE + "clean", "json").apply(job).job)  # type: ignore[arg-type]
    assert [made.envelope(i).client for i in range(4)] == ["bob", "bob", "bob", "cy"]


def test_what_goes_wrong_is_the_records_own() -> None:
    result = run(
        runner("Note", transform="clean"), {"n": 3}, {"n": 4}, {"n": 5}, {"m": 1}, {"n": 0}
    )
    assert result.failure is None
    told = {one.index: one.error for one in result.rejections}
    assert told[0] == "three"
    assert told[1].startswith("ZeroDivisionError")
    assert "object" in told[2]
    assert told[3] == "KeyError: 'n'"
    assert [records for _, _, records, _ in SEEN] == [[{"n": 0, "clean": True}]]


@pytest.mark.parametrize(("n", "reason"), [(7, "postponed"), (8, "unavailable")])
def test_what_it_says_of_everything_is_the_batchs(n: int, reason: str) -> None:
    result = run(runner("Note", transform="clean"), {"n": 0}, {"n": n})
    assert result.failure is not None
    assert result.failure.reason == reason


def test_nothing_left_means_done_without_a_call() -> None:
    result = run(runner("Note", transform="clean"), {"n": 1})
    assert (result.failure, result.rejections, SEEN) == (None, [], [])


def test_what_the_handler_says_is_said_of_the_record_that_came() -> None:
    one = runner("Note", transform="typed")
    assert run(one, {"n": "x"}, {"n": 2}).rejections[0].reason == "undecodable"
    assert SEEN[0][2] == [{"n": 4}]
    result = run(runner("Note", transform="clean"), {"n": 1}, {"n": 0, "reject": "Note"},
                 {"n": 0, "again": "Note"})  # fmt: skip
    assert [(one.index, one.error) for one in result.rejections] == [(1, "no")]
    assert [(one.index, one.after) for one in result.retries] == [(2, 7.0)]


def test_bytes_and_text() -> None:
    seen = runner("Note", transform="raw")
    assert run(seen, {"n": 1}).failure is None
    assert SEEN[0][2] == [{"n": 2}]
    one = Runner(HandlerConfig(HERE + "shouted", {}, "text", "thread", "default", b"/x",
                               HERE + "shout"))  # fmt: skip
    one.prepare()
    SEEN.clear()
    assert one.run(Job("j-1", 1, Records.lines([b"a"]), [Span(1, 0, 1)], "j")).failure is None
    assert SEEN[0][2] == ["A"]


def shouted(batch: Batch[str]) -> None:
    SEEN.append(("shouted", batch.id, list(batch), batch.ids))


def test_each_target_gets_the_batch_in_order_under_one_id() -> None:
    one = runner("Note", "Other")
    result = run(one, {"n": 1}, {"n": 2, "reject": "Other"}, {"n": 3, "reject": "Note"})
    assert [(name, batch, len(records)) for name, batch, records, _ in SEEN] == [
        ("Note", "j-1", 3), ("Other", "j-1", 3),
    ]  # fmt: skip
    assert SEEN[0][3] == SEEN[1][3]
    assert [(one.target, one.records, one.error) for one in result.runs] == [(0, 2, ""), (1, 2, "")]
    assert all(0 <= one.seconds <= result.seconds for one in result.runs)
    assert {one.index: one.error for one in result.rejections} == {
        1: f"{HERE}Other: no", 2: f"{HERE}Note: no",
    }  # fmt: skip
    assert [one.text for one in one.check()] == [
        f"{HERE}Note: Note is well", f"{HERE}Other: Other is well",
    ]  # fmt: skip
    assert one.close() == ""
    assert [seen[:2] for seen in SEEN[2:]] == [("Note", "closed"), ("Other", "closed")]


def test_a_target_that_fails_makes_the_batch_come_again_whole() -> None:
    one = runner("Note", "Other")
    for record, calls in (({"raise": "Note"}, 1), ({"raise": "Other"}, 2), ({"again": "Other"}, 2)):
        result = run(one, {"n": 1}, record)
        assert result.failure is not None
        assert result.failure.reason == "raised"
        assert result.failure.error.startswith(HERE)
        assert (result.rejections, result.retries) == ([], [])
        assert len(result.runs) == calls
        if "raise" in record:
            assert (result.runs[-1].records, result.runs[-1].error) == (0, "RuntimeError")
        assert len([seen for seen in SEEN if seen[1] == "j-1"]) == calls


def test_records_that_a_target_postpones_are_not_at_fault() -> None:
    busy = {"n": 0, "busy": "Note"}
    result = run(runner("Note", transform="clean"), {"n": 1}, busy)
    assert result.retries == [RetryRequest(1, None, "429", is_unavailable=True)]
    result = run(runner("Note", "Other"), {"n": 1}, busy)
    assert result.failure is not None
    assert result.failure.reason == "unavailable"


class Slow(Note):
    begun, may_end = threading.Event(), threading.Event()

    def __call__(self, batch: Batch[dict[str, Any]]) -> None:
        SEEN.append((self.name, "begins", [], []))
        self.begun.set()
        assert self.may_end.wait(60)
        super().__call__(batch)


def test_a_target_that_overruns_in_a_thread_is_not_closed_or_called_meanwhile() -> None:
    one = runner("Slow", "Later", kind="async")

    async def overruns() -> None:
        job = Job("j-1", 1, Records.lines([b"{}"]), [Span(7, 0, 1)], "j")
        first = asyncio.ensure_future(one.run_async(job))
        async with asyncio.timeout(60):
            while not Slow.begun.is_set():
                await asyncio.sleep(0.002)
        for _ in range(2):
            first.cancel()
            await asyncio.sleep(0)
        await asyncio.sleep(0.1)  # in which nothing is closed or called
        Slow.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert (await one.run_async(job)).failure is None

    SEEN.clear()
    asyncio.run(overruns())
    assert [seen[:2] for seen in SEEN] == [
        ("Slow", "begins"), ("Slow", "j-1"), ("Slow", "closed"), ("Later", "closed"),
        ("Slow", "begins"), ("Slow", "j-1"), ("Later", "j-1"),
    ]  # fmt: skip


def test_targets_that_are_awaited_beside_those_that_are_not() -> None:
    one = runner("Later", "Other", transform="clean", kind="async")

    async def all_of_it() -> list[Result]:
        job = Job("j-1", 1, Records.lines([b'{"n":0}', b'{"n":3}']), [Span(7, 0, 2)], "j")
        results = [await one.run_async(job)]
        assert len(await one.check_async()) == 2
        assert await one.close_async() == ""
        return results

    SEEN.clear()
    (result,) = asyncio.run(all_of_it())
    assert [one.index for one in result.rejections] == [1]
    assert [seen[:2] for seen in SEEN] == [
        ("Later", "j-1"), ("Other", "j-1"), ("Later", "closed"), ("Other", "closed"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("transform", "says"),
    [
        ("Note", "is a function of one record"),
        ("late", "no async"),
        ("lazily", "no yield"),
        ("none", "has no 'none'"),
        ("test_bytes_and_text", "a transform is called with one argument, the record"),
    ],
)
def test_what_is_no_transform(transform: str, says: str) -> None:
    with pytest.raises(HandlerLoadError) as caught:
        runner("Note", transform=transform)
    assert says in str(caught.value)


def test_an_async_target_needs_an_executor_for_it() -> None:
    with pytest.raises(HandlerLoadError, match=r"executor\.kind"):
        runner("Later", "Other")


def test_a_daemon_with_a_transform_and_two_sinks(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        "def clean(record):\n"
        "    if record['n'] % 2:\n        return None\n"
        "    return [record, record | {'copy': True}]\n"
    )
    (tmp_path / "ingestd.toml").write_text(
        '[handler]\ntransform = "shop:clean"\ntargets = ["jsonl", "sqlite"]\n'
        '[handler.options.sqlite]\npath = "rows.db"\n'
    )
    with daemon(cwd=tmp_path) as one:
        started = one.event("daemon_started")
        assert one.post(b"".join(b'{"n":%d}\n' % n for n in range(100)))[0] == 202
        numbers = one.until_settled()
        assert (numbers["processed"], numbers["dead"]) == (100, 0)
        assert numbers["executor"] == "process", started
    lines = [json.loads(line) for line in written(tmp_path)]
    assert [line["n"] for line in lines if "copy" not in line] == list(range(0, 100, 2))
    import sqlite3

    with sqlite3.connect(tmp_path / "rows.db") as db:  # relative to the start, and made absolute
        assert db.execute("SELECT count(*), count(copy) FROM records").fetchone() == (100, 50)
    db.close()
