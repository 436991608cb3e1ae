"""The journal in NATS JetStream, with real servers: one node, and three."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

import pytest

from ingestd.base.append import Append
from ingestd.base.errors import ConfigError, JournalFailed, Overloaded
from ingestd.base.record import Records, Span
from ingestd.journal import log as log_journal
from ingestd.journal.interface import Cursor, Seal, Sealed, Settle
from ingestd.journal.jetstream import JetStreamKind, JetStreamLog, JetStreamSettings, doubts
from ingestd.journal.log.cache import open_snapshot
from ingestd.journal.log.interface import LogUnreachable
from tests.journal.on_nats import accept, crash, lines, refused
from tests.nats import running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ingestd.journal.interface import Recovered
    from ingestd.journal.log.interface import LogMessage
    from tests.nats import Cluster

pytest.importorskip("nats", reason="needs nats-py: pip install 'ingestd[jetstream]'")
pytestmark = pytest.mark.slow

STAYS = "5s"
"""A lease that a process keeps which stands still for seconds; a start waits for twice as long."""


@pytest.fixture
def three_nodes(tmp_path: Path) -> Iterator[Cluster]:
    with running(tmp_path, 3) as cluster:
        yield cluster


async def test_another_daemon_goes_on_with_what_was_accepted(one_node, open_) -> None:
    first = await open_(one_node, "goes-on")
    big = Records.sized([b"x" * 3_000_000])  # more than a message takes
    await first.append(Append(lines(b"1", b"2")))
    await first.append(Append(big))
    await first.write(Seal(Sealed(1, (Span(1, 0, 2),), 2), Cursor(2, 0)))
    await crash(first)
    second = await open_(one_node, "goes-on")
    recovered: Recovered = second.recovered
    assert recovered.journal == first.recovered.journal
    assert recovered.batches == [Sealed(1, (Span(1, 0, 2),), 2)]
    loaded = await second.load([Span(2, 0, 1)])
    assert loaded is not None
    assert loaded.payload == big.payload
    await second.write(Settle(1, 2, [], [], [1], 4))
    closed = await second.close()
    assert (closed.ledger.accepted, closed.counted) == (3, 1)


async def test_a_daemon_that_was_paused_is_refused(one_node, open_) -> None:
    first = await open_(one_node, "paused")
    await first.append(Append(lines(b"1")))
    first._renewing.cancel()  # it does nothing until its lease has lapsed
    second = await open_(one_node, "paused")
    with pytest.raises(JournalFailed, match="taken over"):
        await first.append(Append(lines(b"2")))
    await second.append(Append(lines(b"3")))
    assert second.ledger.accepted == 2


async def test_a_second_daemon_of_the_same_name_does_not_start(one_node, open_) -> None:
    own = {"bucket": "same-name-leases", "lease": STAYS}
    first = await open_(one_node, "same-name", **own)
    with pytest.raises(JournalFailed, match="owns it"):
        await open_(one_node, "same-name", **own)
    await first.append(Append(lines(b"1")))
    await first.close()
    assert (await open_(one_node, "same-name", **own)).ledger.accepted == 1  # waited for nothing


async def test_a_bucket_that_is_late_once_ends_no_start(one_node, open_, monkeypatch) -> None:
    from nats.js.client import JetStreamContext

    stream_info, late = JetStreamContext.stream_info, iter([True])

    async def once(self, name: str, *more):
        if name.startswith("KV_") and next(late, False):
            raise TimeoutError
        return await stream_info(self, name, *more)

    monkeypatch.setattr(JetStreamContext, "stream_info", once)
    await (await open_(one_node, "late-once")).append(Append(lines(b"1")))
    assert next(late, None) is None


async def lease_of(log: JetStreamLog) -> LogMessage:
    stream, subject = log._leases()
    found = await log._last_of(subject, stream)
    assert found is not None
    return found


async def test_a_renewal_whose_answer_was_lost_is_made_good(one_node, open_) -> None:
    journal = await open_(one_node, "renewal", bucket="renewal-leases", lease="60s")
    log, owner = journal._log, journal._owner
    journal._renewing.cancel()
    held = await lease_of(log)
    log._revisions[log.place] = held.number - 1  # as it was before
    assert await log.acquire(owner, 1) == owner
    assert (await lease_of(log)).number > held.number


async def test_a_renewal_that_was_cancelled_does_not_keep_the_lease(one_node, open_) -> None:
    journal = await open_(one_node, "cancelled", bucket="cancelled-leases", lease="600s")
    log, owner = journal._log, journal._owner
    held = await lease_of(log)
    renewal = asyncio.create_task(log.acquire(owner, 1))
    await asyncio.sleep(0)  # it has been sent, and is not answered
    renewal.cancel()
    async with asyncio.timeout(60):  # the journal itself renews its lease later
        while (await lease_of(log)).number == held.number:
            await asyncio.sleep(0.01)
    await log.release(owner)
    assert (await log.logs())[log.place].owner == ""


async def test_a_subject_that_no_daemon_writes_is_no_log(one_node, open_) -> None:
    log = (await open_(one_node, "named"))._log
    for place in ("/tmp/named.default", "named.default.more", "$named.default", "named"):
        await log._js.publish(f"ingestd.log.{place}", b"")
    assert [place for place in await log.logs() if "named" in place] == ["named.default"]


async def test_a_sum_that_no_daemon_wrote_is_told(one_node, open_) -> None:
    own = {"stream": "sums", "bucket": "sums-leases"}
    log = (await open_(one_node, "sums", **own))._log
    await log._js.publish("sums.retired.default", b"garbage")
    with pytest.raises(ConfigError, match=r"sums\.retired\.default can't be read"):
        await log.retired()


async def test_a_snapshot_lets_the_stream_go(one_node, open_) -> None:
    first = await open_(one_node, "snapshot")
    first._snapshot_bytes = 1 << 20
    for n in range(40):
        await first.append(Append(Records.sized([b"x" * 100_000])))
        await first.write(Seal(Sealed(n + 1, (Span(n + 1, 0, 1),), 1), Cursor(n + 2, 0)))
        if n != 3:
            await first.write(Settle(n + 1, 1, [], [], [n + 1], 100_004))
    await asyncio.to_thread(first._saver.join, 60)
    config = {"subjects_filter": "ingestd.log.snapshot.>"}
    info = await first._log._js.stream_info("ingestd", **config)
    assert info.state.bytes < 3_000_000 + 4_000_000
    await crash(first)
    second = await open_(one_node, "snapshot")
    assert [batch.number for batch in second.recovered.batches] == [4]
    assert (await second.load([Span(4, 0, 1)])).count == 1
    assert second._snapshot is not None


async def test_a_node_that_is_down_for_a_while_costs_503_and_nothing_else(
    tmp_path: Path, open_
) -> None:
    (tmp_path / "nats").mkdir()
    with running(tmp_path / "nats") as cluster:
        journal = await open_(cluster, "down")
        await journal.append(Append(lines(b"1")))
        cluster.stop()
        seal = journal.write(Seal(Sealed(1, (Span(1, 0, 1),), 1), Cursor(2, 0)))
        await refused(journal)
        assert not seal.done()
        await asyncio.to_thread(cluster.start)
        await asyncio.wait_for(seal, 60)
        await accept(journal, b"3")
        assert journal.ledger.accepted == 2


async def test_two_of_three_nodes_down_and_back(three_nodes, open_) -> None:
    journal = await open_(three_nodes, "quorum", timeout="2s")
    await accept(journal, b"1")
    leader = three_nodes.leader_of("ingestd")
    others = [one for one in three_nodes.servers if one is not leader]
    others[0].kill()
    await accept(journal, b"2")
    others[1].kill()
    waiting, refused = [], None
    while refused is None:  # the first ones may wait for an answer; then all are refused at once
        try:
            one = asyncio.ensure_future(journal.append(Append(lines(b"3"))))
            await asyncio.wait({one}, timeout=2)
            refused = one.exception() if one.done() else None
            waiting += [] if one.done() else [one]
        except Overloaded as at_once:
            refused = at_once
    assert isinstance(refused, Overloaded)
    assert refused.retry_after > 0
    assert "wrong last sequence" not in str(refused)
    await asyncio.to_thread(three_nodes.start)
    await asyncio.wait_for(asyncio.gather(*waiting), 90)
    await accept(journal, b"4")
    assert journal.ledger.accepted == 3 + len(waiting)
    await crash(journal)
    assert (await open_(three_nodes, "quorum")).ledger.accepted == 3 + len(waiting)


async def test_every_leader_is_killed_under_load(three_nodes, open_) -> None:
    journal = await open_(three_nodes, "leaders", timeout="2s")
    accepted, ended = 0, asyncio.Event()

    async def load() -> None:
        nonlocal accepted
        while not ended.is_set():
            try:
                await journal.append(Append(lines(b"%d" % accepted)))
            except Overloaded:
                await asyncio.sleep(0.05)
            else:
                accepted += 1

    loading = asyncio.ensure_future(load())
    for _ in range(3):
        wanted = accepted + 50
        while accepted < wanted and not loading.done():
            await asyncio.sleep(0.01)
        assert not loading.done(), loading.exception()
        leader = await asyncio.to_thread(three_nodes.leader_of, "ingestd")
        leader.kill()
        await asyncio.to_thread(three_nodes.start)
    ended.set()
    await asyncio.wait_for(loading, 90)
    assert journal.ledger.accepted == accepted
    await crash(journal)
    again = await open_(three_nodes, "leaders")
    assert again.ledger.accepted == accepted
    chunks = await again.read(1, 1 << 30)
    items = [item for chunk in chunks for item in chunk.records.items()]
    assert items == [b"%d" % n for n in range(accepted)]


async def test_a_full_stream_refuses_and_goes_on_when_there_is_room(open_, one_node) -> None:
    own = {"stream": "small", "bucket": "small-leases", "stream_bytes_max": "2MiB"}
    journal = await open_(one_node, "full", **own)
    taken = 0
    big, refused = Append(Records.sized([b"x" * 100_000])), ""
    while not refused:
        try:
            await journal.append(big)
            taken += 1
        except Overloaded as full:
            refused = str(full)
    assert "full" in refused or "maximum" in refused
    assert taken > 10
    js = journal._log._js
    info = await js.stream_info("small")
    info.config.max_bytes = 8 << 20
    await js.update_stream(info.config)
    await accept(journal, b"1")
    assert journal.ledger.accepted == taken + 1


async def test_a_stream_that_is_nearly_full_is_made_larger(open_, one_node) -> None:
    own = {"stream": "larger", "bucket": "larger-leases"}
    journal = await open_(one_node, "larger", **own)
    for _ in range(19):
        await journal.append(Append(Records.sized([b"x" * 100_000])))
    js = journal._log._js
    info = await js.stream_info("larger")
    info.config.max_bytes = 2 << 20  # a bound that it did not have
    await js.update_stream(info.config)
    await refused(journal, "nine tenths full")
    info.config.max_bytes = 8 << 20
    await js.update_stream(info.config)
    await accept(journal, b"1")


async def test_a_snapshot_that_does_not_fit_leaves_the_room_as_it_was(open_, one_node) -> None:
    own = {"stream": "tight", "bucket": "tight-leases", "stream_bytes_max": "6MiB"}
    journal = await open_(one_node, "tight", **own)
    for _ in range(36):  # pending, so a snapshot carries them
        await journal.append(Append(Records.sized([b"x" * 100_000])))
    js, marks = journal._log._js, [journal._latest[:2]]
    before = (await js.stream_info("tight")).state.bytes
    db = await asyncio.to_thread(open_snapshot, journal.path)
    await asyncio.to_thread(journal._save, db, journal._last, marks)
    assert journal._snapshot is None
    assert (await js.stream_info("tight")).state.bytes == before
    await journal.write(Seal(Sealed(1, (Span(1, 0, 1),), 1), Cursor(2, 0)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_age": 60.0}, "maximum age"),
        ({"discard": "old"}, "discards old messages"),
        ({"max_msg_size": 10_000}, "low maximum message size"),
        (
            {"allow_msg_ttl": True, "allow_rollup_hdrs": True, "subject_delete_marker_ttl": 60.0},
            "markers of what is deleted",
        ),
        (
            {"subject_transform": {"src": ">", "dest": "elsewhere.>"}},
            "a transform of subjects",
        ),
    ],
)
async def test_a_stream_that_would_lose_records_is_refused(one_node, open_, change, said) -> None:
    import nats
    from nats.js.api import StreamConfig, SubjectTransform

    if "subject_transform" in change:
        change = {"subject_transform": SubjectTransform(**change["subject_transform"])}
    client = await nats.connect(one_node.urls)
    stream = f"other-{said.split()[-1]}"
    config = {"subjects": [f"{stream}.>"], "allow_direct": True, "discard": "new", **change}
    await client.jetstream().add_stream(StreamConfig(name=stream, **config))
    await client.close()
    with pytest.raises(ConfigError, match=said):
        await open_(one_node, "other", stream=stream)


async def test_a_lower_bound_of_messages_ends_the_journal(one_node, open_) -> None:
    """The message is refused for good, so nothing would follow it."""
    own = {"stream": "lower", "bucket": "lower-leases"}
    journal = await open_(one_node, "lower", **own)
    await journal.append(Append(lines(b"1")))
    info = await journal._log._js.stream_info("lower")
    info.config.max_msg_size = 1000
    await journal._log._js.update_stream(info.config)
    with pytest.raises(JournalFailed, match="message size exceeds"):
        await asyncio.wait_for(journal.append(Append(lines(b"x" * 5000))), 60)
    await journal.close()
    with pytest.raises(ConfigError, match="low maximum message size"):
        await open_(one_node, "lower", **own)


async def test_servers_with_a_lower_max_payload_end_the_journal(tmp_path: Path, open_) -> None:
    (tmp_path / "nats").mkdir()
    with running(tmp_path / "nats") as cluster:
        journal = await open_(cluster, "payload", timeout="2s")
        (server,) = cluster.servers
        lower = server.file.read_text().replace("max_payload: 1048576", "max_payload: 65536")
        server.file.write_text(lower)
        server.send(signal.SIGHUP)
        while (await asyncio.to_thread(server.ask, "/varz")).get("max_payload") != 65536:
            await asyncio.sleep(0.05)
        large = Append(Records.sized([b"x" * 300_000]))
        with pytest.raises(JournalFailed, match="max_payload of the servers is 65536"):
            await asyncio.wait_for(journal.append(large), 60)
        await journal.close()
        again = await open_(cluster, "payload")
        await again.append(large)
        assert again.ledger.accepted == 1


async def test_a_start_that_may_not_publish_ends(tmp_path: Path, open_, monkeypatch) -> None:
    (tmp_path / "nats").mkdir()
    users = """authorization { users = [ { user: a, password: a }, { user: b, password: b,
        permissions: { publish: { deny: "ingestd.log.>" } } } ] }"""
    with running(tmp_path / "nats", config=users) as cluster:
        await (await open_(cluster, "one", username="a", password="a")).close()
        # Time for a second try: the servers tell of the first one beside, perhaps after it ended.
        monkeypatch.setattr(log_journal, "OPEN_SECONDS", 4.0)
        with pytest.raises(JournalFailed, match=r"permissions violation.*ingestd\.log\.one"):
            await open_(cluster, "one", username="b", password="b", timeout="2s")


async def test_a_stream_or_bucket_that_is_deleted_is_no_answer(one_node, open_) -> None:
    own = {"stream": "gone", "bucket": "gone-leases", "stream_bytes_max": "8MiB"}
    own["timeout"] = "30s"  # a publish without an answer would be repeated for ever
    journal = await open_(one_node, "gone", **own)
    log = journal._log
    await log._js.delete_stream("gone")
    with pytest.raises(LogUnreachable, match="the stream gone is not there"):
        await log.logs()
    for call in (log.trim(1), log.drop_parts(1)):
        with pytest.raises(LogUnreachable, match="the stream gone is not there"):
            await call
    assert await log.acquire(journal._owner, 1.0) == journal._owner  # the lease is elsewhere
    await log._js.delete_stream("KV_gone-leases")
    with pytest.raises(LogUnreachable):
        await log.acquire(journal._owner, 1.0)
    with pytest.raises(Overloaded):
        await journal.append(Append(lines(b"1")))


async def test_too_few_replicas_are_refused(one_node, open_) -> None:
    await open_(one_node, "replicas")
    said = r"has 1 replicas \(journal.jetstream.replicas is 3\)"
    with pytest.raises(ConfigError, match=said):
        await open_(one_node, "replicas2", replicas=3)


async def test_check_tells_what_was_verified(one_node, tmp_path, open_) -> None:
    await open_(one_node, "check")
    monitor = one_node.servers[0].monitor
    own = JetStreamSettings(servers=one_node.urls, replicas=1, lease="1s", monitoring=[monitor])
    found = await JetStreamKind().check(own)
    texts = [text for _, text in found]
    assert {level for level, _ in found} == {"info"}
    assert any("1 replicas on disk" in text for text in texts)
    assert any("syncs each write" in text for text in texts)
    (level, text), *_ = [
        one for one in await JetStreamKind().check(own.model_copy(update={"monitoring": ()}))
        if "sync" in one[1]
    ]  # fmt: skip
    assert level == "warning"
    assert "not verified" in text
    (tmp_path / "nats").mkdir()
    with running(tmp_path / "nats", sync="2m") as lazy:
        there = own.model_copy(
            update={"servers": tuple(lazy.urls), "monitoring": (lazy.servers[0].monitor,)}
        )
        found = await JetStreamKind().check(there)
    assert any(level == "info" and "run makes it" in text for level, text in found)
    assert any(level == "error" and "sync_interval: always" in text for level, text in found)


async def test_servers_that_do_not_answer_end_the_start(open_, one_node, monkeypatch) -> None:
    own = {"servers": ["nats://127.0.0.1:9"], "timeout": "2s"}
    with pytest.raises(JournalFailed, match=r"no server of journal\.jetstream\.servers .*, 9\)"):
        await open_(one_node, "nobody", **own)


def test_check_tells_which_servers_of_a_stream_are_away() -> None:
    from nats.js.api import ClusterInfo, PeerInfo

    peers = [PeerInfo("n2", offline=True), PeerInfo("n3", offline=False)]
    assert doubts("s", None) == doubts("s", ClusterInfo(leader="n1", replicas=peers[1:])) == []
    ((level, text),) = doubts("s", ClusterInfo(leader="n1", replicas=peers))
    assert (level, text) == ("warning", "servers of the stream s that are away: n2")
    ((level, text),) = doubts("s", ClusterInfo(replicas=peers))
    assert level == "error"
    assert "no leader" in text


def test_the_log_of_a_pipeline_has_a_subject_of_its_own() -> None:
    settings = JetStreamSettings(name="a")
    names = {JetStreamLog(settings, pipeline).name for pipeline in ("default", "clicks")}
    assert names == {"ingestd.log.a.default", "ingestd.log.a.clicks"}
