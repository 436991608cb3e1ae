"""`journal.free_min` on small disks, and what is said where it is not kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.journal.space import scaled
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
            filler.write_bytes(bytes(43 << 20))
            code, answer = running.post(b"2\n")
            assert code == 503
            assert "journal.free_min is" in answer["detail"]
            assert running.request("GET", "/readyz", admin=True)[0] == 503
            for _ in range(3):
                running.post(b"3\n")
            said = running.event("records_refused")
            assert said["bound"] == "journal.free_min"
            assert said["free"] < said["free_min"]
            filler.unlink()
            while running.post(b"4\n")[0] != 202:
                pass
            running.event("records_taken_again")
            assert [one["event"] for one in running.events].count("records_refused") == 1
