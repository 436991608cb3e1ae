"""Faults of the servers and of their surroundings: disks, credentials, certificates, clocks."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import signal
from typing import TYPE_CHECKING

import pytest
import trustme

from ingestd.base.append import Append
from ingestd.base.errors import JournalFailed, Overloaded
from ingestd.journal import jetstream
from tests.journal.on_nats import accept, crash, lines, records, refused, tries
from tests.nats import Refuser, running

if TYPE_CHECKING:
    from pathlib import Path

    from ingestd.journal.log import LogJournal
    from ingestd.prove.servers import NatsServer
    from tests.nats import Cluster

pytest.importorskip("nats", reason="needs nats-py: pip install 'ingestd[jetstream]'")
pytestmark = pytest.mark.slow


async def test_a_disk_is_wiped_and_then_the_other_nodes_fail(tmp_path: Path, open_) -> None:
    """What the wiped node has is what the others gave it; then a majority needs it."""
    (tmp_path / "nats").mkdir()
    with running(tmp_path / "nats", 3) as cluster:
        journal = await open_(cluster, "wiped", timeout="2s")
        first, *others = cluster.servers
        sent = [b"%d" % n for n in range(60)]
        for record in sent[:20]:
            await accept(journal, record)
        first.kill()
        shutil.rmtree(first.store)
        for record in sent[20:30]:
            await accept(journal, record)
        await asyncio.to_thread(first.start)
        for one, some in zip(others, (sent[30:45], sent[45:]), strict=True):
            for node in cluster.servers:
                await asyncio.to_thread(node.wait_ready, "/healthz")
            one.kill()
            for record in some:
                await accept(journal, record)
            await asyncio.to_thread(one.start)
        assert await records(journal) == sent
        await crash(journal)
        assert await records(await open_(cluster, "wiped")) == sent


CONFIG = """
authorization {{ users: [{{ user: "shop", password: "one" }}] }}
tls {{
  cert_file: "{0}/server.pem", key_file: "{0}/server.pem", ca_file: "{0}/ca.pem", verify: true
}}
"""


def certificates(folder: Path) -> dict[str, str]:
    """Makes those of an authority, of the server and of the daemon; settings of the daemon."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    for name in ("server", "client"):
        own = authority.issue_cert("127.0.0.1", common_name=name)
        own.private_key_and_cert_chain_pem.write_to_path(str(folder / f"{name}.pem"))
    return {"ca": str(folder / "ca.pem"), "certificate": str(folder / "client.pem")}


async def test_credentials_are_revoked_and_valid_again(tmp_path: Path, open_) -> None:
    """With a password, over TLS that asks for certificates."""
    (tmp_path / "nats").mkdir()
    tls = certificates(tmp_path)
    access = {"username": "shop", "password": "one", "tls": tls}
    with running(tmp_path / "nats", config=CONFIG.format(tmp_path)) as cluster:
        (node,) = cluster.servers
        text = node.file.read_text()
        journal = await open_(cluster, "revoked", **access)
        await journal.append(Append(lines(b"1")))
        for number in (2, 3):  # and once more: the second time is no other
            node.file.write_text(text.replace('"one"', '"another"'))
            node.send(signal.SIGHUP)
            await refused(journal)
            await tries(journal, 2)  # with what is not valid
            await refused(journal)
            node.file.write_text(text)
            node.send(signal.SIGHUP)
            await accept(journal, b"%d" % number)
        assert await records(journal) == [b"1", b"2", b"3"]
        assert not journal.failed.done()
        await crash(journal)
        assert await records(await open_(cluster, "revoked", **access)) == [b"1", b"2", b"3"]
        for wrong in ({"password": "two"}, {"tls": {"ca": tls["ca"]}}, {"tls": {}}):
            with pytest.raises(JournalFailed, match="takes nothing"):
                await open_(cluster, "revoked", **access | wrong, timeout="0.2s")


async def test_leases_lapse_at_another_time_when_the_clock_of_servers_jumps(
    tmp_path: Path, open_
) -> None:
    """They lapse by the wall clock of the servers, which are static: no library and no namespace
    gives them another one. So this does to the bucket what a jump does: a lease is gone early
    (forward), or stays (back).
    """
    (tmp_path / "nats").mkdir()
    with running(tmp_path / "nats") as cluster:
        one = await open_(cluster, "clock")
        await accept(one, b"1")
        js, bucket = one._log._js, "KV_ingestd-leases"
        await js.purge_stream(bucket)  # forward, without another daemon: it takes the lease again
        async with asyncio.timeout(60):
            while not (await js.stream_info(bucket)).state.messages:
                await asyncio.sleep(0.05)
        await accept(one, b"2")
        one._renewing.cancel()  # paused between two renewals
        await js.purge_stream(bucket)
        two = await open_(cluster, "clock")
        with pytest.raises(JournalFailed):
            await one.append(Append(lines(b"3")))
        await accept(two, b"4")
        assert await records(two) == [b"1", b"2", b"4"]
        await crash(two)
        # Back: a lease that stays, whatever time passes here, until its time has come after all.
        info = await js.stream_info(bucket)
        info.config.allow_msg_ttl = True
        await js.update_stream(info.config)
        place, lease = "$KV.ingestd-leases.clock.default", two._owner.encode()
        await js.publish(place, lease, headers={"Nats-TTL": "never"})
        with pytest.raises(JournalFailed, match="owns it"):
            await open_(cluster, "clock")
        await js.publish(place, lease)
        assert await records(await open_(cluster, "clock")) == [b"1", b"2", b"4"]


async def test_nodes_are_down_when_there_is_no_stream_yet(
    tmp_path: Path, open_, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one of three down it is made; with two the start fails as one to repeat, not with 78."""
    monkeypatch.setattr(jetstream, "READY_SECONDS", 2.0)
    (tmp_path / "nats").mkdir()
    with running(tmp_path / "nats", 3) as cluster:
        first, second = await asyncio.to_thread(followers, cluster)
        for node in (first, second):
            await asyncio.to_thread(node.stop)  # the leader knows that they are gone
        with pytest.raises(JournalFailed, match="takes nothing") as failed:
            await open_(cluster, "first", timeout="0.2s")
        assert failed.value.exit_code == 75
        await asyncio.to_thread(second.start)
        journal = await accepting(open_, cluster)
        await asyncio.to_thread(first.start)
        await asyncio.to_thread(first.wait_ready, "/healthz")
        second.kill()
        await accept(journal, b"2")  # the one that was down is a replica too


async def test_a_node_comes_up_while_a_daemon_starts(
    tmp_path: Path, open_, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leader that has not heard of its nodes yet says so at once; the start waits for them."""
    monkeypatch.setattr(jetstream, "READY_SECONDS", 90.0)
    (tmp_path / "nats").mkdir()
    with running(tmp_path / "nats", 3) as cluster:
        first, second = await asyncio.to_thread(followers, cluster)
        await asyncio.to_thread(first.stop)
        opening = asyncio.create_task(open_(cluster, "early", replicas=3))
        await asyncio.to_thread(second.stop)
        await asyncio.sleep(1)
        for node in (first, second):
            await asyncio.to_thread(node.start)
        await accept(await opening, b"1")


def followers(cluster: Cluster) -> list[NatsServer]:
    """The nodes that do not lead the cluster, once all have agreed on who does."""
    found = ""
    while not found:
        found = cluster.servers[0].ask("/jsz").get("meta_cluster", {}).get("leader", "")
    return [node for node in cluster.servers if node.name != found]


async def accepting(open_, cluster: Cluster) -> LogJournal:
    """Opens a journal as a supervisor does that starts the daemon again after each 75."""
    async with asyncio.timeout(90):
        while True:
            try:
                journal = await open_(cluster, "first", timeout="2s")
            except JournalFailed:
                await asyncio.sleep(0.2)
            else:
                await accept(journal, b"1")
                return journal


async def test_a_refusal_amid_writes_leaves_no_journal_without_a_connection(
    tmp_path: Path, open_
) -> None:
    """The client's end of a connection meets what it writes; each of its orders is gone through."""
    random_, tasks = random.Random(3), set[asyncio.Task[None]]()
    (tmp_path / "nats").mkdir()

    async def send(journal: LogJournal, share: float) -> None:
        for _ in range(random_.randrange(1, 6)):
            if random_.random() < share:
                size = random_.choice([1, 1000, 100_000])
                tasks.add(asyncio.create_task(_append(journal, b"x" * size)))
            await asyncio.sleep(random_.choice([0, 0, 0.001, 0.003]))

    with running(tmp_path / "nats") as cluster:
        refuser = Refuser()
        async with refuser.before(cluster) as refused_:
            journal = await open_(refused_, "amid", lease="60s", timeout="1s")
            for number in range(60):
                await send(journal, 0.5)
                refuser.refuse(is_reset=random_.random() < 0.5)
                await send(journal, 1)
                await accept(journal, b"%d" % number)
            await asyncio.gather(*tasks)
            ours = [one for one in await records(journal) if one[:1] != b"x"]
            assert ours == [b"%d" % number for number in range(60)]
            await crash(journal)


async def _append(journal: LogJournal, record: bytes) -> None:
    with contextlib.suppress(Overloaded):  # its outcome is another test's
        await journal.append(Append(lines(record)))
