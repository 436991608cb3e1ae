"""The sink `elasticsearch`, with a fake of the cluster on a real socket."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.sinks.contract.adapter import SinkAdapter, Slow
from tests.sinks.elasticsearch_server import FakeElasticsearch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path


class Adapter(SinkAdapter):
    target = "elasticsearch"
    secret = "a2V5LW9mLXRoZS1jbHVzdGVy"
    bad = b'{"n":"no number"}'

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.server = FakeElasticsearch(password=f"ApiKey {self.secret}")

    def options(self) -> dict[str, Any]:
        return {"url": self.server.url, "api_key": self.secret}

    def stored(self) -> list[int]:
        return [document["n"] for document in self.server.documents]

    def down(self) -> AbstractContextManager[object]:
        return self.server.down()

    @contextmanager
    def unusable(self) -> Iterator[None]:
        self.server.auto_create = False
        try:
            yield
        finally:
            self.server.auto_create = True

    def slow(self) -> AbstractContextManager[Slow]:
        return self.server.slow()

    def close(self) -> None:
        self.server.stop()
