from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ingestd.handlers.call import call, call_async, close, close_async
from ingestd.handlers.failure import TRACEBACK_BYTES_MAX
from ingestd.handlers.load import HandlerSpec, load
from ingestd.handlers.outcome import Failure, Rejection, Result, RetryRequest

CODE = """
from __future__ import annotations
import asyncio, time
from ingestd.handlers.batch import Batch, Reject

calls = []
class Ugly(Exception):
    def __str__(self): raise SystemExit("even here")
class Deep(Exception):
    def __str__(self): return str(self)

def done(batch: list[dict]):
    calls.append(list(batch)); return "ignored"
def empties(batch: list[dict]): batch.clear()
def says(batch: Batch[dict]):
    calls.append((batch.id, batch.attempt, batch.ids))
    batch.reject(0, "bad"); batch.retry(1, 2.5, "busy")
def gives_up(batch: Batch[dict]):
    batch.reject(1, "mine"); batch.retry(0); raise Reject("all")
def raises(batch: list[dict]):
    hunter2 = "local" + "-value"
    raise ValueError("no\\n" + "x" * 5000)
def says_and_raises(batch: Batch[dict]):
    batch.reject(0, "bad"); raise ValueError
def wrong_place(batch: Batch[dict]): batch.reject(99, "x")
def exits(batch): raise SystemExit(1)
def interrupts(batch): raise KeyboardInterrupt
def generator_exit(batch): raise GeneratorExit
def memory(batch): raise MemoryError
def recursion(batch): return recursion(batch)
def group(batch): raise BaseExceptionGroup("many", [ValueError("a"), SystemExit(2)])
def ugly(batch): raise Ugly
def deep(batch): raise Deep
def surrogate(batch): raise ValueError("\\udc80\\x1b[0m")
def huge(batch): raise ValueError("y" * 1_000_000)
def chained(batch):
    try: 1 / 0
    except ZeroDivisionError as exc: raise LookupError("second") from exc
def slow(batch): time.sleep(0.02)
class Later:
    async def _work(self): ...
    def coroutine(self, batch): return self._work()
    def generator(self, batch): return (i for i in batch)
    def agenerator(self, batch): return self._agen()
    async def _agen(self): yield
later = Later()

async def a_done(batch: Batch[dict]):
    await asyncio.sleep(0); batch.reject(0, "bad")
async def a_raises(batch): await asyncio.sleep(0); raise ValueError("async")
async def a_exits(batch): raise SystemExit(1)
async def a_gives_up(batch): raise Reject("all")
async def a_generator(batch): return (i for i in batch)
async def a_cancelled_by_itself(batch): raise asyncio.CancelledError
async def a_waits_for_a_cancelled_one(batch):
    task = asyncio.ensure_future(asyncio.sleep(60)); task.cancel(); await task
async def a_hangs(batch):
    started.set(); await asyncio.sleep(60)
"""

THREE = [b'{"x":0}', b'{"x":1}', b'{"x":2}']
Run = Callable[..., Result]


@pytest.fixture
def theirs(write: Callable[[str], str]) -> str:
    return write(CODE)


@pytest.fixture
def run(theirs: str, job: Callable[..., Any]) -> Run:
    def run(name: str, items: list[bytes] = THREE, **more: Any) -> Result:
        spec = load(f"{theirs}:{name}", record_format="json", executor="thread")
        result = call(spec, spec.create({}), job(items, **more))
        # It has to get through the socket of a worker.
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=Result) == result
        return result

    return run


def test_returning_is_done(run: Run, theirs: str) -> None:
    result = run("done")
    assert (result.rejections, result.retries, result.failure) == ([], [], None)
    assert sys.modules[theirs].calls == [[{"x": 0}, {"x": 1}, {"x": 2}]]


def test_undecodable_records_are_given_up_and_the_others_handled(run: Run, theirs: str) -> None:
    result = run("says", [b"3", *THREE, b"[]"], attempt=4)
    assert [(r.index, r.reason) for r in result.rejections] == [
        (0, "undecodable"),
        (1, "rejected"),
        (4, "undecodable"),
    ]
    assert result.retries == [RetryRequest(2, 2.5, "busy")]
    assert sys.modules[theirs].calls == [("j1-7", 4, ["j1.3.11", "j1.3.12", "j1.3.13"])]


def test_nothing_left_to_call_with(run: Run, theirs: str) -> None:
    result = run("done", [b"1", b"2"])
    assert [r.index for r in result.rejections] == [0, 1]
    assert run("done", []) == Result()
    assert sys.modules[theirs].calls == []


def test_a_handler_may_do_what_it_likes_with_its_list(run: Run) -> None:
    assert [r.index for r in run("empties", [b"1", *THREE]).rejections] == [0]


def test_reject_gives_the_whole_call_up(run: Run) -> None:
    result = run("gives_up", [b"[]", *THREE])
    assert result.rejections[1:] == [
        Rejection(1, "rejected", "all"),
        Rejection(2, "rejected", "mine"),
        Rejection(3, "rejected", "all"),
    ]
    assert (result.rejections[0].reason, result.retries) == ("undecodable", [])
    assert result.failure is None


def test_raising_is_a_failure_with_one_line_and_a_traceback(run: Run) -> None:
    result = run("raises", [b"1", *THREE])
    assert result.rejections == result.retries == []
    failure = result.failure
    assert failure is not None
    assert failure.reason == "raised"
    assert failure.error.startswith("ValueError: no xxxx")
    assert len(failure.error) == 1000
    assert 'in raises\n    raise ValueError("no' in failure.traceback
    assert "local-value" not in failure.traceback
    assert str(Path("ingestd", "handlers")) not in failure.traceback


def test_what_was_said_before_it_raised_does_not_count(run: Run) -> None:
    result = run("says_and_raises")
    assert (result.rejections, result.retries) == ([], [])
    assert result.failure is not None


def test_our_frames_are_left_out_at_both_ends(run: Run) -> None:
    failure = run("wrong_place").failure
    assert failure is not None
    assert failure.error == "IndexError: record 99 of a batch of 3"
    assert failure.traceback.count('File "') == 1
    assert "in wrong_place" in failure.traceback


@pytest.mark.parametrize(
    ("name", "error", "in_traceback"),
    [
        ("exits", "SystemExit: 1", "SystemExit"),
        ("interrupts", "KeyboardInterrupt", "KeyboardInterrupt"),
        ("generator_exit", "GeneratorExit", "GeneratorExit"),
        ("memory", "MemoryError", "MemoryError"),
        ("recursion", "RecursionError: maximum recursion depth", "more times"),
        ("group", "BaseExceptionGroup: many (2 sub-exceptions)", "SystemExit: 2"),
        ("ugly", "<its message can't be read: __str__ raised>", "Ugly"),
        ("deep", "<its message can't be read: __str__ raised>", "Deep"),
        ("surrogate", "ValueError: \\udc80\\x1b[0m", "\\udc80"),
        ("huge", "ValueError: yyy", "yyy"),
        ("chained", "LookupError: second", "ZeroDivisionError"),
    ],
)
def test_everything_is_caught(run: Run, name: str, error: str, in_traceback: str) -> None:
    failure = run(name).failure
    assert failure is not None
    assert failure.reason == "raised"
    assert error in failure.error
    assert "\n" not in failure.error
    assert len(failure.error) <= 1000
    assert in_traceback in failure.traceback
    assert len(failure.traceback.encode()) <= TRACEBACK_BYTES_MAX


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("later.coroutine", "returned a coroutine that is never awaited: declare it async def"),
        ("later.generator", "returned a generator, so none of it ran"),
        ("later.agenerator", "returned a generator, so none of it ran"),
    ],
)
def test_what_has_not_run_is_no_success(run: Run, name: str, says: str) -> None:
    failure = run(name).failure
    assert failure is not None
    assert says in failure.error


def test_seconds_are_the_handlers_own(run: Run) -> None:
    assert 0.02 <= run("slow").seconds < 60
    assert run("done", [b"1"]).seconds == 0


@pytest.fixture
def spec(theirs: str) -> Callable[[str], HandlerSpec]:
    return lambda name: load(f"{theirs}:{name}", record_format="json", executor="async")


async def test_async_handlers(spec, job) -> None:
    async def run(name: str) -> Result:
        return await call_async(spec(name), spec(name).create({}), job([b"1", *THREE]))

    result = await run("a_done")
    # `a_done` gets dicts only, so the first record is undecodable and its own 0 is record 1.
    assert [(r.index, r.reason) for r in result.rejections] == [(0, "undecodable"), (1, "rejected")]
    assert [r.error for r in (await run("a_gives_up")).rejections] == ["all"] * 4
    failures = {name: (await run(name)).failure for name in ("a_raises", "a_exits", "a_generator")}
    assert failures["a_raises"].error == "ValueError: async"
    assert failures["a_exits"].error == "SystemExit: 1"
    assert "generator" in failures["a_generator"].error


@pytest.mark.parametrize("name", ["a_cancelled_by_itself", "a_waits_for_a_cancelled_one"])
async def test_a_cancellation_that_is_not_ours_is_a_failure(spec, job, name: str) -> None:
    result = await call_async(spec(name), spec(name).create({}), job(THREE))
    assert result.failure is not None
    assert "CancelledError" in result.failure.error


async def test_our_own_cancellation_goes_through(spec, job, theirs: str) -> None:
    started = asyncio.Event()
    hangs = spec("a_hangs")
    sys.modules[theirs].started = started
    task = asyncio.create_task(call_async(hangs, hangs.create({}), job(THREE)))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    started.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await call_async(hangs, hangs.create({}), job(THREE))
    assert started.is_set()


CLOSING = """
closed = []
class Store:
    def __init__(self, raises=None): self.raises = raises
    def __call__(self, batch): ...
    def close(self):
        closed.append(self)
        if self.raises: raise SystemExit("no")
class Later(Store):
    async def __call__(self, batch): ...
    async def close(self): Store.close(self)
class Bare:
    def __call__(self, batch): ...
instance = Store()
"""


async def test_closing(write) -> None:
    theirs = write(CLOSING)

    def made(name: str, executor: str = "thread", **options: object) -> tuple[HandlerSpec, Any]:
        spec = load(f"{theirs}:{name}", record_format="json", executor=executor)
        return spec, spec.create(options)

    assert close(*made("Store")) is None
    assert len(sys.modules[theirs].closed) == 1
    assert close(*made("Bare")) is None
    # Not made by us, so not ours to close: the other workers have it too.
    assert close(*made("instance")) is None
    assert len(sys.modules[theirs].closed) == 1
    failure = close(*made("Store", raises=True))
    assert isinstance(failure, Failure)
    assert failure.error == "SystemExit: no"
    assert await close_async(*made("Later", "async")) is None
    assert (await close_async(*made("Later", "async", raises=True))).error == "SystemExit: no"
    assert len(sys.modules[theirs].closed) == 4


def test_one_spec_serves_many_threads(theirs: str, job) -> None:
    spec = load(f"{theirs}:says", record_format="json", executor="thread")
    results: list[Result] = []

    def work() -> None:
        results.extend(call(spec, spec.found, job([b"1", *THREE] * 5)) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 200
    assert {tuple(r.index for r in result.rejections) for result in results} == {
        (0, 1, 4, 8, 12, 16)
    }
