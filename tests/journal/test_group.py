"""Groups of daemons on one stream: what a daemon leaves pending is processed by another one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.append import Append
from ingestd.base.clock import SystemClock
from ingestd.base.record import Span
from ingestd.journal.dead_letters import DeadLetter, LetterFilter
from ingestd.journal.interface import Cursor, Ledger, Seal, Sealed, Settle
from ingestd.journal.jetstream import JetStreamKind, JetStreamSettings
from ingestd.journal.log.cache import CacheFile
from ingestd.journal.log.group import READS_AT_ONCE, LogGroup, states_of
from ingestd.journal.log.interface import LogLease
from ingestd.journal.maintenance import DeadLetterMaintenance
from ingestd.journal.settings import DeadSettings
from tests.daemon.harness import ROOT, Daemon
from tests.faults.tools import mounted, needs
from tests.journal.on_nats import accepted, batches, calls, drain, leaves, lines
from tests.nats import running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ingestd.journal.log import LogJournal
    from tests.nats import Cluster

pytest.importorskip("nats", reason="needs nats-py: pip install 'ingestd[jetstream]'")
pytestmark = pytest.mark.slow

LIST = "journal list"
LEASE = float(os.environ.get("TEST_LEASE", "6"))
"""Seconds; 10 is the default of the setting. A lease is renewed each third of its time, and may not
lapse where a machine stands still for three seconds."""
HANDLER = """
import json, time
from ingestd import Batch

def keep(batch: Batch[int]) -> None:
    for index, number in enumerate(batch):
        if number < 0:
            batch.reject(index, "negative")
    with open({out!r}, "a") as out:
        out.write(json.dumps([batch.id, list(batch)]) + "\\n")
    time.sleep({seconds})
"""


class Group:
    """Daemons of several names on the servers, each on a machine of its own."""

    def __init__(self, folder: Path, cluster: Cluster, stack: contextlib.ExitStack) -> None:
        self.folder, self.cluster, self.out = folder, cluster, folder / "out"
        self._stack = stack
        self._lives = 0

    def settings(self, name: str, *more: str) -> list[str]:
        own = {
            "name": name, "servers": ",".join(self.cluster.urls), "lease": f"{LEASE}s",
            "replicas": str(len(self.cluster.servers)), "adopt": "true",
        }  # fmt: skip
        given = {f"journal.jetstream.{key}": value for key, value in own.items()}
        given |= {"journal.kind": "jetstream", "batch.records_max": "100"}
        given["executor.kind"] = "thread"  # a child process each would take longer to start
        return [word for key, value in given.items() for word in (f"--{key}", value)] + [*more]

    def start(self, name: str, seconds: float | str, *more: str) -> Daemon:
        """Starts a daemon, whose handler takes so long a batch."""
        self._lives += 1
        folder = self.folder / f"{name}-{self._lives}"
        folder.mkdir()
        (folder / "h.py").write_text(HANDLER.format(out=str(self.out), seconds=seconds))
        words = self.settings(name, *more)
        daemon = Daemon("h:keep", "--data-dir", str(folder / "data"), *words, cwd=folder)
        self._stack.enter_context(daemon)
        self._stack.callback(daemon.terminate, signal.SIGCONT)
        return daemon

    def numbers(self) -> list[int]:
        return sorted(n for numbers in batches(self.out).values() for n in numbers)

    def listed(self) -> dict[str, dict[str, Any]]:
        """The logs by their names; of those that have ended their sum."""
        own = JetStreamSettings(
            servers=tuple(self.cluster.urls), lease=LEASE, replicas=len(self.cluster.servers)
        )
        return {one["log"]: one for one in asyncio.run(JetStreamKind().logs(own))}

    def told(self, *flags: str) -> str:
        """What `ingestd journal list` prints."""
        env = {
            **os.environ, "PYTHONPATH": str(ROOT), "INGESTD_JOURNAL__KIND": "jetstream",
            "INGESTD_JOURNAL__JETSTREAM__SERVERS": ",".join(self.cluster.urls),
            "INGESTD_JOURNAL__JETSTREAM__LEASE": f"{LEASE}s",
            "INGESTD_JOURNAL__JETSTREAM__REPLICAS": str(len(self.cluster.servers)),
        }  # fmt: skip
        command = [sys.executable, "-m", "ingestd", *LIST.split(), *flags]
        return subprocess.run(command, env=env, capture_output=True, check=True, text=True).stdout

    def until_drained(self, *names: str) -> dict[str, dict[str, Any]]:
        return until(
            lambda: (
                (found := self.listed())
                and all(found[name]["state"] == "drained" for name in names)
                and found
            )
        )


@contextlib.contextmanager
def group_of(folder: Path, nodes: int = 1) -> Iterator[Group]:
    (folder / "nats").mkdir()
    with running(folder / "nats", nodes) as cluster, contextlib.ExitStack() as stack:
        yield Group(folder, cluster, stack)


def until(found: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def post(daemon: Daemon, count: int, first: int = 0) -> None:
    for start in range(first, first + count, 200):
        end = min(start + 200, first + count)
        accepted(daemon, b"".join(b"%d\n" % n for n in range(start, end)))


def logs_of(daemon: Daemon) -> dict[str, dict[str, Any]]:
    status = daemon.status()["pipelines"]["default"]["journal"]["logs"]
    return {one["log"]: one for one in status}


def test_a_killed_daemon_is_replaced_by_one_of_another_name(tmp_path: Path) -> None:
    with group_of(tmp_path, 3) as group:
        one, two = group.start("one", 3600), group.start("two", 0)
        post(one, 2000)
        two.event("daemon_started")
        until(lambda: len(batches(group.out)) == 2)  # both workers hold one that will never end
        before = batches(group.out)
        one.terminate(signal.SIGKILL)
        killed = time.monotonic()
        until(lambda: len(batches(group.out)) > 2)
        print(f"takeover took {time.monotonic() - killed:.2f} s, the lease is {LEASE} s")
        left = two.event("log_left")
        assert (left["accepted"], left["processed"], left["pending"]) == (2000, 2000, 0)
        assert (left["reason"], left["balanced"]) == ("drained", True)
        assert {name: batches(group.out)[name] for name in before} == before
        assert group.numbers() == [*range(2000)]
        until(lambda: logs_of(two)["one"]["state"] == "drained")
        assert "default@one" not in two.status()["pipelines"]
        post(two, 100, 5000)
        two.until_settled()
        two.terminate()
        assert two.wait() == 0
        out = f"[{','.join(group.told('--json').splitlines())}]"
        assert json.loads(out) == [*group.listed().values()]
        words = [line.split() for line in group.told().splitlines()]
        assert words == [
            ["log", "pipeline", "owner", "state", "accepted", "processed", "dead", "pending"],
            ["one", "default", "-", "drained", "2000", "2000", "0", "0"],
            ["two", "default", "-", "drained", "100", "100", "0", "0"],
            ["sum", "-", "-", "-", "2100", "2100", "0", "0"],
        ]
        assert not list(tmp_path.glob("two-*/data/adopted/*"))


def test_a_paused_daemon_is_adopted_and_refused(tmp_path: Path) -> None:
    with group_of(tmp_path) as group:
        one = group.start("one", 0, "--batch.age_max", "1h")
        accepted(one, b"1\n")  # it waits for its batch to fill
        two = group.start("two", 0)
        two.event("daemon_started")
        one.terminate(signal.SIGSTOP)
        assert two.event("log_left")["processed"] == 1
        one.terminate(signal.SIGCONT)
        leaves(one, b"2\n")
        assert group.numbers() == [1]
        found = group.listed()["one"]
        assert (found["accepted"], found["processed"], found["pending"]) == (1, 1, 0)


def test_daemons_keep_their_logs_when_the_servers_were_down(tmp_path: Path) -> None:
    with group_of(tmp_path) as group:
        daemons = [group.start(name, 0) for name in ("one", "two")]
        for daemon in daemons:
            daemon.event("daemon_started")
            post(daemon, 1)
        (server,) = group.cluster.servers
        server.kill()
        time.sleep(LEASE + 1)  # all leases lapse
        server.start()
        for daemon in daemons:
            accepted(daemon, b"2\n")
        # A daemon accepts as soon as the servers answer, perhaps before it has renewed its lease.
        until(lambda: owners(group) == {"one": "one", "two": "two"})
        for daemon in daemons:
            daemon.terminate()
            assert daemon.wait() == 0
            assert "log_adopted" not in [event["event"] for event in daemon.events]


def test_a_log_that_cannot_be_read_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    with group_of(tmp_path) as group:
        one = group.start("one", 0)
        one.event("daemon_started")
        asyncio.run(_publish(group.cluster.urls, "ingestd.log.bad.default", b"not of a daemon"))
        failed = one.event("adoption_failed")
        assert "can't be read" in failed["error"]
        assert "exception" not in failed
        (data,) = tmp_path.glob("one-*/data")
        until(lambda: not list(data.glob("adopted/bad*")))
        post(one, 1)
        one.until_settled()


async def _publish(servers: list[str], subject: str, data: bytes) -> None:
    import nats

    client = await nats.connect(servers)
    await client.jetstream().publish(subject, data)
    await client.close()


def test_none_is_adopted_while_the_handler_is_down_or_the_pipeline_paused(tmp_path: Path) -> None:
    with group_of(tmp_path) as group:
        up = tmp_path / "up"
        one = group.start("one", 3600)
        two = group.start("two", f"__import__('os').stat({str(up)!r}).st_size", "--retry.backoff",
                          "50ms", "--retry.backoff_max", "50ms")  # fmt: skip
        post(one, 300)
        post(two, 1, 1000)
        two.event("handler_went_down")
        one.terminate(signal.SIGKILL)
        stays_lapsed(group)
        (data,) = tmp_path.glob("two-*/data")
        ingestd("pause", "--data-dir", str(data))
        until(lambda: two.status()["pipelines"]["default"]["paused"])
        up.touch()
        stays_lapsed(group)
        assert "log_adopted" not in [event["event"] for event in two.events]
        ingestd("resume", "--data-dir", str(data))
        assert two.event("log_left")["processed"] == 300
        two.until_settled()
        assert group.numbers() == [*range(300), 1000]


def owners(group: Group) -> dict[str, str]:
    return {name: one["owner"] for name, one in group.listed().items()}


def stays_lapsed(group: Group) -> None:
    """Waits until a log is free, and for some looks of a daemon that should not adopt it."""
    until(lambda: group.listed()["one"]["state"] == "lapsed")
    end = time.monotonic() + 2
    while time.monotonic() < end:
        assert group.listed()["one"]["state"] == "lapsed"
        time.sleep(0.1)


def ingestd(*words: str) -> None:
    command = [sys.executable, "-m", "ingestd", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=env, check=True, capture_output=True)


@needs("mount", root=True)
def test_a_log_that_has_no_room_on_the_disk_is_left_to_another_daemon(tmp_path: Path) -> None:
    """The daemon whose disk is full goes on with its own records."""
    with (
        mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=4m", "tmpfs") as disk,
        group_of(tmp_path) as group,
    ):
        one = group.start("one", 3600)
        body = b"".join(b"%d\n" % n for n in range(100_000))
        for _ in range(7):
            accepted(one, body)
        two = group.start("two", 0, "--data-dir", str(disk / "data"), "--journal.free_min", "0")
        post(two, 1)
        one.terminate(signal.SIGKILL)
        two.event("adoption_failed")
        until(lambda: not list((disk / "data").glob("adopted/*")))
        post(two, 1)
        three = group.start("three", 0)
        three.event("log_adopted")
        two.until_settled()
        drain(two)


def test_a_drain_hands_over_at_once_and_one_of_two_adopts(tmp_path: Path) -> None:
    with group_of(tmp_path) as group:
        one = group.start("one", 3600, "--drain.timeout", "0s")
        two = group.start("two", 3600, "--drain.timeout", "0s")
        post(one, 1000)
        until(lambda: len(batches(group.out)) == 2)
        hung = batches(group.out)
        two.event("daemon_started")
        one.terminate()
        assert one.wait() == 0
        assert one.event("drained_partly")["pending"] == 1000
        two.event("log_adopted")
        others = [group.start(name, 0) for name in ("three", "four")]
        for other in others:
            other.event("daemon_started")
        until(lambda: len(calls(group.out)) == 4)
        assert batches(group.out) == hung  # the same two, under their ids
        two.terminate()
        assert two.wait() == 0
        gone = time.monotonic()
        until(lambda: len(batches(group.out)) > 2)
        print(f"the hand-over took {time.monotonic() - gone:.2f} s, the lease is {LEASE} s")
        group.until_drained("one")
        assert len(calls(group.out)) == 2 * 2 + 10  # then each batch once
        assert group.numbers() == [*range(1000)]
        events = [event["event"] for other in others for event in other.events]
        assert events.count("log_adopted") == 1


def test_a_log_goes_back_to_its_daemon(tmp_path: Path) -> None:
    with group_of(tmp_path) as group:
        one = group.start("one", 3600)
        post(one, 6000)  # more than a minute for the other one
        two = group.start("two", 0.7, "--batch.records_max", "30")
        two.event("daemon_started")
        assert group.listed()["two"]["accepted"] == 0  # a start alone has no numbers
        one.terminate(signal.SIGKILL)
        two.event("log_adopted")
        assert group.listed()["one"]["accepted"] == 6000
        shown = until(lambda: two.status()["pipelines"].get("default@one"))
        assert shown["accepted"] == 6000
        until(lambda: logs_of(two)["one"]["state"] == "adopted")
        assert logs_of(two)["one"]["owner"] == "two"
        again = group.start("one", 0)
        again.event("daemon_started")
        assert again.event("lease_awaited")["owner"].startswith("two/")
        assert two.event("log_wanted")["pipeline"] == "default@one"
        assert two.event("log_left")["reason"] == "wanted"
        status = again.until_settled()
        assert (status["accepted"], status["processed"]) == (6000, 6000)
        assert group.numbers() == [*range(6000)]


def test_a_daemon_that_is_paused_gives_a_log_to_one_that_works(tmp_path: Path) -> None:
    with group_of(tmp_path) as group:
        one = group.start("one", 3600)
        post(one, 6000)  # two minutes for the other one
        two = group.start("two", 2, "--batch.records_max", "50")
        two.event("daemon_started")
        one.terminate(signal.SIGKILL)
        two.event("log_adopted")
        three = group.start("three", 0)
        three.event("daemon_started")
        (data,) = tmp_path.glob("two-*/data")
        pause = [sys.executable, "-m", "ingestd", "pause", "--data-dir", str(data)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([*pause, "default"], env=env, check=True)
        assert two.event("log_left")["reason"] == "its own pipeline stands still"
        three.event("log_adopted")
        assert three.event("log_left")["processed"] == 6000
        assert group.numbers() == [*range(6000)]


def test_dead_letters_stay_with_their_log_and_the_log_ends_without(tmp_path: Path) -> None:
    with group_of(tmp_path) as group:
        one = group.start("one", 3600, "--batch.records_max", "10")
        accepted(one, b"1\n-2\n3\n")
        accepted(one, b"4\n" * 20)
        two = group.start("two", 0)
        two.event("daemon_started")
        one.terminate(signal.SIGKILL)
        assert two.event("log_left")["dead"] == 1
        assert group.until_drained("one")["one"]["dead"] == 1
        two.terminate()
        assert two.wait() == 0
        # Gone for good: the log is held for its letters, and ends without them.
        three = group.start("three", 0, "--journal.jetstream.retire_after", "0s")
        until(lambda: "default@one" in three.status()["pipelines"])
        data = next(tmp_path.glob("three-*")) / "data"
        dead = [sys.executable, "-m", "ingestd", "dead"]
        place = ["--data-dir", str(data), "--pipeline", "default@one"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        told = subprocess.run(
            [*dead, "list", *place, "--json"], env=env, capture_output=True, check=True
        )
        assert b"negative" in told.stdout
        subprocess.run([*dead, "purge", *place, "--all", "--yes"], env=env, check=True)
        three.event("log_retired")
        found = until(lambda: "one" not in (found := group.listed()) and found)
        ended = next(log for log in found.values() if log["state"] == "retired")
        assert ended["accepted"] >= 23
        assert ended["accepted"] == ended["processed"] + ended["dead"]
        again = group.start("one", 0)
        accepted(again, b"7\n")
        assert again.until_settled()["accepted"] == 1


class Adopted:
    """A journal with the looking after its letters that a pipeline has."""

    def __init__(self, journal: LogJournal) -> None:
        self.journal = journal
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        letters, clock = journal.dead_letters, SystemClock()
        self.letters = DeadLetterMaintenance("default@one", letters, DeadSettings(), clock)

    @property
    def ledger(self) -> Ledger:
        return self.journal.ledger


async def test_a_letter_that_was_marked_last_is_requeued_before_its_log_is_left(
    one_node, open_
) -> None:
    journal = await open_(one_node, "one")
    await journal.append(Append(lines(b"1")))
    await journal.write(Seal(Sealed(1, (Span(1, 0, 1),), 1), Cursor(2, 0)))
    letter = DeadLetter("j.1.0", "rejected", "no", "", b"1", 1, 1.0, 2.0)
    await journal.write(Settle(1, 0, [letter], [], [1], 2))
    group = LogGroup(
        journal._log, clock=SystemClock(), ttl=1.0, retire_after=0.0, named=lambda _: None
    )
    pipeline = Adopted(journal)
    CacheFile(journal.path).dead_letters.mark(LetterFilter(), 1 << 30, lambda _: "")
    assert await group._reason_to_leave("one.default", pipeline, gone_for_good=False) == ""
    assert pipeline.ledger.pending == 1


class SlowLogs:
    """Many logs without an owner, whose last messages take a while."""

    at_once = most = 0

    def sibling(self, place: str) -> SlowLogs:
        return self

    async def logs(self) -> dict[str, LogLease]:
        return {f"{name}.default": LogLease("") for name in range(40)}

    async def last(self) -> None:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(0.01)
        self.at_once -= 1


async def test_the_ends_of_several_logs_are_read_at_a_time() -> None:
    logs: Any = SlowLogs()
    states = await states_of(logs)
    assert [one["log"] for one in states] == [str(name) for name in range(40)]
    assert logs.most == READS_AT_ONCE
