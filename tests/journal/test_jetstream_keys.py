"""Idempotency keys of a group of daemons, with real NATS servers."""

from __future__ import annotations

import asyncio
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.append import Append, IdempotencyClaim
from ingestd.base.errors import ConfigError, KeyInFlight, KeyReused, KeyTaken, Overloaded
from ingestd.journal.idempotency import KeyRule
from ingestd.journal.interface import Place
from ingestd.journal.jetstream import JetStreamKind, JetStreamSettings
from ingestd.journal.log import _name_of
from ingestd.journal.log.interface import LogUnreachable
from tests.journal.on_nats import crash, lines, records
from tests.nats import running

if TYPE_CHECKING:
    from pathlib import Path

    from ingestd.journal.log import LogJournal
    from tests.daemon.harness import Daemon

pytest.importorskip("nats", reason="needs nats-py: pip install 'ingestd[jetstream]'")
# Behind the skip: without nats-py this module is skipped before it has any of its names.
from tests.journal.test_group import group_of, until

pytestmark = pytest.mark.slow


async def sent(journal: LogJournal, key: str, record: bytes, print_: bytes = b"print") -> bytes:
    """What one request is answered: `new`, or what it was answered the first time.

    Raises:
        Overloaded, KeyInFlight, KeyReused: as it is refused.
    """
    assert journal.idempotency is not None
    begun = await journal.idempotency.begin(f"anonymous {key}", print_)
    if not isinstance(begun, IdempotencyClaim):
        return begun
    begun.answer = record
    try:
        await journal.append(Append(lines(record), claim=begun))
    finally:
        journal.idempotency.forget(begun)
    return b"new"


async def insisted(journal: LogJournal, key: str, record: bytes) -> bytes:
    """The answer of a client that comes again after a 503 or a 409."""
    async with asyncio.timeout(90):
        while True:
            try:
                return await sent(journal, key, record)
            except (Overloaded, KeyInFlight):
                await asyncio.sleep(0.02)


async def test_one_of_two_accepts_and_the_other_knows_it(one_node, open_) -> None:
    one, two = await open_(one_node, "a"), await open_(one_node, "b")
    assert await sent(one, "K", b"1") == b"new"
    assert await sent(two, "K", b"1") == b"1"
    with pytest.raises(KeyReused):
        await sent(two, "K", b"1", b"another")
    new = taken = 0
    for n in range(40):
        found = await asyncio.gather(
            *(sent(to, f"race{n}", b"%d" % n) for to in (one, two)),
            *(to.append(Append(lines(b"beside%d" % n))) for to in (one, two)),
            return_exceptions=True,
        )  # fmt: skip
        assert all(isinstance(answer, Place) for answer in found[2:])
        new += found[:2].count(b"new")
        taken += sum(isinstance(answer, KeyTaken) for answer in found)
        assert [await sent(to, f"race{n}", b"%d" % n) for to in (one, two)] == [b"%d" % n] * 2
    assert new == 40
    assert taken > 0
    await crash(one)
    await crash(two)
    again = [await open_(one_node, name) for name in ("a", "b")]
    kept = [record for journal in again for record in await records(journal)]
    beside = [b"beside%d" % n for n in range(40)]
    assert sorted(kept) == sorted([b"1", *[b"%d" % n for n in range(40)], *beside, *beside])


async def test_a_key_goes_with_its_time_and_is_free_again(one_node, open_) -> None:
    one, two = await open_(one_node, "ttl1"), await open_(one_node, "ttl2")
    one.idempotency.rule = two.idempotency.rule = KeyRule(ttl=5.0)
    assert await sent(one, "T", b"1") == b"new"
    assert await sent(two, "T", b"1") == b"1"
    async with asyncio.timeout(60):
        while await two._look_up(_name_of("anonymous T")) is not None:
            await asyncio.sleep(0.1)
    assert await sent(two, "T", b"1") == b"new"
    assert await sent(one, "T", b"1") == b"1"


async def test_many_keys_come_in_commits_that_the_servers_take(one_node, open_) -> None:
    one, two = await open_(one_node, "many1"), await open_(one_node, "many2")
    answers = await asyncio.gather(*(sent(one, f"M{n}", b"%d" % n) for n in range(2000)))
    assert answers == [b"new"] * 2000
    answers = await asyncio.gather(*(sent(two, f"M{n}", b"%d" % n) for n in range(2000)))
    assert answers == [b"%d" % n for n in range(2000)]
    assert (one.ledger.accepted, two.ledger.accepted) == (2000, 0)
    names = [_name_of(f"anonymous M{n}") for n in range(250)]
    found = await one._log.find_keys(names)
    assert found.keys() == {*names}
    assert await one._log.find_keys([*names, _name_of("new")], from_leader=True) == found


async def test_a_key_that_no_replica_answers_for_is_not_new(one_node, open_) -> None:
    log = (await open_(one_node, "deaf"))._log
    log._settings = log._settings.model_copy(update={"stream": "deaf"})
    with pytest.raises(LogUnreachable, match="503"):
        await log.find_keys([_name_of("anonymous K")])


async def test_a_full_stream_has_no_key_without_its_records(one_node, open_) -> None:
    own = {"stream": "tight", "bucket": "tight-leases", "stream_bytes_max": "1MiB"}
    journal = await open_(one_node, "full", **own)
    record = b"x" * 20_000
    answers = list[object]()
    for start in range(0, 100, 5):
        some = (sent(journal, f"F{n}", record + b"%d" % n) for n in range(start, start + 5))
        answers += await asyncio.gather(*some, return_exceptions=True)
    assert b"new" in answers
    assert any(isinstance(answer, Overloaded) for answer in answers)
    info = await journal._log._js.stream_info("tight")
    info.config.max_bytes = 16 << 20
    await journal._log._js.update_stream(info.config)
    other = await open_(one_node, "full2", **own)
    for n, answer in enumerate(answers):
        expected = b"new" if isinstance(answer, Overloaded) else record + b"%d" % n
        assert await insisted(other, f"F{n}", record + b"%d" % n) == expected
    assert journal.ledger.accepted + other.ledger.accepted == 100


async def test_leaders_are_killed_and_each_key_counts_once(tmp_path: Path, open_) -> None:
    (tmp_path / "nats").mkdir()
    with running(tmp_path / "nats", 3) as cluster:
        both = [await open_(cluster, name, timeout="2s") for name in ("a", "b")]
        clients = [0] * 4
        ended = asyncio.Event()

        async def client(number: int) -> None:
            """Sends each request to one daemon, then the other, and some to both at once."""
            while not ended.is_set():
                n = clients[number]
                key, record = f"{number}-{n}", b"%d-%d" % (number, n)
                first, second = both[n % 2], both[1 - n % 2]
                if n % 3:
                    answers = [await insisted(to, key, record) for to in (first, second)]
                else:
                    again = (insisted(to, key, record) for to in (first, second))
                    answers = list(await asyncio.gather(*again))
                assert sorted(answers) in ([record, b"new"], [record, record])
                clients[number] += 1

        running_ = [asyncio.ensure_future(client(number)) for number in range(len(clients))]
        for _ in range(2):
            wanted = sum(clients) + 40
            while sum(clients) < wanted and not any(one.done() for one in running_):
                await asyncio.sleep(0.01)
            leader = await asyncio.to_thread(cluster.leader_of, "ingestd")
            leader.kill()
            await asyncio.to_thread(cluster.start)
        ended.set()
        await asyncio.wait_for(asyncio.gather(*running_), 120)
        for journal in both:
            await crash(journal)
        again = [await open_(cluster, name) for name in ("a", "b")]
        kept = [record for journal in again for record in await records(journal)]
        sent_ = [b"%d-%d" % (who, n) for who, count in enumerate(clients) for n in range(count)]
        assert sorted(kept) == sorted(sent_)


@pytest.mark.parametrize("lacks", ["allow_atomic", "allow_msg_ttl"])
async def test_a_stream_that_can_have_no_keys_is_refused(one_node, open_, lacks) -> None:
    import nats
    from nats.js.api import StreamConfig

    client = await nats.connect(one_node.urls)
    config: dict[str, Any] = {"allow_atomic": True, "allow_msg_ttl": True, lacks: False}
    name = f"no-{lacks}"
    await client.jetstream().add_stream(
        StreamConfig(name=name, subjects=[f"{name}.>"], allow_direct=True, discard="new", **config)
    )
    with pytest.raises(ConfigError, match=f"needs {lacks}, for idempotency keys: edit"):
        await open_(one_node, "other", stream=name)
    own = JetStreamSettings(servers=one_node.urls, replicas=1, lease="1s", stream=name)
    text = f"the stream {name} needs {lacks}, for idempotency keys: edit its configuration"
    assert ("error", text) in await JetStreamKind().check(own)
    info = await client.jetstream().stream_info(name)
    setattr(info.config, lacks, True)
    await client.jetstream().update_stream(info.config)
    await client.close()
    await open_(one_node, "other", stream=name, bucket=f"{name}-leases")


def asked(daemon: Daemon, key: str, body: bytes) -> tuple[int, bool, Any]:
    """Status, whether it is a repeated answer, and the answer; comes again when it is told to."""

    def answered() -> tuple[int, bool, Any] | None:
        status, headers, answer = daemon.request(
            "POST", "/v1/records", body, {"Idempotency-Key": key}
        )
        if status in {409, 503}:
            assert int(headers["retry-after"]) > 0
            return None
        return status, headers.get("idempotent-replayed") == "true", answer

    return until(answered)


def test_a_key_outlives_its_daemon_and_its_log(tmp_path: Path) -> None:
    with group_of(tmp_path) as group:
        one = group.start("one", 3600)
        two = group.start("two", 0, "--journal.jetstream.retire_after", "0s")
        for daemon in (one, two):
            daemon.event("daemon_started", 60)
        body = b"1\n2\n3\n"
        accepted = asked(one, "K", body)
        assert accepted[:2] == (202, False)

        def known(daemon: Daemon) -> None:
            assert asked(daemon, "K", body) == (202, True, accepted[2])
            assert asked(daemon, "K", b"1\n")[0] == 422

        known(one)
        known(two)
        with ThreadPoolExecutor(2) as threads:  # to both at once
            for n in range(10, 20):
                calls = [threads.submit(asked, to, f"B{n}", b"%d\n" % n) for to in (one, two)]
                answers = sorted((call.result() for call in calls), key=str)
                # Both are repeated answers where the servers' answer to the first one was lost.
                assert answers[0][0] == answers[1][0] == 202
                assert answers[1][1]
                assert answers[0][2] == answers[1][2]
                assert asked(two, f"B{n}", b"%d\n" % n) == (202, True, answers[0][2])
        one.terminate(signal.SIGKILL)
        known(two)
        two.event("log_adopted", 60)
        known(two)
        two.event("log_retired", 60)
        until(lambda: "one" not in group.listed())
        known(two)
        again = group.start("one", 0)
        again.event("daemon_started", 60)
        known(again)
        two.until_settled()
        assert group.numbers() == [1, 2, 3, *range(10, 20)]
