"""The shipped units on a machine with its own systemd, installed as docs/DEPLOYMENT.md says."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.daemon.harness import ROOT
from tests.deploy.base import missing
from tests.deploy.machine import TOOLS, Machine, clean, until
from tests.real_input import nginx_log

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why := missing(*TOOLS)), reason=why or "it can run"),
]
LOG = nginx_log()
CONFIG = "/etc/ingestd/ingestd.toml"


def block(heading: str, number: int = 0) -> str:
    """A block of commands below a heading of the page."""
    page = (ROOT / "docs" / "DEPLOYMENT.md").read_text()
    section = page.partition(f"\n### {heading}\n")[2].partition("\n### ")[0]
    return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)[number]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("machine")
    with Machine(folder) as machine:
        machine.sh(block("Install"))
        yield machine
    clean(folder)


@pytest.fixture
def machine(installed: Machine) -> Machine:
    """With `ingestd.service` running, and nothing of an earlier test."""
    installed.sh(
        "systemctl stop ingestd.socket ingestd.service\n"
        "systemctl disable -q ingestd.socket\n"
        "systemctl clean --what=state ingestd.service || true\n"
        "rm -rf /etc/systemd/system/ingestd*.service.d /etc/ingestd/*\n"
        "systemctl daemon-reload\n"
        "systemctl reset-failed\n"
        "systemctl start ingestd.service"
    )
    return installed


def cursor(machine: Machine) -> str:
    return machine.sh("journalctl -n 0 --show-cursor").rpartition("cursor: ")[2]


def said(machine: Machine, event: str, after: str) -> list[dict[str, object]]:
    """The daemon's events of that name since a place in the journal."""
    lines = machine.sh(
        f"journalctl -u 'ingestd*' --after-cursor='{after}' -o cat --no-pager"
    ).splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    return [line for line in events if line.get("event") == event]


def main_pid(machine: Machine) -> str:
    return machine.show("MainPID")


def settled(machine: Machine) -> bool:
    return "running: 0 pending" in machine.show("StatusText")


def records() -> list[bytes]:
    return sorted(LOG.read_bytes().splitlines())


def test_the_shipped_units_are_right(installed: Machine) -> None:
    done = installed.run(
        "systemd-analyze", "verify", "--man=no", "/etc/systemd/system/ingestd.service",
        "/etc/systemd/system/ingestd.socket", "/etc/systemd/system/ingestd@.service",
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_it_is_ready_when_it_is_started_and_loses_nothing_when_it_is_stopped(
    machine: Machine,
) -> None:
    # `start` has returned, so it is ready.
    machine.sh(block("Install", 1))
    assert machine.post(LOG) == "202"
    machine.systemctl("stop", "ingestd.service")
    assert machine.show("Result") == "success"
    assert machine.show("ExecMainStatus") == "0"
    assert sorted(machine.written()) == records()
    # A user that is nobody else's, and that nobody else can look over the shoulder.
    facts = (machine.root / "var/lib/private/ingestd").stat()
    assert (facts.st_mode & 0o777, facts.st_uid) == (0o700, facts.st_uid)
    assert facts.st_uid >= 61184
    assert machine.sh("readlink /var/lib/ingestd") == "private/ingestd"


def test_status_counts(machine: Machine) -> None:
    assert machine.post(LOG) == "202"
    until(lambda: settled(machine))
    assert machine.show("NRestarts") == "0"


def test_a_handler_in_processes_runs_in_the_sandbox(machine: Machine) -> None:
    machine.write(
        "/etc/ingestd/store.py",
        "import os, pathlib\n"
        "def store(batch: list[dict]) -> None:\n"
        "    with pathlib.Path('/var/lib/ingestd/seen').open('a') as seen:\n"
        "        print(len(batch), os.getpid(), file=seen)\n"
        "    for path in ('/etc/ingestd/x', '/var/lib/x', '/usr/x'):\n"
        "        try:\n"
        "            pathlib.Path(path).touch()\n"
        "        except OSError:\n"
        "            continue\n"
        "        raise SystemError(path)\n",
    )
    machine.write(CONFIG, '[handler]\ntarget = "store:store"\n[executor]\nkind = "process"\n')
    machine.systemctl("restart", "ingestd.service")
    assert machine.post(LOG) == "202"
    machine.systemctl("stop", "ingestd.service")
    lines = (machine.root / "var/lib/private/ingestd/seen").read_text().splitlines()
    assert sum(int(line.split()[0]) for line in lines) == len(records())


def test_a_wrong_configuration_stays_down(machine: Machine) -> None:
    machine.write(CONFIG, "[batch]\nrecord_max = 7\n")
    assert machine.run("systemctl", "restart", "ingestd.service").returncode != 0
    assert machine.show("ExecMainStatus") == "78"
    assert machine.show("ActiveState") == "failed"
    assert machine.show("NRestarts") == "0"


def test_a_reload_takes_what_is_right_and_nothing_of_what_is_wrong(machine: Machine) -> None:
    pid, start = main_pid(machine), cursor(machine)
    machine.write(
        CONFIG, '[batch]\nrecords_max = 7\n[log]\nlevel = "debug"\n[queue]\nchunks_max = 9\n'
    )
    machine.systemctl("reload", "ingestd.service")
    until(lambda: said(machine, "reloaded", start))
    (reloaded,) = said(machine, "reloaded", start)
    assert reloaded["changed"] == ["log.level", "batch.records_max"]
    assert reloaded["needs_restart"] == ["queue.chunks_max"]
    machine.write(CONFIG, "[batch]\nrecords_max = 0\nbyte_max = 1\n")
    machine.systemctl("reload", "ingestd.service")
    until(lambda: said(machine, "reload_refused", start))
    (refused,) = said(machine, "reload_refused", start)
    assert "batch.records_max" in str(refused["error"])
    assert "batch.byte_max" in str(refused["error"])
    until(lambda: machine.show("ActiveState") == "active")
    assert machine.post(LOG) == "202"
    assert main_pid(machine) == pid


def test_what_hangs_is_killed_and_started_again_and_nothing_is_lost(machine: Machine) -> None:
    machine.write(
        "/etc/systemd/system/ingestd.service.d/quick.conf",
        "[Service]\nWatchdogSec=8\nRestartSec=100ms\n",
    )
    # What is accepted is still pending when it stops.
    machine.write(CONFIG, '[batch]\nage_max = "1h"\nrecords_max = 1000000\nbytes_max = "15MiB"\n')
    machine.systemctl("daemon-reload")
    machine.systemctl("restart", "ingestd.service")
    assert machine.post(LOG) == "202"
    pid = main_pid(machine)
    machine.sh(f"kill -STOP {pid}")
    until(lambda: machine.show("NRestarts") == "1" and machine.show("ActiveState") == "active")
    assert main_pid(machine) != pid
    assert "watchdog" in machine.sh("journalctl -u ingestd.service --no-pager").lower()
    machine.systemctl("stop", "ingestd.service")
    assert sorted(machine.written()) == records()


def answers_over(machine: Machine, folder: Path, restart: str) -> dict[str, int]:
    """What a client that goes on and on is answered over three restarts, each at work."""
    accepted = folder / "accepted"
    accepted.touch()
    client = machine.client("loop", str(accepted))
    for _ in range(3):
        before = accepted.stat().st_size
        until(lambda: accepted.stat().st_size > before + 20)  # noqa: B023
        machine.sh(restart)
    answers: dict[str, int] = json.loads(client.communicate("over\n", timeout=120)[0])
    return answers


def test_clients_wait_while_it_is_restarted(machine: Machine, tmp_path: Path) -> None:
    machine.sh(block("Restarts without a refused connection"))
    answers = answers_over(machine, tmp_path, "systemctl restart ingestd.service")
    assert set(answers) <= {"202", "503"}
    assert answers["202"] > 60
    machine.systemctl("stop", "ingestd.socket", "ingestd.service")
    assert len(machine.written()) == answers["202"]


def test_a_client_starts_it(machine: Machine) -> None:
    """The socket alone is there: the first connection starts the service, and waits for it."""
    machine.systemctl("stop", "ingestd.service")
    machine.systemctl("start", "ingestd.socket")
    assert machine.show("ActiveState") == "inactive"
    assert machine.post(LOG) == "202"
    assert machine.show("ActiveState") == "active"


def test_a_credential_is_a_setting(machine: Machine) -> None:
    machine.sh(block("Secrets"))
    assert machine.post(LOG) == "401"
    token = machine.sh("cat /etc/ingestd/secrets/shop.token")
    assert machine.post(LOG, "8080", token) == "202"
    # Root's own commands see it as the page says.
    environ = "CREDENTIALS_DIRECTORY=/run/credentials/ingestd.service"
    shown = machine.sh(f"cd /etc/ingestd && {environ} /opt/ingestd/bin/ingestd check")
    assert "/run/credentials/ingestd.service/ingestd_http__tokens__shop__token" in shown
    assert token.strip() not in shown


def test_an_upgrade_keeps_what_was_accepted(machine: Machine) -> None:
    assert machine.post(LOG) == "202"
    machine.sh(block("Upgrade, remove"))
    assert machine.show("ActiveState") == "active"
    until(lambda: sorted(machine.written()) == records())


def test_an_instance_has_its_own_file_and_its_own_folder(machine: Machine) -> None:
    machine.systemctl("stop", "ingestd.service")
    machine.sh("systemctl clean --what=state ingestd.service")
    machine.sh(block("Several on one machine"))
    assert machine.post(LOG, "9080") == "202"
    machine.systemctl("disable", "--now", "-q", "ingestd@shop.service")
    assert sorted(machine.written("ingestd/shop")) == records()
    machine.sh("systemctl clean --what=state ingestd@shop.service")


@pytest.fixture
def two(machine: Machine) -> Iterator[Machine]:
    """Two instances on the port of the one, whose 500 records are still pending."""
    machine.write(
        CONFIG, '[batch]\nage_max = "1h"\nrecords_max = 1000000\n[drain]\ntimeout = "0s"\n'
    )
    machine.systemctl("restart", "ingestd.service")
    assert machine.post(LOG) == "202"
    start = cursor(machine)
    machine.sh(block("Several on one port"))
    assert said(machine, "drained_partly", start)
    machine.sh(f"rm {CONFIG}")
    machine.sh(block("Several on one port", 1))
    yield machine
    machine.systemctl("disable", "--now", "-q", "ingestd@1.service", "ingestd@2.service")
    machine.sh("systemctl clean --what=state ingestd@1.service ingestd@2.service")
    machine.sh("rmdir /var/lib/ingestd /var/lib/private/ingestd")
    machine.sh("rm -f /etc/sysctl.d/ingestd.conf; echo 0 > /proc/sys/net/ipv4/tcp_migrate_req")


def both(machine: Machine) -> list[bytes]:
    return machine.written("ingestd/1") + machine.written("ingestd/2")


def test_two_instances_share_a_port(two: Machine) -> None:
    assert two.post(LOG) == "202"
    assert two.show("User", "ingestd@1.service") == two.show("User", "ingestd@2.service")
    client = two.client("times", "100")
    assert json.loads(client.communicate(timeout=120)[0]) == {"202": 100}
    two.systemctl("stop", "ingestd@2.service")
    second = two.written("ingestd/2")
    assert second
    # The other one goes on, alone.
    client = two.client("times", "100")
    assert json.loads(client.communicate(timeout=120)[0]) == {"202": 100}
    two.systemctl("stop", "ingestd@1.service")
    assert two.written("ingestd/2") == second
    numbers = [b"%d" % number for number in range(1, 101)]
    # Once by the service before them.
    assert sorted(both(two)) == sorted(2 * records() + 2 * numbers)
    for unit in ("ingestd@1.service", "ingestd@2.service"):
        assert (two.show("Result", unit), two.show("ExecMainStatus", unit)) == ("success", "0")


def test_instances_on_one_port_start_anew_one_after_the_other(two: Machine, tmp_path: Path) -> None:
    two.sh(block("Several on one port", 3))
    assert two.sh("cat /proc/sys/net/ipv4/tcp_migrate_req") == "1"
    answers = answers_over(two, tmp_path, block("Several on one port", 2))
    two.systemctl("stop", "ingestd@1.service", "ingestd@2.service")
    assert set(answers) == {"202"}
    numbers = [line for line in both(two) if line.isdigit()]
    assert len(numbers) == len(set(numbers)) == answers["202"]


def test_a_start_longer_than_the_time_to_start_gets_its_time(machine: Machine) -> None:
    machine.write(
        "/etc/systemd/system/ingestd.service.d/quick.conf", "[Service]\nTimeoutStartSec=8\n"
    )
    machine.write(
        "/etc/ingestd/store.py",
        "import time\nend = time.monotonic() + 10\nwhile time.monotonic() < end:\n    pass\n"
        "def store(batch: list[dict]) -> None:\n    pass\n",
    )
    machine.write(CONFIG, '[handler]\ntarget = "store:store"\n')
    machine.systemctl("daemon-reload")
    machine.systemctl("restart", "ingestd.service")
    assert machine.post(LOG) == "202"


def test_a_drain_longer_than_the_time_to_stop_gets_its_time(machine: Machine) -> None:
    machine.write(
        "/etc/systemd/system/ingestd.service.d/quick.conf", "[Service]\nTimeoutStopSec=6\n"
    )
    machine.write(
        "/etc/ingestd/store.py",
        "import time\ndef store(batch: list[dict]) -> None:\n    time.sleep(9)\n",
    )
    machine.write(CONFIG, '[handler]\ntarget = "store:store"\n[batch]\nrecords_max = 1000000\n')
    machine.systemctl("daemon-reload")
    machine.systemctl("restart", "ingestd.service")
    start = cursor(machine)
    assert machine.post(LOG) == "202"
    machine.systemctl("stop", "ingestd.service")
    assert machine.show("Result") == "success"
    (drained,) = said(machine, "drained", start)
    assert drained["processed"] == len(records())
