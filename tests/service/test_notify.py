"""What a service manager hears, from the real daemon and from its parts."""

from __future__ import annotations

import itertools
import os
import signal
from typing import TYPE_CHECKING

import pytest

from ingestd.host.systemd import Effort, Notifier, ServiceNotifier, ServiceState
from tests.daemon.harness import Daemon, daemon
from tests.service.tools import Manager, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    name = f"{tmp_path}/notify" if request.param == "path" else f"@ingestd-test-{os.getpid()}"
    with Manager(name) as listening:
        yield listening


def test_from_the_start_to_the_end(manager: Manager, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import os, pathlib\n"
        "def store(batch: list[int]) -> None:\n"
        "    pathlib.Path('seen').write_text(' '.join(os.environ))\n"
    )
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "200000"}
    flags = ("app:store", "--executor.kind", "process", "--batch.age_max", "0s")
    with daemon(*flags, cwd=tmp_path, environ=environ) as one:
        until(lambda: "READY=1" in manager.told)
        assert one.post(b"1\n")[0] == 202
        one.until_settled()
        until(lambda: manager.told.count("WATCHDOG=1") >= 5)
        until(lambda: any(line.startswith("STATUS=running: 0 pending") for line in manager.told))
        one.terminate(signal.SIGHUP)
        one.event("reloaded")
        until(lambda: manager.told.count("READY=1") == 2)
        one.terminate()
        assert one.wait() == 0
    told = [line for line in manager.told if not line.startswith(("WATCHDOG", "STATUS", "EXT"))]
    assert told[:2] == ["READY=1", "RELOADING=1"]
    assert told[2].startswith("MONOTONIC_USEC=")
    assert told[3:] == ["READY=1", "STOPPING=1"]
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & set((tmp_path / "seen").read_text().split())


def test_a_start_that_fails_is_never_ready(manager: Manager, tmp_path: Path) -> None:
    environ = {"NOTIFY_SOCKET": manager.address}
    with Daemon("no_such:handler", cwd=tmp_path, environ=environ) as one:
        assert one.wait() == 78
    assert "READY=1" not in manager.told


def test_a_pipeline_that_hangs_is_not_fed_and_not_alive(tmp_path: Path) -> None:
    """Its consumer is taken away from under it; the loop turns on."""
    (tmp_path / "app.py").write_text(
        "import asyncio, gc\n"
        "from ingestd.daemon import Daemon\n"
        "(daemon,) = [o for o in gc.get_objects() if type(o) is Daemon]\n"
        "daemon._liveness._hung_after = 3.0\n"
        "def store(batch: list[int]) -> None:\n"
        "    for task in daemon.pipelines['default']._turning:\n"
        "        if task.get_name().endswith('consume'):\n"
        "            task.get_loop().call_soon_threadsafe(task.cancel)\n"
    )
    with Manager(f"{tmp_path}/notify") as manager:
        environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "400000"}
        in_daemon = ("--executor.kind", "thread")
        with daemon("app:store", *in_daemon, cwd=tmp_path, environ=environ) as one:
            assert one.post(b"1\n")[0] == 202
            one.until_settled()
            # On a busy machine its journal may have hung for a while, too.
            until(lambda: one.request("GET", "/livez", admin=True)[0] == 200)
            assert one.post(b"2\n")[0] == 202
            until(lambda: [line for line in one.events if line["event"] == "pipeline_hung"
                           and "consumer of default" in line["problem"]])  # fmt: skip
            status, _, body = one.request("GET", "/livez", admin=True)
            assert (status, body["title"]) == (503, "Hung")
            Notifier(manager.address).tell("MARK=1")
            until(lambda: "MARK=1" in manager.told)  # and all that was said before
            fed = manager.told.count("WATCHDOG=1")
            said = manager.told.count("STATUS=running: 1 pending")
            one.terminate()
            one.event("drain_started")
            one.terminate()
            assert one.wait() == 0
    assert fed > 0
    assert manager.told.count("WATCHDOG=1") <= fed + 1
    assert said <= 1


# -- the parts -----------------------------------------------------------------------------------


def test_what_the_environment_says_is_taken_out_of_it() -> None:
    environ = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "3000000", "HOME": "/"}
    assert Notifier.take(environ).watchdog == 3
    assert environ == {"HOME": "/"}


@pytest.mark.parametrize(
    ("environ", "watchdog"),
    [
        ({}, 0),
        ({"WATCHDOG_USEC": "3000000"}, 0),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, 0),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": f"{os.getpid()}"}, 3),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "soon"}, 0),
        ({"NOTIFY_SOCKET": "vsock:2:1", "WATCHDOG_USEC": "3000000"}, 0),
    ],
)
def test_the_watchdog_of_another_process_is_not_ours(
    environ: dict[str, str], watchdog: float
) -> None:
    assert Notifier.take(dict(environ)).watchdog == watchdog


def test_nobody_listens_any_more(tmp_path: Path) -> None:
    notifier = Notifier(f"{tmp_path}/gone")
    for _ in range(100):
        notifier.tell("STATUS=x")


def test_a_manager_that_is_busy_hears_the_change_later(tmp_path: Path) -> None:
    manager = Manager(f"{tmp_path}/notify")
    notifier = Notifier(manager.address)
    for _ in range(2000):  # nobody reads yet: the kernel's queue fills
        notifier.tell("STATUS=x")
        if notifier._unsent:
            break
    notifier.tell("STOPPING=1")
    with manager:
        until(lambda: "STATUS=x" in manager.told)
        until(lambda: notifier.tell("WATCHDOG=1") or "STOPPING=1" in manager.told)


class Told:
    """What the notifier says at each turn."""

    def __init__(self, tmp_path: Path, watchdog: float = 0.0) -> None:
        self.said: list[str] = []
        self.effort = Effort(0.0, 0)
        notifier = Notifier(f"{tmp_path}/notify", watchdog)
        notifier.tell = lambda *lines: self.said.extend(lines)  # type: ignore[method-assign]
        self.notifying = ServiceNotifier(notifier, lambda: self.effort)

    def turn(self, at: float, **facts: object) -> list[str]:
        self.said.clear()
        standing = {
            "state": "running", "hung": "", "leave_by": None,
            "accepted": 0, "processed": 0, "pending": 0,
        }  # fmt: skip
        self.notifying.turn(ServiceState(**{**standing, **facts}), at)  # type: ignore[arg-type]
        return self.said


def test_the_watchdog_is_fed_with_half_of_the_time_left(tmp_path: Path) -> None:
    told = Told(tmp_path, watchdog=30)
    fed = [at for at in range(100) if "WATCHDOG=1" in told.turn(float(at))]
    assert fed[0] == 0
    assert max(b - a for a, b in itertools.pairwise(fed)) <= 15
    assert len(fed) < 10


def test_what_hangs_is_not_fed(tmp_path: Path) -> None:
    told = Told(tmp_path, watchdog=2)
    assert "WATCHDOG=1" in told.turn(0.0)
    assert not any("WATCHDOG=1" in told.turn(float(at), hung="the pump") for at in range(1, 50))
    assert "WATCHDOG=1" in told.turn(50.0)


def test_rates_are_those_since_the_last_time(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.turn(0.0, accepted=1000, processed=900, pending=100)
    (line,) = told.turn(5.0, accepted=1500, processed=1400, pending=100)
    assert line == "STATUS=running: 100 pending, 100 accepted/s, 100 processed/s"


def asked(said: list[str]) -> bool:
    return any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in said)


def test_a_start_gets_time_as_long_as_it_works(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.turn(0.0, state="starting")
    told.effort = Effort(3.0, 0)
    assert asked(told.turn(5.0, state="starting"))
    told.effort = Effort(3.0, 10**6)
    assert asked(told.turn(10.0, state="starting"))
    assert not asked(told.turn(15.0, state="starting"))


def test_a_drain_gets_the_time_that_it_has_and_no_more(tmp_path: Path) -> None:
    told = Told(tmp_path)
    assert not asked(told.turn(0.0))
    assert asked(told.turn(1.0, state="draining", leave_by=100.0))
    assert asked(told.turn(99.0, state="draining", leave_by=100.0))
    assert not asked(told.turn(105.0, state="draining", leave_by=100.0))
    assert not asked(told.turn(110.0, state="draining", leave_by=200.0, hung="the pump"))
    assert asked(told.turn(120.0, state="draining", leave_by=None))
