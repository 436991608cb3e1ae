"""Handlers that run a sink and then kill the daemon: after the commit, before the settlement."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from ingestd import Batch
from ingestd.handlers.call import call, call_async, close, close_async
from ingestd.handlers.context import Context
from ingestd.handlers.load import load


class Killer:
    """Ends the daemon after the first calls.

    Args:
        sink: its name.
        options: its options.
        kills: how often, over all lives.
        marks: a file that remembers how often it was.
    """

    def __init__(
        self, *, sink: str, options: dict[str, Any], kills: int, marks: str, context: Context
    ) -> None:
        self.spec = load(sink, record_format=context.record_format, executor="auto")
        self.sink = self.spec.create(options, pipeline=context.pipeline, data_dir=context.data_dir)
        self.kills, self.marks = int(kills), Path(marks)

    def __call__(self, batch: Batch[bytes]) -> None:
        result = call(self.spec, self.sink, batch.job)
        assert result.failure is None, result.failure
        self._kill()

    def _kill(self) -> None:
        before = self.marks.stat().st_size if self.marks.exists() else 0
        if before < self.kills:
            with self.marks.open("ab") as marks:
                marks.write(b"x")
            os.kill(os.getpid(), signal.SIGKILL)

    def close(self) -> None:
        close(self.spec, self.sink)


class AsyncKiller(Killer):
    async def __call__(self, batch: Batch[bytes]) -> None:  # type: ignore[override]
        result = await call_async(self.spec, self.sink, batch.job)
        assert result.failure is None, result.failure
        self._kill()

    async def close(self) -> None:  # type: ignore[override]
        await close_async(self.spec, self.sink)
