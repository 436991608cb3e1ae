"""A handler whose `close()` takes its time costs its own bound, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ingestd.handlers.runner import CLOSE_SECONDS
from tests.daemon.harness import daemon

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

STORE = """
import asyncio, time
class Sync:
    def __init__(self, seconds: float): self.seconds = float(seconds)
    def __call__(self, batch): pass
    def close(self): time.sleep(self.seconds)
class Later(Sync):
    async def __call__(self, batch): pass
    async def close(self): await asyncio.sleep(self.seconds)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [CLOSE_SECONDS, 600])
@pytest.mark.parametrize(
    ("name", "kind"), [("Sync", "thread"), ("Sync", "process"), ("Later", "async")]
)
def test_a_slow_close_is_no_stuck_journal(
    tmp_path: Path, name: str, kind: str, seconds: float
) -> None:
    (tmp_path / "slow_store.py").write_text(STORE)
    # No other bound ends it as soon as its own.
    arguments = ("--executor.kind", kind, "--handler.options.seconds", str(seconds),
                 "--drain.timeout", "10m")  # fmt: skip
    with daemon(f"slow_store:{name}", *arguments, cwd=tmp_path) as one:
        assert one.post(b"1\n")[0] == 202
        one.until_settled()
        one.terminate()
        assert one.wait() == 0, one.events[-5:]
        report = one.event("drained")
    assert (report["processed"], report["pending"], report["balanced"]) == (1, 0, True)
    assert not [event for event in one.events if event["event"] == "journal_stuck"]
