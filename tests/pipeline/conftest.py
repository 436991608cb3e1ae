from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.clock import SystemClock
from ingestd.base.metrics import Metrics
from ingestd.pipeline import Pipeline
from ingestd.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Pipeline]]]:
    """Opens a pipeline on this test's folder; what is still open at the end is closed."""
    live: list[Pipeline] = []

    async def start_(handler: str, **tables: Any) -> Pipeline:
        tables.setdefault("retry", {"backoff": "1ms", "backoff_max": "5ms"})
        record_format = tables.pop("record_format", "json")
        options = tables.pop("options", {})
        settings = Settings(
            format=record_format, handler={"target": handler, "options": options}, **tables
        )
        pipeline = Pipeline(
            "default",
            settings.pipeline_settings()["default"],
            folder=tmp_path,
            data_dir=tmp_path,
            metrics=Metrics("test").pipeline("default"),
            clock=SystemClock(),
        )
        await pipeline.open()
        live.append(pipeline)
        real_close = pipeline.close

        async def close(deadline: float | None = None) -> Any:
            live.remove(pipeline)
            at = asyncio.get_running_loop().time() + 60 if deadline is None else deadline
            return await real_close(at)

        pipeline.close = close  # type: ignore[method-assign]
        return pipeline

    yield start_
    for pipeline in live.copy():  # whose handler may hang
        await pipeline.close(asyncio.get_running_loop().time() + 5)
