"""Handlers that note what they got, and do what a fault needs."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import ingestd


class Note:
    """Appends one line a call with one `write`: id, attempt, records.

    It begins with an LF, because a kill may end the line before at the end of a page of the file.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.fd = os.open(Path(folder, "notes"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def __call__(self, batch: ingestd.Batch[Any]) -> Any:
        line = json.dumps([batch.id, batch.attempt, list(batch)])
        os.write(self.fd, f"\n{line}\n".encode())

    def close(self) -> None:
        os.close(self.fd)


class SlowToImport(Note):
    """Makes its daemon's start take as long as the file `starting` is there (at most 5 min)."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        Path(folder, "begun").touch()
        wait_while(Path(folder, "starting"), 300)


class Fails(Note):
    """Notes, then raises while the file `down` is there."""

    def __call__(self, batch: ingestd.Batch[Any]) -> None:
        super().__call__(batch)
        if Path(self.folder, "down").exists():
            raise ConnectionError("the answer got lost")


class Hangs(Note):
    """Notes, then never returns while the file `hang` is there."""

    def __call__(self, batch: ingestd.Batch[Any]) -> None:
        super().__call__(batch)
        wait_while(Path(self.folder, "hang"), 600)


class Slow(Note):
    """Takes a while for each batch."""

    def __call__(self, batch: ingestd.Batch[Any]) -> None:
        time.sleep(0.05)
        super().__call__(batch)


class Leaves(Note):
    """Starts a child that outlives the call and ends before its parent does."""

    def __call__(self, batch: ingestd.Batch[Any]) -> None:
        super().__call__(batch)
        if os.fork() == 0:
            if os.fork() == 0:
                os._exit(0)  # an orphan: its reaper is process 1
            os._exit(0)
        os.wait()


class _NotPlainError(Exception):
    def __init__(self, *, handle: Any) -> None:
        super().__init__("can't be pickled")
        self.handle = handle


class Misbehaves(Note):
    """Does `how` on the first attempt of each batch."""

    def __init__(self, folder: str, how: str) -> None:
        super().__init__(folder)
        self.how = how

    def __call__(self, batch: ingestd.Batch[Any]) -> Any:
        super().__call__(batch)
        if batch.attempt == 1:
            return self._misbehave()
        return None

    def _misbehave(self) -> Any:
        match self.how:
            case "SIGKILL" | "SIGTERM" | "SIGSEGV":
                os.kill(os.getpid(), getattr(signal, self.how))
            case "memory":
                used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
                resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
                bytearray(512 << 20)
            case "hang":
                time.sleep(3600)
            case "sys.exit":
                sys.exit(3)
            case "KeyboardInterrupt":
                raise KeyboardInterrupt
            case "exception":
                raise _NotPlainError(handle=lambda: None)
            case "result":
                return lambda: None
        return None


def wait_while(path: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
