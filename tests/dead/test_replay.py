"""`ingestd replay` beside real daemons, one of which is killed again and again."""

from __future__ import annotations

import json
import signal
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.daemon.harness import Daemon, daemon
from tests.dead.test_dead_commands import cli, status, until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

APP = """
import json
import ingestd

def store(batch: ingestd.Batch[dict]) -> None:
    with open("got", "a") as got:
        for i, record in enumerate(batch):
            again = batch.envelope(i).attributes.get("replayed", "")
            got.write(json.dumps([batch.id, record["n"], again]) + "\\n")
"""
POSTS, EACH = 60, 20
COUNT = POSTS * EACH


def got(folder: Path) -> list[tuple[str, int, str]]:
    return [tuple(json.loads(line)) for line in (folder / "got").read_text().splitlines()]


def moved(running: Daemon, before: int) -> bool:
    """Some more records, or all of them, are fed again."""
    now: int = status(running)["kept"]["replayed"]
    return now > before or now == COUNT


def test_a_kill_during_a_replay_leaves_every_count_exact(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    flags = ("app:store", "--journal.keep", "1h", "--batch.age_max", "5ms")
    with daemon(*flags, cwd=tmp_path) as running:
        for post in range(POSTS):
            body = b"".join(b'{"n":%d}\n' % n for n in range(post * EACH, (post + 1) * EACH))
            assert running.post(body)[0] == 202
        until(lambda: status(running)["processed"] == COUNT, "they are not processed")
        first = got(tmp_path)
        asked = json.loads(cli("replay", "--all", "--yes", "--json", cwd=tmp_path).stdout)
        assert asked["kept"] == COUNT
        running.process.send_signal(signal.SIGKILL)
        running.wait()
    for _ in range(2):
        with daemon(*flags, cwd=tmp_path) as running:
            before = status(running)["kept"]["replayed"]
            until(partial(moved, running, before), "nothing is replayed")
            running.process.send_signal(signal.SIGKILL)
            running.wait()
    with daemon(*flags, cwd=tmp_path) as running:
        done = until(
            lambda: (now := status(running))["processed"] == 2 * COUNT and now, "they are not fed"
        )
        assert (done["accepted"], done["dead"], done["pending"]) == (2 * COUNT, 0, 0)
        until(lambda: status(running)["kept"]["replayed"] == COUNT, "they are not counted")
        _, _, page = running.request("GET", "/metrics", admin=True)
        assert b'ingestd_records_replayed_total{pipeline="default"} %d.0' % COUNT in page
        running.terminate()
        assert running.wait() == 0
        assert running.event("drained")["balanced"]
    listed = json.loads(cli("replay", "--list", "--json", cwd=tmp_path).stdout)
    assert (listed["state"], listed["records"], listed["damaged"]) == ("done", COUNT, 0)
    again = [one for one in got(tmp_path) if one[2]]
    assert {n for _, n, _ in again} == set(range(COUNT))
    # A batch that a kill has interrupted comes again under its own id: by ids, each once.
    assert len({(batch, n) for batch, n, _ in again}) == COUNT
    assert not {batch for batch, *_ in again} & {batch for batch, *_ in first}
    assert cli("journal", "verify", cwd=tmp_path).stdout == "default: ok\n"
