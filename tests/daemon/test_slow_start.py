"""Workers that take long to load the handler: the daemon is ready with the first one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.daemon.harness import daemon

if TYPE_CHECKING:
    from pathlib import Path

HANDLER = """
import pathlib, time
loaded = pathlib.Path("loaded")
if loaded.exists():
    time.sleep(600)
loaded.touch()

def store(batch: list[int]) -> None:
    pass
"""


def test_one_worker_is_enough_to_begin_and_those_that_load_are_ended(tmp_path: Path) -> None:
    """Only the first worker ever loads; the daemon takes records, processes them, and leaves."""
    (tmp_path / "app.py").write_text(HANDLER)
    with daemon("app:store", "--executor.workers", "3", cwd=tmp_path) as one:
        assert one.post(b"1\n2\n")[0] == 202
        assert one.until_settled()["processed"] == 2
        one.terminate()
        assert one.wait() == 0
        assert one.event("drained")["workers_gone"] is True
