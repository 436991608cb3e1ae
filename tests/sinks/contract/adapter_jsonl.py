"""The sink `jsonl`: a folder, whose files another program may lock."""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ingestd.sinks.files import hour_of
from tests.sinks.contract.adapter import SinkAdapter, Slow

if TYPE_CHECKING:
    from collections.abc import Iterator


class Adapter(SinkAdapter):
    target = "jsonl"

    def options(self) -> dict[str, Any]:
        return {"path": str(self.folder / "lines")}

    def stored(self) -> list[int]:
        files = sorted((self.folder / "lines").rglob("*.jsonl"))
        return [json.loads(line)["n"] for file in files for line in file.read_bytes().splitlines()]

    @contextmanager
    def slow(self) -> Iterator[Slow]:
        folder = self.folder / "lines"
        folder.mkdir()
        now = time.time()
        held = [
            os.open(folder / f"{hour_of(now + hour * 3600)}.jsonl", os.O_RDWR | os.O_CREAT, 0o600)
            for hour in (0, 1)
        ]
        for fd in held:
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield Slow(lambda: [os.close(fd) for fd in held])
