"""Handlers that write down what they were called with, from whatever they run in."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import ingestd


def _note(folder: str, batch: Any, **facts: Any) -> None:
    line = {
        "id": batch.id,
        "ids": batch.ids,
        "attempt": batch.attempt,
        "accepted_at": batch.accepted_at.isoformat(),
        "lineage": batch.lineage,
        "clients": [batch.envelope(i).client for i in range(len(batch))],
        "records": list(batch),
        "pid": os.getpid(),
        **facts,
    }
    with Path(folder, "calls.ndjson").open("a") as calls:
        calls.write(json.dumps(line) + "\n")


def calls(folder: Path) -> list[dict[str, Any]]:
    """What was written down so far."""
    path = folder / "calls.ndjson"
    if not path.exists():
        return []
    # What stands behind the last line break is being written.
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


class Note:
    """Records each call."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.made = time.monotonic_ns()

    def __call__(self, batch: ingestd.Batch[Any]) -> None:
        _note(self.folder, batch, made=self.made)

    def close(self) -> None:
        Path(self.folder, f"closed-{self.made}").touch()


class Fails(Note):
    """Raises on the first `times` attempts of each batch."""

    def __init__(self, folder: str, times: int = 1) -> None:
        super().__init__(folder)
        self.times = times

    def __call__(self, batch: ingestd.Batch[Any]) -> None:
        super().__call__(batch)
        if batch.attempt <= self.times:
            raise RuntimeError(f"attempt {batch.attempt} fails")


class Outcomes(Note):
    """Rejects strings, asks for odd numbers again on the first attempt."""

    def __call__(self, batch: ingestd.Batch[Any]) -> None:
        super().__call__(batch)
        for i, record in enumerate(batch):
            if isinstance(record, str):
                batch.reject(i, f"{record} is a string")
            elif record % 2 and batch.attempt == 1:
                batch.retry(i, after=0.001)


class Gate(Note):
    """Waits in each call until the file `open` is there (at most 5 min)."""

    def __call__(self, batch: ingestd.Batch[Any]) -> None:
        super().__call__(batch)
        deadline = time.monotonic() + 300
        while not Path(self.folder, "open").exists() and time.monotonic() < deadline:
            time.sleep(0.002)


class AsyncNote(Note):
    async def __call__(self, batch: ingestd.Batch[Any]) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        _note(self.folder, batch, made=self.made)


class AsyncHang(Note):
    async def __call__(self, batch: ingestd.Batch[Any]) -> None:  # type: ignore[override]
        _note(self.folder, batch)
        if batch.attempt == 1:
            await asyncio.sleep(3600)


class Dies(Note):
    """Ends its process on the first attempt, in the way that `how` says."""

    def __init__(self, folder: str, how: str) -> None:
        super().__init__(folder)
        self.how = how

    def __call__(self, batch: ingestd.Batch[Any]) -> None:
        super().__call__(batch)
        if batch.attempt > 1:
            return
        if self.how == "exit":
            os._exit(7)
        if self.how == "sys.exit":
            raise SystemExit(3)
        if self.how == "hang":
            time.sleep(3600)
        os.kill(os.getpid(), int(self.how))


class DownAtFirst(Note):
    """Its constructor fails until the file `up` is there."""

    def __init__(self, folder: str) -> None:
        if not Path(folder, "up").exists():
            raise ConnectionError("the database is down")
        super().__init__(folder)


class Poison(Note):
    """Fails, in the way that `how` says, as long as one of `bad` is in the batch."""

    def __init__(self, folder: str, bad: list[int], how: str = "raise") -> None:
        super().__init__(folder)
        self.bad = {int(one) for one in bad}
        self.how = how

    def __call__(self, batch: ingestd.Batch[Any]) -> None:
        super().__call__(batch)
        if not self.bad.intersection(batch):
            return
        if self.how == "exit":
            os._exit(9)
        if self.how == "hang":
            time.sleep(3600)
        raise ValueError("poison")


class DownUntil(Note):
    """Fails for everyone until the file `up` is there."""

    def __call__(self, batch: ingestd.Batch[Any]) -> None:
        if not Path(self.folder, "up").exists():
            raise ConnectionError("the sink is down")
        super().__call__(batch)


class AsyncPostponesWhenCancelled(Note):
    """Runs until it is cancelled, and then wants each record again."""

    async def __call__(self, batch: ingestd.Batch[Any]) -> None:  # type: ignore[override]
        _note(self.folder, batch, made=self.made)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            for i in range(len(batch)):
                batch.retry(i, after=0)


class NotNow(Note):
    """Wants each batch again at once."""

    def __call__(self, batch: ingestd.Batch[Any]) -> None:
        _note(self.folder, batch, made=self.made)
        raise ingestd.RetryAfter(0)


class InAnHour(Note):
    """Wants the first record of each batch again in an hour."""

    def __call__(self, batch: ingestd.Batch[Any]) -> None:
        _note(self.folder, batch, made=self.made)
        batch.retry(0, after=3600)
