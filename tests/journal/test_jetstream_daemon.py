"""Daemons on a journal in NATS JetStream: one is killed or paused, another goes on."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

import pytest

from tests.faults.tools import needs
from tests.journal.on_nats import accepted, batches, drain, leaves, start, takes_nothing
from tests.nats import running

pytest.importorskip("nats", reason="needs nats-py: pip install 'ingestd[jetstream]'")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_killed_daemons_records_are_processed_elsewhere(tmp_path: Path, nodes: int) -> None:
    out = tmp_path / "out"
    (tmp_path / "nats").mkdir()
    with running(tmp_path / "nats", nodes) as cluster:
        with start(tmp_path / "one", cluster, out, 3600) as one:
            for first in range(0, 2000, 200):
                accepted(one, b"".join(b"%d\n" % n for n in range(first, first + 200)))
            until = time.monotonic() + 60
            while len(batches(out)) < 2:  # both workers hold one that will never end
                assert time.monotonic() < until
                time.sleep(0.02)
            before = batches(out)
            one.terminate(signal.SIGKILL)
            one.wait()
        with start(tmp_path / "two", cluster, out, 0) as two:
            two.until_settled()
            after = batches(out)
            assert {batch: after[batch] for batch in before} == before
            assert sorted(n for numbers in after.values() for n in numbers) == [*range(2000)]
            two.terminate()
            assert two.wait() == 0
            drained = two.event("drained")
            assert (drained["accepted"], drained["processed"], drained["balanced"]) == (
                2000, 2000, True,
            )  # fmt: skip


def test_a_paused_daemon_accepts_nothing_when_it_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "nats").mkdir()
    with (
        running(tmp_path / "nats") as cluster,
        start(tmp_path / "one", cluster, out, 0) as one,
        contextlib.ExitStack() as stack,
    ):
        accepted(one, b"1\n")
        one.until_settled()
        one.terminate(signal.SIGSTOP)
        stack.callback(one.terminate, signal.SIGCONT)
        with start(tmp_path / "two", cluster, out, 0) as two:
            accepted(two, b"2\n")
            one.terminate(signal.SIGCONT)
            leaves(one, b"3\n")
            accepted(two, b"4\n")
            two.until_settled()
            two.terminate()
            assert two.wait() == 0
    assert sorted(n for numbers in batches(out).values() for n in numbers) == [1, 2, 4]


def test_records_come_again_after_the_servers_were_away(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "nats").mkdir()
    with (
        running(tmp_path / "nats") as cluster,
        start(tmp_path / "one", cluster, out, 0) as one,
    ):
        accepted(one, b"1\n")
        cluster.stop()
        takes_nothing(one)  # a record that comes before may wait for the servers
        assert one.post(b"2\n")[0] == 503
        code, _, said = one.request("GET", "/readyz", admin=True)
        assert (code, "takes no records" in str(said)) == (503, True)
        assert one.status()["pipelines"]["default"]["bounds_near"] == ["journal.kind"]
        cluster.start()
        accepted(one, b"3\n")
        assert one.request("GET", "/readyz", admin=True)[0] == 200
        one.until_settled()
        one.terminate()
        assert one.wait() == 0
    taken = sorted(n for numbers in batches(out).values() for n in numbers)
    assert taken == [1, 3]


@needs("faketime")
def test_a_lease_holder_keeps_its_log_when_its_clock_jumps(tmp_path: Path) -> None:
    """The lease is of the servers' clock; jumps of a day, forward and back, change nothing."""
    out, clock = tmp_path / "out", tmp_path / "clock"
    (tmp_path / "nats").mkdir()
    clock.write_text("+0")
    # A machine that stands still for seconds renews it late, and the other daemon waits twice as
    # long for it.
    brief = ("--journal.jetstream.lease", "5s")
    (library,) = Path("/usr/lib").glob("**/faketime/libfaketimeMT.so.1")
    jumping = {
        "LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    with (
        running(tmp_path / "nats") as cluster,
        start(tmp_path / "one", cluster, out, 0, *brief, environ=jumping) as one,
    ):
        accepted(one, b"1\n")
        clock.write_text("+1d")
        accepted(one, b"2\n")
        with start(tmp_path / "two", cluster, out, 0, *brief) as two:
            clock.write_text("-1d")
            accepted(one, b"3\n")
            assert two.wait() == 75  # the lease was renewed all the time
            assert "owns it" in str([two.events, two.other])
        accepted(one, b"4\n")
        one.until_settled()
        drain(one)
        days = {event["timestamp"][:10] for event in one.events if "timestamp" in event}
        assert len(days) > 1, "its clock did not jump"
    assert sorted(n for numbers in batches(out).values() for n in numbers) == [1, 2, 3, 4]
