"""`Idempotency-Key`: real requests, the real journal, restarts and crashes in between."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import shutil
import signal
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ingestd.base.append import Append, IdempotencyClaim
from ingestd.base.errors import IdsInFlight, KeyInFlight, KeyReused, NeverFits, Overloaded
from ingestd.base.metrics import Metrics
from ingestd.base.record import Records
from ingestd.http.problem import Problem
from ingestd.journal.idempotency import KeyRule
from ingestd.journal.sqlite.journal import SqliteJournal
from ingestd.pipeline import Pipeline
from ingestd.settings import Settings
from ingestd.sources.http import HttpSourceKind
from ingestd.sources.http.headers import parse_key
from ingestd.sources.http.source import HttpSource
from ingestd.sources.screening import Router, ScreenedIntake
from tests.daemon.harness import daemon
from tests.sources.source_tools import ask, connected, until

DAY = 86400.0


class HandClock:
    """Wall time that a test moves."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def now(self) -> float:
        return time.time() + self.ahead

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


class Door:
    """A source before real pipelines; its journals lie in `folder`."""

    def __init__(self, folder: Path, *names: str, **more: Any) -> None:
        self.folder, self.names, self.more = folder, names or ("default",), more
        self.clock = more.pop("clock", None) or HandClock()
        self.rule = more.pop("keys", KeyRule())
        self.http = more.pop("http", {})
        self.route: dict[str, str] = more.pop("route", {})

    async def __aenter__(self) -> Self:
        self.more.setdefault("handler", {"target": "tests.sources.test_idempotency:nothing"})
        self.more.setdefault("executor", {"kind": "thread"})
        settings = Settings(**self.more)
        self.pipelines = {}
        for name in self.names:
            folder = self.folder / name
            folder.mkdir(exist_ok=True)
            self.pipelines[name] = Pipeline(
                name, settings.pipeline_settings()["default"], folder=folder, data_dir=folder,
                metrics=Metrics("test").pipeline(name), clock=self.clock, keys=self.rule,
            )  # fmt: skip
            await self.pipelines[name].open()
        intakes: dict[str, Any] = dict(self.pipelines)
        screens = {}
        if self.route:
            router = Router("/type", self.route, "")
            screened = ScreenedIntake(intakes["default"], None, router, dict(intakes), {})
            intakes["default"] = screens["default"] = screened
        self.source = HttpSource(
            HttpSourceKind.settings(listen="127.0.0.1:0", **self.http),
            intakes,
            default=self.names[0],
            screens=screens,
        )
        await self.source.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.source.close()
        for pipeline in self.pipelines.values():
            await pipeline.close(asyncio.get_running_loop().time() + 60)

    async def post(self, body: bytes, key: str, path: str = "/v1/records", **headers: str) -> Any:
        return await ask(self.source, body, path, Idempotency_Key=key, **headers)

    @property
    def accepted(self) -> int:
        return self.pipelines["default"].journal.ledger.accepted

    def rows(self) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(self.folder / "default" / "journal.db")) as db:
            return db.execute("SELECT key FROM keys ORDER BY id").fetchall()

    @contextlib.contextmanager
    def held_commits(self) -> Any:
        """No commit gets through: another connection has the write lock."""
        db = sqlite3.connect(self.folder / "default" / "journal.db", isolation_level=None)
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            db.close()


def nothing(batch: list[Any]) -> None:
    """A handler."""


KINDS = ["sqlite", "memory"]


# -- the header ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ('"8e03978e-40d5-43dd-bc93-6894a57f9324"', "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        ("8e03978e-40d5-43dd-bc93-6894a57f9324", "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        ('"a\\"b\\\\c"', 'a"b\\c'),
        (" a/b+c==:@! ", "a/b+c==:@!"),
        ('";,"', ";,"),
        ("x" * 255, "x" * 255),
        ('"' + '\\"' * 255 + '"', '"' * 255),
    ],
)
def test_keys_that_are_read(value, key):
    assert parse_key([value]) == key


@pytest.mark.parametrize(
    "value",
    ["", '""', " ", "x" * 256, '"a', 'a"', '"a"b', "a,b", "a;b", "a\\b", '"a\\b"', '"a";p=1', "é",
     "a b", '"a b"', "a\tb", "\x7f"],
)  # fmt: skip
def test_keys_that_are_refused(value):
    with pytest.raises(Problem) as refused:
        parse_key([value])
    assert refused.value.kind.status == 400


async def test_a_bad_key_is_400_and_nothing_is_stored(tmp_path):
    async with Door(tmp_path) as door, connected(door.source) as client:
        client.post(b"1", Idempotency_Key="a,b")
        assert (await client.reply()).slug == "idempotency-key-invalid"
        client.post(b"1", Idempotency_Key='"a"\r\nIdempotency-Key: "a"')
        assert (await client.reply()).slug == "idempotency-key-invalid"
        assert door.accepted == 0


# -- once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_the_same_request_is_accepted_once_and_answered_the_same(tmp_path, kind):
    async with Door(tmp_path, journal={"kind": kind}) as door:
        first = await door.post(b"1\nbad\n2\n", '"k"')
        again = await door.post(b"1\nbad\n2\n", "k")
        assert (first.status, again.status) == (202, 202)
        assert first.body == again.body
        assert first.json["invalid"] == 1
        assert "idempotent-replayed" not in first.headers
        assert again.headers["idempotent-replayed"] == "true"
        ledger = door.pipelines["default"].journal.ledger
        assert (ledger.accepted, ledger.invalid) == (2, 1)
        assert (await door.post(b"1\nbad\n2\n", "other")).status == 202
        assert door.accepted == 4


async def test_answers_outlive_a_restart_and_the_memory_of_recent_keys(tmp_path):
    async with Door(tmp_path) as door:
        long = b"bad\n" * 99 + b"1\n"  # its answer is too long to be kept in memory
        first = [await door.post(b"1", "a"), await door.post(long, "b")]
        assert (await door.post(long, "b")).body == first[1].body
    async with Door(tmp_path) as door:
        again = [await door.post(b"1", "a"), await door.post(long, "b")]
        assert [one.body for one in again] == [one.body for one in first]
        assert all(one.headers["idempotent-replayed"] == "true" for one in again)
        assert (await door.post(b"2", "a")).status == 422
        assert door.accepted == 2


@pytest.mark.parametrize("kind", KINDS)
async def test_another_request_with_the_key_is_422(tmp_path, kind):
    async with Door(tmp_path, journal={"kind": kind}) as door:
        assert (await door.post(b"[1]", "k", Content_Type="application/json")).status == 202
        others = [
            await door.post(b"[2]", "k", Content_Type="application/json"),
            await door.post(b"[1]", "k"),
            await door.post(
                gzip.compress(b"[1]"), "k", Content_Type="application/json", Content_Encoding="gzip"
            ),
        ]
        assert [one.slug for one in others] == ["idempotency-key-reused"] * 3
        assert {one.status for one in others} == {422}
        assert not any("retry-after" in one.headers for one in others)
        assert door.accepted == 1


async def test_pipelines_have_keys_of_their_own(tmp_path):
    async with Door(tmp_path, "default", "clicks") as door:
        assert (await door.post(b"1", "k")).status == 202
        other = await door.post(b"2", "k", "/v1/records/clicks")
        assert other.status == 202
        assert "idempotent-replayed" not in other.headers


ROUTED: dict[str, Any] = {"route": {"a": "as", "b": "bs", "c": "default"}}
A, B, C = b'{"type":"a"}\n', b'{"type":"b"}\n', b'{"type":"c"}\n'


@pytest.mark.parametrize("kind", KINDS)
async def test_a_routed_request_is_answered_the_same_with_its_errors(tmp_path, kind):
    body = A + b"no JSON\n" + B + C + b'{"type":"d"}\n' + A
    async with Door(tmp_path, "default", "as", "bs", journal={"kind": kind}, **ROUTED) as door:
        first = await door.post(body, '"k"')
        told = [(one["index"], one["reason"]) for one in first.json["errors"]]
        assert (first.json["accepted"], told) == (4, [(1, "malformed"), (4, "unrouted")])
        again = await door.post(body, '"k"')
        assert (again.status, again.body) == (202, first.body)
        assert again.headers["idempotent-replayed"] == "true"
        accepted = [one.journal.ledger.accepted for one in door.pipelines.values()]
        assert accepted == [1, 2, 1]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_routed_key_belongs_to_one_body_whichever_pipelines_it_goes_to(tmp_path, kind):
    more = {"journal": {"kind": kind}, **ROUTED}
    async with Door(tmp_path, "default", "as", "bs", **more) as door:
        assert (await door.post(A, '"k"')).status == 202
        for other in (B, C, A + B):
            reply = await door.post(other, '"k"')
            assert (reply.status, reply.slug) == (422, "idempotency-key-reused")
        assert (await door.post(A, '"k"')).headers["idempotent-replayed"] == "true"
        assert (await door.post(B, '"other"')).status == 202
        accepted = [one.journal.ledger.accepted for one in door.pipelines.values()]
        assert accepted == [0, 1, 1]
    if kind == "sqlite":
        async with Door(tmp_path, "default", "as", "bs", **more) as door:
            assert (await door.post(B, '"k"')).status == 422


async def test_a_routed_request_that_was_interrupted_is_accepted_once(tmp_path):
    body = A + b"no JSON\n" + C
    async with Door(tmp_path, "default", "as", "bs", **ROUTED) as door:
        journal = door.pipelines["default"].journal
        journal.bytes_max, room = 1, journal.bytes_max
        first = await door.post(body, '"k"')
        assert (first.status, first.json["accepted"]) == (413, 1)
        journal.bytes_max = room
    async with Door(tmp_path, "default", "as", "bs", **ROUTED) as door:
        for _ in range(2):
            reply = await door.post(body, '"k"')
            assert (reply.status, reply.json["accepted"]) == (202, 2)
            assert [one["index"] for one in reply.json["errors"]] == [1]
        accepted = [one.journal.ledger.accepted for one in door.pipelines.values()]
        assert accepted == [1, 1, 0]


async def accept_keyed(pipelines: dict[str, Any]) -> IdempotencyClaim | bytes:
    """Has an append with a key accepted, as a source over TCP does."""
    router = Router("/type", ROUTED["route"], "")
    screened = ScreenedIntake(pipelines["default"], None, router, dict(pipelines), {})
    claim = await screened.begin("token shop k", b"print")
    if isinstance(claim, bytes):
        return claim
    claim.answer = b"yes"
    records = Records.lines([A.strip(), B.strip(), C.strip()])
    try:
        await screened.accept(Append(records, claim=claim))
    finally:
        screened.forget(claim)
        screened.close()
    return claim


async def test_a_routed_append_with_a_key_is_accepted_once_whatever_interrupts_it(tmp_path):
    async with Door(tmp_path, "default", "as", "bs") as door:
        journal = door.pipelines["default"].journal
        journal.bytes_max, room = 1, journal.bytes_max
        with pytest.raises(NeverFits):
            await accept_keyed(door.pipelines)
        journal.bytes_max = room
        other = door.pipelines["as"].journal.idempotency
        assert await other.begin("token shop k", b"print") == b"yes"
    (tmp_path / "busy").mkdir()
    async with Door(tmp_path / "busy", "default", "as", "bs") as door:
        others = [door.pipelines[name].journal.idempotency for name in ("as", "bs")]
        claims = [await other.begin("token shop k", b"print") for other in others]
        with pytest.raises(IdsInFlight):
            await accept_keyed(door.pipelines)
        for other, claim in zip(others, claims, strict=True):
            other.forget(claim)
        others[0].rule = KeyRule(keys_max=0)  # a table that is full keeps no record out
        assert isinstance(await accept_keyed(door.pipelines), IdempotencyClaim)
        accepted = [one.journal.ledger.accepted for one in door.pipelines.values()]
        assert accepted == [1, 1, 1]
    async with Door(tmp_path, "default", "as", "bs") as door:
        assert isinstance(await accept_keyed(door.pipelines), IdempotencyClaim)
        assert await accept_keyed(door.pipelines) == b"yes"
        accepted = [one.journal.ledger.accepted for one in door.pipelines.values()]
        assert accepted == [1, 1, 1]
        assert not any(one.journal.idempotency._claims for one in door.pipelines.values())


@pytest.mark.parametrize("kind", KINDS)
async def test_a_refused_request_can_be_sent_again_with_its_key(tmp_path, kind):
    async with Door(tmp_path, journal={"kind": kind, "bytes_max": 400}) as door:
        assert (await door.post(b"bad", "k")).status == 400
        assert (await door.post(b'"%b"' % (b"x" * 500), "k")).status == 413
        assert (await door.post(b"1", "k")).status == 202
        assert door.accepted == 1


# -- in flight -----------------------------------------------------------------------------------


async def test_a_key_in_flight_is_409_until_its_commit(tmp_path):
    async with Door(tmp_path) as door:
        keys = door.pipelines["default"].journal.idempotency
        async with connected(door.source) as client:
            with door.held_commits():
                client.post(b"1", Idempotency_Key="k")
                await until(lambda: any(claim.submitted for claim in keys._claims.values()))
                again = await door.post(b"1", "k")
                assert (again.status, again.slug) == (409, "idempotency-key-in-flight")
                other = await door.post(b"another", "k")
                assert (other.status, other.headers["retry-after"]) == (422, "1")
                assert int(again.headers["retry-after"]) >= 1
                assert (await door.post(b"2", "k")).status == 422
            assert (await client.reply()).status == 202
        again = await door.post(b"1", "k")
        assert (again.status, again.headers["idempotent-replayed"]) == (202, "true")
        assert door.accepted == 1
        assert not keys._claims


async def test_a_client_that_leaves_does_not_keep_its_key(tmp_path):
    async with Door(tmp_path) as door:
        keys = door.pipelines["default"].journal.idempotency
        with door.held_commits():
            async with connected(door.source) as client:
                client.post(b"1", Idempotency_Key="k")
                await until(lambda: any(claim.submitted for claim in keys._claims.values()))
            assert (await door.post(b"1", "k")).status == 409
        await until(lambda: not keys._claims)
        again = await door.post(b"1", "k")
        assert (again.status, again.headers["idempotent-replayed"]) == (202, "true")
        # In the middle of a body there is no claim at all yet.
        async with connected(door.source) as client:
            client.post(b"1", Idempotency_Key="half", Content_Length="100")
            await until(lambda: door.source._handler.ingestion.admission.bytes >= 100)
            assert (await door.post(b"1", "half")).status == 202
        assert door.accepted == 2


@pytest.mark.parametrize("kind", KINDS)
async def test_of_many_at_once_one_is_accepted(tmp_path, kind):
    async with Door(tmp_path, journal={"kind": kind}) as door:
        replies = await asyncio.gather(*(door.post(b"1\n2\n", "k") for _ in range(20)))
        first = [r for r in replies if r.status == 202 and "idempotent-replayed" not in r.headers]
        assert len(first) == 1
        assert {r.status for r in replies} <= {202, 409}
        assert door.accepted == 2


async def test_keys_in_one_commit_are_joined_into_one_chunk(tmp_path):
    async with Door(tmp_path) as door:
        await asyncio.gather(*(door.post(b"%d" % n, f"k{n}") for n in range(50)))
        assert door.accepted == 50
        assert len(door.rows()) == 50
        assert door.pipelines["default"].reader._last < 40  # chunks


# -- time and bounds -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_keys_expire(tmp_path, kind):
    async with Door(tmp_path, journal={"kind": kind}, keys=KeyRule(ttl=DAY)) as door:
        journal = door.pipelines["default"].journal
        await door.post(b"1", "k")
        door.clock.ahead = DAY - 60
        assert (await door.post(b"1", "k")).headers["idempotent-replayed"] == "true"
        door.clock.ahead = DAY + 60
        again = await door.post(b"2", "k")  # another body: the key is free
        assert again.status == 202
        assert "idempotent-replayed" not in again.headers
        assert journal.idempotency.count == 1
        assert (await door.post(b"1", "k")).status == 422
        await door.post(b"1", "other")
        door.clock.ahead = 3 * DAY
        await door.post(b"1", "third")
        assert journal.idempotency.count == 1  # the other two went by the way
        assert kind == "memory" or door.rows() == [("anonymous third",)]


@pytest.mark.parametrize("kind", KINDS)
async def test_the_number_of_keys_is_bounded(tmp_path, kind):
    async with Door(tmp_path, journal={"kind": kind}, keys=KeyRule(DAY, 3)) as door:
        journal = door.pipelines["default"].journal
        for n in range(3):
            assert (await door.post(b"1", f"k{n}")).status == 202
        refused = await door.post(b"1", "k3")
        assert (refused.status, refused.slug) == (503, "overloaded")
        assert "http.idempotency_keys_max" in refused.json["detail"]
        assert int(refused.headers["retry-after"]) >= 1
        assert (await door.post(b"1", "k1")).status == 202
        assert (await ask(door.source, b"1")).status == 202
        assert door.accepted == 4
        # Nothing but refused requests comes, and still the expired ones make room.
        door.clock.ahead = DAY + 1
        await door.post(b"1", "k3")
        await until(lambda: journal.idempotency.count < 3)
        assert (await door.post(b"1", "k3")).status == 202


async def test_keys_count_in_the_journals_bytes_until_they_go(tmp_path):
    async with Door(tmp_path, batch={"age_max": 0}) as door:
        journal = door.pipelines["default"].journal
        await door.post(b"1", "k")
        await until(lambda: journal.ledger.pending == 0)
        held = journal.bytes
        assert held > 0
    async with Door(tmp_path, batch={"age_max": 0}) as door:
        journal = door.pipelines["default"].journal
        assert (journal.bytes, journal.idempotency.count) == (held, 1)
        door.clock.ahead = 2 * DAY
        await ask(door.source, b"1")
        await until(lambda: journal.ledger.pending == 0)
        assert (journal.bytes, journal.idempotency.count) == (0, 0)


# -- a real process ------------------------------------------------------------------------------


@pytest.mark.slow
def test_keys_survive_kill_9(tmp_path):
    answers = []
    for _ in range(2):
        with daemon(cwd=tmp_path) as one:
            answers.append(one.request("POST", "/v1/records", b"1\n2\n", {"Idempotency-Key": "k"}))
            one.process.send_signal(signal.SIGKILL)
            one.wait()
    assert [status for status, _, _ in answers] == [202, 202]
    assert answers[0][2] == answers[1][2] == {"accepted": 2, "invalid": 0, "errors": []}
    assert answers[1][1]["idempotent-replayed"] == "true"
    with daemon(cwd=tmp_path) as one:
        assert one.until_settled()["accepted"] == 2


# -- a model -------------------------------------------------------------------------------------

KEYS_MAX = 4


class KeysModel(RuleBasedStateMachine):
    """A dict with times against the journal; crashes and restarts at any point."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = HandClock()
        self.loop = asyncio.new_event_loop()
        self.known: dict[str, tuple[bytes, bytes, float]] = {}
        self.accepted = 0
        self.claims: dict[str, IdempotencyClaim] = {}
        self.lives = 0
        self._open(self.folder / "0")

    def _open(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.path = folder / "journal.db"
        self.journal = SqliteJournal(
            self.path, bytes_max=1 << 30, clock=self.clock, on_commit=lambda *_: None,
            keys=KeyRule(100.0, KEYS_MAX),
        )  # fmt: skip
        self.loop.run_until_complete(self.journal.open(lambda _: None))

    def teardown(self) -> None:
        self.loop.run_until_complete(self.journal.close())
        self.loop.close()
        shutil.rmtree(self.folder)

    def _lives(self, key: str) -> bool:
        return key in self.known and self.clock.now() < self.known[key][2] + 100.0

    async def _begin(self, key: str, print_: bytes) -> IdempotencyClaim | bytes:
        try:
            return await self.journal.idempotency.begin(key, print_)
        except Overloaded:
            # Expired keys may still be there; once they are gone there must be room.
            assert self.journal._sweeping is not None
            await self.journal._sweeping
            await asyncio.sleep(0)
            return await self.journal.idempotency.begin(key, print_)

    @rule(key=st.sampled_from("abcdef"), print_=st.sampled_from([b"x", b"y"]))
    def claim(self, key: str, print_: bytes) -> None:
        live = sum(map(self._lives, self.known))
        try:
            got = self.loop.run_until_complete(self._begin(key, print_))
        except KeyInFlight:
            assert self.claims[key].fingerprint == print_
        except KeyReused:
            other = self.claims[key].fingerprint if key in self.claims else self.known[key][0]
            assert other != print_
        except Overloaded:
            assert not self._lives(key)
            assert live + len(self.claims) >= KEYS_MAX
        else:
            if isinstance(got, bytes):
                assert self._lives(key)
                assert self.known[key][:2] == (print_, got)
            else:
                assert key not in self.claims
                assert not self._lives(key)
                self.claims[key] = got

    @rule(key=st.sampled_from("abcdef"))
    def accept(self, key: str) -> None:
        claim = self.claims.pop(key, None)
        if claim is None:
            return
        claim.answer = b"answer %d" % self.accepted
        future = self.journal.append(Append(Records.lines([key.encode()]), claim=claim))
        self.loop.run_until_complete(future)
        self.journal.idempotency.forget(claim)
        self.known[key] = (claim.fingerprint, claim.answer, self.clock.now())
        self.accepted += 1

    @rule(key=st.sampled_from("abcdef"))
    def give_up(self, key: str) -> None:
        claim = self.claims.pop(key, None)
        if claim is not None:
            self.journal.idempotency.forget(claim)

    @rule(seconds=st.sampled_from([1.5, 60.0, 150.0]))
    def wait(self, seconds: float) -> None:
        self.clock.ahead += seconds

    @rule()
    def restart(self) -> None:
        self.loop.run_until_complete(self.journal.close())
        self.claims.clear()
        self._open(self.path.parent)

    @rule(key=st.sampled_from("abcdef"))
    def crash_during_a_commit(self, key: str) -> None:
        """The files as they are at some moment of a commit: record and key, or neither."""
        claim = self.claims.pop(key, None)
        if claim is None or sum(map(self._lives, self.known)) >= KEYS_MAX:
            if claim is not None:
                self.journal.idempotency.forget(claim)
            return
        claim.answer = b"answer %d" % self.accepted
        at = self.clock.now()
        future = self.journal.append(Append(Records.lines([key.encode()]), claim=claim))
        self.lives += 1
        target = self.folder / str(self.lives)
        target.mkdir()
        for suffix in ("", "-wal"):
            shutil.copy(f"{self.path}{suffix}", target / f"journal.db{suffix}")
        self.loop.run_until_complete(future)
        self.loop.run_until_complete(self.journal.close())
        self.claims.clear()
        self._open(target)
        if self.journal.ledger.accepted > self.accepted:
            self.accepted += 1
            self.known[key] = (claim.fingerprint, claim.answer, at)

    @invariant()
    def records_and_live_keys_agree(self) -> None:
        assert self.journal.ledger.accepted == self.accepted
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            rows = dict(db.execute("SELECT key, answer FROM keys"))
        assert self.journal.idempotency.count == len(rows) <= KEYS_MAX
        for key, (_, answer, _) in self.known.items():
            assert not self._lives(key) or rows[key] == answer


TestKeysModel = pytest.mark.slow(KeysModel.TestCase)
TestKeysModel.settings = hypothesis_settings(max_examples=25, stateful_step_count=25)
