"""The sink `http`: another ingestd, whose sink `sqlite` shows what arrived."""

from __future__ import annotations

import signal
import sqlite3
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from tests.daemon.harness import Daemon
from tests.sinks.contract.adapter import SinkAdapter, Slow

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOKEN = "an-example-of-a-token-0123456789"
RECORD_BYTES = 4000


class Receiver:
    """An ingestd that is started again on its port."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.folder, self.more, self.port = folder, more, 0
        folder.mkdir(exist_ok=True)
        self.daemon: Daemon | None = None

    def start(self, token: str = TOKEN) -> None:
        self.daemon = Daemon(
            "sqlite", "--listen", f"127.0.0.1:{self.port}", "--record_bytes_max",
            str(RECORD_BYTES), "--batch.age_max", "10ms", *self.more, cwd=self.folder,
            environ={"INGESTD_HTTP__TOKENS__SENDER__TOKEN": token},
        )  # fmt: skip
        try:
            self.daemon.event("daemon_started")
        except BaseException:
            self.stop()
            raise
        self.port = self.daemon.port

    def stop(self) -> None:
        one, self.daemon = self.daemon, None
        if one is not None:
            one.__exit__()

    def stored(self) -> list[int]:
        """The `n` of each record that arrived."""
        if self.daemon is None:
            self.start()
        assert self.daemon is not None
        deadline = time.monotonic() + 120
        while self.daemon.status()["pipelines"]["default"]["pending"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with closing(sqlite3.connect(self.folder / "ingestd-data" / "out.db")) as db:
            return [n for (n,) in db.execute("SELECT n FROM records")]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/records"


class Adapter(SinkAdapter):
    target = "http"
    secret = TOKEN
    can_be_killed = True
    is_slow = True
    bad = b'{"n": -1, "text": "%b"}' % (b"x" * RECORD_BYTES)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.receiver = Receiver(folder / "receiver")
        self.receiver.start()

    def options(self) -> dict[str, Any]:
        return {"url": self.receiver.url, "token": TOKEN, "allow_private": True, "compress": "zstd"}

    def stored(self) -> list[int]:
        return self.receiver.stored()

    @contextmanager
    def down(self) -> Iterator[None]:
        self.receiver.stop()
        yield
        self.receiver.start()

    @contextmanager
    def unusable(self) -> Iterator[None]:
        self.receiver.stop()
        self.receiver.start("another-example-of-a-token-0123456789")
        yield
        self.receiver.stop()
        self.receiver.start()

    @contextmanager
    def slow(self) -> Iterator[Slow]:
        one = self.receiver.daemon
        assert one is not None
        one.process.send_signal(signal.SIGSTOP)
        try:
            yield Slow(lambda: one.process.send_signal(signal.SIGCONT))
        finally:
            one.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.receiver.stop()  # with SIGKILL
        self.receiver.start()

    def close(self) -> None:
        self.receiver.stop()
