"""The sink `nats`, and a real server."""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from tests.nats import running
from tests.sinks.contract.adapter import SinkAdapter, Slow

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

SUBJECT = "records.all"


class Adapter(SinkAdapter):
    target = "nats"
    secret = "password-of-the-server"
    bad = b'{"n":5,"text":"%b"}' % (b"x" * 20_000)
    executor = "async"
    can_be_killed = True
    is_slow = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._stack = ExitStack()
        users = f'authorization {{ user: ingestd, password: "{self.secret}" }}'
        self.cluster = self._stack.enter_context(
            running(folder, payload_max=16 * 1024, config=users)
        )
        self.server = self.cluster.servers[0]
        self._do(lambda stream: stream.add_stream(name="S", subjects=["records.>"]))

    def _do(self, what: Callable[[Any], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            import nats

            client = await nats.connect(self.server.url, user="ingestd", password=self.secret)
            try:
                return await what(client.jetstream(timeout=60))
            finally:
                await client.close()

        return asyncio.run(run())

    def options(self) -> dict[str, Any]:
        return {
            "servers": self.server.url, "subject": SUBJECT, "timeout": self.timeout,
            "username": "ingestd", "password": self.secret,
        }  # fmt: skip

    def stored(self) -> list[int]:
        async def read(stream: Any) -> list[int]:
            state = (await stream.stream_info("S")).state
            numbers = range(state.first_seq, state.last_seq + 1) if state.messages else ()
            messages = [await stream.get_msg("S", number) for number in numbers]
            return [json.loads(one.data)["n"] for one in messages]

        found: list[int] = self._do(read)
        return found

    @contextmanager
    def down(self) -> Iterator[None]:
        self.server.stop()
        try:
            yield
        finally:
            self.server.start()

    @contextmanager
    def unusable(self) -> Iterator[None]:
        self._do(lambda stream: stream.delete_stream("S"))
        try:
            yield
        finally:
            self._do(lambda stream: stream.add_stream(name="S", subjects=["records.>"]))

    @contextmanager
    def slow(self) -> Iterator[Slow]:
        self.server.pause()
        slow = Slow(self.server.resume)
        try:
            yield slow
        finally:
            slow.end()

    def kill(self) -> None:
        self.server.kill()
        self.server.start()

    def close(self) -> None:
        self._stack.close()
