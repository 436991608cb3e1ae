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
        assert [event for event in one.events if event["level"] != "info"] == []


def test_an_input_that_is_done_before_all_workers_are_warns_of_nothing(tmp_path: Path) -> None:
    """A worker that is not needed any more is ended while it loads: no fault, and no line."""
    (tmp_path / "app.py").write_text("def store(batch: list[int]) -> None:\n    pass\n")
    (tmp_path / "lines").write_bytes(b"1\n2\n3\n")
    arguments = ("--source", "stdin", "--executor.workers", "6")
    with (
        (tmp_path / "lines").open("rb") as lines,
        daemon("app:store", *arguments, cwd=tmp_path, stdin=lines) as one,
    ):
        assert one.wait() == 0
        assert one.event("drained")["workers_gone"] is True
        assert [event for event in one.events if event["level"] != "info"] == []
