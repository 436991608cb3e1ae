"""The sink `objects` with Parquet in a bucket of `rclone serve s3`."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.sinks.contract.adapter import SinkAdapter, Slow
from tests.sinks.s3_server import BUCKET, KEY_ID, SECRET, RcloneServer, need

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Adapter(SinkAdapter):
    target = "objects"
    secret = SECRET
    bad = b'{"n":"no number"}'
    can_be_killed = True
    is_slow = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        need("obstore", "pyarrow")
        self.server = RcloneServer(folder / "s3")

    def options(self) -> dict[str, Any]:
        return {
            "url": f"s3://{BUCKET}/rows", "format": "parquet", "endpoint": self.server.endpoint,
            "region": "us-east-1", "access_key_id": KEY_ID, "secret_access_key": SECRET,
            "columns": {"n": "int64", "text": "text"}, "timeout": self.timeout,
        }  # fmt: skip

    def stored(self) -> list[int]:
        from pyarrow import parquet

        files = sorted(self.server.folder.rglob("*.parquet"))
        tables = [parquet.ParquetFile(file).read(["n"]) for file in files]
        return [n for table in tables for n in table["n"].to_pylist()]

    @contextmanager
    def down(self) -> Iterator[None]:
        self.server.stop()
        yield
        self.server.start()

    @contextmanager
    def unusable(self) -> Iterator[None]:
        self.server.stop()
        self.server.start("another-secret-of-the-key-id")
        yield
        self.server.stop()
        self.server.start()

    @contextmanager
    def slow(self) -> Iterator[Slow]:
        assert self.server.server is not None
        process = self.server.server.process
        process.send_signal(signal.SIGSTOP)
        try:
            yield Slow(lambda: process.send_signal(signal.SIGCONT))
        finally:
            process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.server.stop()
        self.server.start()

    def close(self) -> None:
        self.server.stop()
