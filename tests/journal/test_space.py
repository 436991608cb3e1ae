"""`journal.free_min` on small disks, and what is said where it is not kept."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from ingestd.base.append import Append
from ingestd.base.clock import SystemClock
from ingestd.base.errors import DataDirError
from ingestd.base.record import Records, Span
from ingestd.journal.disk_space import scaled
from ingestd.journal.interface import Cursor, Seal, Sealed, Settle
from ingestd.journal.sqlite import checkpoint
from ingestd.journal.sqlite.journal import SqliteJournal
from ingestd.journal.sqlite.offline import opened as opened_beside
from ingestd.journal.sqlite.store import Store
from tests.daemon.harness import daemon
from tests.faults.tools import mounted, needs

if TYPE_CHECKING:
    from pathlib import Path


@needs("mount", root=True)
def test_a_small_disk_takes_records_with_the_defaults(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=48m", "tmpfs") as disk:
        assert scaled(256 << 20, disk) == (48 << 20) // 10
        assert scaled(1 << 20, disk) == 1 << 20
        with daemon("--data-dir", str(disk / "data"), cwd=tmp_path) as running:
            assert running.request("GET", "/readyz", admin=True)[0] == 200
            assert running.post(b"1\n")[0] == 202
            filler = disk / "filler"
            filler.write_bytes(bytes(45 << 20))
            code = 202
            while code == 202:  # the disk is asked a few times a second
                code, answer = running.post(b"2\n")
            assert code == 503
            assert re.search(r"[\d.]+ MiB are free, journal.free_min is 4.8 MiB", answer["detail"])
            assert running.request("GET", "/readyz", admin=True)[0] == 503
            for _ in range(3):
                running.post(b"3\n")
            said = running.event("records_refused")
            assert said["bound"] == "journal.free_min"
            assert said["free"] < said["free_min"]
            filler.unlink()
            while running.post(b"4\n")[0] != 202:
                pass
            running.event("records_accepted_again")
            assert [one["event"] for one in running.events].count("records_refused") == 1


@pytest.mark.slow
@needs("mount", root=True)
def test_what_went_through_a_small_disk_does_not_fill_it(tmp_path: Path) -> None:
    """Twice as much as it holds: the log of commits is started over."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=16m", "tmpfs") as disk:
        (tmp_path / "app.py").write_text("def store(batch):\n    pass\n")
        flags = ("app:store", "--executor.kind", "thread", "--batch.age_max", "1ms")
        with daemon(*flags, "--data-dir", str(disk / "data"), cwd=tmp_path) as running:
            body = b"".join(b"%06d%s\n" % (n, b"0" * 1000) for n in range(100_000, 100_640))
            for sent in range(50):
                code, answer = running.post(body)
                assert code == 202, (sent, answer)
                running.until_settled()  # what is pending may take no more
            running.terminate()
            assert running.wait() == 0


async def test_a_log_of_commits_that_killed_lives_left_does_not_pile_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each life ends before it starts the log over: the next ones do, and nothing is lost."""
    monkeypatch.setattr(checkpoint, "WAL_BYTES", 1 << 20)
    sizes = []
    for life in range(12):
        folder = tmp_path / str(life)
        if life:  # what a kill leaves, under a name of its own
            folder.mkdir()
            for name in ("journal.db", "journal.db-wal"):
                shutil.copy(tmp_path / str(life - 1) / name, folder)
            await journal.close()  # noqa: F821
        else:
            folder.mkdir()
        journal = SqliteJournal(
            folder / "journal.db", bytes_max=1 << 30, clock=SystemClock(), on_commit=lambda *_: None
        )
        await journal.open(lambda _: None)
        assert journal.ledger.accepted == 700 * life
        await journal.append(Append(Records.lines([b"x" * 1000] * 700)))
        sizes.append((folder / "journal.db-wal").stat().st_size)
    await journal.close()
    assert max(sizes) < 4 << 20


@needs("mount", root=True)
async def test_a_start_whose_disk_has_no_room_for_what_kills_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log of commits can't be copied then, and stays as it is."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=16m", "tmpfs") as disk:
        killed, journal = (
            SqliteJournal(
                folder / "journal.db", bytes_max=1 << 30, clock=SystemClock(),
                on_commit=lambda *_: None,
            )
            for folder in (tmp_path, disk)
        )  # fmt: skip
        await killed.open(lambda _: None)
        await killed.append(Append(Records.lines([b"x" * 1000] * 2500)))
        for name in ("journal.db", "journal.db-wal"):
            shutil.copy(tmp_path / name, disk)
        room = (disk / "filler").open("wb", buffering=0)
        with suppress(OSError):
            while True:
                room.write(bytes(4096))
        room.truncate(room.tell() - (200 << 10))
        monkeypatch.setattr(checkpoint, "WAL_BYTES", 1 << 20)
        await journal.open(lambda _: None)
        assert (disk / "journal.db-wal").stat().st_size > 2 << 20
        assert journal.ledger.accepted == 2500
        room.truncate(0)
        await journal.close()
        await killed.close()
        room.close()


async def test_a_drained_journal_is_small_again(opened, tmp_path: Path) -> None:
    j = await opened()
    file = tmp_path / "journal.db"
    await j.journal.append(Append(Records.lines([b"x" * 1000] * 60_000)))
    counts = [chunk.records.count for chunk in j.chunks]
    assert len(counts) > 200  # and each is read by itself
    await j.journal.append(Append(Records.lines([b"kept"])))
    spans = tuple(Span(chunk.id, 0, chunk.records.count) for chunk in j.chunks[:-1])
    last = j.chunks[-1].id
    await j.journal.write(Seal(Sealed(1, spans, sum(counts)), Cursor(last, 0)))
    assert (await j.journal.load([Span(2, 1, 2)])).count == 2
    size = sum(len(chunk.records.payload) for chunk in j.chunks[:-1])
    done = Settle(1, sum(counts), [], [], [span.chunk for span in spans], size)
    await j.journal.write(done)
    assert (await j.journal.close()).counted == 1
    assert file.stat().st_size < 1 << 20
    again = await opened()
    (chunk,) = await again.journal.read(last, 1 << 20)
    assert chunk.records.items() == [b"kept"]
    assert not again.recovered.set_aside


@needs("mount", root=True)
def test_a_full_disk_is_called_one(tmp_path: Path) -> None:
    """Without room for the index of the WAL SQLite speaks of an I/O error."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        path = disk / "journal.db"
        Store(path).close()
        with (disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(bytes(4096))
        with pytest.raises(DataDirError, match="the disk is full"), opened_beside(path):
            pass
