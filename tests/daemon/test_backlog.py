"""The daemon before a long backlog: starts at once, stays small, and works it off."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from ingestd.execution.ready_queue import AHEAD_MAX
from tests.backlog import fill
from tests.daemon.harness import Daemon, daemon

pytestmark = pytest.mark.slow

HANDLERS = """
import time

def hang(batch: list[bytes]) -> None:
    time.sleep(3600)

def done(batch: list[bytes]) -> None:
    pass
"""
BOUND = 200 << 20
"""Bytes of memory: `queue.bytes_max`, what lies beside it, and the interpreter."""

ROOM = ("--queue.bytes_max", "32MiB")
"""Room for `AHEAD_MAX` batches of 125 kB; the default has it for fewer."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(HANDLERS)
    (tmp_path / "ingestd-data").mkdir(mode=0o700)
    return tmp_path


def journal_of(folder: Path) -> Path:
    return folder / "ingestd-data" / "journal.db"


def memory(one: Daemon, what: str) -> int:
    """Bytes, from the kernel's own account."""
    status = Path(f"/proc/{one.pid}/status").read_text()
    return 1024 * next(int(x.split()[1]) for x in status.splitlines() if x.startswith(f"{what}:"))


def until_sealed(one: Daemon, batches: int) -> None:
    deadline = time.monotonic() + 60
    while one.status()["pipelines"]["default"]["batches"]["sealed"] < batches:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_lives_that_settle_nothing_do_not_seal_more_and_more(folder: Path) -> None:
    fill(journal_of(folder), chunks=1_000)
    for _ in range(3):
        with daemon("app:hang", "--batch.records_max", "1", cwd=folder) as one:
            until_sealed(one, AHEAD_MAX)
            one.process.kill()
            one.wait()
    with closing(sqlite3.connect(journal_of(folder))) as db:
        (batches,) = db.execute("SELECT count(*) FROM batches").fetchone()
    # Those that run, or are about to, beside those in line.
    assert AHEAD_MAX <= batches <= AHEAD_MAX + 20


@pytest.mark.slow
def test_a_long_backlog_that_does_not_add_up_ends_one_life_and_is_repaired_by_the_next(
    folder: Path,
) -> None:
    fill(journal_of(folder), chunks=7_000)
    with closing(sqlite3.connect(journal_of(folder))) as db, db:
        db.execute("UPDATE chunks SET count = 2 WHERE id = 3000")
    # So small batches that the odd chunk is not met on the records' way before it is counted.
    with daemon("app:hang", "--batch.records_max", "1", cwd=folder) as one:
        assert one.wait() == 75
        assert "do not add up" in one.event("journal_failed")["error"]
    with daemon("app:done", cwd=folder) as two:
        two.event("journal_set_aside")
        settled = two.until_settled()
        # The row's checksum covers its count: it is no record that can be trusted.
        assert (settled["accepted"], settled["processed"], settled["dead"]) == (7_000, 6_999, 1)
        two.terminate()
        assert two.wait() == 0
        assert two.event("drained")["balanced"]


@pytest.mark.slow
@pytest.mark.parametrize(("chunks", "records"), [(10_000, 1_000), (100_000, 100), (1_000_000, 1)])
def test_millions_pending(folder: Path, chunks: int, records: int) -> None:
    """Times are printed, never judged: `pytest -m slow -s`."""
    path, total = journal_of(folder), chunks * records
    fill(path, chunks=chunks, records=records)
    size = path.stat().st_size
    began = time.monotonic()
    with daemon("app:hang", *ROOM, cwd=folder) as one:
        print(f"\n{total} records in {chunks} chunks: ready after {time.monotonic() - began:.2f} s")
        until_sealed(one, AHEAD_MAX)
        status = one.status()["pipelines"]["default"]
        assert (status["accepted"], status["pending"]) == (total, total)
        assert status["journal"]["bytes"] == total * 125
        assert one.post(b'"one more"\n')[0] == 202
        print(f"at most {memory(one, 'VmHWM') >> 20} MiB with a handler that hangs")
        assert memory(one, "VmHWM") < BOUND
        one.process.kill()
        one.wait()
    total += 1
    with daemon("app:done", *ROOM, cwd=folder) as two:
        began = time.monotonic()
        settled = two.until_settled(timeout=600)
        print(f"worked off in {time.monotonic() - began:.1f} s, {memory(two, 'VmHWM') >> 20} MiB")
        assert (settled["accepted"], settled["processed"], settled["dead"]) == (total, total, 0)
        assert settled["journal"]["bytes"] == 0
        assert settled["balanced"]
        assert memory(two, "VmHWM") < BOUND
        two.terminate()
        assert two.wait() == 0
        assert two.event("drained")["balanced"]
    # What went left free pages, and what came meanwhile went there.
    assert path.stat().st_size < size * 1.05 + (64 << 20)


@pytest.mark.slow
def test_a_retry_reads_its_records_and_not_the_body_that_they_came_with(folder: Path) -> None:
    """Four bodies of 13 MB and a handler that fails: 1,000 records a try, again and again."""
    (folder / "app.py").write_text(
        "def fail(batch: list[str]) -> None:\n"
        "    with open('tries', 'a') as tries:\n"
        "        tries.write('x')\n"
        "    raise OSError('down')\n"
    )
    tries = folder / "tries"
    body = b"%0199d\n" % 0 * 65_000
    flags = ("--format", "text", "--retry.backoff", "50ms", "--retry.backoff_max", "100ms")
    with daemon("app:fail", *flags, cwd=folder) as one:
        for _ in range(4):
            answer = one.request("POST", "/v1/records", body, {"Content-Type": "text/plain"})
            assert answer[0] == 202
        one.event("handler_went_down")

        def read() -> tuple[int, int]:
            """Bytes that were read from files so far, cached or not, and tries."""
            counts = Path(f"/proc/{one.pid}/io").read_text()
            return int(counts.split("rchar: ")[1].split()[0]), tries.stat().st_size

        first = last = read()
        deadline = time.monotonic() + 60
        while last[1] < first[1] + 20:
            assert time.monotonic() < deadline
            time.sleep(0.02)
            last = read()
        a_try = (last[0] - first[0]) / (last[1] - first[1])
        print(f"{a_try / 1e6:.2f} MB a try, at most {memory(one, 'VmHWM') / 1e6:.0f} MB held")
        assert a_try < 2_000_000
        assert memory(one, "VmHWM") < BOUND
        one.process.kill()
        one.wait()
