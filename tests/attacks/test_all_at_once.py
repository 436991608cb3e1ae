"""Attacks on a daemon with its defaults, all at once and each alone, beside a polite client.

The attackers share the machine's cores with the daemon and the polite client, so they are niced;
nothing else is taken from them. What the polite client waits under attack is held against a second,
and on a machine that is busy with something else against what it waited before.
"""

from __future__ import annotations

import http.client
import json
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.daemon.harness import ROOT, Daemon, daemon

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 20
ALONE_SECONDS = 8
SLOW_HEADS_SECONDS = 13
"""Longer than `http.header_timeout`, which is what ends them."""
ATTACKS = {
    *("idle", "slow heads", "slow bodies", "pipelining", "bombs", "deep", "large", "tiny chunks"),
    *("smuggling", "resets", "endless bodies", "endless chunk lines"),
    *("waiting bodies", "invalid lines", "long invalid lines", "long headers", "windows"),
    *("alternating lines", "idle streams", "pipelined heads", "unread pages", "parts of heads"),
    "large slow bodies",
}
RESIDENT_MAX = 200 * 1000**2
P99_MAX = 1.0
SLOWER_MAX = 20.0
"""Times what the polite client waits without attacks, if that is more."""


class Watch(threading.Thread):
    """Looks how much memory a process has, all the time."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{pid}/status")
        self._ended = threading.Event()
        self.samples: list[int] = []

    def run(self) -> None:
        while not self._ended.wait(0.02):
            lines = self._status.read_text().splitlines()
            resident = [line for line in lines if line.startswith("VmRSS")]
            if not resident:
                return  # the process has ended
            self.samples.append(int(resident[0].split()[1]) * 1024)

    def end(self) -> int:
        self._ended.set()
        self.join()
        return max(self.samples)


def polite(one: Daemon, goes_on: Callable[[], object]) -> list[tuple[float, int]]:
    """Small requests, one after another: seconds and status of each."""
    answers = []
    number = 0
    while not answers or goes_on():
        connection = http.client.HTTPConnection(
            "127.0.0.1", one.port, timeout=60, source_address=("127.0.0.2", 0)
        )
        try:
            for _ in range(10):
                number += 1
                start = time.monotonic()
                connection.request("POST", "/v1/records", b'{"polite":%d}\n' % number)
                answer = connection.getresponse()
                answer.read()
                answers.append((time.monotonic() - start, answer.status))
                time.sleep(0.01)
        finally:
            connection.close()
    return answers


def p99(answers: list[tuple[float, int]]) -> float:
    times = sorted(seconds for seconds, _ in answers)
    return times[int(len(times) * 0.99)]


def attack(tmp_path: Path, seconds: float, *names: str) -> dict[str, int]:
    """Attacks a daemon with its defaults; how often each attack went through its motions."""
    with daemon(cwd=tmp_path) as one:
        command = [sys.executable, "-m", "tests.attacks.attackers", str(one.port), str(seconds)]
        with subprocess.Popen([*command, *names], cwd=ROOT, stdout=subprocess.PIPE) as attackers:
            try:
                said = attackers.stdout
                assert said is not None
                before = polite(one, lambda: not select.select([said], [], [], 0)[0])
                assert said.readline() == b"ready\n"
                watch = Watch(one.pid)
                watch.start()
                until = time.monotonic() + seconds
                answers = polite(one, lambda: time.monotonic() < until)
                done: dict[str, int] = json.loads(attackers.communicate(timeout=120)[0])
            finally:
                attackers.kill()
        most = watch.end()
        usual, worst = p99(before), p99(answers)
        print(f"{most / 1e6:.0f} MB, {len(before)} polite requests before, p99 {usual:.3f} s")
        print(f"{len(answers)} under attack, p99 {worst:.3f} s; {done}")
        assert {status for _, status in before + answers} == {202}
        assert most < RESIDENT_MAX
        assert worst < max(P99_MAX, SLOWER_MAX * usual), (worst, usual)
        assert one.process.poll() is None
        errors = [event for event in one.events if event.get("level") == "error"]
        assert not errors, json.dumps(errors[:3], indent=1)
        assert not one.other
        one.terminate()
        assert one.wait() == 0
        assert one.event("drained")["balanced"]
    return done


@pytest.mark.slow
def test_all_attacks_at_once(tmp_path: Path) -> None:
    """Less than 200 MB, and a polite client gets its 202 within a second at the 99th percentile."""
    done = attack(tmp_path, SECONDS)
    assert set(done) == ATTACKS
    assert min(done.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_one_attack_alone(tmp_path: Path, name: str) -> None:
    """The same for each by itself: alone, it has all of the daemon."""
    seconds = SLOW_HEADS_SECONDS if name == "slow heads" else ALONE_SECONDS
    assert attack(tmp_path, seconds, name)[name] > 0
