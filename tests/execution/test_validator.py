"""`handler.validate = "accept"`: a record is refused exactly if a worker could not decode it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, field_validator

from ingestd import Batch
from ingestd.base import envelope as envelopes
from ingestd.base.envelope import Envelope
from ingestd.base.errors import HandlerLoadError
from ingestd.base.record import Records, Span
from ingestd.execution import validator as validating
from ingestd.execution.build import make_validator, validating_config
from ingestd.execution.settings import ExecutorSettings, HandlerSettings
from ingestd.execution.validator import Validator, ValidatorBusy
from ingestd.handlers.load import load
from ingestd.handlers.outcome import POSTPONED, Failure, Job, Rejection, Result
from ingestd.handlers.runner import HandlerConfig, Runner

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ingestd.base.record import Format

HERE = f"{__name__}:"


class Click(msgspec.Struct):
    page: str
    user: int = 0
    tags: list[str] = []


@dataclass
class Order:
    id: int
    lines: dict[str, float]


class Person(BaseModel):
    name: str
    age: int

    @field_validator("age")
    @classmethod
    def _is_old(cls, value: int) -> int:
        if value > 200:
            raise ValueError("nobody is so old")
        return value


def clicks(batch: list[Click]) -> None:
    raise AssertionError("no handler is called")


class Orders:
    def __init__(self, dsn: str) -> None:
        raise AssertionError("no handler is made")

    def __call__(self, batch: Batch[Order]) -> None: ...


async def people(batch: list[Person]) -> None: ...


def numbers(batch: list[int | None]) -> None: ...


def lines(batch: list[str]) -> None: ...


def untyped(batch: list[Any]) -> None: ...


def raw(batch: list[bytes]) -> None: ...


def to_click(record: Click) -> dict[str, Any]:
    return {"page": record.page}


def config(*targets: str, form: str = "json", **more: Any) -> HandlerConfig:
    names = tuple(HERE + one for one in targets)
    several = names if len(names) > 1 else ()
    return HandlerConfig(names[0], {}, form, "auto", "web", b"/x", targets=several, **more)


@lru_cache(20)
def validation(*targets: str, form: str = "json", **more: Any) -> Runner:
    runner = Runner(validating_config(config(*targets, form=form, **more)))
    assert runner.prepare() == ""
    return runner


def job(records: Records) -> Job:
    return Job("j-1", 1, records, [Span(1, 0, records.count)], "j")


class Pool:
    """A pool whose worker is in this thread; `results` come first."""

    def __init__(self, runner: Runner | None = None, *results: Result) -> None:
        self.runner, self.results = runner, list(results)
        self.jobs: list[Job] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def run(self, one: Job) -> Result:
        self.jobs.append(one)
        await self.gate.wait()
        if self.results:
            return self.results.pop(0)
        return self.runner.run(one) if self.runner is not None else Result()


def made(pool: Pool) -> Validator:
    return Validator("web", pool, lambda: b"")  # type: ignore[arg-type]


# -- the same as a worker --------------------------------------------------------------------------

SIMPLE = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)
    | st.text(max_size=3)
)  # fmt: skip
VALUES = SIMPLE | st.lists(SIMPLE, max_size=2) | st.dictionaries(st.text(max_size=3), SIMPLE)
FITTING = (
    st.fixed_dictionaries({"page": st.text(max_size=3) | VALUES, "user": st.integers() | VALUES})
    | st.fixed_dictionaries({"id": st.integers() | VALUES, "lines": st.just({"a": 1.5}) | VALUES})
    | st.fixed_dictionaries({"name": st.text(max_size=3), "age": st.integers(0, 400) | VALUES})
    | VALUES
)


@pytest.mark.parametrize("target", ["clicks", "Orders", "people", "numbers"])
@settings(max_examples=40)
@given(values=st.lists(FITTING, min_size=1, max_size=4), sized=st.booleans())
def test_a_record_is_accepted_exactly_if_a_worker_decodes_it(
    target: str, values: list[Any], sized: bool
) -> None:
    texts = [json.dumps(value).encode() for value in values]
    records = Records.sized(texts) if sized else Records.lines(texts)
    _, undecodable = load(HERE + target, record_format="json", executor="auto").decoder.decode(
        records
    )
    said = validation(target).run(job(records))
    assert said.failure is None
    assert sorted(said.rejections, key=lambda one: one.index) == undecodable
    found = asyncio.run(made(Pool(validation(target))).reject(records))
    assert sorted(one.index for one in found) == [one.index for one in undecodable]


def test_text_has_to_be_utf8() -> None:
    (one,) = validation("lines", form="text").run(job(Records.lines([b"\xff", b"ok"]))).rejections
    assert (one.index, one.error) == (0, "not valid UTF-8")


def test_each_of_several_targets_has_to_take_a_record_and_the_first_one_says_why() -> None:
    both = validation("clicks", "people", "raw")
    records = Records.lines(
        [b'{"page":"a","name":"b","age":1}', b'{"page":1}', b'{"page":"a"}', b'{"page":2,"age":1}']
    )
    said = {one.index: one.error for one in both.run(job(records)).rejections}
    assert sorted(said) == [1, 2, 3]
    assert "Expected `str`, got `int`" in said[1]
    assert "name" in said[2]


def test_records_are_those_that_a_transform_takes() -> None:
    runner = validation("untyped", transform=HERE + "to_click")
    said = runner.run(job(Records.lines([b'{"page":"a"}', b"{}"])))
    assert [one.index for one in said.rejections] == [1]


@pytest.mark.parametrize(
    ("target", "form"), [("untyped", "json"), ("raw", "json"), ("raw", "text")]
)
def test_there_has_to_be_something_to_validate(target: str, form: str) -> None:
    with pytest.raises(HandlerLoadError, match="has nothing to validate"):
        Runner(validating_config(config(target, form=form))).prepare()
    with pytest.raises(HandlerLoadError, match="has nothing to validate"):
        Runner(validating_config(HandlerConfig("jsonl", {}, "json", "auto", "p", b"/x"))).prepare()


@pytest.mark.parametrize("target", ["clicks", "Orders", "people"])
def test_the_schema_names_its_parts_after_the_pipeline(target: str) -> None:
    schema, named = json.loads(validation(target).schema)
    kind = {"clicks": "Click", "Orders": "Order"}.get(target)
    if kind is None:  # pydantic has it in place
        assert schema["properties"]["age"] == {"title": "Age", "type": "integer"}
    else:
        assert schema == {"$ref": f"#/components/schemas/web.{kind}"}
        assert named[f"web.{kind}"]["type"] == "object"


def test_several_schemas_hold_at_once() -> None:
    schema, named = json.loads(validation("clicks", "numbers").schema)
    assert len(schema["allOf"]) == 2
    assert list(named) == ["web.Click"]


# -- the validator ---------------------------------------------------------------------------------


async def test_pieces_go_one_after_the_other_without_envelopes(monkeypatch: Any) -> None:
    monkeypatch.setattr(validating, "PIECE_BYTES", 40)
    packed = envelopes.pack(Envelope(client="ann"))
    good, bad = b'{"page":"aaaaaaaaa"}', b'{"page":1}'
    records = Records.lines([good, bad, good, bad, bad, good])._replace(envelopes=packed)
    pool = Pool(validation("clicks"))
    assert [one.index for one in await made(pool).reject(records)] == [1, 3, 4]
    assert len(pool.jobs) > 2
    assert not any(one.records.envelopes for one in pool.jobs)


def crash(reason: str = "crashed") -> Result:
    return Result(failure=Failure(reason, "SECRET of the machine"))


class Deadly(Pool):
    """Dies over one record."""

    def __init__(self, record: bytes, reason: str) -> None:
        super().__init__(validation("clicks"))
        self.record, self.reason = record, reason

    async def run(self, one: Job) -> Result:
        self.jobs.append(one)
        if self.record in one.records.items():
            return crash(self.reason)
        assert self.runner is not None
        return self.runner.run(one)


@pytest.mark.parametrize("reason", ["crashed", "timeout", "raised"])
async def test_a_record_that_ends_the_process_is_found_and_rejected(reason: str) -> None:
    good, bad = b'{"page":"a"}', b'{"page":1}'
    items = [good, bad, good, b'{"page":"b"}', good, bad, good]
    pool = Deadly(b'{"page":"b"}', reason)
    found = await made(pool).reject(Records.lines(items))
    assert [one.index for one in found] == [1, 3, 5]
    assert found[1].error.endswith(", twice")
    assert "SECRET" not in found[1].error


async def test_one_death_alone_is_no_proof() -> None:
    pool = Pool(None, crash(), Result())
    assert await made(pool).reject(Records.lines([b"{}"])) == []


@pytest.mark.parametrize(
    "failure", [Failure(POSTPONED, "no worker", "", 2.0), Failure("raised", "MemoryError")]
)
async def test_where_it_cannot_be_told_nothing_is_accepted_now(failure: Failure) -> None:
    validator = made(Pool(None, Result(failure=failure)))
    with pytest.raises(ValidatorBusy) as raised:
        await validator.reject(Records.lines([b"{}"]))
    assert raised.value.retry_after == 1.0
    assert await validator.reject(Records.lines([b"{}"])) == []


async def test_what_waits_is_bounded_and_one_run_always_may(monkeypatch: Any) -> None:
    monkeypatch.setattr(validating, "QUEUE_BYTES_MAX", 10)
    pool = Pool()
    validator = made(pool)
    pool.gate.clear()
    first = asyncio.ensure_future(validator.reject(Records.lines([b"1" * 100])))
    await asyncio.sleep(0)
    with pytest.raises(ValidatorBusy, match="too many wait"):
        await validator.reject(Records.lines([b"1"]))
    pool.gate.set()
    assert await first == []
    assert await validator.reject(Records.lines([b"1" * 100])) == []


# -- a real process --------------------------------------------------------------------------------

MODULE = """\
import os, pathlib, time
from typing import Annotated
import msgspec
from pydantic import AfterValidator, BaseModel

pathlib.Path("imported").write_text(str(os.getpid()))

def look(value):
    if value == "crash": os.abort()
    if value == "hang": time.sleep(600)
    return value

class Thing(BaseModel):
    name: Annotated[str, AfterValidator(look)]

def store(batch: list[Thing]): ...
"""


def started(folder: Path, monkeypatch: Any) -> Validator:
    (folder / "things.py").write_text(MODULE)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    form: Format = "json"
    return make_validator(
        "web", ExecutorSettings(timeout=60.0), HandlerSettings(target="things:store"), form,
        data_dir=folder,
    )  # fmt: skip


@pytest.mark.slow
async def test_a_real_process_dies_and_hangs_over_records_and_goes_on(
    tmp_path: Path, monkeypatch: Any
) -> None:
    validator = started(tmp_path, monkeypatch)
    await validator.start()
    try:
        assert int((tmp_path / "imported").read_text()) != os.getpid()
        names: Sequence[Any] = ["a", "crash", 1, "b"]
        records = Records.lines([json.dumps({"name": one}).encode() for one in names])
        found = await validator.reject(records)
        assert [one.index for one in found] == [1, 2]
        assert found[0] == Rejection(1, "undecodable", "decoding it ended its process, twice")
        (worker,) = validator._pool.workers
        worker._timeout = 1.0
        (late,) = await validator.reject(Records.lines([b'{"name":"hang"}']))
        worker._timeout = 60.0
        assert late.error == "decoding it took too long, twice"
        schema, _ = json.loads(validator.schema)
        assert schema["required"] == ["name"]
        assert await validator.reject(Records.lines([b'{"name":"d"}'])) == []
        os.kill(int((tmp_path / "imported").read_text()), signal.SIGKILL)
        assert await validator.reject(Records.lines([b'{"name":"d"}'])) == []
    finally:
        await validator.close(asyncio.get_running_loop().time() + 60.0)


@pytest.mark.slow
async def test_a_real_process_that_has_nothing_to_validate_does_not_start(
    tmp_path: Path, monkeypatch: Any
) -> None:
    validator = make_validator(
        "web", ExecutorSettings(), HandlerSettings(), "json", data_dir=tmp_path
    )
    with pytest.raises(HandlerLoadError, match="has nothing to validate"):
        await validator.start()
    await validator.close(asyncio.get_running_loop().time() + 60.0)
