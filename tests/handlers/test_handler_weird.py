"""Weird things that a handler raises, returns or says: each is its batch's failure, and bounded."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ingestd.handlers.call import call, call_async
from ingestd.handlers.failure import TRACEBACK_BYTES_MAX
from ingestd.handlers.load import load
from ingestd.handlers.outcome import (
    Failure,
    Job,
    Rejection,
    Result,
    RetryRequest,
    SinkRun,
    error_kind,
    flaw_of,
)
from ingestd.handlers.runner import HandlerConfig, Runner

WEIRD = """
import asyncio, types
from ingestd.handlers.batch import Batch, Reject

class Meta(type):
    def __getattribute__(cls, name):
        if name in {"__qualname__", "__module__", "__name__", "__mro__", "__dict__", "__bases__"}:
            raise SystemExit(name)
        return type.__getattribute__(cls, name)
    def __hash__(cls): raise SystemExit("no hash")
class Nameless(Exception, metaclass=Meta): pass
class Liar(Exception):
    @property
    def __class__(self): raise SystemExit("no class")
    @property
    def __cause__(self): raise SystemExit("no cause")
    @property
    def __traceback__(self): raise SystemExit("no traceback")
    @property
    def __notes__(self): raise SystemExit("no notes")
    @property
    def args(self): raise SystemExit("no args")
class Pretender(Exception):
    __class__ = Reject
class Text(str):
    def __getitem__(self, i): raise SystemExit("text")
    def __len__(self): raise SystemExit("text")
    def split(self, *a): raise SystemExit("text")
    def isprintable(self): raise SystemExit("text")
    def encode(self, *a): raise SystemExit("text")
    def __str__(self): return self
class Says(Exception):
    def __str__(self): return Text("what it says")
class Bare(Reject):
    def __init__(self): pass
class Odd(Reject):
    def __init__(self): self.why = Unreadable()
class Trap(Reject):
    @property
    def why(self): raise SystemExit("no why")
    @why.setter
    def why(self, value): pass
class Unreadable:
    def __str__(self): raise SystemExit("unreadable")
    __repr__ = __str__
class NoClass:
    @property
    def __class__(self): raise SystemExit("no class")
    def __getattr__(self, name): raise SystemExit(name)
class Stubborn:
    def __call__(self, batch):
        made = self.work(); made.send(None); return made
    @types.coroutine
    def pause(self): yield
    async def work(self):
        try: await self.pause()
        except GeneratorExit: await self.pause()

def nameless(batch): raise Nameless("its message")
def liar(batch): raise Liar("its message")
def pretender(batch): raise Pretender("its message")
def says(batch): raise Says
def bare(batch): raise Bare
def odd(batch): raise Odd
def trap(batch): raise Trap("its why")
def bare_with_args(batch): raise Bare.__new__(Bare, "from the arguments")
def no_class(batch): return NoClass()
stubborn = Stubborn()
def unreadable_argument(batch): raise ValueError(Unreadable())
def many_arguments(batch): raise ValueError("a", [1, {"b": (2,)}], {3}, b"4", bytearray(b"5"))
def text_argument(batch): raise ValueError(Text("the text"))
def noted(batch):
    exc = ValueError("with notes"); exc.add_note("a note"); exc.__notes__.append(Unreadable())
    raise exc
def cyclic(batch):
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    raise one
def long_chain(batch):
    first = None
    for i in range(100_000):
        exc = ValueError(i); exc.__cause__ = first; first = exc
    try: raise first
    finally:
        # else the interpreter itself takes the chain apart by recursion
        keep.append(first)
keep = []
def groups(batch):
    one = ValueError("inmost")
    for i in range(50): one = BaseExceptionGroup(str(i), [one, SystemExit(i)] * 50)
    raise one
def mutual(batch): return lautum(batch)
def lautum(batch): return mutual(batch)
def frames(batch):
    source = "".join(f"def f{i}(): f{i+1}()\\n" for i in range(300)) + "def f300(): 1/0\\n"
    space = {}; exec(source, space); space["f0"]()
def surrogates(batch):
    exc = type("N", (Exception,), {"__module__": "m\\udc81"})("\\udc82"); exc.add_note("\\udc83")
    raise exc
def long_name(batch): raise type("N" * 100_000, (Exception,), {})
def module_object(batch): raise type("Odd", (Exception,), {"__module__": Unreadable()})
def reject_odd(batch: Batch): batch.reject(0, Unreadable()); batch.retry(1, why=Text("text"))
def reject_huge(batch: Batch): batch.reject(0, "x" * 10_000_000)
def reached_far(batch: Batch):
    from ingestd.handlers.outcome import Rejection
    batch._said[0] = Rejection(99, "rejected", "x")
"""

THREE = [b'{"x":0}', b'{"x":1}', b'{"x":2}']
Run = Callable[..., Result]


@pytest.fixture(params=["call", "call_async"])
def run(write: Callable[[str], str], job: Callable[..., Job], request) -> Run:
    theirs = write(WEIRD)

    def run(name: str) -> Result:
        spec = load(f"{theirs}:{name}", record_format="json", executor="thread")
        if request.param == "call":
            result = call(spec, spec.create({}), job(THREE))
        else:
            result = asyncio.run(call_async(spec, spec.create({}), job(THREE)))
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=Result) == result
        return result

    return run


@pytest.mark.parametrize(
    ("name", "error", "in_traceback"),
    [
        ("nameless", "Nameless: its message", "in nameless"),
        ("liar", "Liar: its message", "in liar"),
        ("pretender", "Pretender: its message", "in pretender"),
        ("says", "Says: what it says", "what it says"),
        ("unreadable_argument", "<its message can't be read: __str__ raised>", "ValueError"),
        (
            "many_arguments",
            "ValueError: ('a', [1, {'b': (2,)}], {3}, b'4', bytearray(b'5'))",
            "many_arguments",
        ),
        ("text_argument", "ValueError: the text", "the text"),
        ("noted", "ValueError: with notes", "\na note\n"),
        ("cyclic", "ValueError: one", "ValueError: two\n\nThe above exception was"),
        ("long_chain", "ValueError: 99999", "ValueError: 99985"),
        ("groups", "BaseExceptionGroup: 49 (100 sub-exceptions)", "SystemExit"),
        ("mutual", "RecursionError: maximum recursion depth", "frames ...]"),
        ("frames", "ZeroDivisionError: division by zero", "in f300"),
        ("surrogates", "m\\udc81.N: \\udc82", "\\udc83"),
        ("long_name", "NNNN", "NNNN"),
        ("module_object", "Odd", "in module_object"),
    ],
)
def test_what_is_raised_is_a_bounded_failure(
    run: Run, name: str, error: str, in_traceback: str
) -> None:
    failure = run(name).failure
    assert failure is not None
    assert failure.reason == "raised"
    assert error in failure.error
    assert "\n" not in failure.error
    assert len(failure.error) <= 1000
    assert in_traceback in failure.traceback
    assert len(failure.traceback.encode()) <= TRACEBACK_BYTES_MAX


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("bare", ""),
        ("bare_with_args", "from the arguments"),
        ("trap", "its why"),
        ("odd", "<a theirs.Unreadable that can't be read: __str__ raised>"),
    ],
)
def test_a_reject_of_any_make_is_a_reject(run: Run, name: str, why: str) -> None:
    result = run(name)
    assert result.failure is None
    assert [r.reason for r in result.rejections] == ["rejected"] * 3
    errors = {r.error for r in result.rejections}
    assert len(errors) == 1
    said = errors.pop()
    assert said == why or said.partition(".")[2] == why.partition(".")[2]


def test_what_is_returned_is_not_asked(run: Run) -> None:
    result = run("no_class")
    assert result == Result(seconds=result.seconds)


def test_a_coroutine_that_does_not_end_is_a_failure(write, job) -> None:
    spec = load(f"{write(WEIRD)}:stubborn", record_format="json", executor="thread")
    failure = call(spec, spec.found, job(THREE)).failure
    assert failure is not None
    assert failure.error == "RuntimeError: coroutine ignored GeneratorExit"
    assert failure.reason == "raised"


def test_reasons_of_any_kind_are_text(run: Run) -> None:
    result = run("reject_odd")
    assert "can't be read" in result.rejections[0].error
    assert result.retries[0].error == "text"
    assert len(run("reject_huge").rejections[0].error) == 1000


@pytest.mark.parametrize(
    ("result", "flaw"),
    [
        (Result(), ""),
        (Result([Rejection(0, "rejected", "")], [RetryRequest(1, 0.0, "")]), ""),
        (Result(seconds=float("nan")), "it ran for nan s"),
        (Result(seconds=-1.0), "it ran for -1.0 s"),
        (Result([Rejection(3, "rejected", "")]), "it names record 3 of 3"),
        (Result([], [RetryRequest(-1, None, "")]), "it names record -1 of 3"),
        (Result([Rejection(1, "rejected", "")], [RetryRequest(1, None, "")]), "record 1 twice"),
        (Result([Rejection(1, "rejected", "x" * 5000)]), "5000 characters"),
        (Result([Rejection(1, "because", "")]), "none of ours"),
        (Result([], [RetryRequest(1, float("inf"), "")]), "again after inf s"),
        (Result([], [RetryRequest(1, -1.0, "")]), "again after -1.0 s"),
        (Result(failure=Failure("raised", "ValueError: x")), ""),
        (Result(failure=Failure("because", "")), "reason for the failure is none of ours"),
        (Result(failure=Failure("timeout", "")), "reason for the failure is none of ours"),
        (Result(failure=Failure("raised", "x" * 5000)), "5000 characters"),
        (Result(runs=[SinkRun(0, 1.0, 3, "ValueError")]), ""),
        (Result(runs=[SinkRun(0, float("inf"), 3, "")]), "a sink of it had 3 records for inf s"),
        (Result(runs=[SinkRun(0, 1.0, -3, "")]), "a sink of it had -3 records"),
        (Result(runs=[SinkRun(0, 1.0, 3, "x" * 101)]), "101 characters"),
    ],
)
def test_results_that_can_not_be(result: Result, flaw: str) -> None:
    assert flaw in flaw_of(result, 3)
    assert bool(flaw_of(result, 3)) == bool(flaw)


def wanted(target: str, executor: str = "thread", **options: Any) -> HandlerConfig:
    return HandlerConfig(target, options, "json", executor, "default", b"data")


def test_a_batch_that_its_handler_reached_into_failed(write, job) -> None:
    runner = Runner(wanted(f"{write(WEIRD)}:reached_far"))
    runner.prepare()
    failure = runner.run(job(THREE)).failure
    assert failure is not None
    assert failure.error == "the handler reached into its batch: it names record 99 of 3"


def test_a_huge_message_costs_no_copy(write) -> None:
    """100 MB as message, as one of two arguments and in a list: with 60 MB left there is a text."""
    name = write("""
        huge = "x" * 100_000_000
        class Own(Exception):
            def __str__(self): return huge
        def one(batch): raise ValueError(huge)
        def two(batch): raise ValueError(1, [huge, huge])
        def own(batch): raise Own
    """)
    code = textwrap.dedent(f"""
        import resource
        from pathlib import Path
        from ingestd.base.record import Records, Span
        from ingestd.handlers.outcome import Job
        from ingestd.handlers.runner import HandlerConfig, Runner
        job = Job("j-1", 1, Records.lines([b"1"]), [Span(1, 0, 1)], "j")
        runners = [Runner(HandlerConfig(f"{name}:{{how}}", {{}}, "json", "thread", "default", b"d"))
                   for how in ("one", "two", "own")]
        for runner in runners: runner.prepare()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 60_000_000,) * 2)
        for runner in runners:
            failure = runner.run(job).failure
            print(len(failure.error), len(failure.traceback) > 1000, failure.error[:20])
    """)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{Path.cwd()}"},
        capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["1000", "True"]] * 3, done.stderr


STORES = """
made, closed, calls = [], [], []
class Store:
    def __init__(self, how="ValueError", names=None):
        self.how = how; self.names = names; names is not None and names.append(len(made))
        made.append(self)
    def __call__(self, batch):
        calls.append(self)
        if self.how == "reject":
            from ingestd import Reject
            raise Reject("no")
        if self.how and len(calls) == 1: raise ValueError("the connection broke")
    def close(self):
        closed.append(self)
        if self.how == "close": raise SystemExit("close")
class Later(Store):
    async def __call__(self, batch): Store.__call__(self, batch)
    async def close(self): Store.close(self)
def store(batch): raise ValueError
"""


def run_once(runner: Runner, executor: str, job: Job) -> Result:
    return asyncio.run(runner.run_async(job)) if executor == "async" else runner.run(job)


@pytest.mark.parametrize(("name", "executor"), [("Store", "thread"), ("Later", "async")])
def test_an_instance_whose_call_raised_is_closed_and_made_anew(write, job, name, executor) -> None:
    module = write(STORES)
    said: list[str] = []
    runner = Runner(wanted(f"{module}:{name}", executor, how="close"), said.append)
    assert runner.prepare() == ""
    theirs = sys.modules[module]
    assert run_once(runner, executor, job(THREE)).failure is not None
    assert run_once(runner, executor, job(THREE)).failure is None
    assert run_once(runner, executor, job(THREE)).failure is None
    first, second = theirs.made
    assert theirs.closed == [first]
    assert theirs.calls == [first, second, second]
    assert said == ["SystemExit: close"]


def test_an_instance_that_rejected_stays_and_so_does_a_function(write, job) -> None:
    module = write(STORES)
    runner = Runner(wanted(f"{module}:Store", how="reject"))
    runner.prepare()
    for _ in range(3):
        assert len(runner.run(job(THREE)).rejections) == 3
    assert len(sys.modules[module].made) == 1
    function = Runner(wanted(f"{module}:store"))
    function.prepare()
    for _ in range(3):
        assert function.run(job(THREE)).failure is not None
    assert sys.modules[module].closed == []


def test_options_that_an_instance_changed_are_the_settings_for_the_next_one(write, job) -> None:
    module = write(STORES)
    runner = Runner(wanted(f"{module}:Store", names=[]))
    runner.prepare()
    runner.run(job(THREE))
    runner.run(job(THREE))
    assert [one.names for one in sys.modules[module].made] == [[0], [1]]


FORKS = """
import os, sys
def child(how):
    if os.fork() == 0: how()
    else: os.write(2, b"%d" % (os.waitstatus_to_exitcode(os.wait()[1])))
def nothing(): pass
def exits(): sys.exit(3)
def raises(): raise ValueError("in the child")
class Forks:
    def __init__(self, how, when): self.how, self.when = globals()[how], when; self.at("init")
    def __call__(self, batch): self.at("call")
    def close(self): self.at("close")
    def at(self, when): when == self.when and child(self.how)
"""


@pytest.mark.parametrize("when", ["init", "call", "close"])
@pytest.mark.parametrize(("how", "code"), [("nothing", 0), ("exits", 3), ("raises", 1)])
def test_a_forked_child_ends_where_it_came_back(write, when: str, how: str, code: int) -> None:
    name = write(FORKS)
    script = textwrap.dedent(f"""
        from ingestd.base.record import Records, Span
        from ingestd.handlers.outcome import Job
        from ingestd.handlers.runner import HandlerConfig, Runner
        runner = Runner(HandlerConfig("{name}:Forks", dict(how="{how}", when="{when}"), "json",
            "thread",
                               "default", "d"))
        said = runner.prepare()
        runner.run(Job("j-1", 1, Records.lines([b"1"]), [Span(1, 0, 1)], "j"))
        runner.close()
        print("left", said)
    """)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{Path.cwd()}"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "left \n"
    assert done.stderr.endswith(str(code))
    assert ("ValueError: in the child" in done.stderr) == (how == "raises")


@pytest.mark.parametrize(
    ("reason", "error", "kind"),
    [
        ("raised", "ValueError: a: b", "ValueError"),
        ("raised", "psycopg.errors.UndefinedTable: x", "psycopg.errors.UndefinedTable"),
        ("raised", "the handler returned a coroutine", "raised"),
        ("raised", "", "raised"),
        ("unavailable", "ConnectionError: x", "unavailable"),
        ("timeout", "after 60 s", "timeout"),
    ],
)
def test_the_kind_of_an_error_is_its_class(reason: str, error: str, kind: str) -> None:
    assert error_kind(Failure(reason, error)) == kind
