"""Idempotency keys of two daemons on one stream against a model: faults, races, crashes, expiry."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ingestd.base.append import Append, IdempotencyClaim
from ingestd.base.clock import SystemClock
from ingestd.base.errors import KeyInFlight, KeyReused, KeyTaken, Overloaded
from ingestd.base.record import Records
from ingestd.journal import log as log_journal
from ingestd.journal.idempotency import KeyRule
from ingestd.journal.sqlite import writer
from tests.journal.memory_log import DOWN, FULL, LATE, LOST, Engine
from tests.journal.test_log import Life

if TYPE_CHECKING:
    from collections.abc import Coroutine

TTL = 1000.0
WHO = st.integers(0, 1)
REQUEST = st.tuples(st.sampled_from(["", "a", "b", "c", "d"]), st.sampled_from([b"x", b"y"]))
"""A key, or none, and what stands for the body."""
Answer = bytes | Exception


class HandClock(SystemClock):
    """A clock that the test moves."""

    ahead = 0.0

    def now(self) -> float:
        return super().now() + self.ahead

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead


class GroupAgainstModel(RuleBasedStateMachine):
    """`known` has body and answer of each key, `records` all that was accepted."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="ingestd-model-"))
        self.clock = HandClock()
        one = Engine(4096)
        self.engines = [one, Engine(4096, keys=one.keys)]
        self.lives: list[Life] = []
        self.begun = 0
        self.known: dict[str, tuple[bytes, bytes]] = {}
        self.records: list[bytes] = []
        self.next = 0
        self.lives = [self.begin(who) for who in (0, 1)]

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(call, 90))

    def begin(self, who: int) -> Life:
        async def opened() -> Life:
            options: dict[str, Any] = {"clock": self.clock, "keys": KeyRule(ttl=TTL)}
            folder = self.folder / f"life{self.begun}"
            life = Life(self.engines[who], folder, snapshot_bytes=5_000, **options)
            return await life.open()

        self.begun += 1
        return self.run(opened())

    async def send(self, who: int, key: str, body: bytes, record: bytes) -> Answer:
        """`new`, the stored answer, or why not."""
        journal = self.lives[who].journal
        claim = None
        try:
            if key:
                begun = await journal.idempotency.begin(f"token shop {key}", body)
                if not isinstance(begun, IdempotencyClaim):
                    return begun
                claim = begun
                claim.answer = record
            await journal.append(Append(Records.lines([record]), claim=claim))
        except (Overloaded, KeyReused, KeyInFlight) as error:
            return error
        finally:
            if claim is not None:
                journal.idempotency.forget(claim)
        return b"new"

    def together(self, requests: list[tuple[int, str, bytes]]) -> list[Answer]:
        """Sends requests at once, and compares what became of them."""
        records = [b"%d" % (self.next + place) for place in range(len(requests))]
        self.next += len(requests)
        before = {} if any(engine.lags for engine in self.engines) else dict(self.known)

        async def sent() -> list[Answer]:
            calls = [self.send(*one, record) for one, record in zip(requests, records, strict=True)]
            return await asyncio.gather(*calls)

        answers = self.run(sent())
        for (_, key, body), record, answer in zip(requests, records, answers, strict=True):
            if answer == b"new":
                self.records.append(record)
                if key:
                    assert key not in self.known
                    self.known[key] = body, record
        for (_, key, body), answer in zip(requests, answers, strict=True):
            if isinstance(answer, KeyReused):
                others = {one[2] for one in requests if one[1] == key} - {body}
                if key in self.known:
                    others.add(self.known[key][0])
                assert others - {body}
            elif isinstance(answer, KeyInFlight):
                assert [one[1] for one in requests].count(key) > 1
            elif isinstance(answer, bytes) and answer != b"new":
                assert self.known[key] == (body, answer)
            elif isinstance(answer, KeyTaken):
                assert key
                assert key not in before
        return answers

    @rule(requests=st.lists(st.tuples(WHO, REQUEST), min_size=1, max_size=6))
    def send_some(self, requests: list[tuple[int, tuple[str, bytes]]]) -> None:
        self.together([(who, *request) for who, request in requests])

    @rule(key=st.sampled_from("abcd"), body=st.sampled_from([b"x", b"y"]))
    def send_to_both(self, key: str, body: bytes) -> None:
        """Exactly one accepts a key that is new, if nothing fails."""
        for engine in self.engines:
            engine.faults, engine.lags = [], 0
        is_new = key not in self.known
        answers = self.together([(0, key, body), (1, key, body)])
        assert answers.count(b"new") == is_new

    @rule(
        who=WHO,
        faults=st.lists(st.sampled_from(["", "", LOST, LATE, DOWN, FULL]), min_size=1, max_size=4),
        late=st.sampled_from([0.0, 0.5]),
        lags=st.integers(0, 3),
    )
    def meet(self, who: int, faults: list[str], late: float, lags: int) -> None:
        engine = self.engines[who]
        engine.faults, engine.late_chance, engine.lags = faults, late, lags

    @rule(who=WHO, arrives=st.booleans())
    def crash(self, who: int, arrives: bool) -> None:
        """The machine is lost; what was on its way comes before the next life, or never."""
        engine, life = self.engines[who], self.lives[who]
        life.log.gone = True
        if arrives:
            engine.deliver()
        engine.late, engine.faults, engine.lease = [], [], ("", 0.0)
        self.run(life.close())
        self.lives[who] = self.begin(who)

    @rule(gone=st.booleans())
    def lapse(self, gone: bool) -> None:
        """All keys expire; the engine may be late to let them go."""
        self.clock.ahead += TTL + 1
        self.known = {}
        if gone:
            self.engines[0].keys.clear()

    @invariant()
    def each_is_counted_once(self) -> None:
        ledgers = [life.journal.ledger for life in self.lives]
        assert sum(ledger.accepted for ledger in ledgers) == len(self.records)
        assert not any(life.journal.failed.done() for life in self.lives)

    def teardown(self) -> None:
        for who in (0, 1):
            self.crash(who, arrives=True)

        async def kept() -> list[bytes]:
            chunks = [one for life in self.lives for one in await life.journal.read(1, 1 << 30)]
            return [item for chunk in chunks for item in chunk.records.items()]

        found = self.run(kept())
        for life in self.lives:
            self.run(life.close())
        self.loop.close()
        shutil.rmtree(self.folder)
        assert sorted(found) == sorted(self.records)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_journal, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(log_journal, "KEY_RETRY_SECONDS", 0.001)
    monkeypatch.setattr(writer, "FULL_PAUSE", 0.01)


def run(examples: int, steps: int) -> None:
    case = GroupAgainstModel.TestCase
    case.settings = settings(
        max_examples=examples, stateful_step_count=steps,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    case("runTest").runTest()


def test_two_daemons_do_what_the_model_says(quick: None) -> None:
    run(1, 10)


@pytest.mark.slow
def test_two_daemons_do_what_the_model_says_for_many_steps(quick: None) -> None:
    run(int(os.environ.get("TEST_MODEL_EXAMPLES", "6")), 30)
