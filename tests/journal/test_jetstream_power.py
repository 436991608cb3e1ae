"""Power failures of nodes with disks of their own; nodes and daemons that are cut off."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ingestd.base.append import Append
from ingestd.base.errors import Overloaded
from tests.faults.power import Disk, Network, disks
from tests.faults.tools import needs
from tests.journal.on_nats import (
    accept,
    accepted,
    batches,
    crash,
    drain,
    lines,
    records,
    start,
    takes_nothing,
)
from tests.nats import running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ingestd.journal.log import LogJournal
    from ingestd.prove.servers import NatsServer
    from tests.daemon.harness import Daemon
    from tests.nats import Cluster

pytest.importorskip("nats", reason="needs nats-py: pip install 'ingestd[jetstream]'")
pytestmark = pytest.mark.slow

NODES = ("node1", "node2", "node3")
LAZY = "1h"
"""A `sync_interval` of servers that is not over before a test is; their default is 2 minutes."""


class Load:
    """Records that are accepted one after the other.

    Attributes:
        accepted: in their order.
    """

    def __init__(self, journal: LogJournal) -> None:
        self.accepted: list[bytes] = []
        self._journal = journal
        self._ended = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while not self._ended.is_set():
            record = b"%d" % len(self.accepted)
            try:
                await self._journal.append(Append(lines(record)))
            except Overloaded:
                await asyncio.sleep(0.02)
            else:
                self.accepted.append(record)

    async def more(self, count: int) -> None:
        """Waits until some more are accepted."""
        wanted = len(self.accepted) + count
        async with asyncio.timeout(90):
            while len(self.accepted) < wanted:
                assert not self._task.done(), self._task.exception()
                await asyncio.sleep(0.01)

    async def end(self) -> list[bytes]:
        """Ends once the last one is accepted."""
        self._ended.set()
        await asyncio.wait_for(self._task, 90)
        return self.accepted


def power_failure(pairs: list[tuple[NatsServer, Disk]]) -> None:
    """The power of nodes fails at once, and comes back."""
    for node, _ in pairs:
        node.pause()  # none of them sees a disk that fails
    for _, disk in pairs:
        disk.fail()
    for node, _ in pairs:
        node.kill()
    for node, disk in pairs:
        disk.back()
        node.launch()


@contextlib.contextmanager
def on_disks(folder: Path, sync: str) -> Iterator[tuple[Cluster, list[tuple[NatsServer, Disk]]]]:
    with (
        disks(*(folder / name for name in NODES)) as own,
        running(folder, len(NODES), sync=sync, file_max="128MiB") as cluster,
    ):
        yield cluster, list(zip(cluster.servers, own, strict=True))


@needs("mkfs.ext4", "losetup", root=True)
async def test_nothing_accepted_is_lost_with_the_power(tmp_path: Path, open_) -> None:
    """One, two and all three nodes, under load; each syncs every write."""
    with on_disks(tmp_path / "nats", "always") as (cluster, pairs):
        journal = await open_(cluster, "power", timeout="2s")
        load = Load(journal)
        for count in (1, 2, 3):
            await load.more(30)
            await asyncio.to_thread(power_failure, pairs[:count])
            await asyncio.to_thread(cluster.wait_ready)
        await load.more(30)
        accepted = await load.end()
        await crash(journal)
        assert await records(await open_(cluster, "power")) == accepted


@needs("mkfs.ext4", "losetup", root=True)
async def test_a_majority_that_does_not_sync_loses_what_it_acknowledged(
    tmp_path: Path, open_
) -> None:
    """The same without syncs, as between two of the servers' default: three nodes cost records."""
    with on_disks(tmp_path / "nats", LAZY) as (cluster, pairs):
        journal = await open_(cluster, "power", timeout="2s")
        load = Load(journal)
        await load.more(30)
        await asyncio.to_thread(power_failure, pairs[:1])
        await asyncio.to_thread(cluster.wait_ready)
        await load.more(30)
        accepted = await load.end()
        await crash(journal)
        journal = await open_(cluster, "power")
        assert await records(journal) == accepted
        await crash(journal)
        before = held(cluster)
        assert before > len(accepted)
        await asyncio.to_thread(power_failure, pairs)
        await asyncio.to_thread(cluster.wait_ready)
        assert held(cluster) < before, "so sync_interval: always is what keeps them"


@needs("mkfs.ext4", "losetup", root=True)
@pytest.mark.parametrize("sync", ["always", LAZY])
async def test_two_nodes_lose_power_while_the_third_is_down(
    tmp_path: Path, open_, sync: str
) -> None:
    """What was acknowledged then has to be on the disks of these two."""
    with on_disks(tmp_path / "nats", sync) as (cluster, pairs):
        journal = await open_(cluster, "power", timeout="2s")
        load = Load(journal)
        await load.more(60)
        accepted = await load.end()
        # Most of the bytes come last: the kernel writes by itself what is half a minute old.
        accepted.append(os.urandom(150_000).hex().encode())
        await accept(journal, accepted[-1])
        await crash(journal)
        *two, (third, _) = pairs
        third.kill()
        before = [written(node) for node, _ in two]
        await asyncio.to_thread(power_failure, two)
        left = [written(node) for node, _ in two]
        print(f"{sync}: bytes of messages {before} before, {left} after")
        if sync == "always":
            for node, _ in two:
                await asyncio.to_thread(node.wait_ready)
            assert await records(await open_(cluster, "power")) == accepted
        else:
            assert max(left) < min(before) / 2, "only the third one has what was acknowledged"


def written(node: NatsServer) -> int:
    """Bytes of messages that a node has in the files of its streams and of their agreement."""
    size = 0
    for folder, _, names in os.walk(node.store):  # of a node that runs some may go meanwhile
        for name in names:
            if name.endswith(".blk"):
                with contextlib.suppress(FileNotFoundError):
                    size += Path(folder, name).stat().st_size
    return size


def held(cluster: Cluster) -> int:
    """Messages of the log that some node has."""
    found = [0]
    for node in cluster.servers:
        for account in node.ask("/jsz?accounts=true&streams=true").get("account_details", []):
            found += [
                detail["state"]["messages"]
                for detail in account.get("stream_detail", [])
                if detail["name"] == "ingestd"
            ]
    return max(found)


@contextlib.contextmanager
def network(folder: Path, *daemons: str) -> Iterator[tuple[Network, Cluster]]:
    """A host for each node and each daemon; this thread is on one of its own."""
    (folder / "nats").mkdir()
    with Network([*NODES, *daemons, "here"]) as hosts, hosts.inside("here"):
        places = [(hosts.addresses[name], hosts.command(name)) for name in NODES]
        with running(folder / "nats", hosts=places) as cluster:
            yield hosts, cluster


QUICK = ("--journal.jetstream.timeout", "1s")


@needs("ip", "nsenter", root=True)
def test_an_owner_is_cut_off_and_another_daemon_goes_on(tmp_path: Path) -> None:
    """It accepts nothing on its side of the cut, and leaves when it is back."""
    out = tmp_path / "out"
    with (
        network(tmp_path, "one", "two") as (hosts, cluster),
        start(tmp_path / "one", cluster, out, 0, *QUICK, prefix=hosts.command("one")) as one,
    ):
        with hosts.inside("one"):
            accepted(one, b"1\n")
            one.until_settled()
        hosts.cut("one")
        answers: list[int] = []

        def wait() -> None:
            with hosts.inside("one"), contextlib.suppress(OSError):  # it leaves without an answer
                answers.append(one.post(b"2\n")[0])

        waiting = threading.Thread(target=wait)
        waiting.start()
        with start(tmp_path / "two", cluster, out, 0, *QUICK, prefix=hosts.command("two")) as two:
            with hosts.inside("two"):
                accepted(two, b"3\n")
            with hosts.inside("one"):
                takes_nothing(one)
                code, headers, _ = one.request("POST", "/v1/records", b"4\n")
            assert code == 503
            assert int(headers["retry-after"]) > 0
            hosts.heal("one")
            assert one.wait() == 75
            waiting.join(60)
            assert 202 not in answers
            with hosts.inside("two"):
                accepted(two, b"5\n")
                two.until_settled()
            drain(two)
    assert sorted(n for numbers in batches(out).values() for n in numbers) == [1, 3, 5]


@needs("ip", "nsenter", root=True)
def test_a_minority_is_cut_off(tmp_path: Path) -> None:
    """The node that leads the log: the others elect one, and the daemon goes to them."""
    out = tmp_path / "out"
    with (
        network(tmp_path, "one") as (hosts, cluster),
        start(tmp_path / "one", cluster, out, 0, *QUICK, prefix=hosts.command("one")) as one,
    ):
        sent = itertools.count()
        with hosts.inside("one"):
            assert one.post(b"%d\n" % next(sent))[0] == 202
        leader = cluster.leader_of("ingestd")
        hosts.cut(leader.name)
        for _ in range(5):
            with hosts.inside("one"):
                accepted(one, b"%d\n" % next(sent))
        hosts.heal(leader.name)
        leader.wait_ready("/healthz")
        with hosts.inside("one"):
            accepted(one, b"%d\n" % next(sent))  # they may elect once more
            one.until_settled()
        drain(one)
    assert sorted(n for numbers in batches(out).values() for n in numbers) == [*range(7)]


@needs("ip", "nsenter", root=True)
def test_a_daemon_leaves_a_node_that_the_others_do_not_reach(tmp_path: Path) -> None:
    """The node answers its pings, and nothing else; the others have a majority."""
    out = tmp_path / "out"
    with (
        network(tmp_path, "one") as (hosts, cluster),
        start(tmp_path / "one", cluster, out, 0, *QUICK, prefix=hosts.command("one")) as one,
    ):
        with hosts.inside("one"):
            accepted(one, b"1\n")
        (node,) = [node for node in cluster.servers if _has_daemon(node)]
        hosts.part(node.name, *(name for name in NODES if name != node.name))
        with hosts.inside("one"):
            takes_nothing(one)
            accepted(one, b"2\n")
            one.until_settled()
        assert not _has_daemon(node)
        drain(one)
    assert sorted(n for numbers in batches(out).values() for n in numbers) == [1, 2]


def _has_daemon(node: NatsServer) -> bool:
    return any(one.get("name") == "ingestd" for one in node.ask("/connz")["connections"])


@needs("ip", "nsenter", root=True)
def test_a_daemon_is_left_with_a_minority_and_another_adopts_its_log(tmp_path: Path) -> None:
    """A daemon and one server on this side, two servers and a daemon that adopts on the other."""
    out, answers = tmp_path / "out", list[int]()
    more = (*QUICK, "--journal.jetstream.adopt", "true", "--executor.kind", "thread",
            # A busy machine may renew late, and then the log is adopted before the cut.
            "--journal.jetstream.lease", "6s")  # fmt: skip

    def life(folder: str, name: str, *own: str) -> Daemon:
        words = (*more, "--journal.jetstream.name", name, *own)
        return start(tmp_path / folder, cluster, out, 0, *words, prefix=hosts.command(name))

    def wait() -> None:
        with hosts.inside("one"), contextlib.suppress(OSError):  # it leaves without an answer
            answers.append(one.post(b"2\n")[0])

    with (
        network(tmp_path, "one", "two") as (hosts, cluster),
        life("one", "one", "--batch.age_max", "1h") as one,
        life("two", "two") as two,
    ):
        one.event("daemon_started", 60)
        with hosts.inside("one"):
            accepted(one, b"1\n")  # it waits for its batch to fill
        two.event("daemon_started", 60)
        hosts.split("one", NODES[0])
        waiting = threading.Thread(target=wait)
        waiting.start()
        left = two.event("log_left", 60)
        assert (left["pipeline"], left["processed"], left["pending"]) == ("default@one", 1, 0)
        with hosts.inside("two"):
            accepted(two, b"3\n")
        with hosts.inside("one"):
            takes_nothing(one)
            for _ in range(3):
                code, headers, _ = one.request("POST", "/v1/records", b"4\n")
                assert code == 503
                assert int(headers["retry-after"]) > 0
        for host in ("one", NODES[0]):
            hosts.heal(host)
        assert one.wait() == 75
        waiting.join(60)
        assert 202 not in answers
        for server in cluster.servers:
            server.wait_ready("/healthz")
        with life("again", "one") as again:
            with hosts.inside("one"):
                accepted(again, b"5\n")
                again.until_settled()
            with hosts.inside("two"):
                two.until_settled()
            for daemon, count in ((again, 2), (two, 1)):
                daemon.terminate()
                assert daemon.wait() == 0
                drained = daemon.event("drained")
                assert (drained["accepted"], drained["processed"]) == (count, count)
                assert drained["balanced"]
    assert sorted(n for numbers in batches(out).values() for n in numbers) == [1, 3, 5]
