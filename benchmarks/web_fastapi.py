"""The plain loop behind FastAPI and uvicorn: `python -m benchmarks.web_fastapi PORT AGE`.

One process, uvloop and httptools where they are installed, no access log. Says 202 as soon as the
records are in the queue.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI, Request  # FastAPI reads the annotations

from benchmarks.loop import PlainLoop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def build(plain: PlainLoop) -> FastAPI:
    """The application around a loop."""

    @contextlib.asynccontextmanager
    async def consumer(_: FastAPI) -> AsyncIterator[None]:
        async with plain.running():
            yield

    app = FastAPI(lifespan=consumer)

    @app.post("/v1/records", status_code=202)
    async def take(request: Request) -> dict[str, int]:
        lines = (await request.body()).splitlines()
        for line in lines:
            plain.queue.put_nowait(line)
        plain.accepted += len(lines)
        return {"accepted": len(lines)}

    @app.get("/status")
    async def status() -> dict[str, int]:
        return plain.counts()

    return app


if __name__ == "__main__":
    uvicorn.run(
        build(PlainLoop(float(sys.argv[2]))),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        access_log=False,
        log_level="warning",
    )
