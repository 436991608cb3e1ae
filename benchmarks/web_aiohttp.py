"""The plain loop behind aiohttp: `python -m benchmarks.web_aiohttp PORT AGE`.

Bare: no routing beyond two paths, no access log. Says 202 as soon as the records are in the queue.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from aiohttp import web

from benchmarks.loop import PlainLoop, loop_factory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def build(plain: PlainLoop) -> web.Application:
    """The application around a loop."""

    async def take(request: web.Request) -> web.Response:
        lines = (await request.read()).splitlines()
        for line in lines:
            plain.queue.put_nowait(line)
        plain.accepted += len(lines)
        return web.json_response({"accepted": len(lines)}, status=202)

    async def status(_: web.Request) -> web.Response:
        return web.json_response(plain.counts())

    async def consumer(_: web.Application) -> AsyncIterator[None]:
        async with plain.running():
            yield

    app = web.Application()
    app.add_routes([web.post("/v1/records", take), web.get("/status", status)])
    app.cleanup_ctx.append(consumer)
    return app


if __name__ == "__main__":
    web.run_app(
        build(PlainLoop(float(sys.argv[2]))),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        access_log=None,
        print=None,
        loop=loop_factory()(),
    )
